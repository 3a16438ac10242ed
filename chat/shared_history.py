"""
Conversations in Redis, for many replicas: the same operations as the store in memory.

Each conversation is a list under a key of its own, so that a Redis Cluster can spread them. The key
has a hash of the id: a dump of the keys opens no conversation.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import uuid4

import msgspec

from chat import metrics
from chat.errors import HistoryUnavailable
from chat.history import Exchange
from chat.link import Answers, Command, Link

logger = logging.getLogger(__name__)

READ_BUDGET = 1.0
"""Seconds that a chat waits for its history, over a hiccup of Redis."""
STORE_BUDGET = 1.0
"""Seconds that the end of a reply waits for its exchange to be stored."""
STORE_TIMEOUT = 30.0
"""Seconds after which an exchange that cannot be stored is lost."""
FIRST_PAUSE = 0.05
"""Seconds until an operation is tried again; twice as many each further time."""
LONGEST_PAUSE = 1.0
CLOSE_TIMEOUT = 3.0
"""Seconds that the end of the process waits for what is still to be stored."""
COUNT_INTERVAL = 60.0
"""Seconds that a count of the conversations stays good: it takes Redis a look at every key."""

# Appending is atomic; and when an answer was lost and it is done again, it changes nothing.
APPEND = """
if not redis.call('LPOS', KEYS[1], ARGV[1]) then
    redis.call('RPUSH', KEYS[1], ARGV[1])
    redis.call('LTRIM', KEYS[1], -ARGV[2], -1)
end
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""


class _Stored(msgspec.Struct, array_like=True):
    """An exchange as it stands in Redis; the id tells it from one that says the same."""

    id: str
    exchange: Exchange


_decoder = msgspec.json.Decoder(_Stored)


class SharedHistory:
    """The store that replicas share; an idle conversation goes after `ttl` seconds."""

    def __init__(
        self,
        link: Link,
        *,
        max_exchanges: int,
        ttl: float,
        count_interval: float = COUNT_INTERVAL,
    ) -> None:
        self._link = link
        self._max_exchanges = max_exchanges
        self._ttl = int(ttl * 1000)
        self._count_interval = count_interval
        self._counted = (0, float("-inf"))
        self._storing: set[asyncio.Task[None]] = set()
        self._late: dict[str, asyncio.Task[None]] = {}
        """What is stored in the background, after the end of its reply."""

    async def read(self, conversation: str) -> tuple[Exchange, ...]:
        key = _key(conversation)
        await self._catch_up(key)
        commands: list[Command] = [("LRANGE", key, 0, -1), ("PEXPIRE", key, self._ttl)]
        stored, _ = await self._ask(commands, READ_BUDGET)
        return tuple(_exchanges(stored))

    async def append(self, conversation: str, exchange: Exchange) -> None:
        """Store one exchange; where that takes longer than its budget, go on in the background."""
        key = _key(conversation)
        stored = msgspec.json.encode(_Stored(uuid4().hex, exchange))
        command = ("EVAL", APPEND, 1, key, stored, self._max_exchanges, self._ttl)
        storing = asyncio.create_task(self._store(command, self._late.get(key)))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)
        await asyncio.wait([storing], timeout=STORE_BUDGET)
        if not storing.done():
            self._late[key] = storing
            storing.add_done_callback(partial(self._forget_late, key))

    async def forget(self, conversation: str) -> None:
        key = _key(conversation)
        await self._catch_up(key)
        await self._ask([("DEL", key)], READ_BUDGET)

    async def count(self) -> int:
        """Return how many conversations are kept, as of a while ago; the last known number where
        Redis is not there."""
        number, counted_at = self._counted
        if time.monotonic() - counted_at < self._count_interval:
            return number
        try:
            self._counted = (await self._link.count("chat:history:*"), time.monotonic())
        except TimeoutError:
            return number
        return self._counted[0]

    async def aclose(self) -> None:
        """Wait a while for what is still to be stored, and give up the rest."""
        storing = list(self._storing)
        if storing:
            await asyncio.wait(storing, timeout=CLOSE_TIMEOUT)
        for task in storing:
            task.cancel()
        await asyncio.gather(*storing, return_exceptions=True)

    async def _catch_up(self, key: str) -> None:
        """Let what was said before be stored before what comes now."""
        if late := self._late.get(key):
            await asyncio.wait([late], timeout=READ_BUDGET)
            if not late.done():
                raise HistoryUnavailable

    def _forget_late(self, key: str, storing: asyncio.Task[None]) -> None:
        if self._late.get(key) is storing:
            del self._late[key]

    async def _store(self, command: Command, before: asyncio.Task[None] | None) -> None:
        if before:
            await asyncio.wait([before])
        try:
            await self._ask([command], STORE_TIMEOUT)
        except (HistoryUnavailable, asyncio.CancelledError):
            metrics.HISTORY_LOST.inc()
            logger.error("an exchange is lost: Redis could not be reached to store it")

    async def _ask(self, commands: list[Command], budget: float) -> list[Any]:
        """
        Ask again and again, until Redis answers.

        Raises:
            HistoryUnavailable: it did not within `budget` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + budget, FIRST_PAUSE
        while (left := deadline - loop.time()) > 0:
            answers: Answers = await self._link.ask(commands, budget=min(left, READ_BUDGET))
            if answers is not None:
                return answers
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
            pause = min(2 * pause, LONGEST_PAUSE)
        raise HistoryUnavailable


def _exchanges(stored: Iterable[bytes]) -> Iterator[Exchange]:
    for each in stored:
        with suppress(msgspec.MsgspecError):  # of another version, or of somebody else
            yield _decoder.decode(each).exchange


def _key(conversation: str) -> str:
    return "chat:history:" + sha256(conversation.encode()).hexdigest()
