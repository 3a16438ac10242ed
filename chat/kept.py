"""A reply that runs by itself, into a text that transports read from a position."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from sys import getsizeof
from typing import Any

import msgspec

from chat import errors, metrics
from chat.reply import Reply
from chat.storage.handover import End, Entry


class KeptReply:
    """Its text, how it has ended, and who reads it."""

    task: asyncio.Task[None]
    end: End | None = None
    error: errors.ChatError | None = None
    reader: object = None  # the newest; a string if it is elsewhere
    heard_at = 0.0  # when a reader elsewhere last wrote
    expiry: asyncio.TimerHandle | None = None
    _waiting: asyncio.Future[None] | None = None

    def __init__(self, key: str, fingerprint: str, reply: Reply) -> None:
        self.key, self.fingerprint, self.reply = key, fingerprint, reply
        self.tokens: list[str] = []
        self.length, self.readers = 0, 0
        self.written: int | None = None  # up to where others can read it

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
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)

    def set_unattended(self, is_unattended: bool) -> None:
        if is_unattended != (self.reply.unattended_since is not None):
            metrics.CHAT_REPLIES_UNATTENDED.inc(1 if is_unattended else -1)
        now = asyncio.get_running_loop().time()
        self.reply.unattended_since = now if is_unattended else None

    async def cancel(self) -> None:
        """End it for a client that asks for no more; return once Groq is stopped."""
        self.reply.cancel()
        await asyncio.wait([self.task])

    async def read(self, after: int, reader: object) -> AsyncGenerator[list[str], None]:
        """Give what is there after a position as one token, and then each token as it comes."""
        number = len(self.tokens)
        if after < self.length:
            yield ["".join(self.tokens)[after:]]
        while self.reader is reader:
            if number < len(self.tokens):
                some = self.tokens[number:]
                number += len(some)
                yield some
            elif self.end:
                return
            else:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
        raise errors.ReplyTakenOver

    def unwritten(self, begin: int) -> list[Entry]:
        """Return what others cannot read yet."""
        entries = list[Entry]()
        if begin < self.length:
            entries.append(Entry(self.length, "text", "".join(self.tokens)[begin:]))
        if self.end and begin <= self.length:
            entries.append(Entry(self.length + 1, "end", msgspec.json.encode(self.end).decode()))
        return entries


Attend = Callable[[KeptReply, object], Awaitable[None]]
Leave = Callable[[KeptReply, object], None]


class Reading:
    """A transport's view of a reply: its tokens, and afterwards how it has ended."""

    place = "here"
    end: End | None = None
    truncated: str | None = None

    def __init__(self, kept: KeptReply, after: int, attend: Attend, leave: Leave) -> None:
        if kept.end and after == kept.length + 1:
            raise errors.NothingLeft
        if after > kept.length:
            raise errors.BadPosition(after)
        self.after, self._kept, self._attend, self._leave = after, kept, attend, leave
        self.is_after_cr = "".join(kept.tokens)[:after].endswith("\r")
        self.cancel = kept.cancel

    @asynccontextmanager
    async def tokens(self) -> AsyncIterator[AsyncGenerator[list[str], None]]:
        """Give the tokens for as long as the context lasts; raise `ChatError` as the reply did."""
        kept, reader = self._kept, object()
        try:
            await self._attend(kept, reader)
            async with aclosing(kept.read(self.after, reader)) as tokens:
                yield tokens
            if kept.end:
                if kept.tokens or not kept.error:  # otherwise it is as if it had never begun
                    self.end, self.truncated = kept.end, kept.end.truncated
                kept.end.check(kept.error)
        finally:
            self._leave(kept, reader)

    def summary(self) -> dict[str, Any]:
        """Return what the log line of the request says."""
        return self._kept.reply.summary() if self._kept.end else {"outcome": "detached"}
