"""
What replicas tell each other about kept replies, through Redis. A replay is a stream whose ids are
positions in the text, `0-<end>`: an entry begins at its id less its length, so that a reader cuts
what overlaps and sees what is missing.
"""

from collections.abc import Sequence
from contextlib import suppress
from math import ceil, inf
from time import monotonic
from typing import Any, NamedTuple
from uuid import uuid4

from chat import errors
from chat.config import Settings
from chat.storage.redis import RedisClient

ALIVE_INTERVAL = 1.0  # seconds
CLAIM = """
if ARGV[1] ~= '' and redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2]) then return '' end
return redis.call('GET', KEYS[1]) or ''
"""
SEND = "redis.call('RPUSH', KEYS[1], ARGV[1]) redis.call('EXPIRE', KEYS[1], 10)"
# ARGV: expiry, `anew` or empty, then id, kind and text of each entry; a repeated one is refused.
WRITE = """
if ARGV[2] == 'anew' then redis.call('DEL', KEYS[1]) end
for n = 3, #ARGV, 3 do redis.pcall('XADD', KEYS[1], ARGV[n], ARGV[n + 1], ARGV[n + 2]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""


class Entry(NamedTuple):
    """A part of a text, or its end: completed, cancelled, failed, or its owner has it no more."""

    position: int
    kind: str  # text, completed, cancelled, failed or gone
    text: str  # in this order: itself, why it was cut off, "", the error, the reader it is gone for


BEYOND = "beyond"  # in place of a reader whose position the text does not have
AFTER_ALL = (1 << 64) - 1  # the position of `gone`


class Handover:
    """One replica's side; without Redis, or while it is away, `ReplyUnavailable` is raised."""

    def __init__(self, redis: RedisClient | None, settings: Settings) -> None:
        self.replica, self._shown_at = uuid4().hex, -inf
        self._redis = redis if settings.resume_timeout else None
        self._replay_ttl = ceil(settings.resume_timeout)
        self._claim_ttl = ceil(settings.reply_timeout + settings.resume_timeout)

    async def claim(self, key: str, fingerprint: str = "") -> tuple[str, str]:
        """Return a reply's owner and fingerprint, if it has any; with one, it becomes ours."""
        value = fingerprint and f"{self.replica}:{fingerprint}"
        claim = "EVAL", CLAIM, 1, f"chat:reply:{key}", value, self._claim_ttl
        try:
            found = await self._execute(*claim) if self._redis else b""
        except errors.ReplyUnavailable:
            if not fingerprint:
                raise
            found = b""  # no other replica will know it
        owner, _, of = found.decode().partition(":")
        return owner, of

    async def release(self, key: str) -> None:
        """Let the id be used again, and not be taken by a reader of the reply that has failed."""
        with suppress(errors.ReplyUnavailable):
            await self._execute("SET", f"chat:reader:{key}", self.replica, "EX", 10)
            await self._execute("DEL", f"chat:reply:{key}")

    async def write_to(self, owner: str, letter: str) -> None:
        await self._execute("EVAL", SEND, 1, f"chat:mail:{owner}", letter)

    async def letters(self) -> list[list[str]]:
        """Return what others have written, and show them that this replica is alive."""
        if monotonic() - self._shown_at >= ALIVE_INTERVAL:
            await self._execute("SET", f"chat:alive:{self.replica}", 1, "EX", 2)
            self._shown_at = monotonic()
        found = await self._execute("LPOP", f"chat:mail:{self.replica}", 100)
        return [letter.decode().split() for letter in found or ()]

    async def is_alive(self, owner: str) -> bool:
        return bool(await self._execute("EXISTS", f"chat:alive:{owner}"))

    async def set_reader(self, key: str, reader: str) -> None:
        """Let a reader take a reply over from the one before."""
        with suppress(errors.ReplyUnavailable):
            await self._execute("SET", f"chat:reader:{key}", reader, "EX", self._claim_ttl)

    async def reader(self, key: str) -> str:
        return (await self._execute("GET", f"chat:reader:{key}") or b"").decode()

    async def write(self, key: str, entries: Sequence[Entry], *, anew: bool = False) -> None:
        values = [text for at, *rest in entries for text in (f"0-{at}", *rest)]
        ttl = 1 if entries[-1].kind == "gone" else self._replay_ttl
        write = "EVAL", WRITE, 1, f"chat:replay:{key}", ttl, "anew" * anew
        await self._execute(*write, *values)

    async def read(self, key: str, after: int) -> list[Entry]:
        """Return what comes after a position; the last entry, even where it does not."""
        found = await self._execute("XRANGE", f"chat:replay:{key}", f"(0-{after}", "+")
        last = "XREVRANGE", f"chat:replay:{key}", "+", "-", "COUNT", 1
        entries = [(at, *fields.popitem()) for at, fields in found or await self._execute(*last)]
        return [Entry(int(at[2:]), kind.decode(), text.decode()) for at, kind, text in entries]

    async def _execute(self, *command: str | int | bytes) -> Any:
        if not (self._redis and self._redis.is_up):  # a chat that begins does not wait for it
            raise errors.ReplyUnavailable
        try:
            return await self._redis.execute(*command)
        except errors.HistoryUnavailable:
            raise errors.ReplyUnavailable from None
