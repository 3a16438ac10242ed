"""Conversations in the memory of one process."""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from chat import metrics
from chat.config import Settings
from chat.messages import Exchange, flatten

MESSAGE_BYTES = 150  # about what a message takes beside its text


class Kept(NamedTuple):
    exchanges: Sequence[Exchange]
    size: int
    last_used: float


class MemoryHistory:
    """
    The store of a single process, safe to use from many threads. The least recently used
    conversations are forgotten beyond MAX_CONVERSATIONS, MAX_HISTORY_BYTES or CONVERSATION_TTL.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._lock = threading.Lock()
        self._conversations: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0
        metrics.HISTORY_CONVERSATIONS.set_function(self.count)

    async def read(self, conversation: str) -> Sequence[Exchange]:
        with self._lock:
            exchanges, size = self._take(conversation)
            if exchanges:
                self._put(conversation, exchanges, size)
            return exchanges

    async def append(self, conversation: str, exchange: Exchange) -> None:
        with self._lock:
            exchanges, size = self._take(conversation)
            exchanges, limit = (*exchanges, exchange), self._settings.max_exchanges
            size += _size((exchange,)) - _size(exchanges[:-limit])
            self._put(conversation, exchanges[-limit:], size)

    async def replace(self, conversation: str, exchanges: Sequence[Exchange]) -> None:
        with self._lock:
            self._take(conversation)
            newest = tuple(exchanges[-self._settings.max_exchanges :])
            self._put(conversation, newest, _size(newest))

    async def forget(self, conversation: str) -> None:
        with self._lock:
            self._take(conversation)

    async def aclose(self) -> None: ...  # nothing is still being stored

    def count(self) -> int:
        with self._lock:
            self._take("")  # lets idle ones go
            return len(self._conversations)

    def _take(self, conversation: str) -> tuple[Sequence[Exchange], int]:
        """Take a conversation out, if it is there, and those that have been idle for too long."""
        oldest_allowed = self._clock() - self._settings.conversation_ttl
        while self._conversations:
            oldest = next(iter(self._conversations))
            if self._conversations[oldest].last_used > oldest_allowed:
                break
            self._bytes -= self._conversations.pop(oldest).size
        exchanges, size, _ = self._conversations.pop(conversation, Kept((), 0, 0.0))
        self._bytes -= size
        return exchanges, size

    def _put(self, conversation: str, exchanges: Sequence[Exchange], size: int) -> None:
        """Put a conversation in as the newest; let the oldest go beyond the limits."""
        self._conversations[conversation] = Kept(exchanges, size, self._clock())
        self._bytes += size
        most, bytes_ = self._settings.max_conversations, self._settings.max_history_bytes
        while (count := len(self._conversations)) > 1 and (count > most or self._bytes > bytes_):
            self._bytes -= self._conversations.popitem(last=False)[1].size


def _size(exchanges: Sequence[Exchange]) -> int:
    return sum(MESSAGE_BYTES + sys.getsizeof(each.content) for each in flatten(exchanges))
