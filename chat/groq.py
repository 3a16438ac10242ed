"""
The streamer: asks Groq for replies over httpx and passes on what comes.

The protocol is https://console.groq.com/docs/api-reference#chat-create; any server that speaks
OpenAI's will do. The only place that knows of httpx and of aiohttp, which is its transport.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from math import ceil
from time import time
from typing import cast

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

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

MAX_CONNECTIONS = 10_000
KEEP_ALIVE_EXPIRY = 30.0
"""Seconds that an idle connection to Groq is kept for the next request."""
MAX_REPLY_BYTES = 16 << 20
DRAIN_TIMEOUT = 0.1
"""Seconds to wait after `[DONE]` for the end of the body, so that the connection can be kept."""

REASONING_MODELS = re.compile(r"openai/gpt-oss-\d+b")


class Groq:
    """Ask one model at Groq for replies."""

    def __init__(self, client: httpx.AsyncClient, settings: Settings) -> None:
        self._client = client
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
        async with self._asked({"messages": messages}, reply) as (response, clock):
            body = b""
            async for received in response:
                clock.reschedule(self._deadline())
                body += received
                if len(body) > MAX_REPLY_BYTES:
                    raise GroqReplyBroken("sent a reply that is too large")
            self._take_whole(body, reply)

    async def stream(self, messages: Sequence[Message], reply: Reply) -> None:
        """
        Ask for the reply as a stream and write its tokens to `reply` as they come.

        Raises:
            GroqError: there is no reply, or it broke off; what came until then is in `reply`.
        """
        parser = ReplyParser()
        options = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        async with self._asked(options, reply) as (response, clock):
            async for received in response:
                progress = parser.progress
                if tokens := parser.feed(received):
                    reply.add(tokens)
                reply.groq_id = parser.groq_id
                if parser.is_done or parser.error:
                    break
                if parser.progress > progress:
                    clock.reschedule(self._deadline())
            else:
                if tokens := parser.close():
                    reply.add(tokens)
            reply.usage = parser.usage
            if parser.error:
                raise parser.error
            self._check_not_empty(reply, parser.finish_reason)
            await _drain(response)

    def _take_whole(self, body: bytes, reply: Reply) -> None:
        whole = decode_reply(body)
        if whole and whole.is_error:
            raise GroqFailed
        if whole is None or not whole.choices:
            raise GroqReplyBroken("sent something that is not a reply")
        reply.usage, reply.groq_id = whole.reported_usage, whole.groq_id
        choice = whole.choices[0]
        if choice.message and choice.message.content:
            reply.add([choice.message.content])
        self._check_not_empty(reply, choice.finish_reason)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout

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
    ) -> AsyncIterator[tuple[AsyncIterator[bytes], asyncio.Timeout]]:
        """Send the request, and give the body's reads and the clock that runs between two."""
        body = msgspec.json.encode({**self._options, **options})
        with _translated(reply):
            async with (
                asyncio.timeout(self._timeout) as clock,
                self._client.stream("POST", "/chat/completions", content=body) as response,
            ):
                if response.status_code != 200:
                    raise _refusal(response)
                reply.accept()
                clock.reschedule(self._deadline())
                reads = cast(AsyncGenerator[bytes], response.aiter_raw())
                async with aclosing(reads):
                    yield reads, clock


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
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return ceil(float(value))
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0, ceil(date.timestamp() - (time() if now is None else now)))


async def _drain(reads: AsyncIterator[bytes]) -> None:
    try:
        async with asyncio.timeout(DRAIN_TIMEOUT):
            async for _ in reads:
                pass
    except (TimeoutError, httpx.HTTPError, aiohttp.ClientError):
        return  # the reply is whole; only the connection is not kept


@asynccontextmanager
async def open_groq(settings: Settings) -> AsyncIterator[Groq]:
    """Open the one client of the process."""
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=KEEP_ALIVE_EXPIRY)
    connect = settings.groq_connect_timeout
    headers = {
        "Authorization": f"Bearer {settings.groq_api_key}",
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
    }
    async with httpx.AsyncClient(
        base_url=settings.groq_base_url,
        headers=headers,
        transport=AiohttpTransport(limits=limits),
        timeout=httpx.Timeout(None, connect=connect, pool=connect),
    ) as client:
        yield Groq(client, settings)
