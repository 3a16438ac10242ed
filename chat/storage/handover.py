"""
What replicas tell each other through Redis about replies that outlive their connection: whose a
reply is, letters to its owner, that the owner lives, and the text for readers elsewhere.

A replay is a stream whose ids are positions in the text, `0-<end of the entry>`: an entry begins at
its id less its length, so that a reader cuts what overlaps and sees what is missing.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from chat import errors
from chat.storage.redis import RedisClient

LETTER_TTL = 10  # seconds
ALIVE_TTL = 2
MAX_LETTERS = 100

CLAIM = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2]) then return '' end
return redis.call('GET', KEYS[1])
"""
# ARGV: expiry, `anew` or empty, then id, kind and text of each entry; a repeated one is refused.
WRITE = """
if ARGV[2] == 'anew' then redis.call('DEL', KEYS[1]) end
for n = 3, #ARGV, 3 do redis.pcall('XADD', KEYS[1], ARGV[n], ARGV[n + 1], ARGV[n + 2]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""


class Claim(NamedTuple):
    owner: str
    fingerprint: str


class Entry(NamedTuple):
    """A part of a text, how it ended, or that its owner does not have it (`gone`)."""

    position: int
    kind: str
    text: str


GONE = Entry((1 << 64) - 1, "gone", "")  # after every position
BEYOND = "beyond"  # in place of a reader whose position the text does not have


class End(msgspec.Struct):
    """How a reply has ended."""

    error: str = ""
    truncated: str | None = None
    is_cancelled: bool = False

    def check(self, error: errors.ChatError | None = None) -> None:
        """Raise `ChatError` unless the reply was completed."""
        if self.is_cancelled:
            raise errors.ReplyCancelled
        if self.error:
            raise error or errors.ReplyFailed(self.error)


class Handover:
    """
    One replica's side; methods raise `ReplyUnavailable` if Redis does not respond. Where there is
    none, nothing is found.
    """

    def __init__(self, redis: RedisClient | None, claim_ttl: float, replay_ttl: float) -> None:
        self.replica = uuid4().hex
        self.reaches_others, self._redis = bool(redis), redis
        self._claim_ttl, self._replay_ttl = ceil(claim_ttl), ceil(replay_ttl)

    async def claim(self, key: str, fingerprint: str) -> Claim | None:
        """Return whose a reply is; with a fingerprint, it becomes ours if it is nobody's."""
        name, value = f"chat:reply:{key}", f"{self.replica}:{fingerprint}"
        command = ("EVAL", CLAIM, 1, name, value, self._claim_ttl) if fingerprint else ("GET", name)
        found = await self._execute(*command)
        return Claim(*found.decode().split(":")) if found else None

    async def release(self, key: str) -> None:
        await self._execute("DEL", f"chat:reply:{key}")

    async def write_to(self, owner: str, letter: str) -> None:
        await self._execute("RPUSH", f"chat:mail:{owner}", letter)
        await self._execute("EXPIRE", f"chat:mail:{owner}", LETTER_TTL)

    async def letters(self) -> list[list[str]]:
        found = await self._execute("LPOP", f"chat:mail:{self.replica}", MAX_LETTERS)
        return [letter.decode().split() for letter in found or ()]

    async def show_alive(self) -> None:
        await self._execute("SET", f"chat:alive:{self.replica}", 1, "EX", ALIVE_TTL)

    async def is_alive(self, owner: str) -> bool:
        return bool(await self._execute("EXISTS", f"chat:alive:{owner}"))

    async def write(self, key: str, entries: Sequence[Entry], *, anew: bool = False) -> None:
        """Add entries to a replay, or write it anew."""
        values = [text for at, *rest in entries for text in (f"0-{at}", *rest)]
        how, name = "anew" if anew else "", f"chat:replay:{key}"
        await self._execute("EVAL", WRITE, 1, name, self._replay_ttl, how, *values)

    async def read(self, key: str, after: int) -> list[Entry]:
        """Return what comes after a position; the end, even where it does not."""
        name, start = f"chat:replay:{key}", f"(0-{after}"
        found = await self._execute("XRANGE", name, start, "+")
        found = found or await self._execute("XREVRANGE", name, "+", "-", "COUNT", 1)
        return [
            Entry(int(id_.partition(b"-")[2]), kind.decode(), text.decode())
            for id_, fields in found
            for kind, text in fields.items()
        ]

    async def become_reader(self, key: str, reader: str) -> None:
        """Take a reply over from whoever reads it."""
        await self._execute("SET", f"chat:reader:{key}", reader, "EX", self._claim_ttl)

    async def reader(self, key: str) -> str:
        return (await self._execute("GET", f"chat:reader:{key}") or b"").decode()

    async def _execute(self, *command: str | int | bytes) -> Any:
        if not self._redis:
            return None
        if not self._redis.is_up:  # a chat that begins does not wait for it
            raise errors.ReplyUnavailable
        try:
            return await self._redis.execute(*command)
        except errors.HistoryUnavailable:
            raise errors.ReplyUnavailable from None
