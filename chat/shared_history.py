"""
Conversations in Redis, for many replicas: the same operations as the store in memory.

Each conversation is a list under a key of its own, so that a Redis Cluster can spread them. The key
has a hash of the id: a dump of the keys opens no conversation.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import uuid4

import msgspec

from chat import metrics
from chat.errors import HistoryUnavailable
from chat.history import Exchange
from chat.link import Command, Link

logger = logging.getLogger(__name__)

BUDGET = 1.0
"""Seconds that a chat waits for its history, or for its exchange to be stored."""
STORE_TIMEOUT = 30.0
"""Seconds after which an exchange that cannot be stored is lost."""
FIRST_PAUSE = 0.05
"""Seconds until an operation is tried again; twice as many each further time."""
LONGEST_PAUSE = 1.0
CLOSE_TIMEOUT = 3.0
"""Seconds that the end of the process waits for what is still to be stored."""
PREFIX = "chat:history:"

# Appending is atomic; and when an answer was lost and it is done again, it changes nothing. What
# was said before the conversation was forgotten, and comes late, stays out: ARGV[2] is its age.
APPEND = """
local clock = redis.call('TIME')
local said_at = clock[1] * 1000 + clock[2] / 1000 - ARGV[2]
local forgotten_at = redis.call('GET', KEYS[2])
if forgotten_at and said_at <= tonumber(forgotten_at) then
    return 0
end
if not redis.call('LPOS', KEYS[1], ARGV[#ARGV]) then
    for number = 4, #ARGV do
        redis.call('RPUSH', KEYS[1], ARGV[number])
    end
    redis.call('LTRIM', KEYS[1], -ARGV[1], -1)
end
return redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""
FORGET = """
local clock = redis.call('TIME')
local now = string.format('%.0f', clock[1] * 1000 + clock[2] / 1000)
redis.call('SET', KEYS[2], now, 'PX', ARGV[1])
return redis.call('DEL', KEYS[1])
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
    ) -> None:
        self._link = link
        self._max_exchanges = max_exchanges
        self._ttl = int(ttl * 1000)
        self._counted = 0
        self._storing: set[asyncio.Task[None]] = set()
        self._late: dict[str, asyncio.Task[None]] = {}
        """What is stored in the background, after the end of its reply."""

    async def read(self, conversation: str) -> tuple[Exchange, ...]:
        key = _key(conversation)
        stored, _ = await self._ask_soon(key, [("LRANGE", key, 0, -1), ("PEXPIRE", key, self._ttl)])
        return tuple(_exchanges(stored))

    async def append(self, conversation: str, *exchanges: Exchange) -> None:
        """Store exchanges; where that takes longer than its budget, go on in the background."""
        key = _key(conversation)
        newest = exchanges[-self._max_exchanges :]
        stored = [msgspec.json.encode(_Stored(uuid4().hex, each)) for each in newest]
        storing = asyncio.create_task(self._store(key, stored, self._late.get(key)))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)
        await asyncio.wait([storing], timeout=BUDGET)
        if not storing.done():
            self._late[key] = storing
            storing.add_done_callback(partial(self._forget_late, key))

    async def forget(self, conversation: str) -> None:
        key = _key(conversation)
        late = int(2 * STORE_TIMEOUT * 1000)
        await self._ask_soon(key, [("EVAL", FORGET, 2, key, _forgotten(key), late)])

    async def count(self) -> int:
        """Return about how many conversations are kept; the last known number where Redis is not
        there."""
        with suppress(TimeoutError):
            self._counted = await self._link.count(PREFIX)
        return self._counted

    async def flush(self) -> None:
        while self._storing:
            await asyncio.wait(self._storing)

    async def aclose(self) -> None:
        """Wait a while for what is still to be stored, and give up the rest."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.flush()
        storing = list(self._storing)
        for task in storing:
            task.cancel()
        await asyncio.gather(*storing, return_exceptions=True)

    def _forget_late(self, key: str, storing: asyncio.Task[None]) -> None:
        if self._late.get(key) is storing:
            del self._late[key]

    async def _store(
        self, key: str, stored: list[bytes], before: asyncio.Task[None] | None
    ) -> None:
        loop = asyncio.get_running_loop()
        said_at = loop.time()

        def commands() -> list[Command]:
            age = round((loop.time() - said_at) * 1000)
            keys = (2, key, _forgotten(key))
            return [("EVAL", APPEND, *keys, self._max_exchanges, age, self._ttl, *stored)]

        try:
            async with asyncio.timeout(STORE_TIMEOUT):
                if before:
                    await asyncio.wait([before])
                await self._ask(commands)
        except (TimeoutError, asyncio.CancelledError):
            metrics.HISTORY_LOST.inc(len(stored))
            logger.error("exchanges are lost (%d): Redis did not take them", len(stored))

    async def _ask_soon(self, key: str, commands: list[Command]) -> list[Any]:
        """
        Ask once all is stored that was said before; again and again, until Redis answers.

        Raises:
            HistoryUnavailable: it does not within the budget.
        """
        try:
            async with asyncio.timeout(BUDGET + FIRST_PAUSE):
                if late := self._late.get(key):
                    await asyncio.wait([late])
                return await self._ask(lambda: commands)
        except TimeoutError:
            raise HistoryUnavailable from None

    async def _ask(self, commands: Callable[[], list[Command]]) -> list[Any]:
        pause = FIRST_PAUSE
        while (answers := await self._link.ask(commands(), budget=BUDGET)) is None:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return answers


def _exchanges(stored: Iterable[bytes]) -> Iterator[Exchange]:
    for each in stored:
        with suppress(msgspec.MsgspecError):  # of another version, or of somebody else
            yield _decoder.decode(each).exchange


def _key(conversation: str) -> str:
    return PREFIX + sha256(conversation.encode()).hexdigest()


def _forgotten(key: str) -> str:
    """Return the key that tells when a conversation was forgotten; by its braces, a cluster keeps
    it where it keeps the other."""
    return f"chat:forgotten:{{{key}}}"
