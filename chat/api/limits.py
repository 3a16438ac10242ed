"""How often each client may chat: a token bucket, kept as the moment it is full again (GCRA)."""

import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from ipaddress import IPv6Address, IPv6Network
from math import ceil

from starlette.requests import HTTPConnection
from starlette.types import Scope

from chat.api.middleware import client_of
from chat.errors import BadRequest, MissingMessages, RateLimited
from chat.messages import ChatRequest, parse_request
from chat.storage.redis import RedisClient, hashed_key

CLIENTS = 100_000  # clients that a process remembers: some 20 MB
ROUNDING = 1e-6  # seconds by which sums and differences of clocks may be off
Clock = Callable[[], float]
WINDOWS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
SCRIPT = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local full_at = math.max(now, tonumber(redis.call('GET', KEYS[1]) or '0'))
local limit, window = tonumber(ARGV[1]), tonumber(ARGV[2])
local next_full_at = full_at + window / limit
if next_full_at - now > window + 0.000001 then return {0, tostring(full_at - now)} end
redis.call('SET', KEYS[1], string.format('%.6f', next_full_at), 'EX', math.ceil(window))
return {1, tostring(next_full_at - now)}
"""


async def parse(request: HTTPConnection, received: bytes) -> ChatRequest:
    """Decode and check a message; a bad one, unless it is a ping, counts against the rate limit."""
    try:
        return parse_request(received, may_cancel=request.scope["type"] == "websocket")
    except MissingMessages:
        raise
    except BadRequest:
        await request.app.state.limiter.admit(request.scope)
        raise


def client_key(client: str) -> str:
    """Return whom a limit applies to: an address, or for IPv6 its /64, which is one customer's."""
    if ":" in client:
        with suppress(ValueError):  # a proxy may report anything
            address = IPv6Address(client)
            return str(address.ipv4_mapped or IPv6Network((address, 64), strict=False))
    return client


class RateLimiter:
    """The buckets of all clients, if there is a limit; here while Redis is not there."""

    def __init__(self, rate: str, redis: RedisClient | None, clock: Clock = time.monotonic) -> None:
        limit, _, unit = rate.partition("/")
        self._rate, self._limit, self._window = rate, int(limit or 0), WINDOWS.get(unit, 0)
        self._redis, self._clock = redis, clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    async def admit(self, scope: Scope) -> None:
        """Take a request out of its client's bucket; raise `RateLimited` if there is none in it."""
        if not self._rate:
            return
        is_allowed, full_in = await self.take(client_key(client_of(scope)))
        scope["chat.headers"] = self.headers(full_in)
        if not is_allowed:
            wait = max(1, ceil(full_in + self._window / self._limit - self._window - ROUNDING))
            raise RateLimited(self._rate, wait, retry_after=wait)

    async def take(self, key: str) -> tuple[bool, float]:
        """Return whether a request is allowed, and the seconds until its bucket is full again."""
        limit, window = self._limit, self._window
        if self._redis:
            name = hashed_key(f"rate:{limit}:{window}", key)  # another rate has other buckets
            (found,) = await self._redis.try_all([("EVAL", SCRIPT, 1, name, limit, window)])
            if found:
                return bool(found[0]), float(found[1])
        now = self._clock()
        full_at = max(now, self._full_at.pop(key, 0.0))
        is_allowed = full_at + window / limit - now <= window + ROUNDING
        self._full_at[key] = full_at + window / limit * is_allowed
        if len(self._full_at) > CLIENTS:
            self._full_at.popitem(last=False)
        return is_allowed, self._full_at[key] - now

    def headers(self, full_in: float) -> list[tuple[bytes, bytes]]:
        """See https://datatracker.ietf.org/doc/html/draft-ietf-httpapi-ratelimit-headers-10"""
        remaining = max(0, int((self._window - full_in) * self._limit / self._window + ROUNDING))
        state = f'"default";r={remaining};t={ceil(full_in - ROUNDING)}'
        policy = f'"default";q={self._limit};w={self._window}'
        return [(b"ratelimit-policy", policy.encode()), (b"ratelimit", state.encode())]
