"""Conversations in Redis, for all replicas: a list each, so that a cluster can spread them."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from uuid import uuid4

import msgspec

from chat import metrics
from chat.config import Settings
from chat.errors import HistoryUnavailable
from chat.messages import Exchange
from chat.storage.redis import Command, RedisClient, hashed_key

logger = logging.getLogger(__name__)

WAIT_FOR_STORE = 1.0  # seconds that a chat waits for its exchange to be stored
READ = "redis.call('PEXPIRE', KEYS[1], ARGV[1]) return redis.call('LRANGE', KEYS[1], 0, -1)"
# ARGV: limit, expiry, `anew` or empty, exchanges. It may be repeated if a response is lost.
STORE = """
if redis.call('LPOS', KEYS[1], ARGV[#ARGV]) then return end
if ARGV[3] == 'anew' then redis.call('DEL', KEYS[1]) end
for number = 4, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[number]) end
redis.call('LTRIM', KEYS[1], -ARGV[1], -1)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""


class RedisHistory:
    """The store that replicas share; what it cannot store within `patience` seconds is lost."""

    def __init__(self, settings: Settings, redis: RedisClient, patience: float = 30.0) -> None:
        self._redis, self._patience = redis, patience
        self._max_exchanges = settings.max_exchanges
        self._ttl = int(settings.conversation_ttl * 1000)
        self._storing: set[asyncio.Task[None]] = set()

    async def read(self, conversation: str) -> Sequence[Exchange]:
        key, exchanges = hashed_key("history", conversation), []
        for stored in await self._redis.execute("EVAL", READ, 1, key, self._ttl):
            with suppress(msgspec.MsgspecError):  # written by another version, or by someone else
                exchanges.append(msgspec.json.decode(stored, type=tuple[str, Exchange])[1])
        return exchanges

    async def store(self, conversation: str, exchanges: Sequence[Exchange], anew: bool) -> None:
        """Store exchanges; if that takes longer than a moment, go on in the background."""
        key, limit = hashed_key("history", conversation), self._max_exchanges
        unique = [msgspec.json.encode((uuid4().hex, each)) for each in exchanges[-limit:]]
        command: Command = ("EVAL", STORE, 1, key, limit, self._ttl, "anew" * anew, *unique)
        storing = asyncio.create_task(self._store_patiently(command, len(unique)))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)
        await asyncio.wait([storing], timeout=WAIT_FOR_STORE)

    async def forget(self, conversation: str) -> None:
        await self._redis.execute("DEL", hashed_key("history", conversation))

    async def aclose(self) -> None:
        """Wait a while for what is still to be stored, and give up the rest."""
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*self._storing, return_exceptions=True), 3)

    async def _store_patiently(self, command: Command, count: int) -> None:
        try:
            async with asyncio.timeout(self._patience):
                while True:
                    with suppress(HistoryUnavailable):
                        await self._redis.execute(*command)
                        return
                    await asyncio.sleep(0.5)
        except (TimeoutError, asyncio.CancelledError):
            metrics.HISTORY_LOST.inc(count)
            logger.error("exchanges lost (%d): Redis did not accept them", count)
