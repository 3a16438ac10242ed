"""
Conversations: the exchanges that stay, and the store that keeps them in memory.

The service knows a store only through `History`.
"""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from chat.messages import Message

SHARED = "shared"
"""The conversation of all callers who name none; too short to be a caller's own id."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a caller asked and what was replied; stored whole or not at all."""

    messages: tuple[Message, ...]
    """The user's message or messages, and at the end the assistant's reply."""
    preceding: int = 0
    """How many of the exchanges before it went along to Groq, so that the next prompt can
    begin where this one's began (see `chat.context`)."""


def flatten(exchanges: Iterable[Exchange]) -> list[Message]:
    """Return the messages of the exchanges, oldest first."""
    return [message for exchange in exchanges for message in exchange.messages]


class History(Protocol):
    """Where conversations are kept."""

    async def read(self, conversation: str) -> tuple[Exchange, ...]:
        """Return a snapshot of the conversation, oldest first; empty where there is none."""

    async def append(self, conversation: str, *exchanges: Exchange) -> None:
        """Store exchanges whole and in one step, forgetting the oldest beyond the limit."""

    async def forget(self, conversation: str) -> None:
        """Forget the conversation, whether or not there is one."""

    async def count(self) -> int:
        """Return how many conversations are kept."""

    async def flush(self) -> None:
        """Wait until all is stored that was appended."""

    async def aclose(self) -> None:
        """End what still runs in the background."""


@dataclass(slots=True)
class _Conversation:
    exchanges: tuple[Exchange, ...]
    size: int
    last_used: float


class MemoryHistory:
    """
    The store of a single process, safe to use from many threads and event loops.

    Anonymous callers cannot fill the memory: the least recently used conversations go when there
    are more than `max_conversations`, or when their texts take more than `max_bytes`, and idle
    ones go after `ttl` seconds.
    """

    def __init__(
        self,
        *,
        max_exchanges: int,
        max_conversations: int,
        max_bytes: int,
        ttl: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_exchanges = max_exchanges
        self._max_conversations = max_conversations
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._conversations: OrderedDict[str, _Conversation] = OrderedDict()
        self._bytes = 0

    async def read(self, conversation: str) -> tuple[Exchange, ...]:
        with self._lock:
            self._expire()
            kept = self._conversations.get(conversation)
            if kept is None:
                return ()
            self._touch(conversation, kept)
            return kept.exchanges

    async def append(self, conversation: str, *exchanges: Exchange) -> None:
        with self._lock:
            self._expire()
            kept = self._conversations.setdefault(conversation, _Conversation((), 0, 0.0))
            self._touch(conversation, kept)
            kept.exchanges = (*kept.exchanges, *exchanges)[-self._max_exchanges :]
            size = sum(map(_size, kept.exchanges))
            self._bytes += size - kept.size
            kept.size = size
            self._evict()

    async def forget(self, conversation: str) -> None:
        with self._lock:
            self._remove(conversation)

    async def count(self) -> int:
        with self._lock:
            self._expire()
            return len(self._conversations)

    async def flush(self) -> None:
        """It is stored already."""

    async def aclose(self) -> None:
        """There is nothing to end."""

    def _touch(self, conversation: str, kept: _Conversation) -> None:
        kept.last_used = self._clock()
        self._conversations.move_to_end(conversation)

    def _expire(self) -> None:
        oldest_allowed = self._clock() - self._ttl
        while self._conversations:
            conversation, kept = next(iter(self._conversations.items()))
            if kept.last_used > oldest_allowed:
                return
            self._remove(conversation)

    def _evict(self) -> None:
        while len(self._conversations) > 1 and (
            len(self._conversations) > self._max_conversations or self._bytes > self._max_bytes
        ):
            self._remove(next(iter(self._conversations)))

    def _remove(self, conversation: str) -> None:
        if kept := self._conversations.pop(conversation, None):
            self._bytes -= kept.size


MESSAGE_BYTES = 150
"""What a message takes beside its text, about."""


def _size(exchange: Exchange) -> int:
    texts = sum(sys.getsizeof(message.content) for message in exchange.messages)
    return texts + MESSAGE_BYTES * len(exchange.messages)
