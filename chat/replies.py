"""Replies that outlive their connection, until nobody has read them for RESUME_TIMEOUT."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from sys import getsizeof
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from chat import errors, metrics
from chat.config import Settings
from chat.kept import SEND_INTERVAL, Elsewhere, KeptReply, Reading
from chat.llm.groq import TokenStream
from chat.messages import ChatRequest
from chat.reply import Reply
from chat.service import ChatService
from chat.storage.handover import Handover, Part
from chat.storage.redis import hashed

logger = logging.getLogger(__name__)

MAX_ENDED_BYTES = 64 << 20  # of replies that have ended and may still be read

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
            # A client that leaves meanwhile must not leave a claim without a reply behind.
            opening = self._in_background(self._open(request.reply, request, reply, admit))
            reading: Reading = await asyncio.shield(opening)
            if reply.is_cancelled:  # meanwhile
                await reading.cancel()
            return reading, aclosing(reading.read())
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
                with suppress(errors.ReplyUnavailable):
                    for letter in await self._handover.letters():
                        self._in_background(self._answer_letter(letter))
            await asyncio.sleep(SEND_INTERVAL)

    async def hand_over(self) -> None:
        """Leave what is kept here to the other replicas, the newest first."""
        self._handover.is_closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                for kept in reversed([*self._kept.values()]):
                    await asyncio.wait([kept.task])
                    parts = [Part(0, "text", kept.reply.text), *filter(None, [kept.end])]
                    with suppress(errors.ReplyUnavailable):  # of one node, perhaps
                        await self._handover.store(kept.key, parts)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self, name: str, request: ChatRequest, reply: Reply, admit: Admit) -> Reading:
        """Return the reply of this name; begin it if there is none, and messages to answer."""
        key, after = hashed(name), request.after
        of = msgspec.json.encode((request.messages, request.conversation)).decode()
        fingerprint = hashed(of) if request.messages else ""  # however the reply is sent
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
        metrics.resumes["elsewhere" if isinstance(reading, Elsewhere) else "here"].inc()
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
        reply = kept.reply
        try:
            await admit()
            async with self._service.answer(request, reply) as tokens:
                async for some in tokens:
                    if kept.reader is None:
                        metrics.CHAT_UNATTENDED_TOKENS.inc(len(some))
                    kept.wake()
        except asyncio.CancelledError:  # nobody has come back
            kept.error = errors.ReplyNotFound()
        except errors.ChatError as error:
            kept.error = error
        is_cancelled = isinstance(kept.error, errors.ReplyCancelled)
        is_void = bool(kept.error) and not (reply.sent or is_cancelled)
        if is_void:  # as if it had never begun: it may be sent again
            await self._handover.release(kept.key)
        if is_void or isinstance(kept.error, errors.ReplyNotFound):
            self._forget(kept)
        kind = type(kept.error).__name__ if kept.error else "completed"
        text = str(kept.error or reply.truncated or "")
        kept.end = Part(-1 if is_void else len(reply.text), kind, text)
        kept.note_change()
        if self._kept.get(kept.key) is kept:
            self._kept[kept.key] = self._kept.pop(kept.key)
            kept.size = 4_000 + sum(map(getsizeof, reply.sent))  # about what surrounds them
            self._ended_bytes += kept.size
            while self._ended_bytes > MAX_ENDED_BYTES:
                self._forget(next(each for each in self._kept.values() if each.end))
        log_end(kept)

    def _leave(self, kept: KeptReply, reader: object) -> None:
        """Note that a reader has gone, unless another has the reply now; renew the claim."""
        if kept.reader == reader and self._kept.get(kept.key) is kept:
            kept.set_reader(None, self._timeout, self._forget, kept)
            if reader and not kept.error and (len(kept.readers) > 1 or not kept.end):
                self._in_background(self._handover.claim(kept.key, kept.fingerprint))

    def _forget(self, kept: KeptReply) -> None:
        if self._kept.get(kept.key) is kept:
            del self._kept[kept.key]
            self._ended_bytes -= kept.size
            kept.set_reader(kept.reader)  # without a timer
            if not kept.error:  # else it is ending
                kept.task.cancel()

    def _in_background(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        self._tasks.add(task := asyncio.create_task(coroutine))
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer_letter(self, letter: list[str]) -> None:
        """Do what a reader at another replica asks for; send it the reply, or an error."""
        verb, key, reader, after = letter
        kept = self._kept.get(key)
        with suppress(errors.ReplyUnavailable):  # the reader asks again
            try:
                if kept is None:
                    raise errors.ReplyNotFound
                if verb == "follow":
                    last = await kept.send_to(reader, int(after), self._handover)
                else:
                    await Reading(kept, 0, self._leave).cancel()
                    last = Part(-1, "completed", "")
            except errors.ReplyUnavailable:
                raise
            except errors.ChatError as error:
                last = Part(-1, type(error).__name__, str(error))
            finally:
                if kept:
                    self._leave(kept, reader)
            if last:
                await self._handover.send(reader, last)


def log_end(kept: KeptReply) -> None:
    reply, error = kept.reply, kept.reply.error
    if error and not isinstance(kept.reader, Reading):
        metrics.errors[error.reason].inc()  # which no request's line will count
    if error or reply.outcome != "failed":  # otherwise it was not admitted
        fields = reply.summary() | {"resumed": max(0, len({*kept.readers}) - 1)}
        level = logging.WARNING if reply.outcome == "failed" else logging.INFO
        logger.log(level, "reply %s", reply.outcome, extra={"fields": fields})
