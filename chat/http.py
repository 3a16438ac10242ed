"""Chats over HTTP: bodies in; replies as JSON or as Server-Sent Events, and errors, out."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chat.errors import BodyTooLarge, BodyTooSlow, ChatError, Draining
from chat.framing import DONE_EVENT, KEEP_ALIVE, sse_error, sse_events
from chat.limits import RateLimiter
from chat.messages import ChatRequest, Message
from chat.middleware import add_headers, client_of, connection_of, log_fields
from chat.reply import Reply
from chat.watchdog import Watchdog

NO_SUCH_PATH = "there is no such path"
PIECE_BYTES = 64 << 10
START_TIMEOUT = 10.0
"""Seconds until a stream begins without Groq's status: proxies give up on a silent upstream."""


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """
    Read the body of a request, no further than `limit` bytes and for `timeout` seconds.

    Raises:
        BodyTooLarge, BodyTooSlow: it is longer, or takes longer.
        ClientDisconnect: the caller left before its end.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _read_body(request, limit)
    except TimeoutError:
        raise BodyTooSlow(timeout) from None


async def _read_body(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise BodyTooLarge(limit)
    body = bytearray()
    async for received in request.stream():
        body += received
        if len(body) > limit:
            raise BodyTooLarge(limit)
    return bytes(body)


async def admit(request: Request, limiter: RateLimiter | None) -> None:
    """
    Count a chat against its client's limit, and have the answer bear what is left.

    Raises:
        RateLimited: the limit is reached.
    """
    if limiter:
        allowance = await limiter.take(client_of(request.scope))
        add_headers(request.scope, allowance.headers)
        allowance.check()


def wants_stream(request: Request, body: ChatRequest) -> bool:
    """Tell whether the reply is to be an event stream: body first, then query, then `Accept`."""
    if body.stream is not None:
        return body.stream
    if request.query_params.get("stream") == "true":
        return True
    accepted = ",".join(request.headers.getlist("accept")).lower().split(",")
    return any(each.partition(";")[0].strip() == "text/event-stream" for each in accepted)


class JSONResponse(Response):
    """A body that msgspec renders."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return msgspec.json.encode(content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a large body in pieces: for a slow reader, only the next one waits."""
        if len(self.body) <= PIECE_BYTES:
            return await super().__call__(scope, receive, send)
        await send(_start(self.status_code, self.raw_headers))
        for start in range(0, len(self.body), PIECE_BYTES):
            await send(_body(bytes(self.body[start : start + PIECE_BYTES])))
        await send(_body(b"", more_body=False))


MESSAGES_HEADERS = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]


class MessagesResponse(Response):
    """A conversation, rendered as it is sent: of a large one, no reader has a copy in memory."""

    def __init__(self, reading: AbstractAsyncContextManager[Sequence[Message]]) -> None:
        self._reading = reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._reading as messages:
            await send(_start(200, MESSAGES_HEADERS))
            piece = bytearray(b'{"messages":[')
            for number, message in enumerate(messages):
                piece += (b"," if number else b"") + msgspec.json.encode(message)
                if len(piece) > PIECE_BYTES:
                    await send(_body(bytes(piece)))
                    piece.clear()
            await send(_body(bytes(piece + b"]}"), more_body=False))


class JSONReply(Response):
    """A reply as one JSON object, once it is whole."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _taken(self._reply, scope, receive):
            text = await self._reply.read_all()
            await JSONResponse({"response": text})(scope, receive, send)


class SSEReply(Response):
    """A reply as Server-Sent Events, each token as soon as it is there."""

    def __init__(self, reply: Reply, *, keep_alive_interval: float) -> None:
        self._reply = reply
        self._keep_alive_interval = keep_alive_interval

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply, interval = self._reply, self._keep_alive_interval
        async with _taken(reply, scope, receive):
            is_accepted = await reply.wait_accepted(min(START_TIMEOUT, interval))
            await send(START)
            if not is_accepted:
                await send(_body(KEEP_ALIVE))
            caller = connection_of(scope)
            keep_alive = Watchdog(interval, lambda: reply.tokens_sent, on_silence=reply.wake)
            with keep_alive, caller.watch(reply.delivery):
                await reply.relay(
                    lambda tokens: caller.server_send(_body(sse_events(tokens))),
                    on_wake=lambda: caller.send(_body(KEEP_ALIVE)),
                )
            end = sse_error(reply.error.message) if reply.error else DONE_EVENT
            await caller.send(_body(end, more_body=False))


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> dict[str, object]:
    return {"type": "http.response.start", "status": status, "headers": headers}


START = _start(
    200,
    [
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
)


def _body(frames: bytes, *, more_body: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": frames, "more_body": more_body}


@asynccontextmanager
async def _taken(reply: Reply, scope: Scope, receive: Receive) -> AsyncIterator[None]:
    """Abandon the reply when the caller leaves, and at the end in any case; log how it went."""
    listener = asyncio.create_task(_abandon_on_disconnect(reply, receive))
    try:
        yield
    finally:
        listener.cancel()
        reply.abandon()
        log_fields(scope).update(reply.summary())


async def _abandon_on_disconnect(reply: Reply, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reply.abandon()


async def chat_error(request: Request, error: Exception) -> Response:
    """Render an error of ours."""
    assert isinstance(error, ChatError)  # noqa: S101  (what it is registered for)
    log_fields(request.scope).update(error.log_fields)
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, BodyTooLarge | BodyTooSlow | Draining):
        headers["connection"] = "close"  # the rest of the body is not read, or nothing is any more
    return JSONResponse({"error": error.message}, error.status, headers)


async def routing_error(request: Request, error: Exception) -> Response:
    """Render what Starlette's routing raises: 404 and 405."""
    assert isinstance(error, HTTPException)  # noqa: S101  (what it is registered for)
    headers = dict(error.headers or {})
    message = NO_SUCH_PATH
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        message = f"the method must be one of {headers['Allow']}"
    return JSONResponse({"error": message}, error.status_code, headers)
