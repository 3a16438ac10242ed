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
        self._probe: object | None = None
        """Stands for the one request that is let through while the circuit is open."""
        self._note()

    @property
    def state(self) -> State:
        if not self._is_open:
            return State.CLOSED
        return State.HALF_OPEN if self._probe else State.OPEN

    def check(self) -> None:
        """
        Tell whether a request may be sent.

        Raises:
            GroqDown: it must not.
        """
        wait = self._probe_at - self._clock()
        if self._is_open and (wait > 0 or self._probe):
            # The longer a probe hangs, the longer its answer may take.
            raise GroqDown(max(1, abs(ceil(wait))))

    @contextmanager
    def request(self) -> Iterator[Callable[[], object]]:
        """
        Guard one request, and learn from how it ends.

        Gives a function to be called once the model answers. What goes wrong after that is no
        outage: a caller may have brought it about.

        Raises:
            GroqDown: the request must not be sent.
        """
        self.check()
        request, has_answered = object(), False
        if self._is_open:
            self._probe, self._probe_at = request, self._clock()
            self._note()

        def succeed() -> None:
            nonlocal has_answered
            has_answered = True
            self._succeed()

        try:
            yield succeed
        except GroqError as error:
            if not has_answered and error.is_outage:
                self._fail(is_probe=self._probe is request)
            elif not has_answered and error.is_answer:
                self._succeed()
            raise
        finally:
            if self._probe is request:
                self._probe = None
                self._note()

    def _succeed(self) -> None:
        self._failures = 0
        if self._is_open:
            self._is_open, self._probe, self._pause = False, None, FIRST_PAUSE
            self._note()
            logger.info("Groq answers again", extra={"fields": {"model": self._model}})

    def _fail(self, *, is_probe: bool) -> None:
        self._failures += 1
        if is_probe:
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
