"""Replies that another replica reads: two and three processes, Redis, a cluster, kills."""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from itertools import count, product, repeat
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import (
    Caller,
    Process,
    RedisCluster,
    RedisServer,
    Service,
    connected,
    everything_from,
    free_port,
    part_of,
    raw_chat,
    read_whole,
    wait_until,
)
from tests.test_proxy import configuration
from tests.test_replies import AWKWARD, EVENT, HELD, TEXT, new, reading, received, with_lf

Pair = tuple[Service, Service]


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def pair(module_groq: FakeGroq, redis: RedisServer) -> Iterator[Pair]:
    settings = {"GROQ_BASE_URL": module_groq.url, "REDIS_ADDR": redis.address}
    settings |= {"HISTORY_STORE": "redis", "SHARED_CONVERSATION": "no", "GROQ_MAX_RETRIES": "5"}
    with Service(**settings) as one, Service(**settings) as other:
        yield one, other


def broken_off(owner: Service, groq: FakeGroq) -> dict[str, Any]:
    """Begin a reply at a replica, and break the connection after the two tokens of `HELD`."""
    groq.on("held", HELD)
    asked = new("held")
    assert part_of(owner, asked, cut=2 * EVENT).text == "ab"
    return asked


def test_hundreds_of_breaks_leave_every_text_whole_and_once(pair: Pair, groq: FakeGroq) -> None:
    groq.on("awkward", Script(AWKWARD * 5, interval=0.01))

    def read(number: int) -> None:
        asked = new(f"awkward {number}.", f"conversation-{uuid4().hex}")
        hops = ((random.choice(pair), random.randrange(400)) for _ in count())
        whole = read_whole(asked, hops)
        assert (whole.end, whole.text) == ("[DONE]", with_lf(TEXT * 5))
        assert len(groq.asked(f"awkward {number}.")) == 1
        assert pair[number % 2].contents(asked["conversation"])[1:] == [TEXT * 5]

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(read, range(100)))


def test_an_id_that_failed_may_be_used_again_though_somebody_has_followed_it(
    pair: Pair, groq: FakeGroq
) -> None:
    (owner, other), asked = pair, new("refused")
    groq.on("refused", Script(status=422, hold_before_status=True), Script(["ok"]))
    before = other.metric("chat_resumes_total", result="elsewhere")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(part_of, owner, asked)
        groq.wait_for_request("refused")
        second = pool.submit(part_of, other, asked)
        wait_until(lambda: other.metric("chat_resumes_total", result="elsewhere") > before)
        groq.release()
        assert first.result().status in (502, 409), "it may have been taken over before"
        assert second.result().text == ""
    assert owner.http.head(f"/replies/{asked['reply']}").status_code == 204
    parts = [part_of(service, asked) for service in pair]
    assert [part.text for part in parts] == ["ok", "ok"], parts


def test_the_same_post_to_two_replicas_asks_groq_once(pair: Pair, groq: FakeGroq) -> None:
    groq.on("slow", Script(["a", "b", "c"], interval=0.02))
    for number in range(8):
        asked = new(f"slow {number}.")
        with ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(part_of, pair, repeat(asked)))
        assert "[DONE]" in [part.end for part in parts]  # the other one was told of this one
        for service, part in zip(pair, parts, strict=True):
            assert part.text + part_of(service, asked, part.position).text == "abc", parts
            assert service.http.post("/chat", json=asked).json() == {"response": "abc"}
            assert part_of(service, new("other") | {"reply": asked["reply"]}).status == 409
        assert len(groq.asked(f"slow {number}.")) == 1


@pytest.mark.parametrize("place", [0, 1], ids=["here", "elsewhere"])
def test_a_full_window_holds_up_nobody(pair: Pair, groq: FakeGroq, place: int) -> None:
    asked, large = new("large"), Script([*["x" * 1000] * 12_000, "z"], hold_before_token=12_000)
    groq.on("large", large)
    with connected(pair[0]) as connection:
        connection.sendall(raw_chat("large", reply=asked["reply"], stream=True))
        request = groq.wait_for_request("large")
        wait_until(lambda: len(request.sent_at) == 12_000)
        with reading(pair[place], asked) as tokens:
            length = len(next(tokens).data)
            groq.release()
            *rest, last = (event.data for event in tokens)
            assert (length + sum(map(len, rest)), last) == (12_000_001, "[DONE]")


def test_a_reader_who_was_away_for_long_does_not_take_it_back(pair: Pair, groq: FakeGroq) -> None:
    groq.on("large", Script([*["x" * 1000] * 12_000, "z"], hold_before_token=12_000))
    (owner, other), asked = pair, new("large")
    assert part_of(owner, asked, cut=EVENT).status == 200
    wait_until(lambda: owner.metric("chat_replies_unattended") == 1)
    with connected(other) as connection:
        connection.sendall(
            raw_chat("large", "Connection: close", reply=asked["reply"], stream=True)
        )
        wait_until(lambda: owner.metric("chat_replies_unattended") == 0)
        wait_until(lambda: owner.metric("chat_replies_unattended") == 1)  # nothing is taken
        with reading(owner, asked) as tokens:
            assert next(tokens).data[:1] == "x"
            assert b"another connection has resumed" in everything_from(connection)
            groq.release()
            *_, last = tokens
    assert last.data == "[DONE]"


def test_a_reader_who_has_left_before_its_letter_came_takes_nothing_over(
    pair: Pair, groq: FakeGroq, redis: RedisServer
) -> None:
    owner, other = pair
    asked = broken_off(owner, groq)
    before = other.metric("chat_resumes_total", result="elsewhere")
    with connected(other) as connection:
        connection.sendall(raw_chat("held", reply=asked["reply"], stream=True))
        wait_until(lambda: other.metric("chat_resumes_total", result="elsewhere") > before)
    with reading(owner, asked) as tokens:
        assert next(tokens).data == "ab"
        wait_until(lambda: redis.command("KEYS", "chat:reader:*") != [])
        wait_until(lambda: redis.command("KEYS", "chat:mail:*") == [])
        groq.release()
        assert [event.data for event in tokens] == ["c", "[DONE]"]


def test_what_is_wrong_foreign_or_huge_gives_no_text(pair: Pair, groq: FakeGroq) -> None:
    groq.on("held", HELD)
    asked, unknown = new("held"), uuid4().hex
    path, wrong = f"/replies/{asked['reply']}", (-1, "abc", "1.5", 10**14, 10**15, 10**30, "\u0663")
    assert part_of(pair[0], asked, cut=2 * EVENT).position == 2
    for beyond, service in product((3, 5), pair):  # while it runs, and when it has ended
        for after, of in product((*wrong, beyond, beyond + 1), ("", path)):
            assert part_of(service, asked, after, path=of).status == 400, after
        for place in (-1, beyond, 10**14, 10**15, 10**30, "1", None, 1.5):
            assert "error" in received(service, {"reply": asked["reply"], "after": place})[0], place
        assert part_of(service, {**asked, "reply": unknown}, 3).status == 404
        assert part_of(service, {}, path=f"/replies/{unknown}").status == 404
        assert service.http.delete(f"/replies/{unknown}").status_code == 404
        assert "no such reply" in received(service, {"reply": unknown})[0]["error"]
        assert part_of(service, {**new("other"), "reply": asked["reply"]}).status == 409
        assert part_of(service, {**asked, "conversation": unknown}, 1).status == 409
        assert part_of(service, {**asked, "reply": "too short"}).status == 400
        if beyond == 5:
            assert part_of(service, asked, 2) == (200, "c", 4, "[DONE]")
            assert part_of(service, {}, 4, path=path).status == 204
            assert received(service, {"reply": asked["reply"], "after": 4}) == [{"done": "true"}]
        elif service is pair[1]:
            assert part_of(service, asked, 1, cut=EVENT).text == "b"
            groq.release()
    assert len(groq.requests) == 1


PHASES = {
    "before the first token": Script(hold_before_status=True),
    "between tokens": Script(["t"] * 1000, interval=0.02),
    "in silence": Script(["t", "u"], hold_before_token=1),
    "in a retry's pause": Script(status=503, headers=(("retry-after", "10"),)),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["delete", "websocket"])
@pytest.mark.parametrize("place", [0, 1], ids=["here", "elsewhere"])
def test_a_cancel_stops_groq_before_it_is_answered(
    pair: Pair, groq: FakeGroq, conversation: str, place: int, how: str, phase: str
) -> None:
    groq.on("question", PHASES[phase])
    asked, service = new("question", conversation), pair[place]
    sends = "tokens" in phase or "silence" in phase
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(part_of, pair[0], asked, 0, EVENT if sends else 1 << 20)
        request = groq.wait_for_request("question")
        if sends:
            assert first.result().text == "t"
        if how == "delete":
            assert service.http.delete(f"/replies/{asked['reply']}").status_code == 204
        else:
            last = received(service, {"reply": asked["reply"]}, {"cancel": True})[-1]
            assert last == {"done": "true", "cancelled": "true"}
        assert request.closed.wait(1) or request.answered
        assert sends or first.result().status != 502
    assert len(groq.asked("question")) == 1
    said = received(service, {"reply": asked["reply"]})[:-1]
    stored = ["question", "".join(each["token"] for each in said)] if sends else []
    wait_until(lambda: service.contents(conversation) == stored)
    for each in pair:
        assert each.http.delete(f"/replies/{asked['reply']}").status_code == 204
    assert service.reply("next", conversation) == "You said: next"
    assert groq.requests[-1].contents == [*stored, "next"]


def test_the_newest_reader_has_the_reply_wherever_it_is(pair: Pair, groq: FakeGroq) -> None:
    groq.on("held", HELD)
    asked = new("held")
    with ExitStack() as stack:
        readers = []
        for place in (0, 0, 1, 1, 0, 1):
            readers.append(stack.enter_context(reading(pair[place], asked)))
            assert next(readers[-1]).data[:1] == "a"
            for older in readers[-2:-1]:
                *_, last = older
                assert "another connection has resumed" in last.data
        groq.release()
        assert [event.data for event in readers[-1]][-2:] == ["c", "[DONE]"]
    assert len(groq.asked("held")) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reply_whose_owner_has_died_ends_with_an_error(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, number: signal.Signals
) -> None:
    settings = {"REDIS_ADDR": redis_server.address, "RESUME_TIMEOUT": 2, "REPLY_TIMEOUT": 20}
    owner, other = start_service(**settings), start_service(**settings)
    asked = broken_off(owner, groq)
    with reading(other, asked) as tokens:
        assert next(tokens).data == "ab"
        owner.process.send_signal(number)
        assert "no such reply" in next(tokens).data
        assert list(tokens) == []
    with ThreadPoolExecutor(1) as pool:
        deleted = pool.submit(other.http.delete, f"/replies/{asked['reply']}")
        assert part_of(other, asked).status == 404
        assert deleted.result().status_code == 503
    assert len(groq.asked("held")) == 1
    keys = redis_server.command("KEYS", "chat:*")
    limits = {key: redis_server.command("TTL", key) for key in keys}
    assert all(0 < limit <= 22 for limit in limits.values()), limits
    owner.process.send_signal(signal.SIGCONT)
    assert groq.asked("held")[0].is_closed_soon(), "an owner who wakes up finds the cancel"


@pytest.mark.parametrize("is_in_time", [True, False], ids=["in time", "too late"])
def test_a_replica_that_ends_hands_its_replies_over(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, is_in_time: bool
) -> None:
    settings = {"REDIS_ADDR": redis_server.address, "DRAIN_TIMEOUT": 20 if is_in_time else 0.2}
    owner, other = start_service(**settings), start_service(**settings)
    groq.on("held", HELD)
    asked, ended, followed = new("held"), new("ended"), new("held too")
    assert part_of(owner, ended).end == "[DONE]"
    assert {part_of(owner, each, cut=2 * EVENT).text for each in (asked, followed)} == {"ab"}
    with reading(other, followed) as tokens:
        assert next(tokens).data == "ab"
        owner.process.send_signal(signal.SIGTERM)
        owner.process.wait_for_line(lambda line: "draining" in line)
        if is_in_time:
            wait_until(lambda: part_of(owner, new("refused")).status == 503)
            assert part_of(owner, asked, 1, cut=EVENT).text == "b"
            groq.release()
        rest = [event.data for event in tokens]
    assert owner.process.wait() == 0
    assert "Traceback" not in owner.process.output
    part = part_of(other, asked, 1)
    if is_in_time:
        assert (rest, part.text, part.end) == (["c", "[DONE]"], "bc", "[DONE]")
    else:
        assert (len(rest), part.text) == (1, "b")
        assert "restarting" in rest[0]
        assert "restarting" in part.end
    assert part_of(other, ended, 3).text == " said: ended"
    assert (len(groq.asked("held")), len(groq.asked("ended"))) == (2, 1)


def test_a_replica_that_ends_sends_its_readers_of_other_replicas_away(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    owner, other = (start_service(REDIS_ADDR=redis_server.address) for _ in range(2))
    asked = broken_off(owner, groq)
    with reading(other, asked) as tokens:
        assert next(tokens).data == "ab"
        other.process.send_signal(signal.SIGTERM)
        assert ["restarting" in event.data for event in tokens] == [True]
    assert other.process.wait() == 0
    assert "Traceback" not in other.process.output
    groq.release()
    assert part_of(owner, asked, 2).text == "c"


def test_a_client_that_leaves_while_its_id_is_claimed_may_come_back(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    service, asked = start_service(REDIS_ADDR=redis_server.address), new("hello")
    redis_server.pause()
    with service.socket() as websocket:
        websocket.send(json.dumps(asked))
    redis_server.resume()
    assert part_of(service, asked).text == "You said: hello"
    assert len(groq.asked("hello")) == 1


def test_a_letter_without_sense_does_not_end_the_mail(
    pair: Pair, groq: FakeGroq, redis: RedisServer
) -> None:
    owner, other = pair
    asked = broken_off(owner, groq)
    key = f"chat:reply:{sha256(asked['reply'].encode()).hexdigest()}"
    name = redis.command("GET", key).partition(":")[0]
    redis.command("RPUSH", f"chat:mail:{name}", "hello", b"\xff")
    assert part_of(other, asked, 1, cut=EVENT).text == "b"
    groq.release()


def test_replicas_are_rolled_behind_a_proxy_and_no_token_is_lost(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer, tmp_path: Path
) -> None:
    haproxy, front = shutil.which("haproxy") or "/usr/sbin/haproxy", Caller(free_port())
    if not Path(haproxy).exists():
        pytest.skip("haproxy is not installed")
    settings = {"REDIS_ADDR": redis_server.address, "DRAIN_DELAY": 0.5}
    replicas = [start_service(**settings) for _ in range(3)]
    text = configuration("haproxy").replace("bind :80 ", f"bind 127.0.0.1:{front.port} ")
    lines = [f"    server r{one.port} 127.0.0.1:{one.port}\n" for one in replicas]
    (tmp_path / "file").write_text("".join([text.partition("    server a")[0], *lines]))
    groq.on("text", Script([f" {n}" for n in range(50)], interval=0.03))
    end, names = Event(), count()

    def call(_: int) -> None:
        while not end.is_set():
            asked = new(f"text {next(names)}.")
            whole = read_whole(asked, ((front, random.randrange(500)) for _ in count()))
            assert (whole.end, whole.text) == ("[DONE]", "".join(f" {n}" for n in range(50)))

    with ExitStack() as stack:
        stack.callback(Process([haproxy, "-db", "-f", str(tmp_path / "file")]).end)
        stack.enter_context(front.http)
        wait_until(front.is_up)
        pool = stack.enter_context(ThreadPoolExecutor(50))
        calls = [pool.submit(call, number) for number in range(50)]
        try:
            for replica in replicas:
                assert replica.process.end() == 0
                replica.start()
                replica.process.wait_for_line(lambda line: "POST /chat 200" in line)
        finally:
            end.set()
        for each in calls:
            each.result()
    asked_for = [request.contents[-1] for request in groq.asked("text")]
    assert len(asked_for) == len(set(asked_for)) == next(names)


@pytest.fixture(params=["server", "cluster"])
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[RedisServer]]]:
    with RedisServer() if request.param == "server" else RedisCluster() as redis:
        yield redis.address, [redis] if isinstance(redis, RedisServer) else redis.servers


def test_a_redis_that_is_emptied_while_replies_are_followed_leaves_no_hole(
    start_service: StartService, groq: FakeGroq, servers: tuple[str, list[RedisServer]]
) -> None:
    address, nodes = servers
    owner, other = (start_service(REDIS_ADDR=address) for _ in range(2))
    groq.on("text", Script([f" {n}" for n in range(60)], interval=0.02))
    asked = [new(f"text {number}.") for number in range(20)]
    expected = "".join(f" {n}" for n in range(60))
    for each in asked:
        assert part_of(owner, each, cut=2 * EVENT).status == 200
    with ThreadPoolExecutor(20) as pool:
        reads = pool.map(lambda each: read_whole(each, repeat((other, 1 << 20))), asked)
        wait_until(lambda: other.metric("chat_resumes_total", result="elsewhere") == len(asked))
        for node in nodes:
            node.kill()
            node.start()
        wholes = list(reads)
    assert [whole.text for whole in wholes] == [expected] * len(asked)
    assert {whole.end for whole in wholes} == {"[DONE]"}
    assert len(groq.asked("text")) == len(asked)


def test_without_redis_a_reply_is_its_replicas_alone(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    redis_server.kill()
    owner, other = (start_service(REDIS_ADDR=redis_server.address) for _ in range(2))
    asked = broken_off(owner, groq)
    assert part_of(owner, asked, 1, cut=EVENT).text == "b"
    for answer in (part_of(other, asked, 2), part_of(other, {}, path=f"/replies/{asked['reply']}")):
        assert answer.status == 503
    redis_server.start()
    for service in (owner, other):
        service.log_line(message="Redis is up")
    assert part_of(owner, asked, 1, cut=EVENT).text == "b"  # a break, at which it says whose it is
    wait_until(lambda: redis_server.command("KEYS", "chat:reply:*") != [])
    groq.release()
    assert part_of(other, asked, 1) == (200, "bc", 4, "[DONE]")
    assert len(groq.asked("held")) == 1


def test_one_that_is_never_resumed_costs_one_script(pair: Pair, redis: RedisServer) -> None:
    redis.command("CONFIG", "RESETSTAT")
    for _ in range(100):
        assert pair[0].chat("hello", reply=uuid4().hex).status_code == 200
    stats = redis.command("INFO", "commandstats")
    calls = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
    assert 100 <= calls["eval"] < 150  # the check of Redis has one, too
    assert calls.get("rpush", 0) < 50
