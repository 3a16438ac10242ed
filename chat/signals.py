"""
SIGTERM and SIGINT, held back from uvicorn until the replica is drained.

uvicorn stops listening the moment that it gets one, and raises it again at its end, so that the
process would not exit with 0.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from types import FrameType
from typing import Any

from chat import logs

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FORCED = 1
"""The exit status after a second signal."""


@contextmanager
def held_back(on_first: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """
    Call `on_first` at the first signal, with a function that lets the server end.

    A second signal ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a server in a thread gets no signals
        return
    loop = asyncio.get_running_loop()
    originals = {number: signal.getsignal(number) for number in SIGNALS}
    is_first = True

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_first
        if number == signal.SIGINT and parent_process() is not None:
            return  # Ctrl-C reaches the supervisor of this worker too, which passes it on
        if not is_first:
            logs.write_directly()
            os._exit(FORCED)
        is_first = False
        loop.call_soon_threadsafe(on_first, lambda: _end(originals[signal.Signals(number)], number))

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, original in originals.items():
            signal.signal(number, original)


def _end(original: Any, number: int) -> None:
    server = getattr(original, "__self__", None)
    if server is not None and hasattr(server, "should_exit"):
        server.should_exit = True
    elif callable(original):
        original(number, None)
    else:
        signal.signal(number, original)
        signal.raise_signal(number)
