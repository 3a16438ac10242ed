"""
uvicorn's WebSocket protocol, with one thing more: many text messages with one write.

ASGI sends one message at a time, and uvicorn writes each to the socket by itself: that system call
is most of what a token costs over a WebSocket (bench/README.md). `python server.py` uses this; with
`uvicorn server:app`, tokens go one by one unless `--ws chat.batching:BatchingProtocol` is given.
"""

from typing import Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.http11 import Request

from chat.middleware import TEXTS


class BatchingProtocol(WebSocketsSansIOProtocol):
    """Offers the extension `TEXTS`: a message of that type has `texts`, a list of strings."""

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
