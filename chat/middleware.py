"""What surrounds every request: its id, its one line in the log, its metrics, its last resort."""

import logging
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chat import logs, metrics
from chat.addresses import client_address
from chat.config import Settings
from chat.connection import CallerConnection
from chat.errors import CallerLeft, InternalError
from chat.framing import error_body
from chat.reply import milliseconds

logger = logging.getLogger(__name__)

STARTS = frozenset(("http.response.start", "websocket.http.response.start", "websocket.accept"))
"""The messages that begin an answer, and bear its headers."""
TEXTS = "chat.websocket.texts"
"""An extension of ASGI, where the server has it: many text messages in one (`chat.protocols`)."""
UNMATCHED = "unmatched"
"""The endpoint of what has no route of its own."""
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


def log_fields(scope: Scope) -> dict[str, Any]:
    """Return what the request's line in the log is to say; add to it."""
    fields: dict[str, Any] = scope.setdefault("chat.log_fields", {})
    return fields


def connection_of(scope: Scope) -> CallerConnection:
    """Return the connection that the request came on."""
    connection: CallerConnection = scope["chat.connection"]
    return connection


class RequestMiddleware:
    """Pure ASGI, so that nothing stands between a stream and its socket but a look at its start."""

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self.app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        request_id = _request_id(scope)
        token = logs.request_id.set(request_id)
        self._find_client(scope)
        server_send = scope.get("chat.server_send", send)
        connection = CallerConnection(send, server_send, self._settings.send_timeout)
        scope["chat.connection"] = connection
        started_at = time.perf_counter()
        status = CallerLeft.status  # until an answer begins

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] in STARTS:
                status = message.get("status", 101)
                added = [(b"x-request-id", request_id.encode()), *scope.get("chat.headers", ())]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await connection.send(message)

        try:
            with connection.watch(), answering(scope, connection):
                await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            log_fields(scope).update(InternalError().log_fields)
            if status != CallerLeft.status or scope["type"] != "http":
                raise  # too late for an answer: uvicorn logs it and closes the connection
            logger.exception("a request failed by a fault of ours")
            await _send_internal_error(send_with_id)
        finally:
            _record(scope, status, time.perf_counter() - started_at)
            logs.request_id.reset(token)

    def _find_client(self, scope: Scope) -> None:
        """Put the client's address in the place of a trusted proxy's."""
        trusted = self._settings.trusted_proxies
        if trusted and (peer := scope.get("client")):
            forwarded_for = Headers(scope=scope).getlist("x-forwarded-for")
            scope["client"] = (client_address(peer[0], forwarded_for, trusted), peer[1])


def answering(scope: Scope, connection: CallerConnection) -> AbstractContextManager[None]:
    """Have the connection known to the drain, where the app has one."""
    drain = getattr(scope["app"].state, "drain", None)
    return drain.answering(connection) if drain else nullcontext()


def _request_id(scope: Scope) -> str:
    sent = Headers(scope=scope).get("x-request-id", "")
    return sent if SANE_REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


async def _send_internal_error(send: Send) -> None:
    error = InternalError()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error_body(error.message)})


def _endpoint(scope: Scope) -> str:
    """Return the template of the route: a path itself would be a label without end, or a secret."""
    route = scope.get("route")
    return route.path if route and route.name != UNMATCHED else UNMATCHED


def _record(scope: Scope, status: int, duration: float) -> None:
    method = scope.get("method", "GET")
    method = method if method in METHODS else "OTHER"
    endpoint = _endpoint(scope)
    metrics.HTTP_REQUESTS.labels(method, endpoint, status).inc()
    metrics.HTTP_REQUEST_DURATION.labels(method, endpoint).observe(duration)
    _log_and_count(
        scope, method, status, {"duration_ms": milliseconds(duration), **log_fields(scope)}
    )


def record_message(scope: Scope, status: int, fields: dict[str, Any]) -> None:
    """Log the line of one message on a WebSocket, which is a request of its own there."""
    _log_and_count(scope, "GET", status, fields)


def _log_and_count(scope: Scope, method: str, status: int, fields: dict[str, Any]) -> None:
    """Log the line of a request, and count the error that it tells of."""
    if "error" in fields:
        metrics.CHAT_ERRORS.labels(fields["error"]).inc()
    client = client_of(scope) or None
    logs.log_request(method, _endpoint(scope), status, {"client": client, **fields})


def client_of(scope: Scope) -> str:
    """Return the client's address; empty where the server knows none, as on a Unix socket."""
    client = scope.get("client")
    return client[0] if client else ""


def add_headers(scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Have the headers borne by the answer, whatever it will be."""
    scope.setdefault("chat.headers", []).extend(headers)
