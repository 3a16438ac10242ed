"""Conversations: in the memory of one process, or in Redis for all replicas."""

import asyncio
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol
from uuid import uuid4

import msgspec

from chat import metrics
from chat.config import Settings
from chat.errors import HistoryUnavailable
from chat.messages import Exchange
from chat.storage.redis import Command, RedisClient, hashed_key

logger = logging.getLogger(__name__)

SHARED = "shared"  # the conversation of all clients that name none; too short for a client's own id
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
Exchanges = tuple[Exchange, ...]


class History(Protocol):
    """Each operation is atomic; storing outlasts its caller and raises no `HistoryUnavailable`."""

    async def read(self, conversation: str) -> Sequence[Exchange]: ...  # a snapshot, oldest first
    # Adds exchanges, or with `anew` puts them in place of the others; drops the oldest.
    async def store(self, conversation: str, exchanges: Sequence[Exchange], anew: bool) -> None: ...
    async def forget(self, conversation: str) -> None: ...  # whether or not there is one


class Kept(NamedTuple):
    exchanges: Exchanges
    size: int  # when it was stored: a text grows once it has been encoded
    last_used: float


class MemoryHistory:
    """The store of a single process, safe to use from many threads."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._conversations: OrderedDict[str, Kept] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()
        metrics.HISTORY_CONVERSATIONS.set_function(self.count)

    async def read(self, conversation: str) -> Sequence[Exchange]:
        return self._use(conversation, lambda exchanges: exchanges)

    async def store(self, conversation: str, exchanges: Sequence[Exchange], anew: bool) -> None:
        self._use(conversation, lambda old: (*(() if anew else old), *exchanges))

    async def forget(self, conversation: str) -> None:
        self._use(conversation, lambda _: ())

    async def aclose(self) -> None: ...  # nothing is still being stored

    def count(self) -> int:
        with self._lock:
            self._forget_oldest()
            return len(self._conversations)

    def _use(self, conversation: str, change: Callable[[Exchanges], Exchanges]) -> Exchanges:
        """Return what a conversation has become, which is now the newest, or gone if empty."""
        with self._lock:
            self._forget_oldest()
            old = self._conversations.pop(conversation, Kept((), 0, 0.0))
            exchanges = change(old.exchanges)[-self._settings.max_exchanges :]
            size = old.size if exchanges is old.exchanges else _size(exchanges)
            self._bytes += size - old.size
            if exchanges:
                self._conversations[conversation] = Kept(exchanges, size, self._clock())
            return exchanges

    def _forget_oldest(self) -> None:
        """Forget the least recently used conversations that are idle or exceed the limits."""
        kept, limits = self._conversations, self._settings
        while kept:
            oldest, count = next(iter(kept.values())), len(kept)
            is_idle = self._clock() - oldest.last_used >= limits.conversation_ttl
            is_over = count > limits.max_conversations or self._bytes > limits.max_history_bytes
            if not is_idle and (count == 1 or not is_over):
                break
            self._bytes -= kept.popitem(last=False)[1].size


def _size(exchanges: Exchanges) -> int:
    texts = [message.content for exchange in exchanges for message in exchange.messages]
    return sum(map(sys.getsizeof, texts)) + 150 * len(texts)  # about what they take beside it


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
