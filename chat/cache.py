"""
Redis as a cache that nobody waits for.

Each operation has a budget of time. When one fails, Redis is left out until a probe in the
background has found that it answers.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from redis.asyncio import BlockingConnectionPool, Redis
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
CONNECTIONS = 64


class RedisCache:
    """Whole numbers under string keys, each for `ttl` seconds; errors are misses."""

    def __init__(self, redis: Redis, *, ttl: int) -> None:
        self._redis = redis
        self._ttl = ttl
        self._usable = False
        self._suspect = asyncio.Event()
        self.is_up: bool | None = None
        """What the last probe found; None before the first."""

    async def get(self, keys: Sequence[str]) -> list[int | None]:
        """Return the value of each key, None where it is unknown or Redis is not there."""
        values: Sequence[bytes | str | None] = []
        if keys and self._usable:
            async with self._in_budget():
                values = await self._redis.mget(keys)
        return [_number(value) for value in values] or [None] * len(keys)

    async def set(self, values: Mapping[str, int]) -> None:
        """Store each value under its key, if Redis is there."""
        if not self._usable:
            return
        async with self._in_budget(), self._redis.pipeline(transaction=False) as pipeline:
            for key, value in values.items():
                pipeline.set(key, value, ex=self._ttl)
            await pipeline.execute()

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

    async def probe_forever(self) -> None:
        """Keep probing, at once when an operation has failed."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._suspect.wait(), PROBE_INTERVAL)
            self._suspect.clear()
            await self.probe()

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


def _number(value: bytes | str | None) -> int | None:
    return int(value) if value and value.isdigit() else None


@asynccontextmanager
async def open_cache(address: str, password: str, *, ttl: int) -> AsyncIterator[RedisCache]:
    """Open the cache at `host:port`, waiting for Redis no longer than the budget."""
    host, _, port = address.rpartition(":")
    pool = BlockingConnectionPool(
        max_connections=CONNECTIONS,
        timeout=BUDGET,
        host=host.strip("[]"),
        port=int(port),
        password=password or None,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
    )
    redis = Redis.from_pool(pool)
    cache = RedisCache(redis, ttl=ttl)
    await cache.probe(BUDGET)
    probing = asyncio.create_task(cache.probe_forever())
    try:
        yield cache
    finally:
        probing.cancel()
        await redis.aclose()
