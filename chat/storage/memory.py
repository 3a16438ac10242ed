"""Conversations in the memory of one process."""

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from chat import metrics
from chat.config import Settings
from chat.messages import Exchange

Exchanges = tuple[Exchange, ...]


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
