"""How often a client may chat: one contract for the buckets, here and in Redis; and end to end."""

import json
from collections.abc import AsyncIterator, Callable

import pytest
from starlette.types import Scope

from chat.api.limits import CLIENTS, RateLimiter, client_key
from chat.errors import RateLimited
from chat.storage.redis import open_redis
from tests.clock import Clock
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import PATIENCE, RedisServer, Service, body, closing_code, wait_until

pytestmark = pytest.mark.anyio

CLIENT = "198.51.100.7"


async def test_a_bucket_refills_steadily() -> None:
    limiter = RateLimiter("6/minute", None, clock=(clock := Clock()))
    taken = []
    for wait in (0, 0, 0, 0, 0, 0, 0, 10, 0, 9, 1, 60, *[0] * 6):
        clock.now += wait
        taken.append((await limiter.take(CLIENT))[0])
    refills = [True, False, False, True]  # ten seconds are worth one request
    assert taken == [True] * 6 + [False] + refills + [True] * 6 + [False]


async def test_whole_seconds_stay_whole_whatever_the_clock_says() -> None:
    clock = Clock()
    clock.now = 1000.3
    assert clock.now + 1800 - clock.now > 1800, "of such sums"
    limiter = RateLimiter("2/hour", None, clock=clock)
    _, full_in = await limiter.take(CLIENT)
    assert limiter.headers(full_in)[1][1] == b'"default";r=1;t=1800'


NewLimiter = Callable[[str], RateLimiter]


@pytest.fixture
async def in_redis(redis_server: RedisServer) -> AsyncIterator[NewLimiter]:
    """Make limiters of a given rate on one Redis."""
    async with open_redis(redis_server.address, "", optional_timeout=PATIENCE) as redis:
        yield lambda rate: RateLimiter(rate, redis)


@pytest.fixture(params=["memory", "redis"])
def new_limiter(request: pytest.FixtureRequest, in_redis: NewLimiter) -> NewLimiter:
    return in_redis if request.param == "redis" else lambda rate: RateLimiter(rate, None)


async def test_a_burst_is_fine_and_what_is_over_it_is_told_how_long_to_wait(
    new_limiter: NewLimiter,
) -> None:
    limiter, headers = new_limiter("3/hour"), []
    scope: Scope = {"client": (CLIENT, 1)}
    for _ in range(3):
        await limiter.admit(scope)
        headers.append(scope["chat.headers"])
    with pytest.raises(RateLimited, match="the rate limit is 3/hour") as error:
        await limiter.admit(scope)
    assert 1190 < (error.value.retry_after or 0) <= 1200
    headers.append(scope["chat.headers"])
    assert {policy for policy, _ in headers} == {(b"ratelimit-policy", b'"default";q=3;w=3600')}
    left = [state.partition(b";t=")[0] for _, (_, state) in headers]
    assert left == [b'"default";r=%d' % remaining for remaining in (2, 1, 0, 0)]
    await limiter.admit({"client": ("198.51.100.8", 1)})


async def test_refused_requests_cost_nothing(new_limiter: NewLimiter) -> None:
    limiter = new_limiter("1/day")
    taken = [await limiter.take(CLIENT) for _ in range(50)]
    assert max(full_in for _, full_in in taken) <= 86_400


async def test_limiters_on_one_redis_share_a_bucket_to_the_last_request_for_each_rate(
    in_redis: NewLimiter,
) -> None:
    one, other = in_redis("4/hour"), in_redis("4/hour")
    taken = [await each.take(CLIENT) for each in (one, one, one, other, other, one)]
    assert [is_allowed for is_allowed, _ in taken] == [True, True, True, True, False, False]
    another = in_redis("1/minute")
    assert [(await another.take(CLIENT))[0] for _ in range(2)] == [True, False]


async def test_a_process_remembers_only_so_many_clients() -> None:
    limiter = RateLimiter("1/day", None)
    for number in range(CLIENTS + 1):
        assert (await limiter.take(f"client {number}"))[0]
    assert not (await limiter.take(f"client {CLIENTS}"))[0], "the newest"
    assert (await limiter.take("client 0"))[0], "the oldest"


def statuses(service: Service, count: int, **headers: str) -> list[int]:
    asked = body("hello", stream=False)
    answers = [service.http.post("/chat", json=asked, headers=headers) for _ in range(count)]
    return [answer.status_code for answer in answers]


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
    assert third.json()["error"].startswith("the rate limit is 2/hour; try again in ")
    assert service.log_line(status=429)["error"] == "rate_limited"


def test_the_limit_holds_on_a_websocket_and_for_bad_messages(
    start_service: StartService, groq: FakeGroq
) -> None:
    service, ends, bad = start_service(RATE_LIMIT="2/hour"), [], '{"messages": []}'
    with service.socket() as socket:
        for sent in (json.dumps(body("hello")), bad, bad, json.dumps(body("again"))):
            socket.send(sent)
            while "token" in (message := json.loads(socket.recv(5))):
                pass
            ends.append(message)
    assert ends[0] == {"done": "true"}
    assert "messages must not be empty" in ends[1]["error"]
    assert all("the rate limit is 2/hour" in end["error"] for end in ends[2:])
    assert [request.contents[-1] for request in groq.requests] == ["hello"]


def test_a_bad_body_counts_against_the_limit_but_not_one_without_messages(
    start_service: StartService,
) -> None:
    service = start_service(RATE_LIMIT="2/hour")
    sent = ["{}", "{}", "{}", "nonsense", '{"messages": []}', "nonsense", "{}"]
    statuses = [service.http.post("/chat", content=each).status_code for each in sent]
    assert statuses == [400, 400, 400, 400, 400, 429, 400]


def test_without_a_limit_nothing_is_said_of_one(service: Service) -> None:
    assert not {"ratelimit", "ratelimit-policy"} & service.chat("hello").headers.keys()


def test_a_limit_applies_to_an_address_or_to_the_network_of_a_customer() -> None:
    for client, key in (
        ("198.51.100.7", "198.51.100.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:1::2", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("unix:", "unix:"),
        ("", ""),
    ):
        assert client_key(client) == key


async def test_replicas_share_the_limit_and_it_outlives_them(
    start_service: StartService, redis_server: RedisServer, in_redis: NewLimiter
) -> None:
    limiter = in_redis("1000/day")
    while (await limiter.take("127.0.0.1"))[0]:
        pass
    service = start_service(RATE_LIMIT="1000/day", REDIS_ADDR=redis_server.address)
    # Its own bucket, for chats that Redis does not respond to in time, is full.
    wait_until(lambda: statuses(service, 1) == [429])


@pytest.mark.parametrize("break_it", [RedisServer.kill, RedisServer.pause])
def test_while_redis_is_away_each_process_has_a_limit_of_its_own(
    start_service: StartService, redis_server: RedisServer, break_it: Callable[[RedisServer], None]
) -> None:
    service = start_service(RATE_LIMIT="5/hour", REDIS_ADDR=redis_server.address)
    wait_until(lambda: service.metric("redis_up") == 1)
    break_it(redis_server)
    assert statuses(service, 8) == [200] * 5 + [429] * 3
    redis_server.resume()


def test_behind_a_trusted_proxy_each_client_has_its_own_limit(start_service: StartService) -> None:
    service = start_service(RATE_LIMIT="1/hour", TRUSTED_PROXIES="127.0.0.1, 10.0.0.0/8")
    untrusting = start_service(RATE_LIMIT="1/hour")
    for client, expected in (("198.51.100.1", [200]), ("198.51.100.2", [429])):  # a forged header
        assert statuses(untrusting, 1, **{"x-forwarded-for": client}) == expected
    for client, expected in (
        ("198.51.100.1", [200, 429]),
        ("198.51.100.2, 10.1.1.1", [200, 429]),
        ("6.6.6.6, 198.51.100.2", [429]),
        ("2001:db8::1", [200]),
        ("2001:db8::2", [429]),
    ):
        assert statuses(service, len(expected), **{"x-forwarded-for": client}) == expected
    service.log_line(client="198.51.100.2", status=429)


TOO_MANY = {  # the status, that of another client, and the error
    "MAX_CONCURRENT": (503, 503, "too many concurrent replies; try again"),
    "MAX_CONCURRENT_PER_CLIENT": (429, 200, "concurrent replies for this client (limit 1)"),
}


@pytest.mark.parametrize("setting", TOO_MANY)
def test_too_many_replies_at_once_are_refused(
    start_service: StartService, groq: FakeGroq, setting: str
) -> None:
    service = start_service(TRUSTED_PROXIES="127.0.0.1", **{setting: 1})
    status, status_of_another, error = TOO_MANY[setting]
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events), service.socket() as socket:
        next(events)
        answer = service.chat("another")
        assert (answer.status_code, answer.headers["retry-after"]) == (status, "1")
        assert statuses(service, 1, **{"x-forwarded-for": "198.51.100.1"}) == [status_of_another]
        socket.send(json.dumps(body("another")))
        assert error in json.loads(socket.recv(5))["error"]
        if status == 503:
            assert closing_code(socket) == 1013
        groq.release()
        assert [event.data for event in events] == ["b", "[DONE]"]
    wait_until(lambda: service.chat("another").status_code == 200)
