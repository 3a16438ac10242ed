"""A reply that another replica runs, read through Redis."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from math import inf
from typing import Any
from uuid import uuid4

import msgspec

from chat import errors, metrics
from chat.storage.handover import BEYOND, End, Entry, Handover

READ_INTERVAL = 0.05  # seconds
FOLLOW_INTERVAL = 2.0  # seconds between two letters, which tell the owner that there is a reader
SILENT_OWNER = 1.5  # seconds without a sign of life after which the owner is gone
REDIS_PATIENCE = 10.0  # seconds to wait for Redis
CANCEL_TIMEOUT = 1.0


class Elsewhere:
    """A transport's view of a reply: its tokens, and afterwards how it has ended."""

    place = "elsewhere"
    end: End | None = None
    truncated: str | None = None
    is_after_cr = False  # the text before what comes next ends with a CR

    def __init__(self, handover: Handover, key: str, owner: str, after: int) -> None:
        self.after = self._position = after
        self._handover, self._key, self._owner = handover, key, owner
        self._reader, self._asked_at = uuid4().hex, -inf

    @asynccontextmanager
    async def tokens(self) -> AsyncIterator[AsyncGenerator[list[str], None]]:
        """Give the tokens for as long as the context lasts; raise `ChatError` as the reply did."""
        async with aclosing(self._follow()) as tokens:
            yield tokens
        if self.end:
            self.end.check()

    async def cancel(self) -> None:
        """End the reply for a client that asks for no more; return once Groq is stopped."""
        await self._handover.write_to(self._owner, f"cancel {self._key}")
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_TIMEOUT):
                while True:
                    for entry in await self._handover.read(self._key, self._position):
                        if entry.kind == "gone":
                            raise errors.ReplyNotFound
                        if entry.kind == "end":
                            return
                    await asyncio.sleep(READ_INTERVAL)
        raise errors.ReplyUnavailable

    def summary(self) -> dict[str, Any]:
        """Return what the log line of the request says."""
        return {"outcome": "resumed" if self.end else "detached"}

    async def _follow(self) -> AsyncGenerator[list[str], None]:
        time = asyncio.get_running_loop().time
        heard_at = reached_at = time()
        while self.end is None:
            entries: list[Entry] = []
            try:
                entries = await self._look(time())
                reached_at = time()
                if await self._handover.is_alive(self._owner):
                    heard_at = time()
            except errors.ReplyUnavailable:
                heard_at = time()
                if heard_at - reached_at > REDIS_PATIENCE:
                    raise
            for entry in entries:
                if text := self._take(*entry):
                    heard_at = time()
                    yield [text]
            if time() - heard_at > SILENT_OWNER:
                metrics.resumes["lost"].inc()
                raise errors.ReplyNotFound
            await asyncio.sleep(0 if self.end else READ_INTERVAL)

    async def _look(self, now: float) -> list[Entry]:
        """Return what may be new; tell the owner now and then who reads, and what they have."""
        if self._asked_at == -inf:
            await self._handover.become_reader(self._key, self._reader)
        if now - self._asked_at >= FOLLOW_INTERVAL:
            letter = f"follow {self._key} {self._reader} {self._position}"
            await self._handover.write_to(self._owner, letter)
            self._asked_at = now
        if (reader := await self._handover.reader(self._key)) == BEYOND:
            raise errors.BadPosition(self._position)
        if reader not in (self._reader, ""):
            raise errors.ReplyTakenOver
        return await self._handover.read(self._key, self._position)

    def _take(self, position: int, kind: str, text: str) -> str:
        """Return what an entry adds to the text."""
        begin, place = position - (len(text) if kind == "text" else 1), self._position
        if kind == "gone":
            raise errors.ReplyNotFound
        if kind == "end" and place > position:
            raise errors.BadPosition(place)
        if kind == "end" and place == position:
            raise errors.NothingLeft
        is_second_half = 0 < begin == self.after and text.startswith("\n")  # of a CRLF, perhaps
        if begin > place or (is_second_half and place == begin):
            self._asked_at = -inf  # something is missing: the owner writes all of it
        elif kind == "end":
            self.end = msgspec.json.decode(text, type=End)
            self.truncated = self.end.truncated
        elif position > place:
            self._position = position
            self.is_after_cr = text[: place - begin].endswith("\r")
            return text[place - begin :]
        return ""
