"""A reply that another replica runs, read through Redis."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from math import inf
from typing import Any
from uuid import uuid4

import msgspec

from chat import errors, metrics
from chat.storage.handover import End, Entry, Handover

READ_INTERVAL = 0.05  # seconds
FOLLOW_INTERVAL = 2.0  # seconds between two letters, which tell the owner that there is a reader
SILENT_OWNER = 1.5  # seconds without a sign of life after which the owner is gone
REDIS_PATIENCE = 10.0  # seconds to wait for Redis
CANCEL_TIMEOUT = 1.0


class Elsewhere:
    """A transport's view of a reply: its tokens, and afterwards how it has ended."""

    end: End | None = None
    is_after_cr = False  # the text before what comes next ends with a CR

    def __init__(self, handover: Handover, key: str, owner: str, after: int) -> None:
        self.after = after
        self._handover, self._key, self._owner = handover, key, owner
        self._position, self._reader, self._asked_at = after, "", -inf

    @property
    def truncated(self) -> str | None:
        return self.end.truncated if self.end else None

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
        """Return what may be new; tell the owner now and then that somebody reads."""
        if now - self._asked_at >= FOLLOW_INTERVAL:
            if not self._reader:
                self._reader = uuid4().hex
                await self._handover.become_reader(self._key, self._reader)
            await self._handover.write_to(self._owner, f"follow {self._key} {self._reader}")
            self._asked_at = now
        if await self._handover.reader(self._key) not in (self._reader, ""):
            raise errors.ReplyTakenOver
        return await self._handover.read(self._key, self._position)

    def _take(self, position: int, kind: str, text: str) -> str:
        """Return what an entry adds to the text."""
        if kind == "gone":
            raise errors.ReplyNotFound
        begin = position - (len(text) if kind == "text" else 1)
        if begin > self._position:  # something is missing: a new reader is sent all of it
            self._reader, self._asked_at = "", -inf
            return ""
        if kind == "end":
            if self._position == position:
                raise errors.NothingLeft
            if self._position > position:
                raise errors.BadRequest(f"the text has no position {self._position}")
            self.end = msgspec.json.decode(text, type=End)
            return ""
        place = max(0, self._position - begin)
        self.is_after_cr = text[max(0, place - 1) : place] == "\r"
        self._position = max(position, self._position)
        return text[place:]
