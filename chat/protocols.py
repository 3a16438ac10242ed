"""
uvicorn's protocols, each with one thing more.

`python server.py` uses them; `uvicorn server:app` does with
`--http chat.protocols:TimedProtocol --ws chat.protocols:BatchingProtocol`.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.http11 import Request

from chat.middleware import TEXTS


class TimedProtocol(HttpToolsProtocol):
    """Closes connections on which the beginning of a request does not arrive."""

    head_timeout = 15.0
    """Seconds from the connection, or from a request's first byte, to the end of its headers."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def _wait_for_head(self) -> None:
        self._timer = self._timer or self.loop.call_later(self.head_timeout, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


class BatchingProtocol(WebSocketsSansIOProtocol):
    """
    Offers the extension `TEXTS`: a message of that type has `texts`, a list of strings.

    ASGI sends one message at a time, and uvicorn writes each to the socket by itself: that system
    call is most of what a token costs over a WebSocket (bench/README.md).
    """

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["extensions"][TEXTS] = {}

    async def send(self, message: Any) -> None:
        if message["type"] != TEXTS:
            return await super().send(message)
        await self.writable.wait()
        if self.disconnected or self.close_sent:
            raise ClientDisconnected
        try:
            for text in message["texts"]:
                self.conn.send_text(text.encode())
        except InvalidState:
            raise ClientDisconnected from None
        self.transport.write(b"".join(self.conn.data_to_send()))
