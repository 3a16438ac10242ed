"""The circuit breaker: a model that keeps failing is left alone, except for probes."""

import logging
from collections.abc import Callable
from math import ceil
from time import monotonic

from chat import metrics
from chat.errors import GroqCircuitOpen

logger = logging.getLogger(__name__)

FIRST_PAUSE = 1.0  # seconds until the first probe; each failed probe doubles the pause
LONGEST_PAUSE = 30.0
CLOSED, HALF_OPEN, OPEN = range(3)


class CircuitBreaker:
    """Count consecutive failures; from `limit` on, let a request through now and then."""

    def __init__(self, model: str, limit: int, clock: Callable[[], float] = monotonic) -> None:
        self._model, self._limit, self._clock = model, limit, clock
        self._failures, self._pause = 0, FIRST_PAUSE
        self._change(CLOSED)

    def check(self) -> None:
        """Raise `GroqCircuitOpen` unless a request may be sent, if only as a probe."""
        if self.state != CLOSED:
            if (wait := ceil(self._probe_at - self._clock())) > 0:
                raise GroqCircuitOpen(wait, retry_after=wait)
            self._change(HALF_OPEN)  # if the client of this probe leaves, another one follows

    def success(self) -> None:
        """Note that the model has responded."""
        self._failures = 0
        if self.state != CLOSED:
            self._pause = FIRST_PAUSE
            self._change(CLOSED)
            logger.info("circuit breaker closed", extra={"fields": {"model": self._model}})

    def failure(self) -> None:
        """Note that a request has failed before the model responded."""
        self._failures += 1
        if self.state == HALF_OPEN:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._change(OPEN)
        elif self.state == CLOSED and self._failures >= self._limit:
            self._change(OPEN)
            logger.error("circuit breaker opened", extra={"fields": {"model": self._model}})

    def _change(self, state: int) -> None:
        self.state, self._probe_at = state, self._clock() + self._pause
        metrics.GROQ_CIRCUIT_STATE.labels(self._model).set(state)
