"""
SIGTERM and SIGINT, held back from uvicorn until the replica is drained.

uvicorn stops listening the moment that it gets one, and raises it again at its end, so that the
process would not exit with 0.
"""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from multiprocessing import parent_process
from types import FrameType
from typing import Any

import uvicorn

from chat import logs

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FORCED = 1
"""The exit status after a second signal."""
SHUTDOWN_TIMEOUT = 3
"""Seconds that uvicorn has to end connections, once the replica is drained."""


@asynccontextmanager
async def held_back(drain: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """
    At the first signal, wait for `drain`, then let the server end.

    A second one ends the process at once. A worker leaves that to its supervisor, since it gets the
    same signal twice where all processes do, and the supervisor passes it on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a server in a thread gets no signals
        return
    loop = asyncio.get_running_loop()
    originals = {number: signal.getsignal(number) for number in SIGNALS}
    is_first = True

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            loop.call_soon_threadsafe(lambda: tasks.create_task(end(number)))
        elif parent_process() is None:
            logs.write_directly()
            os._exit(FORCED)

    async def end(number: int) -> None:
        try:
            await drain()
        finally:
            _let_end(originals[signal.Signals(number)], number)

    async with asyncio.TaskGroup() as tasks:
        for number in SIGNALS:
            signal.signal(number, handle)
        try:
            yield
        finally:
            if is_first:  # else a second one is still to end the process at once
                for number, original in originals.items():
                    signal.signal(number, original)


def _let_end(original: Any, number: int) -> None:
    server = getattr(original, "__self__", None)
    if not isinstance(server, uvicorn.Server):
        signal.signal(number, original)
        signal.raise_signal(number)
        return
    if server.config.timeout_graceful_shutdown is None:
        server.config.timeout_graceful_shutdown = SHUTDOWN_TIMEOUT
    server.should_exit = True
