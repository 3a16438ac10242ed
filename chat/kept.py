"""A reply that runs by itself, and what a transport reads of it: from here, or through Redis."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from itertools import accumulate
from math import inf
from sys import getsizeof
from typing import Any
from uuid import uuid4

from chat import errors, metrics
from chat.reply import Reply
from chat.storage.handover import BEYOND, Entry, Handover

READ_INTERVAL, LONGEST_INTERVAL = 0.05, 0.5  # seconds between two looks at a reply elsewhere
ASK_AFTER = 0.5  # seconds of silence after which to ask whether the owner is alive
FOLLOW_INTERVAL = 2.0  # seconds between two letters, which tell the owner who reads
SILENT_OWNER = 1.5  # seconds without a sign of life after which the owner is gone
REDIS_PATIENCE = 10.0  # seconds to wait for Redis

Leave = Callable[["KeptReply", object], None]


class KeptReply:
    """Its text, how it has ended, and who reads it."""

    task: asyncio.Task[None]
    end: Entry | None = None
    error: errors.ChatError | None = None
    reader: object = None  # the newest; a string if it is elsewhere
    written: int | None = None  # up to where others can read it
    _timer: asyncio.TimerHandle | None = None  # until a reader is missed, or it is forgotten

    def __init__(self, key: str, fingerprint: str, reply: Reply) -> None:
        self.key, self.fingerprint, self.reply = key, fingerprint, reply
        self.tokens: list[str] = []
        self.length = self.readers = 0
        self.changed = asyncio.Event()

    @property
    def size(self) -> int:
        return 4_000 + sum(map(getsizeof, self.tokens))  # about what surrounds them

    def append(self, tokens: list[str]) -> None:
        self.tokens += tokens
        self.length += sum(map(len, tokens))
        if self.reader is None:
            metrics.CHAT_UNATTENDED_TOKENS.inc(len(tokens))
        self.changed.set()

    def set_reader(self, reader: object, timer: asyncio.TimerHandle | None = None) -> None:
        """Give it to a reader or to nobody; the one before is told so, and its timer stops."""
        if self._timer:
            self._timer.cancel()
        self.readers += bool(reader and reader != self.reader)
        self.reader, self._timer = reader, timer
        self.note_change()

    def note_change(self) -> None:
        """Wake its reader, and count it if it runs and has none."""
        is_unattended, since = not (self.reader or self.end), self.reply.unattended_since
        metrics.CHAT_REPLIES_UNATTENDED.inc(is_unattended - (since < inf))
        now = asyncio.get_running_loop().time()
        self.reply.unattended_since = now if is_unattended else inf
        self.changed.set()

    def unwritten(self) -> list[Entry]:
        """Return what other replicas cannot read yet."""
        begin, entries = self.written or 0, list[Entry]()
        if begin < self.length:
            entries.append(Entry(self.length, "text", "".join(self.tokens)[begin:]))
        if self.end and begin < self.end.position:
            entries.append(self.end)
        return entries


class Reading:
    """The tokens from a position on, in lists, and afterwards how the reply has ended."""

    place, reader = "here", ""
    end: Entry | None = None
    truncated: str | None = None
    is_after_cr = False  # the text before what comes next ends with a CR

    def __init__(self, kept: KeptReply, after: int, leave: Leave) -> None:
        _check(after, kept.length, has_ended=kept.end is not None)
        self.after = self.position = after
        self._kept, self._leave = kept, leave

    def tokens(self) -> aclosing[AsyncGenerator[list[str], None]]:
        """Give the tokens for as long as the context lasts; raise `ChatError` as the reply did."""
        return aclosing(self._read())

    def ends(self, tokens: Sequence[str]) -> list[int]:
        """Return the position at the end of each token, and go there."""
        _, *ends = accumulate(map(len, tokens), initial=self.position)
        self.position = ends[-1]
        return ends

    async def cancel(self) -> None:
        """End the reply for a client that asks for no more; return once Groq is stopped."""
        self._kept.reply.cancel()
        await asyncio.wait([self._kept.task])

    def summary(self) -> dict[str, Any]:
        """Return what the log line of the request says."""
        if not self._kept.end:
            return {"outcome": "detached"}
        return {k: v for k, v in self._kept.reply.summary().items() if k != "duration_ms"}

    async def _read(self) -> AsyncGenerator[list[str], None]:
        kept = self._kept
        kept.set_reader(self)
        try:
            number, text = len(kept.tokens), "".join(kept.tokens)
            self.is_after_cr = text[: self.after].endswith("\r")
            if self.after < len(text):
                yield [text[self.after :]]  # what was missed is one token
            while kept.reader is self:
                kept.changed.clear()
                if some := kept.tokens[number:]:
                    number += len(some)
                    yield some
                elif kept.end:
                    # One that failed before its first token is as if it had never begun.
                    self.end = kept.end if kept.tokens or kept.end.kind != "failed" else None
                    self.truncated = kept.reply.truncated
                    if kept.error:
                        raise kept.error
                    return
                else:
                    await kept.changed.wait()
            raise errors.ReplyTakenOver
        finally:
            self._leave(kept, self)


class Elsewhere(Reading):
    """A reply that another replica runs."""

    place = "elsewhere"

    def __init__(self, handover: Handover, key: str, owner: str, after: int) -> None:
        self.after = self.position = self._fetched = after
        self._handover, self._key, self._owner = handover, key, owner
        self.reader, self._asked_at = uuid4().hex, -inf

    async def cancel(self) -> None:
        await self._handover.write_to(self._owner, f"cancel {self._key}")
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    for _, kind, _ in await self._handover.read(self._key, self._fetched):
                        if kind == "gone":
                            raise errors.ReplyNotFound
                        if kind != "text":
                            return
                    await asyncio.sleep(READ_INTERVAL)
        raise errors.ReplyUnavailable

    def summary(self) -> dict[str, Any]:
        return {"outcome": "resumed" if self.end else "detached"}

    async def _read(self) -> AsyncGenerator[list[str], None]:
        time = asyncio.get_running_loop().time
        heard_at = reached_at = came_at = time()
        while self.end is None:
            try:
                for entry in await self._look(time()):
                    if text := self._take(*entry):
                        yield [text]
                        heard_at = came_at = time()  # the client may have taken long
                reached_at = time()
                if time() - heard_at > ASK_AFTER and await self._handover.is_alive(self._owner):
                    heard_at = time()
            except errors.ReplyUnavailable:
                heard_at = time()
                if heard_at - reached_at > REDIS_PATIENCE:
                    raise
            if time() - heard_at > SILENT_OWNER and not self.end:
                metrics.resumes["lost"].inc()
                raise errors.ReplyNotFound
            pause = min(max(READ_INTERVAL, (time() - came_at) / 10), LONGEST_INTERVAL)
            await asyncio.sleep(0 if self.end else pause)
        _, kind, text = self.end
        if kind != "completed":
            raise errors.ReplyCancelled if kind == "cancelled" else errors.ReplyFailed(text)
        self.truncated = text

    async def _look(self, now: float) -> list[Entry]:
        """Return what may be new; tell the owner now and then who reads, and what they have."""
        if now - self._asked_at >= FOLLOW_INTERVAL:
            letter = f"follow {self._key} {self.reader} {self._fetched}"
            await self._handover.write_to(self._owner, letter)
            self._asked_at = now
        if (reader := await self._handover.reader(self._key)) == BEYOND:
            raise errors.BadPosition(self._fetched)
        if reader not in (self.reader, ""):
            raise errors.ReplyTakenOver
        return await self._handover.read(self._key, self._fetched)

    def _take(self, position: int, kind: str, text: str) -> str:
        """Return what an entry adds to the text."""
        begin, place = position - (len(text) if kind == "text" else 1), self._fetched
        if kind == "gone":
            if text == self.reader:  # an earlier reply of this id may have had others
                raise errors.ReplyNotFound
            return ""
        if kind != "text":
            _check(place, begin, has_ended=True)
        is_second_half = 0 < begin == self.after and text.startswith("\n")  # of a CRLF, perhaps
        if begin > place or (is_second_half and place == begin):
            self._asked_at = -inf  # something is missing: the owner writes all of it
        elif kind != "text":
            self.end = Entry(position, kind, text)
        elif position > place:
            self._fetched = position
            self.is_after_cr = text[: place - begin].endswith("\r")
            return text[place - begin :]
        return ""


def _check(after: int, length: int, *, has_ended: bool) -> None:
    """Raise `ChatError` unless a text has something to read at a position."""
    if has_ended and after == length + 1:
        raise errors.NothingLeft
    if after > length:
        raise errors.BadPosition(after)
