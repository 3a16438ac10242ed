"""
One request to Groq, over httpx with aiohttp as its transport: the only place that names the two.
The protocol is https://console.groq.com/docs/api-reference#chat-create, and what the headers say
of a model's quota https://console.groq.com/docs/rate-limits
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from math import ceil
from typing import Any, Literal, cast

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

from chat import errors, metrics
from chat.config import Settings
from chat.llm.silence import SilenceClock, Watched
from chat.llm.stream import ReplyParser, parser_for
from chat.llm.types import MALFORMED
from chat.messages import Message
from chat.reply import Reply

KEEP_ALIVE_EXPIRY = 4.0  # seconds that an idle connection is kept: many servers close it after five
ENDING_TIMEOUT = 1.0  # seconds for usage and `[DONE]` once the model has said why it stopped
BODY_END_TIMEOUT = 0.1  # seconds after `[DONE]` for the end of the body, to keep the connection
ERROR_TIMEOUT = 1.0
MAX_ERROR_BYTES = 1 << 20
LOOK_UP_TIMEOUT = 10.0

HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
REASONING_MODELS = re.compile(r"openai/gpt-oss-\d+b")
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)")
LONGEST = 86_400  # seconds; Groq's windows are a minute and a day
# How OpenAI-compatible servers say in a 400 that a prompt is too long.
TOO_LARGE = re.compile(rb"context.{0,20}(length|size|window)|reduce the length", re.I)
# The last: httpx-aiohttp cannot encode a reason phrase that is not UTF-8.
FAULTS = (httpx.HTTPError, aiohttp.ClientError, UnicodeEncodeError)

TokenStream = AsyncGenerator[list[str], None]
ModelState = Literal["available", "missing", "refused", "unknown"]


class Groq:
    """Ask one model for replies, once each; `not_before` is when its quota allows the next one."""

    def __init__(
        self, transport: AiohttpTransport, clock: SilenceClock, settings: Settings, model: str
    ) -> None:
        self.model, self.not_before = model, 0.0
        self._transport, self._clock, self._settings = transport, clock, settings
        self._base_url = settings.groq_base_url.rstrip("/")
        self._chat_url = httpx.URL(f"{self._base_url}/chat/completions")
        authorization, connect = f"Bearer {settings.groq_api_key}", settings.groq_connect_timeout
        self._request = partial(
            httpx.Request,
            headers=httpx.Headers(HEADERS | {"Authorization": authorization}),
            extensions={"timeout": {"connect": connect, "pool": connect}},
        )
        self._options = {"model": model, "max_completion_tokens": settings.max_tokens}
        if REASONING_MODELS.fullmatch(model):
            effort = settings.reasoning_effort
            self._options |= {"include_reasoning": False, "reasoning_effort": effort}

    async def stream(self, messages: Sequence[Message], reply: Reply) -> TokenStream:
        """Give the tokens of a reply, a read at a time; raise `GroqError` if it fails."""
        # A JSON reply is one event, which may take as long as the longest silence in a stream.
        settings, parser = self._settings, None
        first = settings.groq_first_event_timeout if reply.is_stream else settings.groq_timeout
        with _translated() as responses, Watched(self._clock) as silence:
            try:
                async with asyncio.timeout(first):
                    response = await self._ask(messages, reply)
                    responses.append(response)
                    if response.status_code != 200:
                        raise await _refusal(response)
                    parser = parser_for(response.headers, is_stream=reply.is_stream)
                    body = cast(AsyncGenerator[bytes, None], aiter(cast(Any, response.stream)))
                    while not (parser.events or parser.is_over):
                        tokens = parser.feed(await anext(body, b""))
                while True:
                    if tokens:
                        yield tokens
                    if parser.is_over or parser.finish_reason:
                        break
                    silence.is_reading = True
                    received = await anext(body, b"")
                    silence.is_reading = False
                    tokens = parser.feed(received)
                    silence.events = parser.events
                parser.check(settings.max_tokens)
                await _read_ending(body, parser)
            finally:
                if parser:
                    reply.finish_reason, reply.usage = parser.finish_reason, parser.usage
                    reply.groq_id = parser.groq_id
                    await body.aclose()
                for response in responses:
                    await response.aclose()

    async def look_up(self) -> ModelState:
        """Find out whether the server knows the key and the model; unknown if it does not say."""
        with suppress(TimeoutError, LookupError, TypeError, *FAULTS, *MALFORMED):
            async with asyncio.timeout(LOOK_UP_TIMEOUT):
                request = self._request("GET", f"{self._base_url}/models")
                async with aclosing(await self._transport.handle_async_request(request)) as answer:
                    if answer.status_code != 200:
                        return "refused" if answer.status_code in (401, 403) else "unknown"
                    body = await _read_beginning(answer)
            found = {model["id"] for model in msgspec.json.decode(body)["data"]}
            # Ollama lists `llama3:latest` and accepts `llama3`.
            return "available" if found & {self.model, f"{self.model}:latest"} else "missing"
        return "unknown"

    async def _ask(self, messages: Sequence[Message], reply: Reply) -> httpx.Response:
        """Send the request; return the response, to be closed."""
        options = {**self._options, "messages": messages}
        if reply.is_stream:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
        request = self._request("POST", self._chat_url, content=msgspec.json.encode(options))
        # There is no client in front: what it adds, such as redirects, costs 0.06 ms a request.
        response = await self._transport.handle_async_request(request)
        if wait := exhausted_for(response.status_code, response.headers):
            self.not_before = asyncio.get_running_loop().time() + wait
        return response


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `2m59.56s`, at most a day; 0 if it is malformed."""
    parts = DURATION.findall(text)
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    return min(seconds, LONGEST) if "".join(map("".join, parts)) == text else 0.0


def retry_after(headers: Mapping[str, str]) -> int:
    """Return for how many seconds the server asks for no further request; 0 if it does not."""
    return ceil(parse_duration(headers.get("retry-after", "") + "s"))


def exhausted_for(status: int, headers: Mapping[str, str]) -> float:
    """Return for how many seconds the model should not be asked, by the headers of a response."""
    wait: float = retry_after(headers) if status == 429 else 0
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            wait = max(wait, parse_duration(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return wait


async def _refusal(response: httpx.Response) -> errors.GroqRefused:
    """Return what a response with an error status means."""
    status, wait = response.status_code, retry_after(response.headers)
    said = await _read_beginning(response) if status == 400 else b""
    is_too_large = status == 413 or TOO_LARGE.search(said) is not None
    return errors.GroqRefused(status, wait, is_too_large=is_too_large)


async def _read_ending(body: AsyncIterator[bytes], parser: ReplyParser) -> None:
    """Read what may follow the last token, so that usage is known and the connection kept."""
    with suppress(TimeoutError, errors.GroqReplyBroken, *FAULTS):
        async with asyncio.timeout(BODY_END_TIMEOUT if parser.is_done else ENDING_TIMEOUT) as limit:
            while received := await anext(body, b""):
                parser.feed(received)
                if parser.is_done:
                    limit.reschedule(asyncio.get_running_loop().time() + BODY_END_TIMEOUT)
            parser.feed(b"")


async def _read_beginning(response: httpx.Response) -> bytes:
    """Return a body that should be short, unless it is slow."""
    with suppress(TimeoutError, *FAULTS):
        async with asyncio.timeout(ERROR_TIMEOUT):
            return await anext(response.aiter_raw(MAX_ERROR_BYTES), b"")
    return b""


@contextmanager
def _translated() -> Iterator[list[httpx.Response]]:
    """Turn what goes wrong, before or after a response, into our errors; count the outcome."""
    responses: list[httpx.Response] = []
    outcome = "cancelled"
    try:
        yield responses
        outcome = "completed"
    except errors.GroqError as error:
        outcome = error.reason
        raise
    except (TimeoutError, *FAULTS) as error:
        kind: type[errors.GroqError] = errors.GroqReplyCut if responses else errors.GroqUnreachable
        # httpx-aiohttp reports a refused connection as a ConnectTimeout too: the cause tells.
        if isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError):
            kind = errors.GroqTimeout
        outcome = kind.reason
        raise kind from error
    except Exception:
        outcome = "internal"
        raise
    finally:
        metrics.groq_requests[outcome].inc()


@asynccontextmanager
async def open_groq(settings: Settings) -> AsyncIterator[list[Groq]]:
    """Open the connections of the process; give the model, and the fallback if there is one."""
    verify = httpx.create_ssl_context()
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_EXPIRY, ssl=verify),
        cookie_jar=aiohttp.DummyCookieJar(),  # what Groq sets for one client is not the others'
    )
    clock = SilenceClock(settings.groq_timeout)
    watching = asyncio.create_task(clock.run())
    try:
        async with AiohttpTransport(client=session, verify=verify) as transport:
            names = filter(None, (settings.model, settings.fallback_model))
            yield [Groq(transport, clock, settings, name) for name in names]
    finally:
        watching.cancel()
