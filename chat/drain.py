"""
The end of a replica, in steps: the load balancer learns of it first, then running replies end.

At the signal, `/ready` turns 503; for `delay` seconds all else goes on as before. Then new chats
are refused, and running replies have `timeout` seconds. What still runs then is ended properly.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, Protocol

from chat.connection import CallerConnection
from chat.errors import Draining
from chat.service import ChatService

logger = logging.getLogger(__name__)

FAREWELL_TIMEOUT = 3.0
"""Seconds that callers have, in the end, to take the last of what is sent to them."""
POLL_INTERVAL = 0.02


class Socket(Protocol):
    """A caller's WebSocket."""

    def drain(self) -> None:
        """Close it as soon as no reply runs on it."""


class Drain:
    """
    How far the end has come.

    Attributes:
        has_begun: whether no more traffic should be sent here.
    """

    def __init__(self, service: ChatService, *, delay: float, timeout: float) -> None:
        self.has_begun = False
        self._service = service
        self._delay = delay
        self._timeout = timeout
        self._is_refusing = False
        self._connections: set[CallerConnection] = set()
        self._sockets: set[Socket] = set()
        self._receiving: set[asyncio.Timeout] = set()

    def answering(self, connection: CallerConnection) -> AbstractContextManager[None]:
        """Keep an eye on a connection while a request is answered on it."""
        return _kept(connection, self._connections)

    @contextmanager
    def serving(self, socket: Socket) -> Iterator[None]:
        """Keep an eye on a WebSocket while it is open."""
        if self._is_refusing:
            socket.drain()
        with _kept(socket, self._sockets):
            yield

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """
        Give up a chat that has not come whole when new ones are refused.

        Raises:
            Draining: it has not.
        """
        try:
            async with asyncio.timeout(0 if self._is_refusing else None) as limit:
                with _kept(limit, self._receiving):
                    yield
        except TimeoutError:
            raise Draining from None

    async def run(self) -> None:
        """Go through the steps."""
        self.has_begun = True
        logger.info("draining: no more traffic should come here")
        await asyncio.sleep(self._delay)
        self._is_refusing = True
        self._service.refuse(Draining)
        for socket in list(self._sockets):
            socket.drain()
        for limit in self._receiving:
            limit.reschedule(asyncio.get_running_loop().time())
        if not await self._service.wait_idle(self._timeout):
            logger.warning("draining: the replies that still run are ended")
            self._service.interrupt(Draining)
        await self._say_farewell()
        logger.info("drained")

    async def _say_farewell(self) -> None:
        for _ in range(int(FAREWELL_TIMEOUT / POLL_INTERVAL)):
            if not self._connections:
                return
            await asyncio.sleep(POLL_INTERVAL)
        for connection in list(self._connections):
            connection.abort()


@contextmanager
def _kept(one: object, those: set[Any]) -> Iterator[None]:
    those.add(one)
    try:
        yield
    finally:
        those.discard(one)
