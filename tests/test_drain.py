"""The end of a replica: what callers see over each transport, with real signals."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import httpx
import psutil
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from websockets.sync.client import ClientConnection

from chat import signals
from tests.fake_groq import FakeGroq, Script
from tests.servers import RedisServer, Service, UvicornService, body, error_and_code, wait_until
from tests.test_connection import LARGE, asking, connected, everything_from


class TwoWorkers(Service):
    """The service with two workers, which share a history."""


class UvicornWorkers(UvicornService):
    """The same, by uvicorn's own supervisor."""

    @property
    def command(self) -> list[str]:
        return [*super().command, "--workers", "2"]


Start = Callable[..., Service]
STARTS: dict[str, type[Service]] = {
    "python": Service,
    "uvicorn": UvicornService,
    "workers": TwoWorkers,
    "uvicorn's workers": UvicornWorkers,
}


@pytest.fixture(params=STARTS)
def start(
    request: pytest.FixtureRequest, groq: FakeGroq, redis_server: RedisServer
) -> Iterator[Start]:
    """Starts the service in each of its ways, with the history in Redis."""
    with ExitStack() as stack:

        def one(**settings: object) -> Service:
            if request.param == "workers":
                settings["WEB_CONCURRENCY"] = 2
            service = STARTS[request.param](
                GROQ_BASE_URL=groq.url,
                HISTORY_STORE="redis",
                REDIS_ADDR=redis_server.address,
                **settings,
            )
            stack.enter_context(service)
            wait_until(lambda: service.http.get("/ready").status_code == 200)
            return service

        yield one


RESTARTING = "the service is restarting; try again in a moment"


@contextmanager
def asked_over_websocket(
    service: Service, content: str, conversation: str
) -> Iterator[ClientConnection]:
    with service.socket() as socket:
        socket.send(json.dumps(body(content, conversation)))
        yield socket


def test_running_replies_end_whole_over_each_transport(
    start: Start, groq: FakeGroq, conversation: str
) -> None:
    service = start()
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    names = [f"{kind}-{conversation[:30]}" for kind in ("json", "sse", "ws")]
    with ExitStack() as stack:
        answering = Thread(lambda: service.chat("held", names[0], stream=False))
        _, events = stack.enter_context(service.stream("held", names[1]))
        socket = stack.enter_context(asked_over_websocket(service, "held", names[2]))
        idle = stack.enter_context(service.socket())
        assert next(events).data == "a"
        assert json.loads(socket.recv(5)) == {"token": "a"}
        groq.wait_for(lambda: len(groq.asked("held")) == 3)
        service.process.send_signal(signal.SIGTERM)
        assert error_and_code(idle) == (RESTARTING, 1012)
        groq.release()
        assert answering.result().json() == {"response": "ab"}
        assert [event.data for event in events] == ["b", "[DONE]"]
        assert [json.loads(socket.recv(5)) for _ in range(2)] == [{"token": "b"}, {"done": "true"}]
        assert error_and_code(socket) == (RESTARTING, 1012)
    assert service.process.wait() == 0
    with UvicornService(**service._settings | {"WEB_CONCURRENCY": 1}) as after:
        wait_until(lambda: after.http.get("/ready").status_code == 200)
        assert [after.contents(name) for name in names] == [["held", "ab"]] * 3


def test_replies_that_do_not_end_in_time_are_ended_properly_and_not_stored(
    start: Start, groq: FakeGroq, conversation: str
) -> None:
    service = start(DRAIN_TIMEOUT=0.3)
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with ExitStack() as stack:
        answering = Thread(lambda: service.chat("held", conversation, stream=False))
        _, events = stack.enter_context(service.stream("held", conversation))
        socket = stack.enter_context(asked_over_websocket(service, "held", conversation))
        assert next(events).data == "a"
        groq.wait_for(lambda: len(groq.asked("held")) == 3)
        service.process.send_signal(signal.SIGTERM)
        answer = answering.result()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        (last,) = events
        assert (last.name, json.loads(last.data)) == ("error", {"error": RESTARTING})
        assert error_and_code(socket) == (RESTARTING, 1012)
    assert service.process.wait() == 0
    for request in groq.asked("held"):
        assert request.is_closed_soon()
    with UvicornService(**service._settings | {"WEB_CONCURRENCY": 1}) as after:
        wait_until(lambda: after.http.get("/ready").status_code == 200)
        assert after.contents(conversation) == []


@pytest.mark.parametrize("start", ["python", "uvicorn"], indirect=True)
def test_during_the_delay_all_but_readiness_goes_on(start: Start, groq: FakeGroq) -> None:
    service = start(DRAIN_DELAY=30)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: service.http.get("/ready").status_code == 503)
    assert service.http.get("/ready").json()["status"] == "draining"
    with httpx.Client(base_url=service.url) as newcomer:
        assert newcomer.get("/health").status_code == 200
        assert newcomer.post("/chat", json=body("new")).json() == {"response": "You said: new"}
    with service.socket() as socket:
        socket.send(json.dumps(body("new")))
        assert "token" in json.loads(socket.recv(5))
    assert service.process.is_running
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait() == 1


@pytest.mark.parametrize("start", ["python", "uvicorn"], indirect=True)
def test_after_the_delay_new_chats_are_refused_while_old_ones_end(
    start: Start, groq: FakeGroq
) -> None:
    service = start()
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        service.process.send_signal(signal.SIGTERM)
        service.process.wait_for_line(lambda line: "draining" in line)
        wait_until(lambda: refusal(service).status_code == 503)
        answer = refusal(service)
        assert answer.json() == {"error": RESTARTING}
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["connection"] == "close"
        with service.socket() as socket:
            assert error_and_code(socket) == (RESTARTING, 1012)
        assert httpx.get(f"{service.url}/health").status_code == 200
        groq.release()
        assert [event.data for event in events] == ["b", "[DONE]"]
    assert service.process.wait() == 0
    assert service.process.output.count("Traceback") == 0


def refusal(service: Service) -> httpx.Response:
    return httpx.post(f"{service.url}/chat", json=body("new"))


@pytest.mark.parametrize("start", ["python", "uvicorn", "workers"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start: Start, groq: FakeGroq, number: int) -> None:
    service = start()
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        service.process.send_signal(signal.Signals(number))
        service.process.wait_for_line(lambda line: "draining" in line)
        started_at = time.monotonic()
        service.process.send_signal(signal.Signals(number))
        assert service.process.wait() == 1
        assert time.monotonic() - started_at < 20, "the drain alone takes 30 s"
        with pytest.raises(httpx.TransportError):
            list(events)


@pytest.mark.parametrize("start", ["python", "uvicorn"], indirect=True)
def test_a_second_signal_does_not_wait_for_a_redis_that_hangs(
    start: Start, groq: FakeGroq, redis_server: RedisServer
) -> None:
    service = start(DRAIN_TIMEOUT=0.2)
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        redis_server.pause()
        groq.release()
        list(events)
    service.process.send_signal(signal.SIGTERM)
    service.process.wait_for_line(lambda line: "Waiting for application shutdown" in line)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait() == 1


@pytest.mark.parametrize("start", ["python", "uvicorn", "workers"], indirect=True)
def test_two_signals_end_it_at_once_however_close_together(start: Start, groq: FakeGroq) -> None:
    service = start()
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        workers = psutil.Process(service.process.pid).children()
        for number in (signal.SIGTERM, signal.SIGINT):  # of two equal ones, the kernel may drop one
            service.process.send_signal(number)
        assert service.process.wait() == 1
        with pytest.raises(httpx.TransportError):
            list(events)
    assert psutil.wait_procs(workers, timeout=20)[1] == []


@pytest.mark.parametrize("start", ["workers", "uvicorn's workers"], indirect=True)
def test_a_signal_to_all_processes_at_once_leaves_running_replies_their_time(
    start: Start, groq: FakeGroq
) -> None:
    service = start()
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        supervisor = psutil.Process(service.process.pid)
        for each in (*supervisor.children(), supervisor):  # as systemd does
            each.send_signal(signal.SIGTERM)
        service.process.wait_for_line(lambda line: "Terminated child" in line)
        groq.release()
        assert [event.data for event in events] == ["b", "[DONE]"]
    assert service.process.wait() == 0


@pytest.mark.parametrize("command", [Service, UvicornService])
def test_callers_who_read_nothing_do_not_hold_up_the_end_whenever_they_come(
    groq: FakeGroq, conversation: str, command: type[Service]
) -> None:
    groq.on("large", LARGE)
    large = {"MAX_BODY_BYTES": 20 << 20, "CONTEXT_TOKENS": 100_000_000}
    with (
        command(GROQ_BASE_URL=groq.url, DRAIN_TIMEOUT=0.2, **large) as service,
        connected(service) as first,
        connected(service) as second,
    ):
        service.reply("x" * (12 << 20), conversation)
        first.sendall(asking("large", stream=True))
        groq.wait_for_request("large")
        service.process.send_signal(signal.SIGTERM)
        service.process.wait_for_line(lambda line: "the replies that still run" in line)
        second.sendall(f"GET /conversations/{conversation} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        service.log_line(endpoint="/conversations/{id}", status=200)
        assert service.process.wait() == 0


def test_a_chat_that_has_not_come_whole_is_refused_with_the_new_ones(groq: FakeGroq) -> None:
    with Service(GROQ_BASE_URL=groq.url) as service, connected(service) as before:
        groq.on("held", Script(["a", "b"], hold_before_token=1))
        with service.stream("held") as (_, events), connected(service) as after:
            next(events)
            begin_a_chat(before)
            service.process.send_signal(signal.SIGTERM)
            assert_refused(before)
            begin_a_chat(after)
            assert_refused(after)
            groq.release()
            assert [event.data for event in events] == ["b", "[DONE]"]
        assert service.process.wait() == 0


def begin_a_chat(connection: socket.socket) -> None:
    """Send a part of a chat, once the service waits for it."""
    head = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
    connection.sendall(head)
    assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(b'{"messages":')


def assert_refused(connection: socket.socket) -> None:
    answer = everything_from(connection)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close" in answer
    assert RESTARTING.encode() in answer


async def hang(request: Request) -> Response:
    if request.url.path != "/health":
        await asyncio.Event().wait()
    return Response()


@asynccontextmanager
async def drained_at_once(app: Starlette) -> AsyncIterator[None]:
    async def drain() -> None: ...

    async with signals.held_back(drain):
        yield


hanging = Starlette(routes=[Route("/{path:path}", hang)], lifespan=drained_at_once)


class Hanging(Service):
    """An app whose answers never end, but for the one about its health."""

    @property
    def command(self) -> list[str]:
        app = "tests.test_drain:hanging"
        return [sys.executable, "-m", "uvicorn", app, "--port", str(self.port)]


def test_an_answer_that_never_ends_does_not_hold_up_the_end() -> None:
    with Hanging() as service, connected(service) as caller:
        caller.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        service.http.get("/health").raise_for_status()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait() == 0


class Thread:
    """A call in the background, and its result."""

    def __init__(self, call: Callable[[], httpx.Response]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(call)

    def result(self) -> Any:
        found = self._future.result(20)
        self._pool.shutdown()
        return found
