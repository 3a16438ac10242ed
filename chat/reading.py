"""What a transport reads of a kept reply: from this process, or through Redis from its owner."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from math import inf
from typing import Any
from uuid import uuid4

import msgspec

from chat import errors, metrics
from chat.kept import End, KeptReply
from chat.storage.handover import Entry, Handover

READ_INTERVAL = 0.05  # seconds between two looks at a reply that runs elsewhere
FOLLOW_INTERVAL = 2.0  # seconds between two letters, which tell the owner who reads
SILENT_OWNER = 1.5  # seconds without a sign of life after which the owner is gone
REDIS_PATIENCE = 10.0  # seconds to wait for Redis
BEYOND = "beyond"  # in place of a reader whose position the text does not have

Attend = Callable[[KeptReply, object], Awaitable[None]]
Leave = Callable[[KeptReply, object], None]


class Reading:
    """Its tokens, in lists, and afterwards how it has ended."""

    place = "here"
    end: End | None = None
    is_after_cr = False  # the text before what comes next ends with a CR

    def __init__(self, kept: KeptReply, after: int, attend: Attend, leave: Leave) -> None:
        if kept.end and after == kept.length + 1:
            raise errors.NothingLeft
        if after > kept.length:
            raise errors.BadPosition(after)
        self.after, self._kept, self._attend, self._leave = after, kept, attend, leave

    @property
    def truncated(self) -> str | None:
        return self.end.truncated if self.end else None

    @asynccontextmanager
    async def tokens(self) -> AsyncIterator[AsyncGenerator[list[str], None]]:
        """Give the tokens for as long as the context lasts; raise `ChatError` as the reply did."""
        async with aclosing(self._read()) as tokens:
            yield tokens

    async def cancel(self) -> None:
        """End the reply for a client that asks for no more; return once Groq is stopped."""
        self._kept.reply.cancel()
        await asyncio.wait([self._kept.task])

    def summary(self) -> dict[str, Any]:
        """Return what the log line of the request says."""
        return self._kept.reply.summary() if self._kept.end else {"outcome": "detached"}

    async def _read(self) -> AsyncGenerator[list[str], None]:
        kept, reader, number = self._kept, object(), len(self._kept.tokens)
        try:
            await self._attend(kept, reader)
            number, text = len(kept.tokens), "".join(kept.tokens)
            self.is_after_cr = text[: self.after].endswith("\r")
            if self.after < len(text):
                yield [text[self.after :]]  # what was missed is one token
            while kept.reader is reader:
                if some := kept.tokens[number:]:
                    number += len(some)
                    yield some
                elif kept.end:
                    # One that failed before its first token is as if it had never begun.
                    self.end = kept.end if kept.tokens or not kept.error else None
                    kept.end.check(kept.error)
                    return
                else:
                    kept.waiting = asyncio.get_running_loop().create_future()
                    await kept.waiting
            raise errors.ReplyTakenOver
        finally:
            self._leave(kept, reader)


class Elsewhere(Reading):
    """A reply that another replica runs."""

    place = "elsewhere"

    def __init__(self, handover: Handover, key: str, owner: str, after: int) -> None:
        self.after = self._position = after
        self._handover, self._key, self._owner = handover, key, owner
        self._reader, self._asked_at = uuid4().hex, -inf

    async def cancel(self) -> None:
        await self._handover.write_to(self._owner, f"cancel {self._key}")
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while not self.end:
                    for entry in await self._handover.read(self._key, self._position):
                        self._take(*entry)
                    await asyncio.sleep(READ_INTERVAL)
                return
        raise errors.ReplyUnavailable

    def summary(self) -> dict[str, Any]:
        return {"outcome": "resumed" if self.end else "detached"}

    async def _read(self) -> AsyncGenerator[list[str], None]:
        time = asyncio.get_running_loop().time
        heard_at = reached_at = time()
        while self.end is None:
            try:
                for entry in await self._look(time()):
                    if text := self._take(*entry):
                        heard_at = time()
                        yield [text]
                reached_at = time()
                if await self._handover.is_alive(self._owner):
                    heard_at = time()
            except errors.ReplyUnavailable:
                heard_at = time()
                if heard_at - reached_at > REDIS_PATIENCE:
                    raise
            if time() - heard_at > SILENT_OWNER and not self.end:
                metrics.resumes["lost"].inc()
                raise errors.ReplyNotFound
            await asyncio.sleep(0 if self.end else READ_INTERVAL)
        self.end.check()

    async def _look(self, now: float) -> list[Entry]:
        """Return what may be new; tell the owner now and then who reads, and what they have."""
        handover, key = self._handover, self._key
        if self._asked_at == -inf:
            await handover.become_reader(key, self._reader)
        if now - self._asked_at >= FOLLOW_INTERVAL:
            letter = f"follow {key} {self._reader} {self._position}"
            await handover.write_to(self._owner, letter)
            self._asked_at = now
        if (reader := await handover.reader(key)) == BEYOND:
            raise errors.BadPosition(self._position)
        if reader not in (self._reader, ""):
            raise errors.ReplyTakenOver
        return await handover.read(key, self._position)

    def _take(self, position: int, kind: str, text: str) -> str:
        """Return what an entry adds to the text."""
        begin, place = position - (len(text) if kind == "text" else 1), self._position
        if kind == "gone":
            raise errors.ReplyNotFound
        if kind == "end" and place == position:
            raise errors.NothingLeft
        if kind == "end" and place > position:
            raise errors.BadPosition(place)
        is_second_half = 0 < begin == self.after and text.startswith("\n")  # of a CRLF, perhaps
        if begin > place or (is_second_half and place == begin):
            self._asked_at = -inf  # something is missing: the owner writes all of it
        elif kind == "end":
            self.end = msgspec.json.decode(text, type=End)
        elif position > place:
            self._position = position
            self.is_after_cr = text[: place - begin].endswith("\r")
            return text[place - begin :]
        return ""
