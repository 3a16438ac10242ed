"""Which pages may use the service; CORS alone stops neither a form nor a WebSocket of others."""

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from chat.api.http import error_response
from chat.errors import OriginNotAllowed


def plain(origin: str) -> str:
    """Leave off what browsers do: a default port, and a slash at the end."""
    origin = origin.lower().rstrip("/")
    return origin.removesuffix({"http": ":80", "https": ":443"}.get(origin.partition(":")[0], "/"))


class OriginMiddleware:
    """Pure ASGI; refuses requests from pages of other origins."""

    def __init__(self, app: ASGIApp, *, allowed: list[str]) -> None:
        self.app, self._allowed = app, frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(raw=scope.get("headers", []))
        origin, host = plain(headers.get("origin", "")), headers.get("host", "")
        own = plain(f"{origin.partition('://')[0]}://{host}")
        if "origin" not in headers or {"*", origin} & (self._allowed | {own}):
            return await self.app(scope, receive, send)
        response = await error_response(HTTPConnection(scope), OriginNotAllowed())
        scope["chat.log_fields"] |= {"origin": origin[:200], "host": host[:200]}
        if scope["type"] == "http":
            return await response(scope, receive, send)
        websocket = WebSocket(scope, receive, send)
        await websocket.accept()  # a browser does not tell a page why a handshake failed
        await websocket.send_text(bytes(response.body).decode())
        await websocket.close(OriginNotAllowed.close_code)
