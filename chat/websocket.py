"""Chats over a WebSocket: one reply at a time, and the caller heard while it runs."""

import asyncio
import logging
import sys
from collections.abc import Callable
from functools import partial

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from chat.config import Settings
from chat.drain import Drain
from chat.errors import (
    BadRequest,
    BinaryMessage,
    BodyTooLarge,
    CallerIdle,
    ChatError,
    Draining,
    InternalError,
    TooManyConnections,
    TooManyWasted,
)
from chat.framing import SOCKET_CANCELLED, SOCKET_DONE, error_body, socket_token
from chat.limits import RateLimiter
from chat.messages import SocketRequest, parse_request
from chat.middleware import TEXTS, client_of, connection_of, log_fields, record_message
from chat.places import Places
from chat.reply import Reply

logger = logging.getLogger(__name__)


CLOSED = (WebSocketDisconnect, OSError, RuntimeError)
"""What sending raises once the connection is closed, by the caller or by another task of ours."""


MAX_WASTED = 100
"""Messages in a row that begin no reply, after which the connection is closed."""


class ChatSocket:
    """
    One caller's connection.

    Args:
        websocket: the connection, not yet accepted.
        reply_to: begins the reply to a request.
        limiter: counts the requests, if they are limited.
        drain: closes it when this replica ends.
        settings: tell how large a message may be, and how long none may come.
    """

    def __init__(
        self,
        websocket: WebSocket,
        reply_to: Callable[[SocketRequest], Reply],
        limiter: RateLimiter | None,
        drain: Drain,
        settings: Settings,
    ) -> None:
        self._websocket = websocket
        self._caller = connection_of(websocket.scope)
        self._takes_many = TEXTS in websocket.scope.get("extensions", ())
        self._reply_to = reply_to
        self._limiter = limiter
        self._drain = drain
        self._wasted = 0
        self._is_draining = False
        self._clock: asyncio.Timeout | None = None
        self._max_bytes = settings.max_body_bytes
        self._idle_timeout = settings.idle_timeout
        self._reply: Reply | None = None
        self._relaying: asyncio.Task[None] | None = None

    async def serve(self, places: Places) -> None:
        """Answer messages until either side closes the connection, if its client has a place."""
        scope = self._websocket.scope
        await self._websocket.accept()
        try:
            with places.taken_by(client_of(scope)), self._drain.serving(self):
                await self._serve()
        except TooManyConnections as error:
            log_fields(scope).update(error.log_fields)
            await self._fail(error)

    def drain(self) -> None:
        """Close the connection as soon as no reply runs on it."""
        self._is_draining = True
        self._wake()

    def _wake(self) -> None:
        """Stop waiting for a message, to see whether there is another reason to go on."""
        if self._is_draining and self._clock and not self._clock.expired():
            self._clock.reschedule(asyncio.get_running_loop().time())

    async def _serve(self) -> None:
        try:
            while (message := await self._next_message())["type"] == "websocket.receive":
                await self._answer(message)
            if message.get("code") == BodyTooLarge.close_code:  # the server has told the caller
                self._record(BodyTooLarge(self._max_bytes))
        except WebSocketDisconnect:
            pass
        except (CallerIdle, Draining) as error:
            await self._fail(error)
        except Exception:
            logger.exception("a WebSocket failed by a fault of ours")
            fault = InternalError()
            self._record(fault)
            await self._fail(fault)
        finally:
            if self._reply:
                self._reply.abandon()
            if self._relaying:
                await self._relaying

    async def _next_message(self) -> Message:
        while True:
            if self._is_draining and not self._is_replying:
                raise Draining
            try:
                async with asyncio.timeout(self._idle_timeout) as self._clock:
                    return await self._websocket.receive()
            except TimeoutError:
                if not (self._is_replying or self._is_draining):
                    raise CallerIdle(self._idle_timeout) from None
            finally:
                self._clock = None

    async def _answer(self, message: Message) -> None:
        try:
            request = await self._parse_counted(message)
            if request.cancel:
                self._stop()
            else:
                self._begin(request)
        except ChatError as error:
            self._record(error)
            if error.close_code is not None and self._reply:
                self._reply.abandon()
            await self._fail(error)

    async def _parse_counted(self, message: Message) -> SocketRequest:
        """Parse a message, and count it against the client's limit, good or bad; but a cancel."""
        self._wasted += 1
        if self._wasted > MAX_WASTED:
            raise TooManyWasted
        try:
            request = self._parse(message)
        except ChatError:
            await self._count()
            raise
        if not request.cancel:
            await self._count()
        return request

    async def _count(self) -> None:
        if self._limiter:
            allowance = await self._limiter.take(client_of(self._websocket.scope))
            allowance.check()

    def _parse(self, message: Message) -> SocketRequest:
        text = message.get("text")
        if text is None:
            raise BinaryMessage
        if len(text) > self._max_bytes or len(text.encode()) > self._max_bytes:
            raise BodyTooLarge(self._max_bytes)
        return parse_request(SocketRequest, text)

    def _stop(self) -> None:
        # Without a reply there is nothing to do, and nothing to say: a cancel may cross the end of
        # its reply, and an error would then be taken for the next one's.
        if self._reply:
            self._reply.stop()

    @property
    def _is_replying(self) -> bool:
        return self._relaying is not None and not self._relaying.done()

    def _begin(self, request: SocketRequest) -> None:
        if self._is_replying:
            raise BadRequest("a reply is still running on this socket; wait for it, or cancel it")
        self._reply = self._reply_to(request)
        self._wasted = 0
        self._relaying = asyncio.create_task(self._relay(self._reply))
        self._relaying.add_done_callback(lambda _: self._wake())

    async def _relay(self, reply: Reply) -> None:
        try:
            with self._caller.watch(reply.delivery):
                at_once = sys.maxsize if self._takes_many else 1
                await reply.relay(partial(self._write, reply), at_once=at_once)
            if reply.error:
                await self._fail(reply.error)
            else:
                is_stopped = reply.outcome == "cancelled"
                await self._websocket.send_text(SOCKET_CANCELLED if is_stopped else SOCKET_DONE)
        except CLOSED:
            pass
        finally:
            status = reply.error.status if reply.error else 200
            record_message(self._websocket.scope, status, reply.summary())

    async def _write(self, reply: Reply, tokens: list[str]) -> None:
        texts = [socket_token(token) for token in tokens]
        message: Message = {"type": TEXTS, "texts": texts}
        if not self._takes_many:
            message = {"type": "websocket.send", "text": texts[0]}
        try:
            await self._caller.server_send(message)
        except CLOSED:
            reply.abandon()

    def _record(self, error: ChatError) -> None:
        record_message(self._websocket.scope, error.status, error.log_fields)

    async def _fail(self, error: ChatError) -> None:
        """Tell the caller of an error, and close the connection where the error asks for it."""
        try:
            await self._websocket.send_text(error_body(error.message).decode())
            if error.close_code is not None:
                await self._websocket.close(error.close_code)
        except CLOSED:
            pass
