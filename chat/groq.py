"""
The streamer: asks Groq for replies over httpx and passes on what comes.

The protocol is https://console.groq.com/docs/api-reference#chat-create; any server that speaks
OpenAI's will do. The only place that knows of httpx and of aiohttp, which is its transport.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from typing import Literal

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
    GroqRateLimited,
    GroqRefused,
    GroqReplyBroken,
    GroqReplyCut,
    GroqReplyEmpty,
    GroqTimeout,
    GroqUnreachable,
)
from chat.framing import ReplyParser
from chat.messages import Message, decode_model_names, decode_reply
from chat.quota import Quota, parse_retry_after
from chat.reply import Reply
from chat.watchdog import Watchdog

MAX_CONNECTIONS = 10_000
KEEP_ALIVE_EXPIRY = 30.0
"""Seconds that an idle connection to Groq is kept for the next request."""
MAX_REPLY_BYTES = 16 << 20
BODY_END_TIMEOUT = 0.1
"""Seconds to wait after `[DONE]` for the end of the body, so that the connection can be kept."""

MAX_SHORT_BYTES = 1 << 20
SHORT_TIMEOUT = 1.0
"""Seconds to wait for the body of an error or of a list of models, which is short."""
LOOK_UP_TIMEOUT = 10.0

REASONING_MODELS = re.compile(r"openai/gpt-oss-\d+b")
TOO_LARGE = re.compile(rb"context.{0,20}(length|size|window)|reduce the length", re.I)
"""How OpenAI-compatible servers say, somewhere in a 400, that a prompt is too long."""

REPLY_TYPES = ("text/event-stream", "application/json", "")
"""The last: one that is not named is taken for what was asked for."""

OnAnswer = Callable[[], object]
ModelState = Literal["available", "missing", "refused", "unknown"]


class Groq:
    """
    Ask one model at Groq for replies, once each.

    Attributes:
        model: the model's name.
        quota: what is left of the model's quota, by Groq's last answer.
    """

    def __init__(self, transport: "GroqTransport", settings: Settings, model: str) -> None:
        self.model = model
        self.quota = Quota()
        self._transport = transport
        self._url = httpx.URL(f"{settings.groq_base_url}/chat/completions")
        self._models_url = httpx.URL(f"{settings.groq_base_url}/models")
        self._headers = httpx.Headers(
            {
                "Authorization": f"Bearer {settings.groq_api_key}",
                "Content-Type": "application/json",
                "Accept-Encoding": "identity",
            }
        )
        connect = settings.groq_connect_timeout
        self._connect_timeout = {"connect": connect, "pool": connect}
        self._first_event_timeout = settings.groq_first_event_timeout
        self._timeout = settings.groq_timeout
        self._max_tokens = settings.max_tokens
        self._options: dict[str, object] = {
            "model": model,
            "max_completion_tokens": settings.max_tokens,
        }
        if REASONING_MODELS.fullmatch(model):
            self._options["include_reasoning"] = False
            self._options["reasoning_effort"] = settings.reasoning_effort

    async def complete(
        self, messages: Sequence[Message], reply: Reply, on_answer: OnAnswer
    ) -> None:
        """
        Ask for the reply as a whole and write it to `reply`.

        Args:
            on_answer: is called once the model has answered.

        Raises:
            GroqError: there is no reply.
        """
        # All of it is one event, which may take as long as the longest silence in a stream.
        async with self._asked({"messages": messages}, reply, self._timeout) as attempt:
            await self._read_whole(attempt, reply)
            on_answer()

    async def stream(self, messages: Sequence[Message], reply: Reply, on_answer: OnAnswer) -> None:
        """
        Ask for the reply as a stream and write its tokens to `reply` as they come.

        Args:
            on_answer: is called once the model has begun to answer.

        Raises:
            GroqError: there is no reply, or it broke off; what came until then is in `reply`.
        """
        options = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        async with self._asked(options, reply, self._first_event_timeout) as attempt:
            if attempt.is_whole:
                await self._read_whole(attempt, reply)  # of a server that cannot stream
                on_answer()
                return
            parser = ReplyParser()
            await self._read_stream(attempt, parser, reply, on_answer)
            reply.usage = parser.usage
            if parser.error:
                raise parser.error
            self._check_not_empty(reply, parser.finish_reason)
            await _read_to_end(attempt.content)

    async def look_up(self) -> ModelState:
        """Find out whether Groq knows the key and the model; unknown where it does not tell."""
        request = httpx.Request("GET", self._models_url, headers=self._headers)
        try:
            async with asyncio.timeout(LOOK_UP_TIMEOUT):
                response = await self._transport.handle_async_request(request)
                async with aclosing(response):
                    status, body = response.status_code, await _beginning(_content(response))
        except (TimeoutError, httpx.HTTPError, aiohttp.ClientError):
            return "unknown"
        if status in (401, 403):
            return "refused"
        names = decode_model_names(body) if status == 200 else None
        if names is None:
            return "unknown"
        # Ollama lists `llama3:latest` where it also takes `llama3`.
        return "available" if names & {self.model, f"{self.model}:latest"} else "missing"

    async def _read_stream(
        self, attempt: "_Attempt", parser: ReplyParser, reply: Reply, on_answer: OnAnswer
    ) -> None:
        content, size = attempt.content, 0
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
            if attempt.is_waiting and parser.progress:
                attempt.begin()
            if tokens:
                if not reply.has_tokens:
                    on_answer()
                reply.add(tokens)
                await reply.deliver()
            if not received:
                return
            size += len(received)
            if size > MAX_REPLY_BYTES:
                raise GroqReplyBroken("sent a reply that is too large")

    async def _read_whole(self, attempt: "_Attempt", reply: Reply) -> None:
        body = bytearray()
        while received := await attempt.content.readany():
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
        self, options: dict[str, object], reply: Reply, first_limit: float
    ) -> AsyncIterator["_Attempt"]:
        """Send the request, and give its answer while Groq makes progress."""
        body = msgspec.json.encode({**self._options, **options})
        request = httpx.Request("POST", self._url, headers=self._headers, content=body)
        request.extensions["timeout"] = self._connect_timeout
        attempt = _Attempt(reply, self._timeout)
        with _translated(attempt):
            async with asyncio.timeout(first_limit) as attempt.clock:
                with attempt.clocks:
                    with self.quota.reserve((reply.prompt_tokens or 0) + self._max_tokens):
                        response = await self._transport.handle_async_request(request)
                        self.quota.note(response.status_code, response.headers)
                    async with aclosing(response):
                        if response.status_code != 200:
                            raise await _refusal(response)
                        attempt.accept(response)
                        yield attempt


class _Attempt:
    """
    One request to Groq and its clocks: one until the first event, then one for each silence.

    Attributes:
        is_waiting: whether the first event is still to come.
        is_accepted: whether Groq has begun to answer.
        is_whole: whether the answer is no stream.
    """

    clock: asyncio.Timeout
    content: aiohttp.StreamReader
    is_whole: bool

    def __init__(self, reply: Reply, silence_limit: float) -> None:
        self.is_waiting = True
        self.is_accepted = False
        self.clocks = ExitStack()
        self._reply = reply
        self._silence_limit = silence_limit

    def accept(self, response: httpx.Response) -> None:
        """Begin to read a reply, unless it is a page of a server that is not Groq at all."""
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        encoding = response.headers.get("content-encoding", "identity").lower()
        if content_type not in REPLY_TYPES or encoding != "identity":
            raise GroqReplyBroken("sent something that is not a reply")
        self.is_accepted = True
        self.content = _content(response)
        self.is_whole = content_type == "application/json"
        self._reply.accept()

    def begin(self) -> None:
        """Change from the first clock to the second."""
        self.is_waiting = False
        self.clock.reschedule(None)
        loop, reply = asyncio.get_running_loop(), self._reply
        watchdog = Watchdog(
            self._silence_limit,
            # While a slow caller is written to, Groq is not waited for: that is no silence.
            progress=lambda: object() if reply.is_delivering else reply.progress,
            on_silence=lambda: self.clock.reschedule(loop.time()),
        )
        self.clocks.enter_context(watchdog)


@contextmanager
def _translated(attempt: _Attempt) -> Iterator[None]:
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
        translated = _translate(error, attempt)
        outcome = translated.reason
        raise translated from error
    except Exception:
        outcome = "internal"
        raise
    finally:
        metrics.GROQ_REQUESTS.labels(outcome).inc()


def _translate(error: Exception, attempt: _Attempt) -> GroqError:
    if attempt.is_accepted:
        return GroqReplyCut()
    if isinstance(error.__cause__, TimeoutError):
        return GroqTimeout()
    return GroqUnreachable()


async def _refusal(response: httpx.Response) -> GroqRefused:
    status = response.status_code
    retry_after = parse_retry_after(response.headers.get("retry-after", ""))
    if status == 429:
        return GroqRateLimited(retry_after)
    is_too_large = status == 413 or (
        status == 400 and TOO_LARGE.search(await _beginning(_content(response))) is not None
    )
    return GroqRefused(status, retry_after, is_too_large=is_too_large)


async def _beginning(content: aiohttp.StreamReader) -> bytes:
    """Return a body that should be short, as far as it comes soon."""
    body = b""
    try:
        async with asyncio.timeout(SHORT_TIMEOUT):
            while len(body) < MAX_SHORT_BYTES and (received := await content.readany()):
                body += received
    except (TimeoutError, aiohttp.ClientError):
        pass
    return body


async def _read_to_end(content: aiohttp.StreamReader) -> None:
    try:
        async with asyncio.timeout(BODY_END_TIMEOUT):
            while await content.readany():
                pass
    except (TimeoutError, httpx.HTTPError, aiohttp.ClientError):
        return  # the reply is whole; only the connection is not kept


@asynccontextmanager
async def open_groq(settings: Settings) -> AsyncIterator[list[Groq]]:
    """Open the connections of the process; give the model, and the fallback if there is one."""
    async with GroqTransport() as transport:
        names = filter(None, (settings.model, settings.fallback_model))
        yield [Groq(transport, settings, name) for name in names]


class GroqTransport(AiohttpTransport):
    """
    httpx over aiohttp, without cookies: what Groq sets for one caller is not the others'.

    There is no client around it, whose redirects and merging of headers nobody needs here.
    """

    def get_client(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=MAX_CONNECTIONS, keepalive_timeout=KEEP_ALIVE_EXPIRY, ssl=self.ssl_context
        )
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await super().handle_async_request(request)
        except UnicodeEncodeError as error:  # of a reason phrase that is not UTF-8
            raise httpx.RemoteProtocolError("the status line is not UTF-8") from error
        assert isinstance(response.stream, AiohttpResponseStream)  # noqa: S101
        response.extensions["content"] = response.stream._aiohttp_response.content
        return response


def _content(response: httpx.Response) -> aiohttp.StreamReader:
    """Return aiohttp's own reader of the body: `aiter_raw` resumes three generators a read."""
    content: aiohttp.StreamReader = response.extensions["content"]
    return content
