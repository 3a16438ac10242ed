"""Token counts: learned from Groq, which alone has the model's tokenizer; estimated until then."""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from chat import metrics
from chat.messages import Message
from chat.storage.redis import Command, RedisClient, hashed_key

REMEMBERED = 50_000  # counts kept in the process: some 10 MB
MAX_TEMPLATE_TOKENS = 1000  # more than a template puts around a prompt; beyond it a report is wrong


class Count(NamedTuple):
    """The tokens of one or more messages, and whether Groq has reported all of them."""

    tokens: int
    is_exact: bool


class TokenCounts:
    """The counts of one model's messages."""

    def __init__(self, model: str, redis: RedisClient | None) -> None:
        self._model, self._redis = model, redis
        self._known: OrderedDict[str, int] = OrderedDict()
        self._to_share: list[Command] = []

    async def count(self, messages: Sequence[Message]) -> list[Count]:
        """Return the count of each message: learned here or by another replica, else estimated."""
        keys = [self._key(message) for message in messages]
        found = {key: self._known[key] for key in keys if key in self._known}
        if self._redis and (missing := [key for key in keys if key not in found]):
            values = await self._redis.try_all([("GET", key) for key in missing])
            pairs = zip(missing, values, strict=True)
            found |= {key: int(value) for key, value in pairs if value and value.isdigit()}
        self._remember(found)
        misses = sum(key not in found for key in keys)
        metrics.cache_misses.inc(misses)
        metrics.cache_hits.inc(len(keys) - misses)
        return [
            Count(found[key], True) if key in found else Count(estimate(message), False)
            for key, message in zip(keys, messages, strict=True)
        ]

    def learn(self, message: Message, tokens: int) -> Count | None:
        """Remember and return what Groq reported, unless it is wrong: a token is a byte or more."""
        if not 0 < tokens <= len(message.content.encode()) + MAX_TEMPLATE_TOKENS:
            return None
        if self._known.get(key := self._key(message)) != tokens:
            self._remember({key: tokens})
            self._to_share.append(("SET", key, tokens, "EX", 86_400))
        return Count(tokens, True)

    async def share_forever(self) -> None:
        """Write what was learned to Redis, together; what it does not take is given up."""
        while True:
            await asyncio.sleep(0.05)
            commands, self._to_share = self._to_share, []
            if self._redis and commands:
                await self._redis.try_all(commands)

    def _key(self, message: Message) -> str:
        return hashed_key("tokens", f"{self._model}\0{message.role}\0{message.content}")

    def _remember(self, counts: dict[str, int]) -> None:
        for key, tokens in counts.items():
            self._known[key] = tokens
            self._known.move_to_end(key)  # the least recently used goes first
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)


def total(counts: Sequence[Count]) -> Count:
    return Count(sum(count.tokens for count in counts), all(count.is_exact for count in counts))


# About what o200k, a current vocabulary, has as one token: fitted to tests/token_counts.json.
_PIECES = re.compile(
    r"[._(]?[A-Z]?[a-z\u1e00-\u1eff]{1,10}|[A-Z]{1,4}|[0-9]{1,3}"  # words, parts of identifiers
    r"|\s{2,64}|\n|[!-/:-@\[-`{-~]{1,8}"  # indentation, punctuation
    r"|[\u0400-\u052f\u0600-\u06ff]{1,4}|[\u0080-\u1fff]{1,3}"  # Cyrillic, Arabic; others
    r"|[\u2000-\u2e7f]|[\U00010000-\U0010ffff]"  # symbols, emoji
)
_IDEOGRAPHS = re.compile(r"[\u2e80-\uffef]")  # Chinese, Japanese, Korean


def estimate(message: Message) -> int:
    """Return about how many tokens a message takes in a prompt."""
    return estimate_tokens(message.content) + 4  # of the model's template, around each message


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text takes; at least one."""
    tokens = len(_PIECES.findall(text)) + 0.77 * len(_IDEOGRAPHS.findall(text))
    return max(1, round(tokens))
