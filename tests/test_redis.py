"""Redis as an extra: what it holds, and that no chat waits for it or fails because of it."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis.asyncio import Redis

from chat.errors import HistoryUnavailable
from chat.messages import Message
from chat.storage.redis import OPTIONAL_TIMEOUT, RedisClient, open_redis
from chat.tokens import Count, TokenCounts
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import PATIENCE, ROOT, RedisCluster, RedisServer, Service, wait_until

pytestmark = pytest.mark.anyio

NOWHERE = "127.0.0.1:1"


def stored(server: RedisServer) -> dict[str, int]:
    keys = server.command("KEYS", "chat:tokens:*")
    return {key: int(server.command("GET", key) or 0) for key in keys}


def is_up(service: Service) -> bool:
    return service.metric("redis_up") == 1


async def eventually(ask: Callable[[], Awaitable[list[Any]]]) -> list[Any]:
    """Ask until there is an answer."""
    async with asyncio.timeout(PATIENCE):
        while True:
            if any(answer := await ask()):
                return answer
            await asyncio.sleep(0.01)


@pytest.fixture
async def client(redis_server: RedisServer) -> AsyncIterator[RedisClient]:
    async with open_redis(redis_server.address, "") as opened:
        yield opened


def test_learned_counts_are_kept_for_a_day_under_a_hash(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    service = start_service(REDIS_ADDR=redis_server.address)
    wait_until(lambda: is_up(service))
    groq.on("one", Script(["ok"], prompt_tokens=71, completion_tokens=5, reasoning=["hm", "hm"]))
    groq.on("two", Script(["fine"], prompt_tokens=90, completion_tokens=3))
    service.reply("one", conversation)
    service.reply("two", conversation)
    wait_until(lambda: len(stored(redis_server)) == 4)
    assert sorted(stored(redis_server).values()) == [3, 5, 14, 71]
    for key in stored(redis_server):
        assert re.fullmatch(r"chat:tokens:[0-9a-f]{64}", key)
        assert 86_000 < redis_server.command("TTL", key) <= 86_400


async def test_another_replica_knows_what_one_has_learned_and_nonsense_is_a_miss(
    redis_server: RedisServer,
) -> None:
    message = Message("user", "hello")
    async with open_redis(redis_server.address, "", optional_timeout=PATIENCE) as client:
        one, other = TokenCounts("a-model", client), TokenCounts("a-model", client)
        sharing = asyncio.create_task(one.share_forever())
        one.learn(message, 7)
        (key,) = await eventually(lambda: client.execute("KEYS", "chat:tokens:*"))
        sharing.cancel()
        assert await other.count([message]) == [Count(7, True)]
        for command in (("SET", key, "nonsense"), ("DEL", key), ("LPUSH", key, 1)):
            await client.execute(*command)
            (count,) = await TokenCounts("a-model", client).count([message])
            assert not count.is_exact
            assert await other.count([message]) == [Count(7, True)], "it has remembered it"


def test_a_chat_in_a_long_conversation_asks_redis_for_one_count(
    start_service: StartService, redis_server: RedisServer, conversation: str
) -> None:
    service = start_service(REDIS_ADDR=redis_server.address, HISTORY_STORE="redis")
    wait_until(lambda: is_up(service))
    for number in range(20):
        service.reply(f"{number}", conversation)
    with redis_server.client() as client, client.monitor() as monitor:
        service.reply("and now", conversation)
        client.echo("the end")
        seen = []
        while "the end" not in (command := monitor.next_command()["command"]):
            seen.append(command)
    assert len([command for command in seen if command.startswith("GET chat:tokens:")]) == 1
    assert len([command for command in seen if re.match("EVAL.*chat:history:", command, re.S)]) == 2


def test_redis_with_a_password(start_service: StartService) -> None:
    with RedisServer("--requirepass", "open sesame") as server:
        right = start_service(REDIS_ADDR=server.address, REDIS_PASSWORD="open sesame")
        wrong = start_service(REDIS_ADDR=server.address, REDIS_PASSWORD="sesame")
        wait_until(lambda: is_up(right))
        assert not is_up(wrong)
        states = [service.http.get("/ready").json()["redis"] for service in (right, wrong)]
        assert states == ["up", "down"]
        assert wrong.reply("hello") == "You said: hello"
        assert "sesame" not in wrong.process.output + right.process.output


def least_duration(service: Service) -> float:
    """Return how long the fastest of some chats takes, in seconds; a busy machine slows some."""
    service.reply("warm")
    taken = []
    for number in range(15):
        started_at = time.monotonic()
        service.reply(f"n{number}")
        taken.append(time.monotonic() - started_at)
    return min(taken)


@pytest.mark.parametrize("address", [NOWHERE, "redis.invalid:6379", f"redis+cluster://{NOWHERE}"])
def test_an_absent_redis_delays_nothing(start_service: StartService, address: str) -> None:
    service = start_service(REDIS_ADDR=address, RATE_LIMIT="1000/day")
    assert least_duration(service) < OPTIONAL_TIMEOUT
    assert service.process.output.count("Redis is down") == 1
    reason = "Connection refused" if NOWHERE in address else "[Nn]ame (or service|resol)"
    assert re.search(f"Redis is down .*{reason}", service.process.output)


@pytest.fixture(params=[RedisServer, RedisCluster])
def servers(request: pytest.FixtureRequest) -> Iterator[list[RedisServer]]:
    """A server, or those of a cluster, for this test alone."""
    with request.param() as running:
        yield [running] if request.param is RedisServer else running.servers


def url_of(servers: list[RedisServer], user: str = "") -> str:
    scheme = "redis" if len(servers) == 1 else "redis+cluster"
    return f"{scheme}://{user}" + ",".join(server.address for server in servers)


REFUSALS = {  # what makes Redis refuse commands, and what ends it
    "SET: OOM": ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
    "EVAL: NOPERM": ("ACL SETUSER default -@scripting", "ACL SETUSER default +@all"),
    "GET: NOPERM": ("ACL SETUSER default -@fast", "ACL SETUSER default +@all"),
    "SET: READONLY": ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),  # not in a cluster
}


def test_a_redis_that_refuses_what_the_service_uses_is_down(
    start_service: StartService, servers: list[RedisServer]
) -> None:
    service = start_service(REDIS_ADDR=url_of(servers), HISTORY_STORE="redis")
    for number, refused in enumerate(list(REFUSALS)[: 4 if len(servers) == 1 else 3]):
        wait_until(service.is_ready)
        for server in servers:
            server.command(*REFUSALS[refused][0].split())
        for _ in range(10 * bool(number)):  # the first is found in silence, too, within 5 s
            service.chat("hello")
        wait_until(lambda: not (is_up(service) or service.is_ready()))
        service.log_line(level="WARNING", message=f"Redis refused {refused}")
        for server in servers:
            server.command(*REFUSALS[refused][1].split())
    wait_until(service.is_ready)


def test_the_documented_rights_are_those_that_it_needs(
    start_service: StartService, servers: list[RedisServer], conversation: str
) -> None:
    rights = re.findall(r"^ACL SETUSER .*", (ROOT / "docs/operations.md").read_text(), re.M)
    for server in servers:
        for line in rights[: len(servers)]:  # the second is for a cluster
            server.command(*line.split())
    address = url_of(servers, "chat:password@")
    service = start_service(REDIS_ADDR=address, HISTORY_STORE="redis", RATE_LIMIT="9/day")
    wait_until(lambda: is_up(service))
    service.reply("hello", conversation)
    assert service.contents(conversation) == ["hello", "You said: hello"]
    assert service.http.delete(f"/conversations/{conversation}").status_code == 204
    wait_until(lambda: any(map(stored, servers)))
    assert any(server.command("KEYS", "chat:rate:*") for server in servers)
    assert "Redis refused" not in service.process.output


class BrokenRedis(Redis):
    async def execute_command(self, *_: object, **__: object) -> None:
        raise KeyError("unforeseen")


async def test_no_error_ends_the_checks(caplog: pytest.LogCaptureFixture) -> None:
    client = RedisClient(BrokenRedis())
    await client.check(PATIENCE)
    assert not client.is_up
    assert "Traceback" in caplog.text


FAULTS: dict[str, tuple[Callable[[RedisServer], Any], Callable[[RedisServer], Any]]] = {
    "is killed": (RedisServer.kill, RedisServer.start),
    "hangs": (RedisServer.pause, RedisServer.resume),
    "is full": (
        lambda server: server.command("CONFIG SET", "maxmemory", 1),
        lambda server: server.command("CONFIG SET", "maxmemory", 0),
    ),
}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def cached(module_groq: FakeGroq, redis: RedisServer) -> Iterator[Service]:
    settings = {"REDIS_ADDR": redis.address, "RATE_LIMIT": "100000/day"}
    with Service(GROQ_BASE_URL=module_groq.url, **settings) as service:
        yield service


@pytest.mark.parametrize("fault", FAULTS)
def test_a_redis_that_fails_fails_and_delays_no_chat_and_is_used_again_later(
    cached: Service, redis: RedisServer, groq: FakeGroq, fault: str
) -> None:
    begin, end = FAULTS[fault]
    wait_until(lambda: is_up(cached))
    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(cached.reply, f"n{n}", f"conversation-{n:04}") for n in range(50)]
        begin(redis)
        chats += [pool.submit(cached.reply, f"m{n}", f"conversation-{n:04}") for n in range(50)]
        assert all(chat.result(30).startswith("You said: ") for chat in chats)
    assert least_duration(cached) < OPTIONAL_TIMEOUT
    wait_until(lambda: not is_up(cached))
    end(redis)
    wait_until(lambda: is_up(cached))
    before = len(stored(redis))
    cached.reply(f"after it {fault}")
    wait_until(lambda: len(stored(redis)) > before)


def test_redis_may_start_after_the_service(start_service: StartService) -> None:
    server = RedisServer()
    service = start_service(REDIS_ADDR=server.address)
    assert service.reply("before") == "You said: before"
    assert not is_up(service)
    with server:
        wait_until(lambda: is_up(service))
        wait_until(lambda: bool(service.reply("after")) and len(stored(server)) > 0)


async def test_an_optional_command_gives_up_soon_and_the_next_ones_at_once(
    client: RedisClient, redis_server: RedisServer
) -> None:
    assert await client.try_all([("SET", "a", 1), ("GET", "a")]) == [True, b"1"]
    redis_server.pause()
    started_at = time.monotonic()
    assert await client.try_all([("GET", "a")]) == [None]
    assert OPTIONAL_TIMEOUT * 0.9 < time.monotonic() - started_at < 0.5
    with pytest.raises(StopIteration):  # it does not wait for anything
        client.try_all([("GET", "a")]).send(None)
    redis_server.resume()
    assert await eventually(lambda: client.try_all([("GET", "a")])) == [b"1"]


async def test_a_required_command_takes_a_second_at_most(
    client: RedisClient, redis_server: RedisServer
) -> None:
    redis_server.pause()
    started_at = time.monotonic()
    with pytest.raises(HistoryUnavailable):
        await client.execute("GET", "a")
    assert 0.9 < time.monotonic() - started_at < 2
    redis_server.resume()
    await client.execute("GET", "a")  # at once, whatever was known of Redis


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    """A cluster whose nodes go on without each other."""
    with RedisCluster() as running:
        for server in running.servers:
            server.command("CONFIG SET", "cluster-require-full-coverage", "no")
        yield running


def statuses(service: Service, names: list[str]) -> list[int]:
    """Chat in some conversations at once; return the statuses."""
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: service.chat("hello", name).status_code, names))


def test_a_cluster_keeps_conversations_and_counts(
    start_service: StartService, cluster: RedisCluster
) -> None:
    settings = {"REDIS_ADDR": cluster.address, "HISTORY_STORE": "redis"}
    service, other = start_service(**settings), start_service(**settings)
    wait_until(lambda: is_up(service) and is_up(other))
    for number in range(10):
        name = f"conversation-{number:04}"
        service.reply("hello", name)
        assert other.contents(name) == ["hello", "You said: hello"]
    keys = [server.command("KEYS", "chat:history:*") for server in cluster.servers]
    assert sum(map(len, keys)) == 10
    assert all(keys)
    wait_until(lambda: any(map(stored, cluster.servers)))


async def test_a_spike_of_commands_to_a_cluster_fails_none(cluster: RedisCluster) -> None:
    async with open_redis(cluster.address, "", optional_timeout=PATIENCE) as client:
        await client.check()  # the first look has half a second
        keys = [f"{{one slot}} {number}" for number in range(200)]
        await asyncio.gather(*[client.execute("SET", key, key) for key in keys])
        values = await client.try_all([("GET", key) for key in keys])
        assert values == [key.encode() for key in keys]


@pytest.mark.parametrize("fault", ["is killed", "hangs"])
def test_a_node_of_a_cluster_that_fails_is_alone(
    start_service: StartService, cluster: RedisCluster, fault: str
) -> None:
    settings = {"REDIS_ADDR": cluster.address, "HISTORY_STORE": "redis"}
    service = start_service(**settings, RATE_LIMIT="1000/day")
    (begin, end), node = FAULTS[fault], cluster.servers[1]
    wait_until(lambda: is_up(service))
    names = [f"conversation-{number:04}" for number in range(30)]
    expected = [503 if cluster.server_of(name) is node else 200 for name in names]
    assert set(expected) == {200, 503}
    begin(node)
    try:  # while redis-py looks the nodes up anew, others may wait too long as well
        wait_until(lambda: statuses(service, names) == expected and service.is_ready())
    finally:
        end(node)
    wait_until(lambda: set(statuses(service, names)) == {200})
    assert "traceback" not in service.process.output


def test_a_cluster_that_goes_as_a_whole_is_used_again_when_it_is_back(
    start_service: StartService, cluster: RedisCluster
) -> None:
    service = start_service(REDIS_ADDR=cluster.address, HISTORY_STORE="redis")
    names = [f"conversation-{number:04}" for number in range(10)]
    wait_until(lambda: is_up(service))
    for server in cluster.servers:
        server.kill()
    assert set(statuses(service, names)) == {503}
    wait_until(lambda: not is_up(service))
    for server in cluster.servers:
        server.start()
    wait_until(lambda: set(statuses(service, names)) == {200})
