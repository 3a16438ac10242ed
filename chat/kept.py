"""A reply that runs by itself, and what a transport reads of it: from here, or through Redis."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from itertools import count
from math import inf
from typing import Any
from uuid import uuid4

from chat import errors, metrics
from chat.reply import Reply
from chat.storage.handover import Handover, Part

SEND_INTERVAL = 0.05  # seconds between two parts of a text, and two looks for letters
LIFE_SIGN = 5  # intervals of silence after which an owner sends a part without text
MAX_UNREAD = 20  # parts; more, and the reader is gone
READ_INTERVAL = 0.1  # seconds between two looks at what the owner has sent
SILENCE = 0.8  # seconds in which nothing came, not even a sign of life: ask for the rest anew
MAX_ASKED = 3  # times in a row, then the owner is gone
REDIS_PATIENCE = 10.0  # seconds to wait for Redis
SIMPLE = [each for each in errors.ChatError.__subclasses__() if "{" not in each.text[1:]]
RELAYED = {each.__name__: each for each in SIMPLE}  # of others, another replica tells the text


class KeptReply:
    """What others need to know about a reply: how it has ended, and who reads it."""

    task: asyncio.Task[None]
    end: Part | None = None
    error: errors.ChatError | None = None
    size = 0  # in bytes, once it has ended
    reader: object = None  # who reads it now
    waiting: asyncio.Future[None] | None = None  # for the next token, or the end
    _timer: asyncio.TimerHandle | None = None  # until it is forgotten

    def __init__(self, key: str, fingerprint: str, reply: Reply) -> None:
        self.key, self.fingerprint, self.reply = key, fingerprint, reply
        self.readers = deque[object](maxlen=1000)  # only the last one may have it back

    def set_reader(self, reader: object, *timer: Any) -> None:
        """Give it to a reader or to nobody; the one before is told so, and the timer stops."""
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(*timer) if timer else None
        self.reader = reader
        self.note_change()

    def note_change(self) -> None:
        """Wake its reader, and count it if it runs and has none."""
        is_unattended, since = not (self.reader or self.end), self.reply.unattended_since
        metrics.CHAT_REPLIES_UNATTENDED.inc(is_unattended - (since < inf))
        self.reply.unattended_since = asyncio.get_running_loop().time() if is_unattended else inf
        self.wake()

    def wake(self) -> None:
        """Let the reader go on; a future costs half of what an event does, for each token."""
        if self.waiting and not self.waiting.done():
            self.waiting.set_result(None)

    async def send_to(self, reader: str, after: int, handover: Handover) -> Part | None:
        """Send a reader elsewhere all but the end, which is returned unless the reader leaves."""
        if (name := reader.partition(":")[0]) in self.readers and name != self.readers[-1]:
            raise errors.ReplyTakenOver
        _check(after, len(self.reply.text), self.end)
        await handover.send(reader, Part(after, "text", ""))
        while (unread := await handover.send(reader, Part(after, "text", ""))) > 1:
            if unread > MAX_UNREAD:
                return None  # it had left before its letter came, and takes nothing over
            await asyncio.sleep(SEND_INTERVAL)
        self.readers.append(name)
        begin = max(0, after - 1)  # the reader needs to know whether it is after a CR
        self.set_reader(reader)
        for tick in count():
            end, text = self.end, self.reply.text[begin:]
            if text or tick % LIFE_SIGN == 0:
                if await handover.send(reader, Part(begin, "text", text)) > MAX_UNREAD:
                    break
                begin += len(text)
            if self.reader != reader:
                raise errors.ReplyTakenOver
            if end:
                return end
            await asyncio.sleep(SEND_INTERVAL)
        return None


class Reading:
    """The tokens from a position on, in lists, and afterwards how the reply has ended."""

    end: Part | None = None
    truncated: str | None = None
    is_after_cr = False  # the text before what comes next ends with a CR

    def __init__(self, kept: KeptReply, after: int, leave: Callable[..., None]) -> None:
        _check(after, len(kept.reply.text), kept.end)
        self.after = self.position = after
        self._kept, self._leave = kept, leave

    async def cancel(self) -> None:
        """End the reply for a client that asks for no more; return once Groq is stopped."""
        self._kept.reply.cancel()
        await asyncio.wait([self._kept.task])

    def summary(self) -> dict[str, Any]:
        """Return what the log line of the request says."""
        if not self._kept.end:
            return {"outcome": "detached"}
        return {k: v for k, v in self._kept.reply.summary().items() if k != "duration_ms"}

    async def read(self) -> AsyncGenerator[list[str], None]:
        """Give the tokens; raise `ChatError` as the reply did."""
        kept, tokens = self._kept, self._kept.reply.sent
        kept.readers.append(self)
        kept.set_reader(self)
        try:
            number, text = len(tokens), kept.reply.text
            self.is_after_cr = text[: self.after].endswith("\r")
            if self.after < len(text):
                yield [text[self.after :]]  # what was missed is one token
            while kept.reader is self:
                if number < len(tokens):
                    some = tokens[number:]
                    number = len(tokens)
                    yield some
                elif kept.end:
                    self.end = kept.end if kept.end.begin >= 0 else None
                    self.truncated = kept.reply.truncated
                    if kept.error:
                        raise kept.error
                    return
                else:
                    kept.waiting = asyncio.get_running_loop().create_future()
                    await kept.waiting
            raise errors.ReplyTakenOver
        finally:
            self._leave(kept, self)


class Elsewhere(Reading):
    """A reply that another replica runs, or has left in Redis."""

    def __init__(self, handover: Handover, key: str, owner: str, after: int) -> None:
        self.after = self.position = self._received = after
        self._handover, self._key, self._owner, self._name = handover, key, owner, uuid4().hex

    async def cancel(self) -> None:
        reader, parts = await self._ask("cancel")
        for _ in range(10):  # a second
            if parts:
                self._take(parts[0])  # raises if there is no such reply
                return
            await asyncio.sleep(READ_INTERVAL)
            parts = await self._handover.receive(reader)
        raise errors.ReplyUnavailable

    def summary(self) -> dict[str, Any]:
        return {"outcome": "resumed" if self.end else "detached"}

    async def read(self) -> AsyncGenerator[list[str], None]:
        time = asyncio.get_running_loop().time
        reader, heard_at, asked = "", -inf, 0
        while not self.end:
            if self._handover.is_closing:
                raise errors.Draining
            try:
                if time() - heard_at < SILENCE:
                    parts = await self._handover.receive(reader)
                elif asked == MAX_ASKED:
                    parts = [Part(-1, "ReplyNotFound", "")]
                else:
                    reader, parts = await self._ask("follow")
                    heard_at, asked = time(), asked + 1
            except errors.ReplyUnavailable:
                if time() - heard_at > REDIS_PATIENCE:
                    raise
                parts = []
            for part in parts:
                if part.begin > self._received:  # some of it is lost: ask anew at once
                    heard_at -= SILENCE
                    break
                if text := self._take(part):
                    yield [text]
                heard_at, asked = time(), 0
            await asyncio.sleep(0 if self.end else READ_INTERVAL)

    async def _ask(self, verb: str) -> tuple[str, list[Part]]:
        """Ask the owner for more; return where it will come, and the reply if it was left."""
        reader = f"{self._name}:{uuid4().hex}"
        await self._handover.ask(self._owner, verb, self._key, reader, self._received)
        return reader, await self._handover.load(self._key)

    def _take(self, part: Part) -> str:
        """Return what a part adds to the text; raise `ChatError` as the reply or its owner did."""
        if part.kind == "text":
            known = self._received - part.begin
            self._received = part.begin + len(part.text)
            if known:
                self.is_after_cr = part.text[:known].endswith("\r")
            return part.text[known:]
        if part.begin >= 0:
            _check(self.after, part.begin, part)
            self.end = part
        if part.kind != "completed":
            metrics.resumes["lost"].inc(part.kind == "ReplyNotFound")
            raise RELAYED.get(part.kind, errors.GroqError)(part.text)
        self.truncated = part.text
        return ""


def _check(after: int, length: int, end: Part | None) -> None:
    """Raise `ChatError` unless there is something to read after a position, or will be."""
    if end and after == length + 1:
        raise errors.NothingLeft
    if after > length:
        raise errors.BadRequest(f"the text has no position {after}")
