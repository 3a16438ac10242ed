"""What uvicorn's protocols lack; private members of libraries are used here alone."""

from typing import Any

import msgspec
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState, PayloadTooBig
from websockets.frames import Frame, Opcode

from chat.errors import BodyTooLarge

TEXTS = "chat.websocket.texts"  # an ASGI extension: "texts" of `websocket.send` are many, in UTF-8
MAX_HEAD_BYTES = 64 << 10  # trailers too; checked after each read, so one read may exceed it


class HTTPProtocol(HttpToolsProtocol):  # timeouts, disconnects, upgrades (uvicorn#2722), HTTP/1.0
    head_timeout = 15.0  # seconds from the first byte of a head to its end
    _head_bytes = 0
    _running: Any = None  # uvicorn's `cycle` is the last request, which may still be queued

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.shutdown)

    def connection_lost(self, exc: Exception | None) -> None:
        self.cycle = self._running
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        try:
            self._parse(memoryview(data))
        except (HttpParserError, HttpParserUpgrade):  # the latter from CONNECT
            self.send_400_response("Invalid HTTP request received.")
        if self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()
        elif self.pipeline and not self.cycle.body:
            self.flow.resume_reading()  # uvicorn pauses: a disconnect would go unnoticed
        if self not in self.connections or not getattr(self.cycle, "response_complete", True):
            self._unset_keepalive_if_required()
        elif self._head_bytes == len(data):  # a new head
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(self.head_timeout, self.shutdown)

    def _parse(self, data: memoryview) -> Any:
        while True:
            try:
                return self.parser.feed_data(data)
            except HttpParserUpgrade as offer:  # the parser stopped at the end of the head
                data = data[offer.args[0] :]
            size = [v for k, v in self.headers if k in (b"content-length", b"transfer-encoding")]
            if self.scope["method"] == "GET" and size in ([], [b"0"]) and super()._should_upgrade():
                if self.flow.write_paused or not getattr(self.cycle, "response_complete", True):
                    return self.transport.abort()  # that reply would not learn of a disconnect
                self.handle_websocket_upgrade()
                return self.transport.get_protocol().conn.reader.feed_data(bytes(data))  # type: ignore[attr-defined]
            line = "{method} %b HTTP/{http_version}\r\n".format_map(self.scope).encode() % self.url
            headers = [b"%b: %b\r\n" % item for item in self.headers if item[0] != b"upgrade"]
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
            self.parser.feed_data(line + b"".join(headers) + b"\r\n")

    def _should_upgrade(self) -> bool:
        return True  # uvicorn then leaves every offer to `_parse`

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        async def send_unframed(message: Any, send: Any = cycle.send) -> None:
            cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        self._running, self._head_bytes = cycle, 0
        if cycle.scope["http_version"] < "1.1":  # which has no chunks: the end is the close
            cycle.chunked_encoding, cycle.keep_alive, cycle.send = False, False, send_unframed
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)


class WebSocketProtocol(WebSocketsSansIOProtocol):  # slow clients, missed ends, an error with 1009
    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except InvalidState:  # from invalid UTF-8 with a close in the same read
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()
        self.close_sent |= bool(self.conn.parser_exc) or self.transport.is_closing()
        if not self.handshake_initiated:
            self.transport.close()
        if not (self.handshake_complete and self.writable.is_set()):
            self.read_paused = False  # so that `receive` does not resume it
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()

    def eof_received(self) -> None:
        if not self.writable.is_set():  # else it would wait for a client that does not read
            self.transport.abort()

    def handle_parser_exception(self) -> None:
        if not isinstance(self.conn.parser_exc, PayloadTooBig):
            super().handle_parser_exception()
        elif not self.close_sent:
            error = BodyTooLarge(self.config.ws_max_size)
            text = Frame(Opcode.TEXT, msgspec.json.encode({"error": str(error)}))
            self.transport.write(text.serialize(mask=False) + b"".join(self.conn.data_to_send()))
            self.transport.write_eof()  # to close with input unread would discard the output
            self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)
            self.queue.put_nowait({"type": "websocket.disconnect", "code": error.close_code})

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        if self.close_sent or self.transport.is_closing():
            raise ClientDisconnected  # where uvicorn would blame the application
        if "texts" in message:
            frames = [Frame(Opcode.TEXT, text).serialize(mask=False) for text in message["texts"]]
            return self.transport.write(b"".join(frames))
        await super().send(message)
        if message["type"] == "websocket.accept":
            self.scope["extensions"][TEXTS] = {}
            self.transport.resume_reading()
            self.data_received(b"")
