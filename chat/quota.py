"""
What is left of a model's quota, as Groq's headers tell it.

https://console.groq.com/docs/rate-limits: requests count per day, tokens per minute; both fill up
again steadily, and `reset` says how long until they are full. Of the tokens per day only a 429
tells, with its `retry-after`.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from math import ceil

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}
DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|s|m|h|d))+")
DURATION_PART = re.compile(r"([\d.]+)(ms|s|m|h|d)")


def parse_duration(text: str) -> float | None:
    """Return the seconds of a duration such as `2m59.56s` or `547ms`; None where it is none."""
    if DURATION.fullmatch(text) is None:
        return None
    return sum(float(number) * SECONDS[unit] for number, unit in DURATION_PART.findall(text))


LONGEST_RESET = 86_400.0
"""Seconds; a longer one is nonsense: Groq's windows are a minute and a day."""


def parse_retry_after(value: str, *, now: float | None = None) -> int | None:
    """Return the seconds of a `retry-after` header, a number or a date, but a day at most."""
    now = time.time() if now is None else now
    is_number = re.fullmatch(r"\d+(\.\d+)?", value.strip())
    try:
        seconds = float(value) if is_number else parsedate_to_datetime(value).timestamp() - now
    except (ValueError, OverflowError):
        return None
    return ceil(min(max(0, seconds), LONGEST_RESET))


@dataclass(frozen=True, slots=True)
class Level:
    """How full the quota of one kind was, and in how many seconds it will be full again."""

    limit: float | None
    remaining: float
    reset: float
    noted_at: float

    def wait_for(self, amount: float, reserved: float, now: float) -> float:
        """Return the seconds until `amount` is there, beside what is `reserved` for others."""
        missing = amount + reserved - self.remaining
        if missing <= 0 or (self.limit is not None and amount > self.limit):
            return 0.0  # what will never fit is for Groq to refuse
        share = 1.0
        if self.limit is not None and self.limit > self.remaining:
            share = min(1.0, missing / (self.limit - self.remaining))
        return max(0.0, self.noted_at + share * self.reset - now)


PROBE_INTERVAL = 60.0
"""Seconds after which one request is sent in spite of a quota that is used up: only an answer can
tell that it has been raised."""


class Quota:
    """The requests and tokens that one model's quota has left; endless until Groq tells."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._levels: dict[str, Level] = {}
        self._reserved = {"requests": 0, "tokens": 0}
        self._refused_until = 0.0
        self._probe_at = 0.0

    def wait_for(self, tokens: int) -> float:
        """Return the seconds until a request of so many tokens will not be refused."""
        now, amounts = self._clock(), {"requests": 1, "tokens": tokens}
        waits = (
            level.wait_for(amounts[kind], self._reserved[kind], now)
            for kind, level in self._levels.items()
        )
        wait = max(0.0, self._refused_until - now, *waits)
        if wait and now >= self._probe_at:
            self._probe_at = now + PROBE_INTERVAL
            return 0.0
        return wait

    @contextmanager
    def reserve(self, tokens: int) -> Iterator[None]:
        """Set something aside for a request until Groq has answered it, and so counted it."""
        self._reserved["requests"] += 1
        self._reserved["tokens"] += tokens
        try:
            yield
        finally:
            self._reserved["requests"] -= 1
            self._reserved["tokens"] -= tokens

    def note(self, status: int, headers: Mapping[str, str]) -> None:
        """Take what an answer tells: a 429 how long all is refused, any other that it is not."""
        now = self._clock()
        refused_for = parse_retry_after(headers.get("retry-after", "")) if status == 429 else None
        self._refused_until = now + (refused_for or 0)
        if refused_for:
            self._probe_at = now + PROBE_INTERVAL
        for kind in self._reserved:
            remaining = _number(headers.get(f"x-ratelimit-remaining-{kind}", ""))
            reset = parse_duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
            if remaining is not None and reset is not None:
                limit = _number(headers.get(f"x-ratelimit-limit-{kind}", ""))
                self._levels[kind] = Level(limit, remaining, min(reset, LONGEST_RESET), now)
                self._probe_at = now + PROBE_INTERVAL


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text) else None
