"""What runs beside the server that callers see, and ends with it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from chat.protocols import HTTPProtocol


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something in the background, and cancel it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class SideServer(uvicorn.Server):
    """A server within another's process, which leaves the signals to that one."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(address: tuple[str, int], *, is_shared: bool) -> socket.socket:
    """
    Listen on a port.

    Raises:
        OSError: it is taken; unless it `is_shared` with other workers, who listen on it too.
    """
    return socket.create_server(address, reuse_port=is_shared)


@asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve an app on a port of its own, over HTTP only."""
    config = uvicorn.Config(
        app,
        http=HTTPProtocol,
        ws="none",
        log_config=None,
        lifespan="off",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = SideServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True  # cancelled, it would leave its port open
        await task
