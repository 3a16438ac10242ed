"""How often a client may chat: one contract for the buckets, here and in Redis; and end to end."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from chat.config import Rate
from chat.limits import CLIENTS, Allowance, RateLimiter
from chat.link import open_link
from tests.clock import Clock
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import (
    PATIENCE,
    RedisServer,
    Service,
    body,
    closing_code,
    free_port,
    wait_until,
)


def test_a_bucket_refills_steadily() -> None:
    async def scenario() -> list[bool]:
        clock = Clock()
        limiter = RateLimiter(Rate(6, "minute"), None, clock=clock)
        taken = []
        for wait in (0, 0, 0, 0, 0, 0, 0, 10, 0, 9, 1, 60, *[0] * 6):
            clock.now += wait
            taken.append((await limiter.take("198.51.100.7")).is_allowed)
        return taken

    burst, refused, allowed = [True] * 6, [False], [True]
    assert asyncio.run(scenario()) == [
        *burst,
        *refused,
        *allowed,
        *refused,
        *refused,
        *allowed,
        *burst,
        *refused,
    ]


def test_whole_seconds_stay_whole_whatever_the_clock_says() -> None:
    async def scenario() -> Allowance:
        clock = Clock()
        clock.now = 1000.3
        assert clock.now + 1800 - clock.now > 1800, "of such sums"
        return await RateLimiter(Rate(2, "hour"), None, clock=clock).take("198.51.100.7")

    assert asyncio.run(scenario()).headers[1][1] == b'"default";r=1;t=1800'


@asynccontextmanager
async def limiter_on(store: str, server: RedisServer, rate: Rate) -> AsyncIterator[RateLimiter]:
    if store == "memory":
        yield RateLimiter(rate, None)
        return
    async with open_link(server.address, "") as link:
        await link.probe()
        yield RateLimiter(rate, link, budget=PATIENCE)


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_a_burst_is_fine_and_what_is_over_it_is_told_how_long_to_wait(
    store: str, redis_server: RedisServer
) -> None:
    async def scenario() -> tuple[list[Allowance], Allowance]:
        async with limiter_on(store, redis_server, Rate(3, "hour")) as limiter:
            taken = [await limiter.take("198.51.100.7") for _ in range(4)]
            return taken, await limiter.take("198.51.100.8")

    (first, second, third, over), other = asyncio.run(scenario())
    assert [each.is_allowed for each in (first, second, third, over)] == [True] * 3 + [False]
    assert [each.remaining for each in (first, second, third, over)] == [2, 1, 0, 0]
    assert 1190 < over.retry_after <= 1200
    assert other.is_allowed
    assert [name for name, _ in first.headers] == [b"ratelimit-policy", b"ratelimit"]
    assert first.headers[0][1] == b'"default";q=3;w=3600'
    assert first.headers[1][1].startswith(b'"default";r=2;t=')


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_refused_requests_cost_nothing(store: str, redis_server: RedisServer) -> None:
    async def scenario() -> list[float]:
        async with limiter_on(store, redis_server, Rate(1, "day")) as limiter:
            await limiter.take("198.51.100.7")
            return [(await limiter.take("198.51.100.7")).full_in for _ in range(50)]

    waits = asyncio.run(scenario())
    assert max(waits) <= 86_400


def test_limiters_on_one_redis_share_a_bucket_to_the_last_request(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> list[bool]:
        rate = Rate(4, "hour")
        async with (
            limiter_on("redis", redis_server, rate) as one,
            limiter_on("redis", redis_server, rate) as other,
        ):
            takers = [one, one, one, other, other, one]
            return [(await each.take("198.51.100.7")).is_allowed for each in takers]

    assert asyncio.run(scenario()) == [True, True, True, True, False, False]


def test_another_rate_has_another_bucket_on_the_same_redis(redis_server: RedisServer) -> None:
    async def scenario(rate: Rate) -> list[bool]:
        async with limiter_on("redis", redis_server, rate) as limiter:
            return [(await limiter.take("198.51.100.7")).is_allowed for _ in range(2)]

    for rate in (Rate(1, "day"), Rate(1, "minute")):
        assert asyncio.run(scenario(rate)) == [True, False]


def test_a_process_remembers_only_so_many_clients() -> None:
    async def scenario() -> tuple[bool, bool]:
        limiter = RateLimiter(Rate(1, "day"), None)
        for number in range(CLIENTS + 1):
            assert (await limiter.take(f"client {number}")).is_allowed
        newest, oldest = await limiter.take(f"client {CLIENTS}"), await limiter.take("client 0")
        return newest.is_allowed, oldest.is_allowed

    assert asyncio.run(scenario()) == (False, True)


def statuses(service: Service, count: int, **headers: str) -> list[int]:
    asked = body("hello", stream=False)
    return [
        service.http.post("/chat", json=asked, headers=headers).status_code for _ in range(count)
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_over_its_limit_gets_a_429_that_says_when_to_come_back(
    start_service: StartService, stream: bool
) -> None:
    service = start_service(RATE_LIMIT="2/hour")
    first, _, third = (service.chat("hello", stream=stream) for _ in range(3))
    assert first.headers["ratelimit-policy"] == '"default";q=2;w=3600'
    assert first.headers["ratelimit"] == '"default";r=1;t=1800'
    assert third.status_code == 429
    assert 1780 < int(third.headers["retry-after"]) <= 1800
    assert third.headers["ratelimit"].startswith('"default";r=0;t=')
    assert third.json()["error"].startswith("the limit is 2 requests per hour; try again in ")
    assert service.log_line(status=429)["error"] == "rate_limited"


def test_the_limit_holds_on_a_websocket_which_stays_open(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(RATE_LIMIT="1/hour")
    with service.socket() as socket:
        ends = []
        for _ in range(3):
            socket.send(json.dumps(body("hello")))
            while "token" in (message := json.loads(socket.recv(5))):
                pass
            ends.append(message)
    assert ends[0] == {"done": "true"}
    assert all("the limit is 1 request per hour" in end["error"] for end in ends[1:])
    assert len(groq.asked("hello")) == 1


def test_without_a_limit_nothing_is_said_of_one(service: Service) -> None:
    answer = service.chat("hello")
    assert "ratelimit" not in answer.headers
    assert "ratelimit-policy" not in answer.headers


def test_replicas_share_the_limit(start_service: StartService, redis_server: RedisServer) -> None:
    settings = {"RATE_LIMIT": "20/hour", "REDIS_ADDR": redis_server.address}
    one, other = start_service(**settings), start_service(**settings)
    for service in (one, other):
        wait_until(lambda service=service: service.metric("redis_up") == 1)  # type: ignore[misc]
    assert statuses(one, 20).count(200) == 20
    # An answer of Redis' that comes too late on a busy machine leaves one chat to its process.
    assert statuses(other, 20).count(429) > 10


@pytest.mark.parametrize(
    "break_it", [RedisServer.kill, RedisServer.pause], ids=["killed", "hanging"]
)
def test_a_dying_redis_locks_nobody_out_and_lifts_no_limit(
    start_service: StartService,
    redis_server: RedisServer,
    break_it: Callable[[RedisServer], None],
) -> None:
    service = start_service(RATE_LIMIT="20/hour", REDIS_ADDR=redis_server.address)
    wait_until(lambda: service.metric("redis_up") == 1)
    assert statuses(service, 20).count(200) == 20
    break_it(redis_server)
    # A bucket of its own, of which late answers of Redis' may have taken some before.
    after = statuses(service, 25)
    assert after.count(200) > 10
    assert after[20:] == [429] * 5
    redis_server.resume()


def test_without_redis_each_process_has_its_own_limit(start_service: StartService) -> None:
    service = start_service(RATE_LIMIT="1/hour", REDIS_ADDR=f"127.0.0.1:{free_port()}")
    assert statuses(service, 2) == [200, 429]


def test_a_forged_header_makes_nobody_a_new_client(start_service: StartService) -> None:
    service = start_service(RATE_LIMIT="1/hour")
    assert statuses(service, 1, **{"x-forwarded-for": "198.51.100.1"}) == [200]
    assert statuses(service, 1, **{"x-forwarded-for": "198.51.100.2"}) == [429]


def test_behind_a_trusted_proxy_each_client_has_its_own_limit(start_service: StartService) -> None:
    service = start_service(RATE_LIMIT="1/hour", TRUSTED_PROXIES="127.0.0.1, 10.0.0.0/8")
    assert statuses(service, 2, **{"x-forwarded-for": "198.51.100.1"}) == [200, 429]
    assert statuses(service, 2, **{"x-forwarded-for": "198.51.100.2, 10.1.1.1"}) == [200, 429]
    assert statuses(service, 1, **{"x-forwarded-for": "6.6.6.6, 198.51.100.2"}) == [429]
    assert statuses(service, 1, **{"x-forwarded-for": "2001:db8::1"}) == [200]
    assert statuses(service, 1, **{"x-forwarded-for": "2001:db8::2"}) == [429]
    service.log_line(client="198.51.100.2", status=429)


def test_too_many_replies_at_once_are_a_503(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service(MAX_CONCURRENT=1)
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        answer = service.chat("another")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        with service.socket() as socket:
            socket.send(json.dumps(body("another")))
            assert "too many replies at once" in json.loads(socket.recv(5))["error"]
            assert closing_code(socket) == 1013
        groq.release()
        assert [event.data for event in events] == ["b", "[DONE]"]
    wait_until(lambda: service.chat("another").status_code == 200)


def test_too_many_replies_to_one_client_are_a_429(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(MAX_CONCURRENT_PER_CLIENT=1, TRUSTED_PROXIES="127.0.0.1")
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        answer = service.chat("another")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert statuses(service, 1, **{"x-forwarded-for": "198.51.100.1"}) == [200]
        with service.socket() as socket:
            socket.send(json.dumps(body("another")))
            assert "for one client" in json.loads(socket.recv(5))["error"]
        groq.release()
        list(events)
    wait_until(lambda: service.chat("another").status_code == 200)


def test_the_addresses_of_one_ipv6_network_share_their_places(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(MAX_CONCURRENT_PER_CLIENT=1, TRUSTED_PROXIES="127.0.0.1")
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    headers = {"x-forwarded-for": "2001:db8::1"}
    asked = body("held", stream=True)
    with service.http.stream("POST", "/chat", json=asked, headers=headers) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        assert statuses(service, 1, **{"x-forwarded-for": "2001:db8::2"}) == [429]
        assert statuses(service, 1, **{"x-forwarded-for": "2001:db8:0:1::2"}) == [200]
        groq.release()


def test_bad_messages_on_a_websocket_count_too(start_service: StartService) -> None:
    service = start_service(RATE_LIMIT="3/day")
    with service.socket() as socket:
        for _ in range(3):
            socket.send("{}")
            assert "messages" in json.loads(socket.recv(5))["error"]
        socket.send("{}")
        assert "the limit is 3 requests per day" in json.loads(socket.recv(5))["error"]


@pytest.mark.parametrize("message", ["{}", '{"cancel":true}'])
def test_a_websocket_that_asks_for_nothing_is_closed(service: Service, message: str) -> None:
    with service.socket() as socket:
        for _ in range(101):
            socket.send(message)
        error = json.loads(socket.recv(5))["error"]
        while "in a row" not in error:
            error = json.loads(socket.recv(5))["error"]
        assert closing_code(socket) == 1008


def test_another_limit_begins_with_a_full_bucket(
    start_service: StartService, redis_server: RedisServer
) -> None:
    for rate in ("5/day", "5/minute"):
        service = start_service(RATE_LIMIT=rate, REDIS_ADDR=redis_server.address)
        wait_until(lambda service=service: service.metric("redis_up") == 1)  # type: ignore[misc]
        assert statuses(service, 5) == [200] * 5
