"""
Replies that outlive their connection: those that their clients have named, until nobody has read
them for a while. Other replicas read them through Redis.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from chat import errors, metrics
from chat.config import Settings
from chat.kept import Elsewhere, KeptReply, Reading
from chat.llm.groq import TokenStream
from chat.messages import ChatRequest
from chat.reply import Reply
from chat.service import ChatService
from chat.storage.handover import AFTER_ALL, BEYOND, Entry, Handover
from chat.storage.redis import hashed

logger = logging.getLogger(__name__)

MAX_ENDED_BYTES = 64 << 20  # of replies that have ended and may still be read
MAIL_INTERVAL = 0.05  # seconds between two looks for letters, and two writes of a replay
ABSENT_READER = 5.0  # seconds without a letter after which a reader elsewhere has left

Admit = Callable[[], Awaitable[None]]


class Replies:
    """The replies of this replica that can be read again, and the way to those of others."""

    def __init__(self, service: ChatService, settings: Settings, handover: Handover) -> None:
        self._service, self._timeout, self._handover = service, settings.resume_timeout, handover
        self._kept: dict[str, KeptReply] = {}  # those that ended longest ago come first
        self._ended_bytes = 0
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def answer(
        self, request: ChatRequest, reply: Reply, admit: Admit
    ) -> tuple[Reply | Reading, AbstractAsyncContextManager[TokenStream]]:
        """Return a reply and its tokens, kept for later readers if its client has named it."""
        if request.reply and self._timeout:
            reading = await self._open(request.reply, request, reply, admit)
            if reply.is_cancelled:  # meanwhile
                await reading.cancel()
            return reading, reading.tokens()
        await admit()
        if not request.messages:
            raise errors.ReplyNotFound
        return reply, self._service.answer(request, reply)

    async def cancel(self, name: str) -> None:
        """End a reply for a client that asks for no more; return once Groq is stopped."""
        key = hashed(name)
        async with self._locks.setdefault(key, asyncio.Lock()):  # it may be about to begin
            reading = await self._find(key)
        if reading:
            await reading.cancel()

    async def serve(self) -> None:
        """Answer the letters of other replicas whenever there are replies."""
        while True:
            if self._kept:
                try:
                    for letter in await self._handover.letters():
                        await self._obey(*letter)
                except errors.ReplyUnavailable:
                    pass
                except Exception:  # a bug must not end the service to others
                    logger.exception("unexpected error in a letter of another replica")
                followed = [kept for kept in self._kept.values() if kept.written is not None]
                await asyncio.gather(*map(self._write, followed))
            await asyncio.sleep(MAIL_INTERVAL)

    async def hand_over(self) -> None:
        """Write what is kept here for the other replicas, the newest first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                for kept in reversed([*self._kept.values()]):
                    kept.written = 0
                    await self._write(kept)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self, name: str, request: ChatRequest, reply: Reply, admit: Admit) -> Reading:
        """Return the reply of this name; begin it if there is none, and messages to answer."""
        key, fingerprint, after = hashed(name), _fingerprint(request), request.after
        async with self._locks.setdefault(key, asyncio.Lock()):  # it may come twice at one moment
            try:
                reading = await self._find(key, fingerprint, after)
            except errors.ReplyNotFound:
                metrics.resumes["lost"].inc()
                await admit()
                raise
            if reading is None:
                kept = self._kept[key] = KeptReply(key, fingerprint, reply)
                kept.task = self._in_background(self._run(kept, request, admit))
                self._leave(kept, None)  # the connection may break before it is read
                return Reading(kept, 0, self._leave)
        metrics.resumes[reading.place].inc()
        # Before anything is sent: the client may be on its way elsewhere afterwards.
        await self._handover.set_reader(key, reading.reader or self._handover.replica)
        return reading

    async def _find(self, key: str, fingerprint: str = "", after: int = 0) -> Reading | None:
        """Return a reply, or None if it has become ours: nobody had it, and it may begin."""
        if kept := self._kept.get(key):
            owner, of = self._handover.replica, kept.fingerprint
        else:
            owner, of = await self._handover.claim(key, fingerprint * (not after))
        if owner and fingerprint not in ("", of):
            raise errors.ReplyConflict
        if kept:
            return Reading(kept, after, self._leave)
        if owner not in ("", self._handover.replica):
            return Elsewhere(self._handover, key, owner, after)
        if owner or after or not fingerprint:
            raise errors.ReplyNotFound
        return None

    async def _run(self, kept: KeptReply, request: ChatRequest, admit: Admit) -> None:
        try:
            await admit()
            async with self._service.answer(request, kept.reply) as tokens:
                async for some in tokens:
                    kept.append(some)
        except asyncio.CancelledError:  # nobody has come back
            kept.error = errors.ReplyNotFound()
            self._forget(kept)
        except errors.ChatError as error:
            kept.error = error
            if not (kept.tokens or kept.reply.is_cancelled):  # it may be sent again
                await self._handover.release(kept.key)
                self._forget(kept)
        self._note_end(kept)

    def _note_end(self, kept: KeptReply) -> None:
        is_cancelled = isinstance(kept.error, errors.ReplyCancelled)
        kind = "cancelled" if is_cancelled else "failed" if kept.error else "completed"
        text = str(kept.error or kept.reply.truncated or "")
        kept.end = Entry(kept.length + 1, kind, text)
        kept.note_change()
        if self._kept.get(kept.key) is kept:
            self._kept[kept.key] = self._kept.pop(kept.key)
            self._ended_bytes += kept.size
            while self._ended_bytes > MAX_ENDED_BYTES:
                self._forget(next(each for each in self._kept.values() if each.end))
        error, outcome = kept.reply.error, kept.reply.outcome
        if error and not isinstance(kept.reader, Reading):
            metrics.errors[error.reason].inc()  # which no request's line will count
        if error or outcome != "failed":  # otherwise it was not admitted
            fields = kept.reply.summary() | {"resumed": max(0, kept.readers - 1)}
            level = logging.WARNING if outcome == "failed" else logging.INFO
            logger.log(level, "reply %s", outcome, extra={"fields": fields})

    def _leave(self, kept: KeptReply, reader: object) -> None:
        """Note that a reader has gone, unless another has taken the reply over."""
        if kept.reader is reader and self._kept.get(kept.key) is kept:
            call_later = asyncio.get_running_loop().call_later
            kept.set_reader(None, call_later(self._timeout, self._forget, kept))
            if reader and not kept.end:  # Redis may have been away at the beginning
                self._in_background(self._handover.claim(kept.key, kept.fingerprint))

    def _forget(self, kept: KeptReply) -> None:
        if self._kept.get(kept.key) is kept:
            del self._kept[kept.key]
            self._ended_bytes -= kept.size if kept.end else 0
            kept.set_reader(kept.reader)  # without a timer
            kept.task.cancel()  # of no effect once it has ended

    def _in_background(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        self._tasks.add(task := asyncio.create_task(coroutine))
        task.add_done_callback(self._tasks.discard)
        return task

    async def _obey(self, verb: str, key: str, reader: str = "", after: str = "0") -> None:
        kept = self._kept.get(key)
        if kept is None:
            if (await self._handover.claim(key))[0] in ("", self._handover.replica):
                await self._handover.write(key, [Entry(AFTER_ALL, "gone", reader)], anew=True)
        elif verb == "cancel":
            kept.reply.cancel()
            kept.written = kept.written or 0  # its end confirms the cancel
        elif int(after) > kept.length + bool(kept.end):
            await self._handover.set_reader(key, BEYOND)
        elif reader == kept.reader or await self._handover.reader(key) in (reader, ""):
            if reader != kept.reader or int(after) < (kept.written or 0):
                kept.written = 0  # nothing that is of use
            call_later = asyncio.get_running_loop().call_later
            kept.set_reader(reader, call_later(ABSENT_READER, self._leave, kept, reader))

    async def _write(self, kept: KeptReply) -> None:
        """Write what others cannot read yet; all of it, anew, if nothing is known to be there."""
        if entries := kept.unwritten():
            with suppress(errors.ReplyUnavailable):
                await self._handover.write(kept.key, entries, anew=not kept.written)
                kept.written = entries[-1].position


def _fingerprint(request: ChatRequest) -> str:
    """Return what tells requests apart, except for the way in which the reply is sent."""
    if not request.messages:
        return ""
    return hashed(msgspec.json.encode((request.messages, request.conversation)).decode())
