"""The circuit breaker: a model that fails again and again is left alone, and probed."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from math import ceil

from chat import metrics
from chat.errors import GroqDown, GroqError

logger = logging.getLogger(__name__)

FIRST_PAUSE = 1.0
"""Seconds until the first probe; each probe that fails doubles the pause."""
LONGEST_PAUSE = 30.0


class State(IntEnum):
    """As the metric shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """
    Count failures in a row; from `max_failures` on, let only single requests through, as probes.

    Args:
        model: the model's name, for log and metric.
        max_failures: how many make a run.
    """

    def __init__(
        self, model: str, max_failures: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._max_failures = max_failures
        self._clock = clock
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._probe_at = 0.0
        self._is_open = False
        self._is_probing = False
        self._note()

    @property
    def state(self) -> State:
        if not self._is_open:
            return State.CLOSED
        return State.HALF_OPEN if self._is_probing else State.OPEN

    @contextmanager
    def request(self) -> Iterator[None]:
        """
        Guard one request, and learn from how it ends.

        Raises:
            GroqDown: the request must not be sent.
        """
        is_probe = self._admit()
        try:
            yield
        except GroqError as error:
            if error.is_outage:
                self._fail()
            else:
                self.succeed()  # an answer, if not a good one
            raise
        finally:
            if is_probe:
                self._is_probing = False
                self._note()

    def succeed(self) -> None:
        """Take note that the model answers, as soon as that is known."""
        self._failures = 0
        if self._is_open:
            self._is_open = False
            self._pause = FIRST_PAUSE
            self._note()
            logger.info("Groq answers again", extra={"fields": {"model": self._model}})

    def _admit(self) -> bool:
        """Return whether the request is a probe."""
        if not self._is_open:
            return False
        wait = self._probe_at - self._clock()
        if wait > 0 or self._is_probing:
            raise GroqDown(max(1, ceil(wait)))
        self._is_probing = True
        self._note()
        return True

    def _fail(self) -> None:
        self._failures += 1
        if self._is_probing:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif self._is_open or self._failures < self._max_failures:
            return
        else:
            fields = {"model": self._model, "failures": self._failures}
            logger.error("Groq is down: it is left alone but for probes", extra={"fields": fields})
        self._is_open = True
        self._probe_at = self._clock() + self._pause
        self._note()

    def _note(self) -> None:
        metrics.GROQ_CIRCUIT_STATE.labels(self._model).set(self.state)
