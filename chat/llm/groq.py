"""One request to Groq, over httpx with aiohttp as its transport: no other place names the two."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from math import ceil
from typing import Any, cast

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport

from chat import errors, metrics
from chat.config import Settings, proxy_for
from chat.llm.chunks import load
from chat.llm.dialects import failure, parameters
from chat.llm.stream import ReplyParser, parser_for
from chat.messages import Message
from chat.reply import Reply

KEEP_ALIVE_EXPIRY = 4.0  # seconds that an idle connection is kept: many servers close it after five
ENDING_TIMEOUT = 1.0  # seconds for usage and `[DONE]` once the model has said why it stopped
BODY_END_TIMEOUT = 0.1  # seconds after `[DONE]` for the end of the body, to keep the connection

HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d)")
# The last: httpx-aiohttp has met a reason phrase that is not UTF-8, or msgspec half a character.
FAULTS = (httpx.HTTPError, aiohttp.ClientError, UnicodeEncodeError)
LOST = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)  # a connection, by the server
is_reused: ContextVar[bool] = ContextVar("is_reused")  # the connection of the current request

TokenStream = AsyncGenerator[list[str], None]


class Groq:
    """Ask one model for replies, once each; `not_before` is when its quota allows the next one."""

    def __init__(self, settings: Settings, model: str, *transports: AiohttpTransport) -> None:
        self.model, self.not_before, self._settings = model, 0.0, settings
        self._pooled, self._fresh = transports  # the latter connects anew for each request
        self._base_url = settings.groq_base_url.rstrip("/")
        self._chat_url = httpx.URL(f"{self._base_url}/chat/completions")
        connect, read = settings.groq_connect_timeout, settings.groq_timeout
        self._request = partial(
            httpx.Request,
            headers=httpx.Headers(HEADERS | {"Authorization": f"Bearer {settings.groq_api_key}"}),
            extensions={"timeout": {"connect": connect, "pool": connect, "read": read}},
        )
        where = self._chat_url.host, model, settings
        self._parameters = {how: parameters(*where, is_stream=how) for how in (False, True)}

    async def stream(self, messages: Sequence[Message], reply: Reply) -> TokenStream:
        """Give the tokens of a reply, a read at a time; raise `GroqError` if it fails."""
        # A JSON reply is one event, which may take as long as the longest silence in a stream.
        settings, parser, time = self._settings, None, asyncio.get_running_loop().time
        first = settings.groq_first_event_timeout if reply.is_stream else settings.groq_timeout
        with _translated() as responses:
            try:
                async with asyncio.timeout(first):
                    response = await self._ask(messages, reply, responses)
                    parser = parser_for(response.headers, is_stream=reply.is_stream)
                    body = cast(AsyncGenerator[bytes, None], aiter(cast(Any, response.stream)))
                    while not (parser.events or parser.is_over):
                        tokens = parser.feed(await anext(body, b""))
                events, since = 0, time()
                while True:
                    if tokens:
                        yield tokens
                    if parser.is_over or parser.finish_reason:
                        break
                    if parser.events > events:
                        events, since = parser.events, time()
                    elif time() - since > settings.groq_timeout:
                        raise errors.GroqTimeout  # comments alone are silence, too
                    tokens = parser.feed(await anext(body, b""))
                if not parser.error and (tokens := await _read_ending(body, parser)):
                    yield tokens
                parser.check(settings.max_tokens)
            finally:
                if parser:
                    reply.finish_reason = "refusal" if parser.is_refusal else parser.finish_reason
                    reply.usage, reply.groq_id = parser.usage, parser.groq_id
                    await body.aclose()
                for response in responses:
                    await response.aclose()

    async def look_up(self) -> int:
        """Return the status that a chat would get, by the server's list of models; 0 if unknown."""
        request = self._request("GET", f"{self._base_url}/models")
        with suppress(LookupError, TypeError, *FAULTS):
            async with aclosing(await self._pooled.handle_async_request(request)) as answer:
                if answer.status_code != 200:
                    return answer.status_code if answer.status_code in (401, 403) else 0
                listed = {model["id"] for model in load(await answer.aread())["data"]}
            # Ollama lists `llama3:latest` and accepts `llama3`.
            return 200 if listed & {self.model, f"{self.model}:latest"} else 404
        return 0

    async def _ask(
        self, messages: Sequence[Message], reply: Reply, responses: list[httpx.Response]
    ) -> httpx.Response:
        """Send the request; return the response, which is among those to be closed."""
        options = self._parameters[reply.is_stream] | {"messages": messages}
        request = self._request("POST", self._chat_url, content=msgspec.json.encode(options))
        # There is no client in front: what it adds, such as redirects, costs 0.06 ms a request.
        is_reused.set(False)
        try:
            response = await self._pooled.handle_async_request(request)
        except FAULTS as error:
            if not (is_reused.get() and isinstance(error.__cause__ or error, LOST)):
                raise
            # It was closed while idle, as others in the pool may be; nothing has been generated.
            response = await self._fresh.handle_async_request(request)
        if wait := exhausted_for(response.status_code, response.headers):
            self.not_before = asyncio.get_running_loop().time() + wait
        responses.append(response)
        if response.status_code != 200:
            said = b""  # of no use if it is slow
            with suppress(TimeoutError, *FAULTS):
                async with asyncio.timeout(1):
                    said = await anext(response.aiter_raw(1 << 20), b"")
            raise failure(response.status_code, load(said), retry_after(response.headers))
        return response


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `2m59.56s`, at most a day; 0 if it is malformed."""
    seconds = sum(float(number) * SECONDS[unit] for number, unit in DURATION.findall(text))
    return 0.0 if DURATION.sub("", text) else min(seconds, SECONDS["d"])


def retry_after(headers: Mapping[str, str]) -> int:
    """Return for how many seconds the server asks for no further request; 0 if it does not."""
    return ceil(parse_duration(headers.get("retry-after", "") + "s"))


def exhausted_for(status: int, headers: Mapping[str, str]) -> float:
    """Return for how many seconds not to ask again: https://console.groq.com/docs/rate-limits."""
    wait: float = retry_after(headers) if status == 429 else 0
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            wait = max(wait, parse_duration(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return wait


async def _read_ending(body: AsyncIterator[bytes], parser: ReplyParser) -> list[str]:
    """Read what may follow the last token, so that usage is known and the connection kept."""
    tokens: list[str] = []
    with suppress(TimeoutError, errors.GroqReplyBroken, *FAULTS):
        async with asyncio.timeout(ENDING_TIMEOUT):
            while not parser.is_over:
                tokens += parser.feed(await anext(body, b""))
        async with asyncio.timeout(BODY_END_TIMEOUT):
            await anext(body, b"")
    return tokens


@contextmanager
def _translated() -> Iterator[list[httpx.Response]]:
    """Turn what goes wrong, before or after a response, into our errors; count the outcome."""
    responses, outcome = list[httpx.Response](), "cancelled"
    try:
        yield responses
        outcome = "completed"
    except (TimeoutError, *FAULTS) as error:
        kind: type[errors.GroqError] = errors.GroqReplyCut if responses else errors.GroqUnreachable
        # httpx-aiohttp reports a refused connection as a ConnectTimeout too: the cause tells.
        cause = error.__cause__ if isinstance(error, httpx.HTTPError) else error
        if isinstance(cause, TimeoutError):
            kind = errors.GroqTimeout
        elif isinstance(cause, aiohttp.ClientResponseError | UnicodeEncodeError):
            kind = errors.GroqReplyBroken
        outcome = kind.reason
        raise kind(cause=type(cause or error).__name__) from error
    except Exception as error:
        outcome = error.reason if isinstance(error, errors.GroqError) else "internal"
        raise
    finally:
        metrics.groq_requests[outcome].inc()


async def _note_reuse(*_: object) -> None:
    is_reused.set(True)


@asynccontextmanager
async def open_groq(settings: Settings) -> AsyncIterator[list[Groq]]:
    """Open the connections of the process; give the model, and the fallback if there is one."""
    verify, proxy = httpx.create_ssl_context(), proxy_for(settings.groq_base_url)
    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(_note_reuse)
    async with AsyncExitStack() as stack:
        transports = []
        for options in ({"keepalive_timeout": KEEP_ALIVE_EXPIRY}, {"force_close": True}):
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=verify, **options),
                cookie_jar=aiohttp.DummyCookieJar(),  # what Groq sets for one client is not others'
                max_field_size=64 << 10,
                proxy=proxy,
                trace_configs=[tracing],
            )
            transport = AiohttpTransport(client=session, verify=verify)
            transports.append(await stack.enter_async_context(transport))
        names = filter(None, (settings.model, settings.fallback_model))
        yield [Groq(settings, name, *transports) for name in names]
