"""HTTP: bodies in; JSON, errors and the chat page out; and the client's disconnect."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive

from chat import errors
from chat.config import Settings
from chat.messages import ChatRequest

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


async def json_reply(request: Request, answer: Answer, source: Any) -> Response:
    """Wait for a reply; render it as one object."""
    texts, content = list[str](), dict[str, str]()
    try:
        async with cancelled_on_disconnect(request.receive), answer as tokens:
            async for some in tokens:
                texts += some
    except errors.ReplyCancelled:  # by another connection
        content["cancelled"] = "true"
    content |= {"truncated": source.truncated} if source.truncated else {}
    return JSONResponse({"response": "".join(texts), **content})


async def error_response(connection: HTTPConnection, error: errors.ChatError) -> Response:
    """Render an error of ours, and note it for the log."""
    if isinstance(error, errors.NothingLeft):
        return Response(status_code=error.status)
    connection.scope["chat.log_fields"] = error.log_fields
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    if isinstance(error, CLOSING):
        headers["connection"] = "close"  # the rest of the body is not read, or nothing is any more
    return JSONResponse({"error": str(error)}, error.status, headers)


async def routing_error(request: Request, error: HTTPException) -> Response:
    """Render what Starlette's routing raises: 404 and 405."""
    if not error.headers:
        return JSONResponse({"error": NO_SUCH_PATH}, error.status_code)
    allowed = ", ".join(sorted(error.headers["Allow"].split(", ")))
    return JSONResponse({"error": f"method not allowed; use {allowed}"}, 405, {"Allow": allowed})


PAGE = StaticFiles(directory=Path(__file__).with_name("static"), check_dir=False)
PAGE_HEADERS = {
    # https://www.w3.org/TR/CSP3/; a reply that breaks out of its element meets these.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # revalidated each time: a new version is seen at once
}


async def chat_page(request: Request) -> Response:
    name = request.path_params.get("file", "index.html")
    response = await PAGE.get_response(name, request.scope)
    response.headers.update(PAGE_HEADERS)
    return response
