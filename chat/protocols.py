"""
uvicorn's protocols, guarded against callers who send without an end, read nothing, or take all
connections.

`python server.py` uses them; `uvicorn server:app` does with
`--http chat.protocols:HTTPProtocol --ws chat.protocols:WebSocketProtocol`.
"""

import asyncio
import socket
from contextlib import ExitStack, suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState, PayloadTooBig, SecurityError
from websockets.frames import Frame, Opcode
from websockets.http11 import Request

from chat import metrics
from chat.errors import BodyTooLarge, TooManyConnections
from chat.framing import error_body
from chat.middleware import TEXTS
from chat.places import PLACES, Places

MAX_CONNECTIONS = 10_000
"""Connections of a process; beyond it, new ones are closed at once."""
MAX_HEAD_BYTES = 64 << 10
"""Bytes of a request that are no body: its line, its headers, its trailers; counted a read at a
time, so that a head that comes whole with one read, of at most 256 KiB, may be larger."""
MAX_PIPELINED = 16
"""Requests that may wait on a connection."""
MAX_FRAMES = 1000
"""Frames of a WebSocket, pings and pieces of messages, that may come without a whole message."""
SLICE_BYTES = 4 << 10
"""As much of what comes on a WebSocket is parsed before its frames are counted."""
MAX_UNREAD_BYTES = 256 << 10
"""Bytes of pongs that may wait for a caller who does not read them."""
UNREAD_TIMEOUT = 60.0
"""Seconds that what was sent may stay unread; then the kernel ends the connection, also where
nothing of the application is left that would notice."""


def limit_unread(transport: asyncio.BaseTransport) -> None:
    connection = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_USER_TIMEOUT") and connection.family != socket.AF_UNIX:
        milliseconds = int(UNREAD_TIMEOUT * 1000)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


class Guarded(asyncio.Protocol):
    """What both protocols do about a client with too many connections, and about what does not come
    in time."""

    app_state: dict[str, Any]
    client: tuple[str, int] | None
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._place = ExitStack()
        places: Places | None = self.app_state.get(PLACES)
        if places and self.client:  # there is none on a Unix socket
            try:
                self._place.enter_context(places.taken_by(self.client[0]))
            except TooManyConnections as error:
                metrics.CHAT_ERRORS.labels(error.reason).inc()
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def _leave(self) -> None:
        self._place.close()
        self._stop_timer()

    def _start_timer(self, seconds: float) -> None:
        """Give up in so many seconds, unless it runs already or is stopped."""
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self.transport.abort()


class HTTPProtocol(Guarded, HttpToolsProtocol):
    """Ends connections on which the head of a request is too long, or does not arrive."""

    head_timeout = 15.0
    """Seconds in which a request has to begin and its headers to end, on a connection where none
    is being answered."""
    _head_bytes = 0
    _answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        if not transport.is_closing():
            limit_unread(transport)
            self._start_timer(self.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answering:  # uvicorn tells only the last request of those that were pipelined
            self._answering.disconnected = True
            self._answering.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES or len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        elif not self._is_answering and self.transport.get_protocol() is self:
            self._start_timer(self.head_timeout)

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()
        if self._is_answering:
            self._stop_timer()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        # The request in front of it would hear of nothing more, neither that its caller has left,
        # nor that it may go on writing.
        if self._is_answering or self.flow.write_paused:
            self.transport.abort()
        else:
            self._leave()
            super().handle_websocket_upgrade()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class WebSocketProtocol(Guarded, WebSocketsSansIOProtocol):
    """
    Takes no more from a caller than that caller reads, and not too many frames; and offers the
    extension `TEXTS`: a message of that type has `texts`, a list of strings.

    ASGI sends one message at a time, and uvicorn writes each to the socket by itself: that system
    call is most of what a token costs over a WebSocket (bench/README.md).
    """

    message_timeout = 15.0
    """Seconds in which a message has to arrive, from its first byte on."""
    _frames = 0

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.conn.reader.discard()  # what it is part of waits for the garbage collector

    def data_received(self, data: bytes) -> None:
        if self.conn.parser_exc:
            return  # what comes behind the end is dropped
        for start in range(0, len(data), SLICE_BYTES):
            super().data_received(data[start : start + SLICE_BYTES])
            if self.conn.handshake_exc and not self.handshake_initiated:
                self._refuse_handshake(self.conn.handshake_exc)
            if self._frames > MAX_FRAMES:
                self.transport.abort()
            if self.transport.is_closing() or self.conn.parser_exc:
                return
        if not (self.conn.reader.buffer or self.frames):
            self._stop_timer()
        else:
            self._start_timer(self.message_timeout)

    def _give_up(self) -> None:
        """End the connection, unless it is we who do not read."""
        self._timer = None
        if self.transport.is_reading():
            self.transport.abort()
        else:
            self._start_timer(self.message_timeout)

    def _refuse_handshake(self, error: Exception) -> None:
        """Answer what websockets cannot parse, of which uvicorn says nothing."""
        status, message = 400, "the request for a WebSocket must be valid, and without a body"
        if isinstance(error, SecurityError):
            status, message = 431, "the head of the request is too large"
        response = self.conn.reject(status, error_body(message).decode())
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        self.handshake_complete = self.close_sent = True
        self.transport.write(response.serialize())
        self.transport.close()

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:  # it came before the handshake was answered
            self.transport.abort()
        elif isinstance(self.conn.parser_exc, PayloadTooBig) and not self.close_sent:
            self._refuse_message(BodyTooLarge(self.config.ws_max_size))
        else:
            super().handle_parser_exception()

    def _refuse_message(self, error: BodyTooLarge) -> None:
        """Tell of the error before the close, and let the rest come: to close a connection on which
        something is unread cuts off what the caller has not read yet."""
        self._stop_timer()
        self.frames = []
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": error.close_code})
        message = Frame(Opcode.TEXT, error_body(error.message)).serialize(mask=False)
        self.transport.write(message + b"".join(self.conn.data_to_send()))
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)
        else:  # with TLS
            self.transport.close()

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["extensions"][TEXTS] = {}

    def handle_ping(self) -> None:
        self._frames += 1
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.transport.abort()

    def handle_pong(self, event: Frame) -> None:
        self._frames += 1
        super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        self._frames += 1
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        self._frames = 0
        self._stop_timer()
        with suppress(InvalidState):  # of what is no text, with a close in the same read
            super().send_receive_event_to_app()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()  # each ping that is read is a pong to write

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        message = await super().receive()
        if not self.writable.is_set():
            self.transport.pause_reading()  # uvicorn reads on, whether or not its caller does
        return message

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
