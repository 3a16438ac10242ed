"""Redis as a cache: what it holds, and that no chat waits for it or fails by it."""

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import redis
from redis.crc import key_slot

from chat.link import Link, open_link
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import RedisCluster, RedisServer, Service, free_port, wait_until

READY = {"status": "ready", "models": {"openai/gpt-oss-20b": "unknown"}}


def stored(server: RedisServer) -> dict[str, int]:
    with redis.Redis(port=server.port, decode_responses=True) as client:
        return {key: int(client.get(key) or 0) for key in client.keys()}  # noqa: SIM118


def is_up(service: Service) -> bool:
    return bool(service.metric("redis_up") == 1)


def test_learned_counts_are_kept_for_a_day_under_a_hash(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    service = start_service(REDIS_ADDR=redis_server.address)
    groq.on("one", Script(["ok"], prompt_tokens=71, completion_tokens=5, reasoning=["hm", "hm"]))
    groq.on("two", Script(["fine"], prompt_tokens=90, completion_tokens=3))

    def is_learned() -> bool:  # what Redis does not take in time is told again with the next reply
        service.http.delete(f"/conversations/{conversation}")
        service.reply("one", conversation)
        service.reply("two", conversation)
        return len(stored(redis_server)) == 4

    wait_until(is_learned)
    assert sorted(stored(redis_server).values()) == [3, 5, 14, 71]
    with redis.Redis(port=redis_server.port, decode_responses=True) as client:
        for key in client.keys():  # noqa: SIM118
            assert re.fullmatch(r"chat:tokens:[0-9a-f]{64}", key)
            assert 86_000 < client.ttl(key) <= 86_400


def test_another_replica_knows_what_one_has_learned(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    one, other = (start_service(REDIS_ADDR=redis_server.address) for _ in range(2))

    def is_known() -> bool:  # of a message that the other one was never asked before
        content = conversation = uuid4().hex
        one.reply(content, conversation)
        hits = other.metric("token_cache_lookups_total", result="hit")
        other.reply(content, conversation)
        return other.metric("token_cache_lookups_total", result="hit") > hits

    wait_until(is_known)


def test_redis_with_a_password(start_service: StartService, groq: FakeGroq) -> None:
    with RedisServer("--requirepass", "open sesame") as server:
        right = start_service(REDIS_ADDR=server.address, REDIS_PASSWORD="open sesame")
        wrong = start_service(REDIS_ADDR=server.address, REDIS_PASSWORD="sesame")
        wait_until(lambda: is_up(right))
        assert not is_up(wrong)
        assert right.http.get("/ready").json() == {**READY, "redis": "up"}
        assert wrong.http.get("/ready").json() == {**READY, "redis": "down"}
        assert wrong.reply("hello") == "You said: hello"
        assert "sesame" not in wrong.process.output + right.process.output


def test_what_somebody_else_stored_there_is_a_miss(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    one = start_service(REDIS_ADDR=redis_server.address)
    wait_until(lambda: bool(one.reply("hello")) and len(stored(redis_server)) == 2)
    with redis.Redis(port=redis_server.port) as client:
        for key in client.keys():  # noqa: SIM118
            client.set(key, "nonsense")
    other = start_service(REDIS_ADDR=redis_server.address)
    assert other.reply("hello") == "You said: hello"
    assert other.metric("token_cache_lookups_total", result="miss") == 1


def test_redis_may_start_after_the_service(start_service: StartService, groq: FakeGroq) -> None:
    server = RedisServer()
    service = start_service(REDIS_ADDR=server.address)
    assert service.reply("before") == "You said: before"
    assert not is_up(service)
    with server:
        wait_until(lambda: is_up(service))
        wait_until(lambda: bool(service.reply("after")) and len(stored(server)) > 0)


def test_a_cluster_that_goes_as_a_whole_is_used_again_when_it_is_back(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    with RedisCluster() as cluster:
        service = start_service(REDIS_ADDR=cluster.url, HISTORY_STORE="redis")
        wait_until(lambda: is_up(service))
        for server in cluster.servers:
            server.kill()
        assert service.chat("away", conversation).status_code == 503
        wait_until(lambda: not is_up(service))
        for server in cluster.servers:
            server.start()
        wait_until(lambda: service.chat("back", conversation).status_code == 200)


def test_a_redis_that_is_not_there_delays_nothing(
    start_service: StartService, groq: FakeGroq
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    for address in (nowhere, "redis.invalid:6379", f"redis+cluster://{nowhere}"):
        service = start_service(REDIS_ADDR=address)
        assert service.reply("hello") == "You said: hello"
        warnings = [line for line in service.log_lines() if line["level"] == "WARNING"]
        assert len(warnings) == 1, "one line says that it is not there, not one a chat"


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_a_dying_redis_fails_no_chat_and_the_cache_heals(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, fault: str
) -> None:
    service = start_service(REDIS_ADDR=redis_server.address)
    assert service.reply("hello") == "You said: hello"
    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(service.reply, f"n{n}", f"conversation-{n:04}") for n in range(100)]
        getattr(redis_server, fault)()
        chats += [pool.submit(service.reply, f"m{n}", f"conversation-{n:04}") for n in range(100)]
        replies = [chat.result(30) for chat in chats]
    assert all(reply.startswith("You said: ") for reply in replies)
    wait_until(lambda: not is_up(service))
    assert service.reply("meanwhile") == "You said: meanwhile"
    redis_server.resume() if fault == "pause" else redis_server.start()
    wait_until(lambda: is_up(service))
    before = len(stored(redis_server))
    wait_until(lambda: bool(service.reply("healed")) and len(stored(redis_server)) > before)


def test_a_hung_redis_takes_no_more_than_its_budget(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    """The budget is 25 ms; the limit here only tells it from waiting for the hung server."""
    service = start_service(REDIS_ADDR=redis_server.address)
    service.reply("warm")
    redis_server.pause()
    started_at = time.monotonic()
    for number in range(20):
        service.reply(f"n{number}")
    assert time.monotonic() - started_at < 5
    redis_server.resume()


def test_once_a_question_took_too_long_none_is_asked_until_redis_answers_again(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> None:
        async with open_link(redis_server.address, "") as link:
            await until_answered(link)
            redis_server.pause()
            assert await link.ask([("GET", "a")]) is None
            with pytest.raises(StopIteration):  # it does not wait for anything
                link.ask([("GET", "a")]).send(None)
            redis_server.resume()
            await until_answered(link)

    asyncio.run(scenario())


def test_an_answer_that_is_there_is_not_missed_by_a_process_that_was_busy(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> None:
        async with open_link(redis_server.address, "") as link:
            assert await patiently(link, "SET", "a", "1") is True
            await until_answered(link)
            asked = asyncio.create_task(link.ask([("GET", "a")]))
            for _ in range(100):
                await asyncio.sleep(0)  # it is sent
            time.sleep(0.2)  # noqa: ASYNC251  (the event loop is held up)
            assert await asked == [b"1"]
            next_one = link.ask([("GET", "a")])
            next_one.send(None)  # it is asked, and waited for
            next_one.close()

    asyncio.run(scenario())


def test_more_patient_questions_have_a_lane_of_their_own(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with open_link(redis_server.address, "") as link:
            await link.probe()
            redis_server.pause()
            patient = asyncio.create_task(link.ask([("SET", "b", "1")], budget=20))
            assert await link.ask([("GET", "a")]) is None
            redis_server.resume()
            assert await patient == [True]

    asyncio.run(scenario())


async def patiently(link: Link, *command: str) -> object:
    """Ask for what has nothing to do with budgets, however busy the machine is."""
    await link.probe()
    (answer,) = await link.ask([command], budget=20) or [None]
    return answer


async def until_answered(link: Link) -> None:
    async with asyncio.timeout(20):
        while await link.ask([("GET", "a")]) is None:
            await link.probe()


def test_a_spike_of_questions_to_a_cluster_takes_few_connections() -> None:
    async def scenario(cluster: RedisCluster) -> None:
        async with open_link(cluster.url, "") as link:
            await link.probe()
            keys = [f"key {number}" for number in range(300)]
            for key in keys:
                assert await patiently(link, "SET", key, key) is True
            asked = [link.ask([("GET", key), ("GET", key)], budget=20) for key in keys * 3]
            assert await asyncio.gather(*asked) == [[key.encode()] * 2 for key in keys * 3]
            async with asyncio.timeout(20):
                while await link.look_up(keys[:50]) != {key: key.encode() for key in keys[:50]}:
                    await link.probe()

    with RedisCluster() as cluster:
        asyncio.run(scenario(cluster))
        for server in cluster.servers:
            with server.client() as client:
                assert client.info("stats")["total_connections_received"] < 20


def test_a_node_of_a_cluster_that_hangs_is_alone(
    start_service: StartService, groq: FakeGroq
) -> None:
    with RedisCluster() as cluster:
        service = start_service(REDIS_ADDR=cluster.url, HISTORY_STORE="redis")
        wait_until(lambda: is_up(service))
        names = [f"conversation-{number:04}" for number in range(30)]
        cluster.servers[1].pause()
        wait_until(lambda: redis_state(service) == "partly")
        with ThreadPoolExecutor(len(names)) as pool:  # before the others say that all is down
            answers = pool.map(lambda name: service.chat("hello", name).status_code, names)
            statuses = dict(zip(names, answers, strict=True))
        for name, status in statuses.items():
            assert (status == 503) == (cluster.server_of(name) is cluster.servers[1])
        assert set(statuses.values()) == {200, 503}
        assert service.http.get("/ready").status_code == 200
        cluster.servers[1].resume()
        wait_until(lambda: redis_state(service) == "up")
        assert {service.chat("hello", name).status_code for name in names} == {200}


def test_a_node_of_a_cluster_with_few_slots_is_used_too() -> None:
    async def scenario(cluster: RedisCluster) -> None:
        async with open_link(cluster.url, "") as link:
            await link.probe()
            names = [f"key {number}" for number in range(10_000)]
            (last,) = [key for key in names if key_slot(key.encode()) == 16_383][:1]
            assert await patiently(link, "SET", last, "1") is True

    with RedisCluster([(0, 8000), (8000, 16_382), (16_382, 16_384)]) as cluster:
        asyncio.run(scenario(cluster))


def redis_state(service: Service) -> str:
    state: str = service.http.get("/ready").json()["redis"]
    return state


def test_keys_are_counted_exactly_where_they_are_few_and_else_by_a_sample(
    redis_server: RedisServer,
) -> None:
    async def counted() -> int:
        async with open_link(redis_server.address, "") as link:
            return await link.count("a:")

    with redis_server.client() as client:
        client.mset({f"{kind}:{number}": 1 for number in range(100) for kind in "ab"})
        assert asyncio.run(counted()) == 100
        client.mset({f"{kind}:{number}": 1 for number in range(5000) for kind in "ab"})
        assert 4000 < asyncio.run(counted()) < 6000
