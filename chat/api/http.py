"""HTTP: bodies in, JSON and errors out, and the client's disconnect."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive

from chat import errors
from chat.config import Settings
from chat.messages import ChatRequest

Headers = Mapping[str, str] | None
Answer = AbstractAsyncContextManager[AsyncIterator[list[str]]]
CLOSING = (errors.BodyCompressed, errors.BodyTooLarge, errors.BodyTooSlow, errors.Draining)
NO_SUCH_PATH = """\
no such path; POST /chat takes chats (no slash at its end, no OpenAI API at /v1), \
and GET /openapi.yaml describes all paths"""


async def read_body(request: Request, settings: Settings) -> bytes:
    """Read a body; raise `ChatError` if that fails."""
    body, limit, timeout = bytearray(), settings.max_body_bytes, settings.body_timeout
    if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise errors.BodyCompressed(encoding[:40])
    if int(request.headers.get("content-length", 0)) > limit:
        raise errors.BodyTooLarge(limit)
    try:
        async with asyncio.timeout(timeout):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise errors.BodyTooLarge(limit)
    except TimeoutError:
        raise errors.BodyTooSlow(timeout) from None
    except ClientDisconnect:
        raise errors.ClientDisconnected from None
    return bytes(body)


def wants_stream(request: Request, body: ChatRequest) -> bool:
    """Tell whether the reply is to be an event stream: by the body, the query, then `Accept`."""
    if body.stream is not None:
        return body.stream
    accepted = ",".join(request.headers.getlist("accept")).lower().split(",")
    types = [each.partition(";")[0].strip() for each in accepted]
    return request.query_params.get("stream") == "true" or "text/event-stream" in types


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel what runs inside when the client leaves, and raise `ClientDisconnected`."""

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        presence.reschedule(0)

    try:
        async with asyncio.timeout(None) as presence, in_background(listen()):
            yield
    except TimeoutError:
        raise errors.ClientDisconnected from None


@asynccontextmanager
async def in_background(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine for as long as the context lasts."""
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()


def position(request: Request) -> int:
    """Return where in a reply's text the client wants to read on."""
    given = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not (given.isascii() and given.isdecimal() and len(given) < 16):
        raise errors.BadRequest("Last-Event-ID and after must be the id of an event, such as 8")
    return int(given)


def json_response(content: object, status: int = 200, headers: Headers = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


async def json_reply(request: Request, answer: Answer, source: Any) -> Response:
    """Wait for a reply; render it as one object."""
    texts: list[str] = []
    content: dict[str, str] = {}
    try:
        async with cancelled_on_disconnect(request.receive), answer as tokens:
            async for some in tokens:
                texts += some
    except errors.ReplyCancelled:  # by another connection
        content["cancelled"] = "true"
    content |= {"truncated": source.truncated} if source.truncated else {}
    return json_response({"response": "".join(texts), **content})


async def error_response(connection: HTTPConnection, error: errors.ChatError) -> Response:
    """Render an error of ours, and note it for the log."""
    if isinstance(error, errors.NothingLeft):
        return Response(status_code=error.status)
    connection.scope["chat.log_fields"] = error.log_fields
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    if isinstance(error, CLOSING):
        headers["connection"] = "close"  # the rest of the body is not read, or nothing is any more
    return json_response({"error": str(error)}, error.status, headers)


async def routing_error(request: Request, error: HTTPException) -> Response:
    """Render what Starlette's routing raises: 404 and 405."""
    if not error.headers:
        return json_response({"error": NO_SUCH_PATH}, error.status_code)
    allowed = ", ".join(sorted(error.headers["Allow"].split(", ")))
    return json_response({"error": f"method not allowed; use {allowed}"}, 405, {"Allow": allowed})
