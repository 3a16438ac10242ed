"""What replicas tell each other about kept replies, through Redis: see docs/design.md."""

from collections.abc import Sequence
from contextlib import suppress
from math import ceil
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec

from chat import errors
from chat.config import Settings
from chat.storage.redis import RedisClient

TTL = 10  # seconds that a letter or a part of a reply waits for its reader
CLAIM = """
local claim, ours = redis.call('GET', KEYS[1]) or '', ARGV[1]
local may_set = ours ~= '' and (claim == '' or claim == ours)
if may_set then redis.call('SET', KEYS[1], ours, 'EX', ARGV[2]) end
return claim
"""
PUSH = """
local length = redis.call('RPUSH', KEYS[1], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return length
"""


class Part(NamedTuple):
    """A part of a reply's text, or its end."""

    begin: int  # its place in the text; -1 for what does not end the reply
    kind: str  # text, completed, or the name of an error
    text: str  # in this order: itself, why it was cut off, what the error says


class Handover:
    """One replica's side; without Redis, or while it is away, `ReplyUnavailable` is raised."""

    def __init__(self, redis: RedisClient | None, settings: Settings) -> None:
        self.replica, self.is_closing = uuid4().hex, False
        self._redis = redis if settings.resume_timeout else None
        self._ttl = ceil(settings.reply_timeout + settings.resume_timeout)

    async def claim(self, key: str, fingerprint: str = "") -> tuple[str, str]:
        """Return a reply's owner and fingerprint, if it has any; with one, it becomes ours."""
        value = fingerprint and f"{self.replica}:{fingerprint}"
        claim = "EVAL", CLAIM, 1, f"chat:reply:{key}", value, self._ttl
        try:
            found = await self._execute(*claim) if self._redis else b""
        except errors.ReplyUnavailable:
            if not fingerprint:
                raise
            found = b""  # no other replica will know it
        owner, _, of = found.decode().partition(":")
        return owner, of

    async def release(self, key: str) -> None:
        """Let the id of a reply that has failed be used again."""
        with suppress(errors.ReplyUnavailable):
            await self._execute("DEL", f"chat:reply:{key}")

    async def ask(self, owner: str, *words: str | int) -> None:
        """Write a letter to another replica."""
        letter = " ".join(map(str, words))
        await self._execute("EVAL", PUSH, 1, f"chat:mail:{owner}", letter, TTL)

    async def letters(self) -> list[list[str]]:
        found = await self._execute("LPOP", f"chat:mail:{self.replica}", 1000)
        return [letter.decode(errors="replace").split() for letter in found or ()]

    async def send(self, reader: str, part: Part) -> int:
        """Send a part to a reader; return how many it has not taken yet."""
        push = "EVAL", PUSH, 1, f"chat:reader:{reader}", msgspec.json.encode(part), TTL
        return int(await self._execute(*push))

    async def receive(self, reader: str) -> list[Part]:
        found = await self._execute("LPOP", f"chat:reader:{reader}", 1000)
        return [msgspec.json.decode(part, type=Part) for part in found or ()]

    async def store(self, key: str, parts: Sequence[Part]) -> None:
        """Keep a reply in Redis for the time after this replica's end."""
        whole = msgspec.json.encode(parts)
        await self._execute("SET", f"chat:replay:{key}", whole, "EX", self._ttl)

    async def load(self, key: str) -> list[Part]:
        """Return a reply whose owner has ended; nothing if it has not."""
        found = await self._execute("GET", f"chat:replay:{key}")
        return msgspec.json.decode(found or b"[]", type=list[Part])

    async def _execute(self, *command: str | int | bytes) -> Any:
        if not (self._redis and self._redis.is_up):  # a chat that begins does not wait for it
            raise errors.ReplyUnavailable
        try:
            return await self._redis.execute(*command)
        except errors.HistoryUnavailable:
            raise errors.ReplyUnavailable from None
