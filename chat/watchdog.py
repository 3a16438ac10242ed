"""A timer for streams: it costs nothing for each read, however many there are."""

import asyncio
from collections.abc import Callable
from typing import Self

TICKS = 10
"""How often it looks within its limit; so it may notice a silence a tenth later."""


class Watchdog:
    """
    Call `on_silence` when `progress` has stayed the same for `limit` seconds, and each time again.

    A timer that is set anew at each read costs more than the read's own work (bench/README.md);
    this one only compares, a few times within its limit.
    """

    def __init__(
        self, limit: float, progress: Callable[[], object], on_silence: Callable[[], object]
    ) -> None:
        self._interval = limit / TICKS
        self._progress = progress
        self._on_silence = on_silence

    def __enter__(self) -> Self:
        self._seen = self._progress()
        self._silent_ticks = 0
        self._schedule()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._timer.cancel()

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval, self._look)

    def _look(self) -> None:
        seen = self._progress()
        self._silent_ticks = self._silent_ticks + 1 if seen == self._seen else 0
        self._seen = seen
        self._schedule()
        if self._silent_ticks == TICKS:
            self._silent_ticks = 0
            self._on_silence()
