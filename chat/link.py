"""
Redis as an extra that nobody waits for.

Each question has a budget of time. When one fails, Redis is left out until a probe in the
background has found that it answers. Commands that come while others run are sent together:
under load, one round trip serves many chats.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from chat import metrics

logger = logging.getLogger(__name__)

BUDGET = 0.05
"""Seconds that a question may take: no chat waits longer for Redis."""
PROBE_BUDGET = 1.0
"""Seconds that a probe may take; nobody waits for it, and a busy event loop must not fail it."""
PROBE_INTERVAL = 0.5
"""Seconds between two probes."""
FAULTS = (RedisError, OSError, TimeoutError)

Command = tuple[str | int, ...]
Answers = list[Any] | None


class RedisLink:
    """Commands to Redis, answered soon or not at all."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._usable = False
        self._suspect = asyncio.Event()
        self._waiting: list[tuple[Sequence[Command], asyncio.Future[Answers] | None]] = []
        self._has_waiting = asyncio.Event()
        self.is_up: bool | None = None
        """What the last probe found; None before the first."""

    async def ask(self, commands: Sequence[Command]) -> Answers:
        """Return the answer to each command; None where Redis is not there, or refuses one."""
        if not self._usable:
            return None
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Answers] = loop.create_future()
        timer = loop.call_later(BUDGET, _resolve, answered, None)
        self._enqueue(commands, answered)
        try:
            return await answered
        finally:
            timer.cancel()

    def tell(self, commands: Sequence[Command]) -> None:
        """Send the commands soon, if Redis is there."""
        if self._usable:
            self._enqueue(commands, None)

    def _enqueue(
        self, commands: Sequence[Command], answered: asyncio.Future[Answers] | None
    ) -> None:
        self._waiting.append((commands, answered))
        self._has_waiting.set()

    async def probe(self, budget: float = PROBE_BUDGET) -> None:
        """Find out whether Redis answers."""
        try:
            async with asyncio.timeout(budget):
                await self._redis.ping()
        except FAULTS as error:
            self._usable = False
            self._note(False, f"Redis is not there ({type(error).__name__}): going on without it")
        else:
            self._usable = True
            self._note(True, "Redis is there")

    async def run(self) -> None:
        """Serve `ask` and `tell`, and keep probing, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._probe_forever())
            tasks.create_task(self._exchange_forever())

    async def _probe_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._suspect.wait(), PROBE_INTERVAL)
            self._suspect.clear()
            await self.probe()

    async def _exchange_forever(self) -> None:
        while await self._has_waiting.wait():
            self._has_waiting.clear()
            waiting, self._waiting = self._waiting, []
            answers: list[Any] = []
            try:
                async with asyncio.timeout(BUDGET):
                    answers = await self._exchange([c for commands, _ in waiting for c in commands])
            except FAULTS:
                self._usable = False
                self._suspect.set()
            for commands, answered in waiting:
                own, answers = answers[: len(commands)], answers[len(commands) :]
                is_refused = any(isinstance(answer, Exception) for answer in own)
                if answered:
                    _resolve(answered, own if own and not is_refused else None)

    async def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers

    def _note(self, is_up: bool, message: str) -> None:
        if is_up is self.is_up:
            return
        self.is_up = is_up
        metrics.REDIS_UP.set(is_up)
        logger.log(logging.INFO if is_up else logging.WARNING, message)


def _resolve(answered: asyncio.Future[Answers], answers: Answers) -> None:
    if not answered.done():
        answered.set_result(answers)


@asynccontextmanager
async def open_link(address: str, password: str) -> AsyncIterator[RedisLink]:
    """Open the link to Redis at `host:port`, waiting for it no longer than the budget."""
    host, _, port = address.rpartition(":")
    redis = Redis(
        host=host.strip("[]"),
        port=int(port),
        password=password or None,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    link = RedisLink(redis)
    await link.probe(BUDGET)
    running = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        running.cancel()
        await redis.aclose()
