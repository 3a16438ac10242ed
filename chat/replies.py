"""
Replies that outlive their connection. A reply that its client has named runs in a task of its own,
into a text that transports read from a position; other replicas read it through Redis.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager, suppress
from hashlib import sha256
from math import inf
from sys import getsizeof
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from chat import errors, metrics
from chat.config import Settings
from chat.elsewhere import Elsewhere
from chat.messages import ChatRequest
from chat.reply import Reply
from chat.service import ChatService
from chat.storage.handover import GONE, Claim, End, Entry, Handover

logger = logging.getLogger(__name__)

MAX_ENDED_BYTES = 64 << 20  # of replies that have ended and may still be read
MAIL_INTERVAL = 0.05  # seconds between two looks for letters, and between two writes of a replay
ALIVE_INTERVAL = 1.0
ABSENT_READER = 5.0  # seconds without a letter after which a reader elsewhere has left
HAND_OVER_TIMEOUT = 3.0

Admit = Callable[[], Awaitable[None]]


class KeptReply:
    """A reply that runs by itself: its text, how it has ended, and who reads it."""

    def __init__(self, key: str, fingerprint: str, reply: Reply) -> None:
        self.key, self.fingerprint, self.reply = key, fingerprint, reply
        self.tokens: list[str] = []
        self.length = self.resumed = 0
        self.end: End | None = None
        self.error: errors.ChatError | None = None
        self.task: asyncio.Task[None] | None = None
        self.reader: object = None  # the newest; a string if it is elsewhere
        self.former_readers: set[object] = set()
        self.heard_at = 0.0  # when a reader elsewhere last wrote
        self.written: int | None = None  # up to where others can read it
        self.expiry: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Future[None] | None = None

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

    def check_position(self, after: int) -> None:
        if self.end and after == self.length + 1:
            raise errors.NothingLeft
        if after > self.length:
            raise errors.BadRequest(f"the text has no position {after}")

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

    def unwritten(self, *, anew: bool = False) -> list[Entry]:
        """Return what others cannot read yet, or all of it."""
        begin, entries = 0 if anew else self.written or 0, list[Entry]()
        if begin < self.length:
            entries.append(Entry(self.length, "text", "".join(self.tokens)[begin:]))
        if self.end and begin <= self.length:
            entries.append(Entry(self.length + 1, "end", msgspec.json.encode(self.end).decode()))
        return entries


class Reading:
    """A transport's view of a reply: its tokens, and afterwards how it has ended."""

    end: End | None = None

    def __init__(self, replies: "Replies", kept: KeptReply, after: int) -> None:
        self.after, self._replies, self._kept = after, replies, kept
        self.is_after_cr = "".join(kept.tokens)[:after].endswith("\r")

    @property
    def truncated(self) -> str | None:
        return self.end.truncated if self.end else None

    @asynccontextmanager
    async def tokens(self) -> AsyncIterator[AsyncGenerator[list[str], None]]:
        """Give the tokens for as long as the context lasts; raise `ChatError` as the reply did."""
        kept, reader = self._kept, object()
        self._replies.attend(kept, reader)
        try:
            async with aclosing(kept.read(self.after, reader)) as tokens:
                yield tokens
            if kept.end:
                self.end = kept.end
                self.end.check(kept.error)
        finally:
            self._replies.leave(kept, reader)

    async def cancel(self) -> None:
        """End the reply for a client that asks for no more; return once Groq is stopped."""
        self._kept.reply.cancel()
        if self._kept.task:
            await asyncio.wait([self._kept.task])

    def summary(self) -> dict[str, Any]:
        """Return what the log line of the request says."""
        return self._kept.reply.summary() if self.end else {"outcome": "detached"}


class Replies:
    """The replies of this replica that can be read again, and the way to those of others."""

    def __init__(self, service: ChatService, settings: Settings, handover: Handover | None) -> None:
        self._service, self._timeout, self._handover = service, settings.resume_timeout, handover
        self._kept: dict[str, KeptReply] = {}  # those that ended longest ago come first
        self._ended_bytes = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None

    async def open(
        self, name: str, request: ChatRequest | None, reply: Reply | None, after: int, admit: Admit
    ) -> Reading | Elsewhere:
        """Return the reply of this name; with a request, begin it if there is none."""
        key, fingerprint = _key(name), _fingerprint(request) if request else ""
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:  # the same request may come twice at one moment
            found = await self._find(key, "" if after else fingerprint)
            if found and fingerprint not in ("", found.fingerprint):
                raise errors.ReplyConflict
            if isinstance(found, KeptReply):
                found.check_position(after)
                found.resumed += 1
                metrics.resumes["here"].inc()
                return Reading(self, found, after)
            if found and self._handover and found.owner != self._handover.replica:
                metrics.resumes["elsewhere"].inc()
                return Elsewhere(self._handover, key, found.owner, after)
            if found or request is None or reply is None or after:
                metrics.resumes["lost"].inc()
                await admit()
                raise errors.ReplyNotFound
            return await self._begin(key, fingerprint, request, reply, admit)

    async def cancel(self, name: str) -> None:
        """End a reply for a client that asks for no more; return once Groq is stopped."""
        found = await self._find(key := _key(name))
        if isinstance(found, KeptReply):
            await Reading(self, found, 0).cancel()
        elif found and self._handover and found.owner != self._handover.replica:
            await Elsewhere(self._handover, key, found.owner, 0).cancel()
        else:
            raise errors.ReplyNotFound

    def attend(self, kept: KeptReply, reader: object) -> None:
        """Give a reply to a reader; the one before is told so."""
        kept.former_readers.add(kept.reader)
        kept.reader = reader
        if kept.expiry:
            kept.expiry.cancel()
        self._set_unattended(kept, False)
        kept.wake()

    def leave(self, kept: KeptReply, reader: object) -> None:
        """Note that a reader has gone, unless another has taken the reply over."""
        if kept.reader is reader and self._kept.get(kept.key) is kept:
            kept.reader = None
            kept.expiry = asyncio.get_running_loop().call_later(self._timeout, self._expire, kept)
            self._set_unattended(kept, not kept.end)
            if not kept.end:  # Redis may have been away at the beginning
                self._in_background(self._claim(kept))

    async def hand_over(self) -> None:
        """Write what is kept here for the other replicas, the newest first."""
        with suppress(errors.ReplyUnavailable, TimeoutError):
            async with asyncio.timeout(HAND_OVER_TIMEOUT):
                for kept in reversed([*self._kept.values()]):
                    if self._handover:
                        await self._write(self._handover, kept, anew=True)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _find(self, key: str, fingerprint: str = "") -> KeptReply | Claim | None:
        """Return a reply, or whose it is; with a fingerprint it becomes ours if it is nobody's."""
        if (kept := self._kept.get(key)) or not self._handover:
            return kept
        try:
            return await self._handover.claim(key, fingerprint)
        except errors.ReplyUnavailable:
            if not fingerprint:
                raise
            return None  # only this replica will know it

    async def _begin(
        self, key: str, fingerprint: str, request: ChatRequest, reply: Reply, admit: Admit
    ) -> Reading:
        kept = KeptReply(key, fingerprint, reply)
        try:
            await admit()
        except BaseException:
            self._in_background(self._release(kept))
            raise
        self._kept[key] = kept
        kept.task = self._in_background(self._run(kept, request))
        self.leave(kept, None)  # the connection may break before it is read
        if self._handover and (self._serving is None or self._serving.done()):
            self._serving = self._in_background(self._serve(self._handover))
        return Reading(self, kept, 0)

    async def _run(self, kept: KeptReply, request: ChatRequest) -> None:
        try:
            async with self._service.answer(request, kept.reply) as tokens:
                async for some in tokens:
                    kept.append(some)
            kept.end = End(truncated=kept.reply.truncated)
        except errors.ReplyCancelled:
            kept.end = End(is_cancelled=True)
        except errors.ChatError as error:
            kept.error, kept.end = error, End(error=str(error))
        finally:
            self._note_end(kept)

    def _note_end(self, kept: KeptReply) -> None:
        self._set_unattended(kept, False)
        kept.wake()
        if kept.end is None:  # it was cancelled, since nobody has come back
            self._forget(kept)
        elif kept.error and not kept.tokens:  # the same request may be sent again
            self._forget(kept)
            self._in_background(self._release(kept))
        else:
            self._kept[kept.key] = self._kept.pop(kept.key)
            self._ended_bytes += kept.size
            while self._ended_bytes > MAX_ENDED_BYTES:
                self._forget(next(each for each in self._kept.values() if each.end))
        if kept.reader is None and kept.reply.error:
            metrics.errors[kept.reply.error.reason].inc()
        level = logging.WARNING if kept.error else logging.INFO
        fields = kept.reply.summary() | {"resumed": kept.resumed}
        logger.log(level, "reply %s", kept.reply.outcome, extra={"fields": fields})

    def _expire(self, kept: KeptReply) -> None:
        if kept.end:
            self._forget(kept)
        elif kept.task:
            kept.task.cancel()

    def _forget(self, kept: KeptReply) -> None:
        if self._kept.pop(kept.key, None) and kept.end:
            self._ended_bytes -= kept.size

    def _set_unattended(self, kept: KeptReply, is_unattended: bool) -> None:
        if is_unattended != (kept.reply.unattended_since is not None):
            metrics.CHAT_REPLIES_UNATTENDED.inc(1 if is_unattended else -1)
        now = asyncio.get_running_loop().time()
        kept.reply.unattended_since = now if is_unattended else None

    def _in_background(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _claim(self, kept: KeptReply) -> None:
        if self._handover:
            with suppress(errors.ReplyUnavailable):
                await self._handover.claim(kept.key, kept.fingerprint)

    async def _release(self, kept: KeptReply) -> None:
        if self._handover:
            with suppress(errors.ReplyUnavailable):
                await self._handover.release(kept.key)

    async def _serve(self, handover: Handover) -> None:
        """Answer the letters of other replicas for as long as there are replies."""
        time, shown_at = asyncio.get_running_loop().time, -inf
        while self._kept:
            with suppress(errors.ReplyUnavailable):
                if time() - shown_at >= ALIVE_INTERVAL:
                    await handover.show_alive()
                    shown_at = time()
                for letter in await handover.letters():
                    await self._obey(handover, *letter)
                for kept in [*self._kept.values()]:
                    if kept.written is not None:
                        await self._write(handover, kept)
                    if isinstance(kept.reader, str) and time() - kept.heard_at > ABSENT_READER:
                        self.leave(kept, kept.reader)
            await asyncio.sleep(MAIL_INTERVAL)

    async def _obey(self, handover: Handover, verb: str, key: str, reader: str = "") -> None:
        kept = self._kept.get(key)
        if kept is None:
            await handover.write(key, [GONE], anew=True)
        elif verb == "cancel":
            kept.reply.cancel()
            kept.written = kept.written or 0  # its end confirms the cancel
        elif reader == kept.reader or reader not in kept.former_readers:
            kept.heard_at = asyncio.get_running_loop().time()
            if reader != kept.reader:
                kept.resumed += 1
                self.attend(kept, reader)
                await self._write(handover, kept, anew=True)

    async def _write(self, handover: Handover, kept: KeptReply, *, anew: bool = False) -> None:
        if entries := kept.unwritten(anew=anew):
            await handover.write(kept.key, entries, anew=anew)
            kept.written = entries[-1].position
        kept.written = kept.written or 0


def _key(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def _fingerprint(request: ChatRequest) -> str:
    """Return what tells requests apart, except for the way in which the reply is sent."""
    return _key(msgspec.json.encode((request.messages, request.conversation)).decode())
