"""
The streamer: asks Groq for replies over httpx and passes on what comes.

The protocol is https://console.groq.com/docs/api-reference#chat-create; any server that speaks
OpenAI's will do. The only place that knows of httpx and of aiohttp, which is its transport.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from math import ceil
from time import time

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport
from httpx_aiohttp.transport import AiohttpResponseStream

from chat import metrics
from chat.config import Settings
from chat.errors import (
    GroqError,
    GroqFailed,
    GroqRefused,
    GroqReplyBroken,
    GroqReplyEmpty,
    GroqTimeout,
    GroqUnreachable,
)
from chat.framing import ReplyParser
from chat.messages import Message, decode_reply
from chat.reply import Reply
from chat.watchdog import Watchdog

MAX_CONNECTIONS = 10_000
KEEP_ALIVE_EXPIRY = 30.0
"""Seconds that an idle connection to Groq is kept for the next request."""
MAX_REPLY_BYTES = 16 << 20
MAX_RETRY_AFTER = 86_400
DRAIN_TIMEOUT = 0.1
"""Seconds to wait after `[DONE]` for the end of the body, so that the connection can be kept."""

REASONING_MODELS = re.compile(r"openai/gpt-oss-\d+b")


class Groq:
    """Ask one model at Groq for replies."""

    def __init__(self, client: httpx.AsyncClient, settings: Settings) -> None:
        self._client = client
        self._url = httpx.URL(f"{settings.groq_base_url}/chat/completions")
        self._headers = httpx.Headers(
            {
                "Authorization": f"Bearer {settings.groq_api_key}",
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
            }
        )
        connect = settings.groq_connect_timeout
        self._connect_timeout = {"connect": connect, "pool": connect}
        self._timeout = settings.groq_timeout
        self._max_tokens = settings.max_tokens
        self._options: dict[str, object] = {
            "model": settings.model,
            "max_completion_tokens": settings.max_tokens,
        }
        if REASONING_MODELS.fullmatch(settings.model):
            self._options["include_reasoning"] = False
            self._options["reasoning_effort"] = settings.reasoning_effort

    async def complete(self, messages: Sequence[Message], reply: Reply) -> None:
        """
        Ask for the reply as a whole and write it to `reply`.

        Raises:
            GroqError: there is no reply.
        """
        async with self._asked({"messages": messages}, reply) as response:
            await self._read_whole(response, reply)

    async def stream(self, messages: Sequence[Message], reply: Reply) -> None:
        """
        Ask for the reply as a stream and write its tokens to `reply` as they come.

        Raises:
            GroqError: there is no reply, or it broke off; what came until then is in `reply`.
        """
        parser = ReplyParser()
        options = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        async with self._asked(options, reply) as response:
            if response.headers.get("content-type", "").startswith("application/json"):
                return await self._read_whole(response, reply)  # of a server that cannot stream
            await self._read_stream(response, parser, reply)
            reply.usage = parser.usage
            if parser.error:
                raise parser.error
            self._check_not_empty(reply, parser.finish_reason)
            await _drain(_content(response))

    async def _read_stream(
        self, response: httpx.Response, parser: ReplyParser, reply: Reply
    ) -> None:
        content, size = _content(response), 0
        while not (parser.is_done or parser.error):
            try:
                received = await content.readany()
            except aiohttp.ClientError:
                if parser.finish_reason is None:
                    raise
                received = b""  # only the end of the body is missing
            tokens = parser.feed(received) if received else parser.close()
            reply.progress = parser.progress
            reply.groq_id = parser.groq_id
            if tokens:
                reply.add(tokens)
                await reply.deliver()
            if not received:
                return
            size += len(received)
            if size > MAX_REPLY_BYTES:
                raise GroqReplyBroken("sent a reply that is too large")

    async def _read_whole(self, response: httpx.Response, reply: Reply) -> None:
        content, body = _content(response), bytearray()
        while received := await content.readany():
            reply.progress += 1
            body += received
            if len(body) > MAX_REPLY_BYTES:
                raise GroqReplyBroken("sent a reply that is too large")
        whole = decode_reply(bytes(body))
        if whole and whole.is_error:
            raise GroqFailed
        if whole is None or not whole.choices:
            raise GroqReplyBroken("sent something that is not a reply")
        reply.usage, reply.groq_id = whole.reported_usage, whole.groq_id
        choice = whole.choices[0]
        if choice.message and choice.message.content:
            reply.add([choice.message.content])
        self._check_not_empty(reply, choice.finish_reason)

    def _check_not_empty(self, reply: Reply, finish_reason: str | None) -> None:
        if reply.has_tokens:
            return
        if finish_reason == "length":
            raise GroqReplyEmpty(
                f"the model used up its {self._max_tokens} tokens before it wrote any text"
            )
        raise GroqReplyEmpty("the language model sent an empty reply")

    @asynccontextmanager
    async def _asked(
        self, options: dict[str, object], reply: Reply
    ) -> AsyncIterator[httpx.Response]:
        """Send the request, and give its answer while Groq makes progress."""
        body = msgspec.json.encode({**self._options, **options})
        request = httpx.Request("POST", self._url, headers=self._headers, content=body)
        request.extensions["timeout"] = self._connect_timeout
        with _translated(reply):
            async with asyncio.timeout(None) as clock:
                with self._watchdog(reply, clock):
                    response = await self._client.send(request, stream=True)
                    async with aclosing(response):
                        if response.status_code != 200:
                            raise _refusal(response)
                        reply.accept()
                        yield response

    def _watchdog(self, reply: Reply, clock: asyncio.Timeout) -> Watchdog:
        loop = asyncio.get_running_loop()
        return Watchdog(
            self._timeout,
            # While a slow caller is written to, Groq is not waited for: that is no silence.
            progress=lambda: (
                object() if reply.is_delivering else (reply.is_accepted, reply.progress)
            ),
            on_silence=lambda: clock.reschedule(loop.time()),
        )


@contextmanager
def _translated(reply: Reply) -> Iterator[None]:
    """Turn what httpx, aiohttp and the clock raise into our own errors; count the outcome."""
    outcome = "cancelled"
    try:
        yield
        outcome = "completed"
    except GroqError as error:
        outcome = error.reason
        raise
    except TimeoutError as error:
        outcome = GroqTimeout.reason
        raise GroqTimeout from error
    except (httpx.HTTPError, aiohttp.ClientError) as error:
        translated = _translate(error, reply)
        outcome = translated.reason
        raise translated from error
    except Exception:
        outcome = "internal"
        raise
    finally:
        metrics.GROQ_REQUESTS.labels(outcome).inc()


def _translate(error: Exception, reply: Reply) -> GroqError:
    if reply.is_accepted:
        return GroqReplyBroken("cut its reply short")
    if isinstance(error.__cause__, TimeoutError):
        return GroqTimeout()
    return GroqUnreachable()


def _refusal(response: httpx.Response) -> GroqRefused:
    retry_after = None
    if response.status_code == 429:
        retry_after = parse_retry_after(response.headers.get("retry-after", ""))
    return GroqRefused(response.status_code, retry_after)


def parse_retry_after(value: str, *, now: float | None = None) -> int | None:
    """Return the seconds of a `retry-after` header, given as a number or as a date."""
    if re.fullmatch(r"\d{1,5}(\.\d{1,9})?", value.strip()):
        return ceil(float(value))
    try:
        date = parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    seconds = max(0, ceil(date - (time() if now is None else now)))
    return seconds if seconds <= MAX_RETRY_AFTER else None


async def _drain(content: aiohttp.StreamReader) -> None:
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT):
            while await content.readany():
                pass
    except (TimeoutError, httpx.HTTPError, aiohttp.ClientError):
        return  # the reply is whole; only the connection is not kept


@asynccontextmanager
async def open_groq(settings: Settings) -> AsyncIterator[Groq]:
    """Open the one client of the process."""
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
    async with httpx.AsyncClient(transport=GroqTransport(), cookies=no_cookies) as client:
        yield Groq(client, settings)


class GroqTransport(AiohttpTransport):
    """aiohttp without cookies: what Groq sets for one caller is not the others'."""

    def get_client(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=MAX_CONNECTIONS, keepalive_timeout=KEEP_ALIVE_EXPIRY, ssl=self.ssl_context
        )
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        assert isinstance(response.stream, AiohttpResponseStream)  # noqa: S101
        response.extensions["content"] = response.stream._aiohttp_response.content
        return response


def _content(response: httpx.Response) -> aiohttp.StreamReader:
    """Return aiohttp's own reader of the body: `aiter_raw` resumes three generators a read."""
    content: aiohttp.StreamReader = response.extensions["content"]
    return content
