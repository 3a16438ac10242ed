"""
Groq, asked with patience: retries, a circuit breaker for each model, quotas, and the fallback.

Whatever is tried, is tried before the first token; after it, an error ends the reply.
"""

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from math import ceil, inf

from chat import metrics
from chat.breaker import CircuitBreaker
from chat.config import Settings
from chat.errors import GroqError, GroqQuotaUsedUp, GroqRefused
from chat.groq import Groq, ModelState
from chat.messages import Message
from chat.reply import Reply

logger = logging.getLogger(__name__)

FIRST_BACKOFF = 0.5
"""Seconds at most before the first retry; twice as many before each further one."""
LONGEST_WAIT = 10.0
"""Seconds that are waited at Groq's wish; a caller who has to wait longer is told so."""
QUOTA_INTERVAL = 1.0
"""Seconds after which a wait for the quota is reckoned anew: others' answers change it."""
CHECK_INTERVAL = 600.0
"""Seconds between two looks at whether the models are still there."""
REFUSALS = {
    401: "Groq refuses the key: check GROQ_API_KEY",
    403: "Groq refuses the key: check what GROQ_API_KEY may do",
    404: "Groq does not know the model: check MODEL, FALLBACK_MODEL and GROQ_BASE_URL",
}
CHECKS: dict[ModelState, str] = {"refused": REFUSALS[401], "missing": REFUSALS[404]}


class Upstream:
    """
    The models that replies are asked from, in the order of preference.

    Attributes:
        model_states: what the last check found, by the models' names.
    """

    def __init__(self, models: Sequence[Groq], settings: Settings) -> None:
        self._max_retries = settings.groq_max_retries
        self._max_tokens = settings.max_tokens
        self._models = models
        self._breakers = {
            each.model: CircuitBreaker(each.model, settings.groq_circuit_failures)
            for each in models
        }
        self.model_states: dict[str, ModelState] = {each.model: "unknown" for each in models}

    async def ask(self, messages: Sequence[Message], reply: Reply) -> None:
        """
        Have `reply` written by a model, asking again where that may help.

        Raises:
            GroqError: there is no reply, or it broke off; what came until then is in `reply`.
        """
        longest = (FIRST_BACKOFF * 2**retry for retry in range(self._max_retries))
        backoffs = (random.uniform(0, each) for each in longest)  # noqa: S311
        for model in self._models:
            try:
                return await self._try(model, messages, reply, backoffs)
            except GroqError as error:
                if reply.has_tokens or not self._is_for_fallback(error, model):
                    raise
            metrics.GROQ_FALLBACKS.inc()
            fields = {"model": self._models[-1].model}
            logger.warning("the fallback model is asked", extra={"fields": fields})

    async def check_forever(self) -> None:
        """Look now and then whether Groq knows the key and the models, until cancelled."""
        while True:
            for each in self._models:
                try:
                    self._note(each.model, await each.look_up())
                except Exception:
                    logger.exception("the models could not be looked up, by a fault of ours")
            await asyncio.sleep(CHECK_INTERVAL)

    async def _try(
        self, model: Groq, messages: Sequence[Message], reply: Reply, backoffs: Iterator[float]
    ) -> None:
        """Ask one model, and again where that may help, for as long as there are `backoffs`."""
        while True:
            try:
                return await self._attempt(model, messages, reply)
            except GroqError as error:
                _explain(error, model)
                is_over = reply.has_tokens or not error.is_temporary
                if is_over or self._is_for_fallback(error, model):
                    raise
                wished = error.retry_after or 0
                delay = wished + next(backoffs, inf)
                if wished > LONGEST_WAIT or delay >= reply.time_left:
                    raise
            await asyncio.sleep(delay)
            metrics.GROQ_RETRIES.inc()

    def _is_for_fallback(self, error: GroqError, model: Groq) -> bool:
        return error.is_of_model and model is not self._models[-1]

    async def _attempt(self, model: Groq, messages: Sequence[Message], reply: Reply) -> None:
        reply.model = model.model
        breaker = self._breakers[model.model]
        breaker.check()
        await self._wait_for_quota(model, reply)
        with breaker.request() as succeed:
            ask = model.complete if reply.stream_type == "json" else model.stream
            await ask(messages, reply, succeed)

    async def _wait_for_quota(self, model: Groq, reply: Reply) -> None:
        tokens = (reply.prompt_tokens or 0) + self._max_tokens
        left = min(LONGEST_WAIT, reply.time_left) if model is self._models[-1] else 0
        while wait := model.quota.wait_for(tokens):
            if wait > left:
                raise GroqQuotaUsedUp(ceil(wait))
            pause = min(wait, QUOTA_INTERVAL)
            await asyncio.sleep(pause)
            left -= pause

    def _note(self, model: str, state: ModelState) -> None:
        fields, before = {"model": model}, self.model_states[model]
        self.model_states[model] = state
        if state in CHECKS:  # each time: it is an operator's to mend
            logger.error(CHECKS[state], extra={"fields": fields})
        elif state == "available" and before != state:
            logger.info("Groq knows the key and the model", extra={"fields": fields})
        if state != "unknown":
            metrics.GROQ_MODEL_AVAILABLE.labels(model).set(state == "available")


def _explain(error: GroqError, model: Groq) -> None:
    """Tell the operator what only an operator can mend."""
    if isinstance(error, GroqRefused) and error.upstream_status in REFUSALS:
        explanation = REFUSALS[error.upstream_status]
        logger.error(explanation, extra={"fields": {"model": model.model}})
