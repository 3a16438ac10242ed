"""What runs beside the server that callers see, and ends with it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp


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


@asynccontextmanager
async def serving(
    app: ASGIApp, address: tuple[str, int], *, is_shared: bool
) -> AsyncIterator[None]:
    """
    Serve an app on a port of its own.

    Raises:
        OSError: the port is taken; unless it `is_shared` with other workers, who listen on it too.
    """
    config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False)
    listener = socket.create_server(address, reuse_port=is_shared)
    async with running(SideServer(config).serve(sockets=[listener])):
        yield
