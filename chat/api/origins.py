"""
Which pages may use the service: its own, and those of the allowed origins. CORS would not be
enough: a form or a WebSocket of any page reaches a service on a private network.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from chat.api.http import error_response
from chat.errors import OriginNotAllowed


class OriginMiddleware:
    """Pure ASGI; refuses requests from pages of other origins."""

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]) -> None:
        self.app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(Headers(scope=scope)):
            return await self.app(scope, receive, send)
        response = await error_response(HTTPConnection(scope), OriginNotAllowed())
        if scope["type"] == "http":
            return await response(scope, receive, send)
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()  # a browser does not tell a page why a handshake failed
        await websocket.send_text(bytes(response.body).decode())
        await websocket.close(OriginNotAllowed.close_code)

    def _is_allowed(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None or "*" in self._allowed or origin in self._allowed:
            return True
        return origin.partition("://")[1:] == ("://", headers.get("host", "").lower())
