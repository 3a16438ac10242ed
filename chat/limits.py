"""
How often each client may chat: a token bucket, shared by all replicas where Redis is there.

The bucket is kept as one number, the moment at which it will be full again (the "generic cell rate
algorithm"): what a chat takes moves it on, and time catches up with it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from math import ceil

from chat.addresses import bucket_of
from chat.config import Rate
from chat.errors import RateLimited
from chat.link import BUDGET, Link
from chat.recent import Recent

CLIENTS = 100_000
"""Clients that a process remembers: some 20 MB."""
ROUNDING = 1e-6
"""Seconds by which sums and differences of clocks may be off."""

# Answers whether the request may go, and the seconds until the bucket is full again.
SCRIPT = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local full_at = math.max(now, tonumber(redis.call('GET', KEYS[1]) or '0'))
local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
local next_full_at = full_at + window / limit
if next_full_at - now > window + 0.000001 then
    return {0, tostring(full_at - now)}
end
redis.call('SET', KEYS[1], string.format('%.6f', next_full_at), 'EX', math.ceil(window))
return {1, tostring(next_full_at - now)}
"""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a client's bucket holds after a request."""

    rate: Rate
    is_allowed: bool
    full_in: float
    """Seconds until the bucket is full again."""

    @property
    def interval(self) -> float:
        """Seconds in which one more request becomes possible."""
        return self.rate.window / self.rate.limit

    @property
    def remaining(self) -> int:
        return max(0, int((self.rate.window - self.full_in) / self.interval + ROUNDING))

    @property
    def retry_after(self) -> int:
        return max(1, _whole_seconds(self.full_in + self.interval - self.rate.window))

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """As of draft-ietf-httpapi-ratelimit-headers-10."""
        policy = f'"default";q={self.rate.limit};w={self.rate.window}'
        state = f'"default";r={self.remaining};t={_whole_seconds(self.full_in)}'
        return [(b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())]

    def check(self) -> None:
        """Raise `RateLimited` where the request may not go."""
        if not self.is_allowed:
            raise RateLimited(str(self.rate), self.retry_after)


def _whole_seconds(seconds: float) -> int:
    return ceil(seconds - ROUNDING)


class RateLimiter:
    """The buckets of all clients; kept in this process while Redis is not there."""

    def __init__(
        self,
        rate: Rate,
        link: Link | None,
        *,
        budget: float = BUDGET,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate = rate
        self._link = link
        self._budget = budget
        self._clock = clock
        self._full_at: Recent[str, float] = Recent(CLIENTS)

    async def take(self, client: str) -> Allowance:
        """Take one request out of a client's bucket, if there is one in it."""
        key = bucket_of(client)
        shared = await self._take_shared(key) if self._link else None
        return shared or self._take_here(key)

    async def _take_shared(self, key: str) -> Allowance | None:
        assert self._link  # noqa: S101
        # Of another limit, what is left in the bucket says nothing.
        kind = f"{self._rate.limit}:{self._rate.window}"
        name = f"chat:rate:{kind}:{sha256(key.encode()).hexdigest()}"
        command = ("EVAL", SCRIPT, 1, name, self._rate.limit, self._rate.window)
        answers = await self._link.ask([command], budget=self._budget)
        if answers is None:
            return None
        is_allowed, full_in = answers[0]
        return Allowance(self._rate, bool(is_allowed), float(full_in))

    def _take_here(self, key: str) -> Allowance:
        now, window = self._clock(), self._rate.window
        full_at = max(now, self._full_at.get(key) or 0.0)
        next_full_at = full_at + window / self._rate.limit
        if next_full_at - now > window + ROUNDING:
            return Allowance(self._rate, False, full_at - now)
        self._full_at[key] = next_full_at
        return Allowance(self._rate, True, next_full_at - now)
