"""
The end of a replica, in steps: the load balancer learns of it first, then running replies end.

At the signal, `/ready` turns 503; for `delay` seconds all else goes on as before. Then new chats
are refused, and running replies have `timeout` seconds. What still runs then is ended properly.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from chat.errors import Draining
from chat.service import ChatService

logger = logging.getLogger(__name__)

FAREWELL_TIMEOUT = 3.0
"""Seconds that callers have, in the end, to take the last of what is sent to them."""
POLL_INTERVAL = 0.02


class Connection(Protocol):
    """A caller's connection, while a request is answered on it."""

    def abort(self) -> None:
        """Cut it."""


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
        self._connections: set[Connection] = set()
        self._sockets: set[Socket] = set()

    @contextmanager
    def answering(self, connection: Connection) -> Iterator[None]:
        """Keep an eye on a connection while a request is answered on it."""
        self._connections.add(connection)
        try:
            yield
        finally:
            self._connections.discard(connection)

    @contextmanager
    def serving(self, socket: Socket) -> Iterator[None]:
        """Keep an eye on a WebSocket while it is open."""
        self._sockets.add(socket)
        if self._is_refusing:
            socket.drain()
        try:
            yield
        finally:
            self._sockets.discard(socket)

    async def run(self) -> None:
        """Go through the steps."""
        self.has_begun = True
        logger.info("draining: no more traffic should come here")
        await asyncio.sleep(self._delay)
        self._is_refusing = True
        self._service.refuse(Draining)
        for socket in list(self._sockets):
            socket.drain()
        if not await self._service.wait_idle(self._timeout):
            logger.warning("draining: the replies that still run are ended")
            self._service.interrupt(Draining)
        await self._say_farewell()
        logger.info("drained")

    async def _say_farewell(self) -> None:
        loop = asyncio.get_running_loop()
        deadline, left = loop.time() + FAREWELL_TIMEOUT, set(self._connections)
        while left and loop.time() < deadline:
            await asyncio.sleep(POLL_INTERVAL)
            left &= self._connections
        for connection in left:
            connection.abort()
