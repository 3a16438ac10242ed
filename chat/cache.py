"""
Redis as a cache that nobody waits for.

Each operation has a budget of time. When one fails, Redis is left out until a probe in the
background has found that it answers. Operations that come while others run are sent together:
under load, one round trip serves many chats.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from chat import metrics

logger = logging.getLogger(__name__)

BUDGET = 0.05
"""Seconds that an operation may take: no chat waits longer for the cache."""
PROBE_BUDGET = 1.0
"""Seconds that a probe may take; nobody waits for it, and a busy event loop must not fail it."""
PROBE_INTERVAL = 0.5
"""Seconds between two probes."""

Values = dict[str, int]


class RedisCache:
    """Whole numbers under string keys, each for `ttl` seconds; errors are misses."""

    def __init__(self, redis: Redis, *, ttl: int) -> None:
        self._redis = redis
        self._ttl = ttl
        self._usable = False
        self._suspect = asyncio.Event()
        self._wanted: list[tuple[Sequence[str], asyncio.Future[Values]]] = []
        self._learned: Values = {}
        self._has_wanted = asyncio.Event()
        self._has_learned = asyncio.Event()
        self.is_up: bool | None = None
        """What the last probe found; None before the first."""

    async def get(self, keys: Sequence[str]) -> Values:
        """Return what is known under the keys; nothing where Redis is not there."""
        if not self._usable:
            return {}
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Values] = loop.create_future()
        timer = loop.call_later(BUDGET, _resolve, found, {})
        self._wanted.append((keys, found))
        self._has_wanted.set()
        try:
            return await found
        finally:
            timer.cancel()

    def set(self, values: Values) -> None:
        """Store each value under its key, soon, if Redis is there."""
        if self._usable:
            self._learned |= values
            self._has_learned.set()

    async def probe(self, budget: float = PROBE_BUDGET) -> None:
        """Find out whether Redis answers."""
        try:
            async with asyncio.timeout(budget):
                await self._redis.ping()
        except (RedisError, OSError, TimeoutError) as error:
            self._usable = False
            self._note(False, f"Redis is not there ({type(error).__name__}): going on without it")
        else:
            self._usable = True
            self._note(True, "Redis is there")

    async def run(self) -> None:
        """Serve `get` and `set`, and keep probing, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._probe_forever())
            tasks.create_task(self._look_up_forever())
            tasks.create_task(self._store_forever())

    async def _probe_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._suspect.wait(), PROBE_INTERVAL)
            self._suspect.clear()
            await self.probe()

    async def _look_up_forever(self) -> None:
        while await self._has_wanted.wait():
            self._has_wanted.clear()
            wanted, self._wanted = self._wanted, []
            keys = list({key for keys, _ in wanted for key in keys})
            values: Values = {}
            async with self._in_budget():
                values = _numbers(keys, await self._redis.mget(keys))
            for _, found in wanted:
                _resolve(found, values)

    async def _store_forever(self) -> None:
        while await self._has_learned.wait():
            self._has_learned.clear()
            learned, self._learned = self._learned, {}
            async with self._in_budget(), self._redis.pipeline(transaction=False) as pipeline:
                for key, value in learned.items():
                    pipeline.set(key, value, ex=self._ttl)
                await pipeline.execute()

    @asynccontextmanager
    async def _in_budget(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(BUDGET):
                yield
        except (RedisError, OSError, TimeoutError):
            self._usable = False
            self._suspect.set()

    def _note(self, is_up: bool, message: str) -> None:
        if is_up is self.is_up:
            return
        self.is_up = is_up
        metrics.REDIS_UP.set(is_up)
        logger.log(logging.INFO if is_up else logging.WARNING, message)


def _resolve(found: asyncio.Future[Values], values: Values) -> None:
    if not found.done():
        found.set_result(values)


def _numbers(keys: Sequence[str], values: Sequence[bytes | str | None]) -> Values:
    pairs = zip(keys, values, strict=True)
    return {key: int(value) for key, value in pairs if value and value.isdigit()}


@asynccontextmanager
async def open_cache(address: str, password: str, *, ttl: int) -> AsyncIterator[RedisCache]:
    """Open the cache at `host:port`, waiting for Redis no longer than the budget."""
    host, _, port = address.rpartition(":")
    redis = Redis(
        host=host.strip("[]"),
        port=int(port),
        password=password or None,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    cache = RedisCache(redis, ttl=ttl)
    await cache.probe(BUDGET)
    running = asyncio.create_task(cache.run())
    try:
        yield cache
    finally:
        running.cancel()
        await redis.aclose()
