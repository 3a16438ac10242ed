"""The end of a replica: what clients see over each transport, with real signals."""

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import psutil
import pytest
from websockets.exceptions import InvalidStatus

from tests.fake_groq import FakeGroq, Script
from tests.servers import (
    RedisServer,
    Service,
    UvicornService,
    body,
    closing_code,
    connected,
    error_and_code,
    everything_from,
    raw_chat,
    wait_until,
)

RESTARTING = "the service is restarting; try again in a moment"
HELD = Script(["a", "b"], hold_before_token=1)
BOTH = pytest.mark.parametrize("command", [Service, UvicornService], ids=["python", "uvicorn"])

Start = Callable[..., Service]


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def start(command: type[Service], groq: FakeGroq, shared_redis: RedisServer) -> Iterator[Start]:
    """Start the service by a command, with the history in Redis."""
    redis = {"HISTORY_STORE": "redis", "REDIS_ADDR": shared_redis.address}
    groq.on("held", HELD)
    with ExitStack() as stack:

        def one(**settings: object) -> Service:
            service = command(GROQ_BASE_URL=groq.url, **redis, **settings)
            stack.enter_context(service)
            wait_until(lambda: service.http.get("/ready").status_code == 200)
            return service

        yield one


@BOTH
@pytest.mark.parametrize("is_in_time", [True, False], ids=["in time", "too late"])
def test_replies_in_progress_end_properly_over_each_transport(
    start: Start, groq: FakeGroq, conversation: str, is_in_time: bool
) -> None:
    service = start() if is_in_time else start(DRAIN_TIMEOUT=0.3)
    names = [f"{kind}-{conversation[:30]}" for kind in ("json", "sse", "ws")]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        json_reply = pool.submit(service.chat, "held", names[0], stream=False)
        _, events = stack.enter_context(service.stream("held", names[1]))
        websocket, idle = (stack.enter_context(service.socket()) for _ in range(2))
        websocket.send(json.dumps(body("held", names[2])))
        assert next(events).data == "a"
        assert json.loads(websocket.recv(5)) == {"token": "a"}
        groq.wait_for(lambda: len(groq.asked("held")) == 3)
        service.process.send_signal(signal.SIGTERM)
        if is_in_time:
            service.process.wait_for_line(lambda line: "draining" in line)
            groq.release()
            assert json_reply.result().json() == {"response": "ab"}
            assert [event.data for event in events] == ["b", "[DONE]"]
            received = [json.loads(websocket.recv(5)) for _ in range(2)]
            assert received == [{"token": "b"}, {"done": "true"}]
            assert closing_code(websocket) == 1012
        else:
            answer = json_reply.result()
            assert (answer.status_code, answer.json()) == (503, {"error": RESTARTING})
            assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
            (last,) = events
            assert (last.name, json.loads(last.data)) == ("error", {"error": RESTARTING})
            assert error_and_code(websocket) == (RESTARTING, 1012)
        assert closing_code(idle) == 1012
    assert service.process.wait() == 0
    assert "Traceback" not in service.process.output
    for request in groq.asked("held"):
        assert request.is_closed_soon()
    service.process.end()
    service.start()
    wait_until(lambda: service.http.get("/ready").status_code == 200)
    stored = ["held", "ab"] if is_in_time else []
    assert [service.contents(name) for name in names] == [stored] * 3


@BOTH
def test_during_the_delay_all_but_readiness_goes_on(start: Start) -> None:
    service = start(DRAIN_DELAY=30)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: service.http.get("/ready").status_code == 503)
    assert service.http.get("/ready").json()["status"] == "draining"
    assert httpx.get(f"{service.url}/health").status_code == 200
    assert chat_once(service).json() == {"response": "You said: new"}
    with service.socket() as websocket:
        websocket.send(json.dumps(body("new")))
        assert "token" in json.loads(websocket.recv(5))
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait() == 1


@BOTH
def test_after_the_delay_new_chats_are_refused_while_old_ones_end(
    start: Start, groq: FakeGroq
) -> None:
    service = start()
    with (
        service.stream("held") as (_, events),
        connected(service) as unfinished,
        service.socket() as websocket,
    ):
        next(events)
        begin_a_chat(unfinished)
        service.process.send_signal(signal.SIGTERM)
        service.process.wait_for_line(lambda line: "draining" in line)
        wait_until(lambda: httpx.get(f"{service.url}/ready").status_code == 503)
        wait_until(lambda: chat_once(service).status_code == 503)
        assert chat_once(service).json() == {"error": RESTARTING}
        unfinished.sendall(b'"role":"user","content":"late"}]}')
        assert everything_from(unfinished).startswith(b"HTTP/1.1 503 ")
        websocket.send(json.dumps(body("new")))
        assert error_and_code(websocket) == (RESTARTING, 1012)
        with pytest.raises(InvalidStatus) as refused, service.socket():
            pass
        answer = refused.value.response
        assert (answer.status_code, json.loads(answer.body or b"")) == (503, {"error": RESTARTING})
        assert {"retry-after", "x-request-id"} <= {name.lower() for name in answer.headers}
        assert service.log_line(endpoint="/chat", method="GET", status=503)["error"] == "draining"
        assert httpx.get(f"{service.url}/health").status_code == 200
        groq.release()
        assert [event.data for event in events] == ["b", "[DONE]"]
    assert service.process.wait() == 0
    assert "Traceback" not in service.process.output


def chat_once(service: Service) -> httpx.Response:
    return httpx.post(f"{service.url}/chat", json=body("new"))


def begin_a_chat(connection: socket.socket) -> None:
    """Send a part of a chat, once the service waits for it."""
    head = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 47\r\nExpect: 100-continue\r\n\r\n"
    connection.sendall(head)
    assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(b'{"messages":[{')


@BOTH
@pytest.mark.parametrize(
    ("second", "is_at_once"),  # at once of another kind alone: the kernel may merge two of one
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)],
)
def test_a_second_signal_ends_the_process_at_once(
    start: Start, groq: FakeGroq, second: signal.Signals, is_at_once: bool
) -> None:
    service = start()
    with service.stream("held") as (_, events):
        next(events)
        service.process.send_signal(signal.SIGTERM)
        if not is_at_once:
            service.process.wait_for_line(lambda line: "draining" in line)
        begun = time.monotonic()
        service.process.send_signal(second)
        assert service.process.wait() == 1
        assert time.monotonic() - begun < 5, "the drain alone may take 30 s"
        with pytest.raises(httpx.TransportError):
            list(events)


@BOTH
def test_a_redis_that_hangs_holds_up_neither_the_end_nor_a_second_signal(
    start: Start, groq: FakeGroq, shared_redis: RedisServer
) -> None:
    service = start(DRAIN_TIMEOUT=0.2)
    with service.stream("held") as (_, events):
        next(events)
        shared_redis.pause()
        try:
            service.process.send_signal(signal.SIGTERM)
            groq.release()
            list(events)
            assert service.process.wait() == 0
        finally:
            shared_redis.resume()


@BOTH
def test_clients_who_read_nothing_do_not_hold_up_the_end(
    groq: FakeGroq, conversation: str, command: type[Service]
) -> None:
    groq.on("large", Script(["x" * 1000] * 12_000))
    large = {"MAX_BODY_BYTES": 20 << 20, "CONTEXT_TOKENS": 100_000_000}
    service = command(GROQ_BASE_URL=groq.url, DRAIN_TIMEOUT=0.2, **large)
    with service, connected(service) as first, connected(service) as second:
        service.reply("x" * (12 << 20), conversation)
        first.sendall(raw_chat("large", stream=True))
        second.sendall(f"GET /conversations/{conversation} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        request = groq.wait_for_request("large")
        service.log_line(endpoint="/conversations/{id}", status=200)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 0
        assert request.is_closed_soon()


class UvicornWorkers(UvicornService):
    """Two workers of uvicorn's own supervisor."""

    @property
    def command(self) -> list[str]:
        return [*super().command, "--workers", "2"]


@pytest.mark.parametrize("command", [Service, UvicornWorkers], ids=["python", "uvicorn"])
def test_workers_that_all_get_the_signal_leave_replies_their_time(
    start: Start, groq: FakeGroq
) -> None:
    service = start(WEB_CONCURRENCY=2)
    with service.stream("held") as (_, events):
        next(events)
        supervisor = psutil.Process(service.process.pid)
        for each in (*supervisor.children(), supervisor):  # as systemd does
            each.send_signal(signal.SIGTERM)
        service.process.wait_for_line(lambda line: "Terminated child" in line)
        groq.release()
        assert [event.data for event in events] == ["b", "[DONE]"]
    assert service.process.wait() == 0
