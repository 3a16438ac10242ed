"""Retries, circuit breaking and fallback for Groq; all of it before the first token."""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from math import ceil, inf
from time import monotonic

from chat import metrics
from chat.config import Settings
from chat.errors import GroqCircuitOpen, GroqError, GroqQuotaExhausted, GroqRefused
from chat.llm.groq import Groq, TokenStream
from chat.messages import Message
from chat.reply import Reply

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 0.5  # seconds at most before the first retry; twice as many before each further one
LONGEST_WAIT = 10.0  # seconds to wait if Groq asks for it; a client is told of a longer wait
FIRST_PAUSE = 1.0  # seconds from the opening of a circuit to a probe; each that fails doubles them
LONGEST_PAUSE = 30.0
CLOSED, HALF_OPEN, OPEN = range(3)
STATES = {200: "available", 401: "refused", 403: "refused", 404: "missing"}  # by the status
ADVICE = {
    "refused": "Groq rejects the key: check GROQ_API_KEY and what it may do",
    "missing": "Groq does not have the model: check MODEL, FALLBACK_MODEL and GROQ_BASE_URL",
}


class GroqClient:
    """The models that replies are asked from, in the order of preference, and their states."""

    def __init__(self, models: Sequence[Groq], settings: Settings) -> None:
        limit = settings.groq_circuit_failures
        self._models = [(each, CircuitBreaker(each.model, limit)) for each in models]
        self._max_retries = settings.groq_max_retries
        self.model_states = {each.model: "unknown" for each in models}

    async def stream(self, messages: Sequence[Message], reply: Reply) -> TokenStream:
        """Give the tokens of a reply, a read at a time; raise `GroqError` if it fails."""
        loop, retries, left = asyncio.get_running_loop(), 0, list(self._models)
        while True:
            model, breaker = left[0]
            reply.model = model.model
            try:
                breaker.check()
                if (wait := ceil(model.not_before - loop.time())) > 0:
                    raise GroqQuotaExhausted(wait, retry_after=wait)
                async with aclosing(model.stream(messages, reply)) as tokens:
                    async for some in tokens:
                        if reply.ttft_ms is None:
                            reply.ttft_ms = reply.duration_ms
                            breaker.success()
                            self._note(model.model, 200)
                        yield some
                return
            except GroqError as error:
                if reply.ttft_ms is not None:
                    raise
                self._learn(model.model, breaker, error)
                if error.is_of_model and len(left) > 1:
                    del left[0]
                    metrics.GROQ_FALLBACKS.inc()
                    fields = {"model": left[0][0].model, "error": error.reason}
                    logger.warning("asking the fallback model", extra={"fields": fields})
                    continue
                delay = self._delay(error, retries, reply.deadline - loop.time())
            retries += 1
            metrics.GROQ_RETRIES.inc()
            await asyncio.sleep(delay)

    async def check_models(self) -> None:
        """Find out whether Groq knows the key and the models."""
        for model, _ in self._models:
            self._note(model.model, await model.look_up())

    def _delay(self, error: GroqError, retries: int, left: float) -> float:
        """Return the seconds until the next attempt; raise the error if there is to be none."""
        requested = error.retry_after or 0
        backoff = random.uniform(0, FIRST_BACKOFF * 2**retries)  # noqa: S311
        delay = requested + (backoff if retries < self._max_retries else inf)
        if not error.is_temporary or requested > LONGEST_WAIT or delay >= left:
            raise error
        return delay

    def _learn(self, model: str, breaker: "CircuitBreaker", error: GroqError) -> None:
        if isinstance(error, GroqRefused):
            self._note(model, error.upstream_status)
        if error.is_outage:
            breaker.failure()
        elif error.reason not in ("down", "quota"):
            breaker.success()  # after a 429 of a limit in front of it, the model may still be down

    def _note(self, model: str, status: int) -> None:
        state, fields = STATES.get(status), {"fields": {"model": model}}
        if state in ADVICE:  # each time: only the operator can fix it
            logger.error(ADVICE[state], extra=fields)
        if state and state != self.model_states[model]:
            self.model_states[model] = state
            metrics.GROQ_MODEL_AVAILABLE.labels(model).set(state == "available")
            logger.info("model %s", state, extra=fields)


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
        self._failures, self._pause = 0, FIRST_PAUSE
        if self.state != CLOSED:
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
