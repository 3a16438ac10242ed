"""What surrounds every request: its id, log line, metrics, unexpected errors, and its origin."""

import logging
import random
import re
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from chat import logs, metrics
from chat.api.http import error_response
from chat.errors import ClientDisconnected, InternalError, OriginNotAllowed

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
        logs.request_id.set(request_id)  # for this task, which the server starts for each request
        scope["chat.send"] = send  # the server's own
        started_at, status = time.perf_counter(), ClientDisconnected.status  # until a response

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
            reply, fields = scope.get("chat.reply"), scope.get("chat.log_fields", {})
            fields = fields | reply.summary() if reply else fields
            log_request(scope, status, fields, time.perf_counter() - started_at)


def log_request(scope: Scope, status: int, fields: dict[str, Any], duration: float = 0) -> None:
    """Log and count a request, or a message on a WebSocket, which has no duration of its own."""
    method, route = scope.get("method", "GET"), scope.get("route")
    method = method if method in METHODS else "OTHER"
    endpoint = route.path if route else "unmatched"  # a path would be an unbounded label, or secret
    line = {"method": method, "endpoint": endpoint, "status": status, "client": client_of(scope)}
    if duration:
        metrics.http_requests(method, endpoint, status).inc()
        metrics.http_request_duration(method, endpoint).observe(duration)
        line["duration_ms"] = round(duration * 1000, 1)
    if "error" in fields:
        metrics.errors[fields["error"]].inc()
    is_failed = status >= 500 or (status < 400 and fields.get("outcome") == "failed")
    is_probe = status == 200 and endpoint in ("/health", "/ready", "/metrics")
    level = logging.WARNING if is_failed else logging.DEBUG if is_probe else logging.INFO
    logger.log(level, "%s %s %d", method, endpoint, status, extra={"fields": line | fields})


def plain_origin(origin: str) -> str:
    """Leave off what browsers do: a default port, and a slash at the end."""
    origin = origin.lower().rstrip("/")
    return origin.removesuffix({"http": ":80", "https": ":443"}.get(origin.partition(":")[0], "/"))


class OriginMiddleware(CORSMiddleware):
    """Refuses pages of other origins; CORS alone stops neither a form nor a WebSocket of theirs."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(raw=scope.get("headers", []))
        origin, host = plain_origin(headers.get("origin", "")), headers.get("host", "")
        if self.is_allowed_origin(origin):
            return await super().__call__(scope, receive, send)
        own = plain_origin(f"{origin.partition('://')[0]}://{host}")
        if "origin" not in headers or origin == own:
            return await self.app(scope, receive, send)
        response = await error_response(HTTPConnection(scope), OriginNotAllowed())
        scope["chat.log_fields"] |= {"origin": origin[:200], "host": host[:200]}
        if scope["type"] == "http":
            return await response(scope, receive, send)
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()  # a browser does not tell a page why a handshake failed
        await websocket.send_text(bytes(response.body).decode())
        await websocket.close(OriginNotAllowed.close_code)
