"""A reply that runs by itself, into a text that transports read from a position."""

import asyncio
from sys import getsizeof

import msgspec

from chat import errors, metrics
from chat.reply import Reply
from chat.storage.handover import Entry


class End(msgspec.Struct):
    """How a reply has ended."""

    error: str = ""
    truncated: str | None = None
    is_cancelled: bool = False

    def check(self, error: errors.ChatError | None = None) -> None:
        """Raise `ChatError` unless the reply was completed."""
        if self.is_cancelled:
            raise errors.ReplyCancelled
        if self.error:
            raise error or errors.ReplyFailed(self.error)


class KeptReply:
    """Its text, how it has ended, and who reads it."""

    task: asyncio.Task[None]
    end: End | None = None
    error: errors.ChatError | None = None
    reader: object = None  # the newest; a string if it is elsewhere
    heard_at = 0.0  # when a reader elsewhere last wrote
    written: int | None = None  # up to where others can read it
    expiry: asyncio.TimerHandle | None = None
    waiting: asyncio.Future[None] | None = None

    def __init__(self, key: str, fingerprint: str, reply: Reply) -> None:
        self.key, self.fingerprint, self.reply = key, fingerprint, reply
        self.tokens: list[str] = []
        self.length = self.readers = 0

    @property
    def size(self) -> int:
        return sum(map(getsizeof, self.tokens))

    def append(self, tokens: list[str]) -> None:
        self.tokens += tokens
        self.length += sum(map(len, tokens))
        if self.reader is None:
            metrics.CHAT_UNATTENDED_TOKENS.inc(len(tokens))
        self.wake()

    def wake(self) -> None:
        if self.waiting and not self.waiting.done():
            self.waiting.set_result(None)

    def set_unattended(self, is_unattended: bool) -> None:
        if is_unattended != (self.reply.unattended_since is not None):
            metrics.CHAT_REPLIES_UNATTENDED.inc(1 if is_unattended else -1)
        now = asyncio.get_running_loop().time()
        self.reply.unattended_since = now if is_unattended else None

    def unwritten(self, begin: int) -> list[Entry]:
        """Return what other replicas cannot read yet."""
        entries = list[Entry]()
        if begin < self.length:
            entries.append(Entry(self.length, "text", "".join(self.tokens)[begin:]))
        if self.end and begin <= self.length:
            entries.append(Entry(self.length + 1, "end", msgspec.json.encode(self.end).decode()))
        return entries
