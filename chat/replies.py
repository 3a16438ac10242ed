"""
Replies that outlive their connection: those that their clients have named, until nobody has read
them for a while. Other replicas read them through Redis.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from hashlib import sha256
from math import inf
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from chat import errors, metrics
from chat.config import Settings
from chat.kept import End, KeptReply
from chat.llm.groq import TokenStream
from chat.messages import ChatRequest
from chat.reading import BEYOND, Elsewhere, Reading
from chat.reply import Reply
from chat.service import ChatService
from chat.storage.handover import GONE, Handover

logger = logging.getLogger(__name__)

MAX_ENDED_BYTES = 64 << 20  # of replies that have ended and may still be read
MAIL_INTERVAL = 0.05  # seconds between two looks for letters, and two writes of a replay
ALIVE_INTERVAL = 1.0
ABSENT_READER = 5.0  # seconds without a letter after which a reader elsewhere has left

Admit = Callable[[], Awaitable[None]]


class Replies:
    """The replies of this replica that can be read again, and the way to those of others."""

    def __init__(self, service: ChatService, settings: Settings, handover: Handover) -> None:
        self._service, self._timeout, self._handover = service, settings.resume_timeout, handover
        self._kept: dict[str, KeptReply] = {}  # those that ended longest ago come first
        self._ended_bytes = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None

    async def answer(
        self, request: ChatRequest, reply: Reply, after: int, admit: Admit
    ) -> tuple[Reply | Reading, AbstractAsyncContextManager[TokenStream]]:
        """Return a reply and its tokens, kept for later readers if its client has named it."""
        if not (request.reply and self._timeout):
            await admit()
            if not request.messages:
                raise errors.ReplyNotFound
            return reply, self._service.answer(request, reply)
        asked = request if request.messages else None
        reading = await self.open(request.reply, asked, reply, after, admit)
        if reply.is_cancelled:  # meanwhile
            await reading.cancel()
        return reading, reading.tokens()

    async def open(
        self, name: str, request: ChatRequest | None, reply: Reply | None, after: int, admit: Admit
    ) -> Reading:
        """Return the reply of this name; with a request, begin it if there is none."""
        key, fingerprint = _hash(name), _fingerprint(request) if request else ""
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:  # the same request may come twice at one moment
            if reading := await self._find(key, fingerprint, after):
                metrics.resumes[reading.place].inc()
                return reading
            if request is None or reply is None or after:
                metrics.resumes["lost"].inc()
                await admit()
                raise errors.ReplyNotFound
            try:
                await admit()
            except BaseException:
                await _quietly(self._handover.release(key))
                raise
            kept = self._kept[key] = KeptReply(key, fingerprint, reply)
            kept.task = self._in_background(self._run(kept, request))
        self._leave(kept, None)  # the connection may break before it is read
        if self._serving is None or self._serving.done():
            self._serving = self._in_background(self._serve())
        return Reading(kept, 0, self._attend, self._leave)

    async def cancel(self, name: str) -> None:
        """End a reply for a client that asks for no more; return once Groq is stopped."""
        if (reading := await self._find(_hash(name), "", 0)) is None:
            raise errors.ReplyNotFound
        await reading.cancel()

    async def hand_over(self) -> None:
        """Write what is kept here for the other replicas, the newest first."""
        with suppress(errors.ReplyUnavailable, TimeoutError):
            async with asyncio.timeout(3):
                for kept in reversed([*self._kept.values()]):
                    await self._write(kept, anew=True)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _find(self, key: str, fingerprint: str, after: int) -> Reading | None:
        """Return a reply; one that nobody has becomes ours if it is asked for from the start."""
        kept, owner, of = self._kept.get(key), "", ""
        try:
            if kept is None and (
                claim := await self._handover.claim(key, fingerprint * (not after))
            ):
                owner, of = claim
        except errors.ReplyUnavailable:
            if after or not fingerprint:
                raise  # otherwise, only this replica will know it
        if (kept or owner) and fingerprint not in ("", kept.fingerprint if kept else of):
            raise errors.ReplyConflict
        if kept:
            return Reading(kept, after, self._attend, self._leave)
        if owner == self._handover.replica:
            metrics.resumes["lost"].inc()
            raise errors.ReplyNotFound
        return Elsewhere(self._handover, key, owner, after) if owner else None

    async def _run(self, kept: KeptReply, request: ChatRequest) -> None:
        try:
            async with self._service.answer(request, kept.reply) as tokens:
                async for some in tokens:
                    kept.append(some)
            kept.end = End(truncated=kept.reply.truncated)
        except errors.ReplyCancelled:
            kept.end = End(is_cancelled=True)
        except asyncio.CancelledError:  # nobody has come back
            self._forget(kept)
            kept.error = errors.ReplyNotFound()
        except errors.ChatError as error:
            kept.error = error
            if not kept.tokens:  # the same request may be sent again
                self._forget(kept)
                await _quietly(self._handover.release(kept.key))
        finally:
            kept.end = kept.end or End(error=str(kept.error))
            kept.set_unattended(False)
            kept.wake()
            self._note_end(kept)

    def _note_end(self, kept: KeptReply) -> None:
        if self._kept.get(kept.key) is kept:
            self._kept[kept.key] = self._kept.pop(kept.key)
            self._ended_bytes += kept.size
            while self._ended_bytes > MAX_ENDED_BYTES:
                self._forget(next(each for each in self._kept.values() if each.end))
        if kept.reply.error and (kept.reader is None or isinstance(kept.reader, str)):
            metrics.errors[kept.reply.error.reason].inc()  # which no request's line will count
        fields = kept.reply.summary() | {"resumed": max(0, kept.readers - 1)}
        level = logging.WARNING if kept.reply.outcome == "failed" else logging.INFO
        logger.log(level, "reply %s", kept.reply.outcome, extra={"fields": fields})

    async def _attend(self, kept: KeptReply, reader: object) -> None:
        """Give a reply to a reader; the one before is told so."""
        kept.reader = reader
        kept.readers += 1
        if kept.expiry:
            kept.expiry.cancel()
        kept.set_unattended(False)
        kept.wake()
        if kept.readers > 1 and not isinstance(reader, str):
            # Before anything is sent: the client may be on its way elsewhere afterwards.
            await _quietly(self._handover.become_reader(kept.key, self._handover.replica))

    def _leave(self, kept: KeptReply, reader: object) -> None:
        """Note that a reader has gone, unless another has taken the reply over."""
        if kept.reader is reader and self._kept.get(kept.key) is kept:
            kept.reader = None
            kept.expiry = asyncio.get_running_loop().call_later(self._timeout, self._expire, kept)
            kept.set_unattended(not kept.end)
            if reader and not kept.end:  # Redis may have been away at the beginning
                self._in_background(_quietly(self._handover.claim(kept.key, kept.fingerprint)))

    def _expire(self, kept: KeptReply) -> None:
        self._forget(kept)
        if not kept.end:
            kept.task.cancel()

    def _forget(self, kept: KeptReply) -> None:
        if self._kept.get(kept.key) is kept:
            del self._kept[kept.key]
            self._ended_bytes -= kept.size if kept.end else 0

    def _in_background(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._tasks.add(task := asyncio.create_task(coroutine))
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self) -> None:
        """Answer the letters of other replicas for as long as there are replies."""
        time, shown_at = asyncio.get_running_loop().time, -inf
        while self._kept:
            with suppress(errors.ReplyUnavailable):
                if time() - shown_at >= ALIVE_INTERVAL:
                    await self._handover.show_alive()
                    shown_at = time()
                for letter in await self._handover.letters():
                    await self._obey(*letter)
            followed = [kept for kept in self._kept.values() if kept.written is not None]
            await asyncio.gather(*(_quietly(self._write(kept)) for kept in followed))
            for kept in followed:
                if isinstance(kept.reader, str) and time() - kept.heard_at > ABSENT_READER:
                    self._leave(kept, kept.reader)
            await asyncio.sleep(MAIL_INTERVAL)

    async def _obey(self, verb: str, key: str, reader: str = "", after: str = "0") -> None:
        kept = self._kept.get(key)
        if kept is None:
            await self._handover.write(key, [GONE], anew=True)
        elif verb == "cancel":
            kept.reply.cancel()
            kept.written = kept.written or 0  # its end confirms the cancel
        elif int(after) > kept.length + bool(kept.end):
            await self._handover.become_reader(key, BEYOND)
        elif reader == kept.reader or await self._handover.reader(key) in (reader, ""):
            kept.heard_at = asyncio.get_running_loop().time()
            if reader != kept.reader:
                await self._attend(kept, reader)
                kept.written = None
            if kept.written is None or int(after) < kept.written:
                await self._write(kept, anew=True)

    async def _write(self, kept: KeptReply, *, anew: bool = False) -> None:
        begin, kept.written = 0 if anew else kept.written or 0, kept.written or 0
        if entries := kept.unwritten(begin):
            await self._handover.write(kept.key, entries, anew=anew)
            kept.written = entries[-1].position


async def _quietly(coroutine: Coroutine[Any, Any, object]) -> None:
    with suppress(errors.ReplyUnavailable):
        await coroutine


def _hash(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def _fingerprint(request: ChatRequest) -> str:
    """Return what tells requests apart, except for the way in which the reply is sent."""
    return _hash(msgspec.json.encode((request.messages, request.conversation)).decode())
