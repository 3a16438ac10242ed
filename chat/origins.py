"""
Which pages may talk to the service: its own, and those of the origins that are allowed.

A browser sends `Origin` along with whatever a page asks for, but for plain reads whose answers it
does not show to the page. Answers alone would not do: a form or a WebSocket of any page reaches a
service on a private network, and what it says there counts.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from chat.errors import OriginNotAllowed
from chat.framing import error_body
from chat.http import JSONResponse
from chat.middleware import log_fields


class OriginMiddleware:
    """Pure ASGI; refuses requests of pages of other origins."""

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]) -> None:
        self.app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(Headers(scope=scope)):
            return await self.app(scope, receive, send)
        error = OriginNotAllowed()
        log_fields(scope).update(error.log_fields)
        if scope["type"] == "http":
            refusal = JSONResponse({"error": error.message}, error.status)
            return await refusal(scope, receive, send)
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()  # a page is not told why a handshake failed
        await websocket.send_text(error_body(error.message).decode())
        await websocket.close(error.close_code)

    def _is_allowed(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or "*" in self._allowed or origin in self._allowed:
            return True
        _, scheme_end, host = origin.partition("://")
        return bool(scheme_end) and host == headers.get("host", "").lower()
