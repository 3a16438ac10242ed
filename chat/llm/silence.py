"""
The limit on silence between two events: one clock looks at all streams a few times within it, since
a timer for each read would cost half as much as reading and writing a token.
"""

import asyncio
from typing import Self

from chat.errors import GroqTimeout

TICKS = 10


class SilenceClock:
    """The clock of the process; `limit` is in seconds."""

    def __init__(self, limit: float) -> None:
        self.streams: set[Watched] = set()
        self._interval = limit / TICKS

    async def run(self) -> None:
        """Look at the streams until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            for stream in list(self.streams):
                stream.tick()


class Watched:
    """A stream that the current task reads; after too long a silence, `GroqTimeout` is raised."""

    def __init__(self, clock: SilenceClock) -> None:
        self.events = 0  # that have come
        self.is_reading = False  # it waits for Groq, and not for a slow client
        self._clock, self._task = clock, asyncio.current_task()
        self._is_silent = False
        self._seen = self._ticks = 0

    def __enter__(self) -> Self:
        self._clock.streams.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._clock.streams.discard(self)
        task = self._task if kind is asyncio.CancelledError and self._is_silent else None
        if task and task.uncancel() == 0:  # nobody else has cancelled it
            raise GroqTimeout from None

    def tick(self) -> None:
        is_waiting = self.is_reading and self.events == self._seen
        self._ticks = self._ticks + 1 if is_waiting else 0
        self._seen = self.events
        if self._ticks == TICKS + 1 and self._task:  # the first may come at once
            self._is_silent = self._task.cancel()
