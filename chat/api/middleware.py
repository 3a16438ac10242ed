"""What surrounds every request: its id, its line in the log, its metrics, and unexpected errors."""

import logging
import random
import re
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from chat import logs, metrics
from chat.api.http import error_response
from chat.errors import ClientDisconnected, InternalError

logger = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


def client_of(scope: Scope) -> str:
    """Return the client's address; empty if there is none, as on a Unix socket."""
    return str((scope.get("client") or ("",))[0])


class RequestMiddleware:
    """Pure ASGI; takes `chat.headers`, `chat.log_fields` and `chat.reply` from the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not SANE_REQUEST_ID.fullmatch(request_id):
            request_id = f"{random.getrandbits(128):032x}"
        token, started_at = logs.request_id.set(request_id), time.perf_counter()
        scope["chat.send"] = send  # the server's own
        status = ClientDisconnected.status  # until a response begins

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"].endswith((".response.start", ".accept")):
                status = message.get("status", 101)
                added = [(b"x-request-id", request_id.encode()), *scope.get("chat.headers", ())]
                if scope["type"] == "http" and "upgrade" in Headers(scope=scope):
                    added.append((b"connection", b"close"))  # its body may pass for a request
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except WebSocketDisconnect:
            pass  # before it was accepted or refused
        except Exception:
            response = await error_response(HTTPConnection(scope), InternalError())
            if status != ClientDisconnected.status or scope["type"] != "http":
                raise  # too late for a response: uvicorn logs it and closes the connection
            logger.exception("unexpected error in a request")
            await response(scope, receive, send_with_id)
        finally:
            duration, labels = time.perf_counter() - started_at, _labels(scope)
            metrics.http_requests(*labels, status).inc()
            metrics.http_request_duration(*labels).observe(duration)
            fields = {"duration_ms": round(duration * 1000, 1), **scope.get("chat.log_fields", {})}
            reply = scope.get("chat.reply")
            log_request(scope, status, fields | reply.summary() if reply else fields)
            logs.request_id.reset(token)


def log_request(scope: Scope, status: int, fields: dict[str, Any]) -> None:
    """Log and count a request; a message on a WebSocket is one of its own."""
    if "error" in fields:
        metrics.errors[fields["error"]].inc()
    method, endpoint = _labels(scope)
    line = {"method": method, "endpoint": endpoint, "status": status, "client": client_of(scope)}
    is_failed = status >= 500 or fields.get("outcome") == "failed"
    is_probe = status == 200 and endpoint in ("/health", "/ready", "/metrics")
    level = logging.WARNING if is_failed else logging.DEBUG if is_probe else logging.INFO
    logger.log(level, "%s %s %d", method, endpoint, status, extra={"fields": line | fields})


def _labels(scope: Scope) -> tuple[str, str]:
    """Return the method and the route's template: a path would be an unbounded label, or secret."""
    method, route = scope.get("method", "GET"), scope.get("route")
    return method if method in METHODS else "OTHER", route.path if route else "unmatched"
