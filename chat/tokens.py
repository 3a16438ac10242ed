"""
Token counts: learned from what Groq reports, estimated for text that it has never counted.

A count that Groq reported is exact for its model, and nobody can compute it without that model's
tokenizer. So it is remembered under a hash of model, role and content: in this process, and in
Redis for all replicas.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from chat import metrics
from chat.link import Link
from chat.messages import Message
from chat.recent import Recent

TTL = 86_400
"""Seconds that a count stays in Redis."""
REMEMBERED = 50_000
"""Counts kept in the process: some 10 MB."""
MAX_TEMPLATE_TOKENS = 1000
"""More than a model's template puts around a prompt; by it a report is told from nonsense."""


@dataclass(frozen=True, slots=True)
class Count:
    """The tokens of one message, and whether Groq has reported them."""

    tokens: int
    is_exact: bool


class TokenCounts:
    """The counts of one model's messages."""

    def __init__(self, model: str, link: Link | None) -> None:
        self._model = model
        self._link = link
        self._known: Recent[str, int] = Recent(REMEMBERED)
        self._estimated: Recent[str, int] = Recent(REMEMBERED)

    async def count(self, messages: Sequence[Message]) -> list[Count]:
        """Return the count of each message: learned here or by another replica, else estimated."""
        keys = [self._key(message) for message in messages]
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        if missing and self._link:
            cached = await self._shared(missing)
            for key, message in zip(keys, messages, strict=True):
                if key in cached:
                    self._remember(key, message, cached[key])
        found = [self._known.get(key) for key in keys]
        misses = found.count(None)
        metrics.TOKEN_CACHE_LOOKUPS.labels("miss").inc(misses)
        metrics.TOKEN_CACHE_LOOKUPS.labels("hit").inc(len(found) - misses)
        return [
            Count(self._estimate(key, message), False) if tokens is None else Count(tokens, True)
            for key, message, tokens in zip(keys, messages, found, strict=True)
        ]

    def learn(
        self,
        prompt: Sequence[Message],
        counts: Sequence[Count],
        *,
        prompt_tokens: int,
        reply: Message,
        reply_tokens: int,
    ) -> None:
        """
        Remember what Groq's report tells: the reply's count, and by difference that of the one
        message of the prompt which was not known before.

        Args:
            prompt: the messages that Groq was sent, but for the system prompt.
            counts: their counts, as `count` gave them.
            prompt_tokens: the tokens of the prompt, less those of the system prompt.
            reply: the assistant's message.
            reply_tokens: its tokens, less those of the model's reasoning.
        """
        reported = [(reply, reply_tokens)]
        unknown = [
            message for message, count in zip(prompt, counts, strict=True) if not count.is_exact
        ]
        if len(unknown) == 1:
            known = sum(count.tokens for count in counts if count.is_exact)
            reported.append((unknown[0], prompt_tokens - known))
        learned = {
            key: tokens
            for message, tokens in reported
            if self._remember(key := self._key(message), message, tokens)
        }
        if learned and self._link:
            self._link.tell([("SET", key, tokens, "EX", TTL) for key, tokens in learned.items()])

    async def _shared(self, keys: list[str]) -> dict[str, int]:
        assert self._link  # noqa: S101
        found = await self._link.look_up(keys)
        return {key: int(value) for key, value in found.items() if value.isdigit()}

    def _key(self, message: Message) -> str:
        text = "\0".join((self._model, message.role, message.content))
        return "chat:tokens:" + sha256(text.encode()).hexdigest()

    def _estimate(self, key: str, message: Message) -> int:
        """Estimate a message, once: it comes again with each turn of its conversation."""
        tokens = self._estimated.get(key)
        if tokens is None:
            tokens = self._estimated[key] = estimate(message)
        return tokens

    def _remember(self, key: str, message: Message, tokens: int) -> bool:
        """Keep a count, unless it is nonsense: no token is shorter than a byte."""
        if not 0 < tokens <= len(message.content.encode()) + MAX_TEMPLATE_TOKENS:
            return False
        self._known[key] = tokens
        return True


MESSAGE_TOKENS = 4
"""What a model's template puts around each message."""

# What a BPE vocabulary of today (o200k) makes one token of, about: fitted to texts and code, with
# the measured counts in tests/token_counts.json.
PIECES = re.compile(
    r"[._(]?[A-Z]?[a-z\u1e00-\u1eff]{1,10}|[A-Z]{1,4}|[0-9]{1,3}"  # words, parts of identifiers
    r"|\s{2,64}|\n|[!-/:-@\[-`{-~]{1,8}"  # indentation, punctuation
    r"|[\u0400-\u052f\u0600-\u06ff]{1,4}|[\u0080-\u1fff]{1,3}"  # Cyrillic, Arabic; others
    r"|[\u2000-\u2e7f]|[\U00010000-\U0010ffff]"  # symbols, emoji
)
IDEOGRAPHS = re.compile(r"[\u2e80-\uffef]")  # Chinese, Japanese, Korean
TOKENS_PER_IDEOGRAPH = 0.77


def estimate(message: Message) -> int:
    """Return about how many tokens a message takes in a prompt."""
    return estimate_tokens(message.content) + MESSAGE_TOKENS


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text takes; at least one."""
    ideographs = len(IDEOGRAPHS.findall(text)) * TOKENS_PER_IDEOGRAPH
    return max(1, round(len(PIECES.findall(text)) + ideographs))
