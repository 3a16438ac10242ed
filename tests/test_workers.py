"""Several workers on one machine: who may have them, and what they show together."""

import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import RedisServer, Service, UvicornService, free_port, wait_until
from tests.test_server import run

PYTHON = Service().command
UVICORN = UvicornService().command


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (PYTHON, {"WEB_CONCURRENCY": 2}),
        (UVICORN, {"WEB_CONCURRENCY": 2}),
        ([*UVICORN, "--workers", "2"], {}),
    ],
    ids=["python", "uvicorn", "uvicorn --workers"],
)
def test_workers_with_a_history_each_are_refused_at_the_start(
    command: Sequence[str], settings: dict[str, object]
) -> None:
    ended = run(command, GROQ_API_KEY="k", REDIS_ADDR="", **settings)
    assert ended.returncode != 0 or command != PYTHON
    assert "error: WEB_CONCURRENCY=2 needs HISTORY_STORE=redis" in ended.stderr


def start_workers(start: StartService, server: RedisServer, **settings: object) -> Service:
    service = start(WEB_CONCURRENCY=3, HISTORY_STORE="redis", REDIS_ADDR=server.address, **settings)
    wait_until(lambda: len(workers_of(service)) == 3)
    wait_until(lambda: service.http.get("/ready").status_code == 200)
    return service


def workers_of(service: Service) -> list[int]:
    """Return the ids of the processes that serve; some serve on two ports, and say so twice."""
    started = set(re.findall(r"Started server process \[(\d+)\]", service.process.output))
    return [pid for pid in sorted(map(int, started)) if psutil.pid_exists(pid)]


def test_the_figures_are_those_of_all_workers(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    service = start_workers(start_service, redis_server)
    asked = 0
    used = set[str]()
    while len(used) < 2 and asked < 200:
        with httpx.Client(base_url=service.url) as client:  # a connection of its own
            client.post("/chat", json={"messages": [{"role": "user", "content": "hello"}]})
        asked += 1
        used = {name for name in os.listdir(directory_of(service)) if "counter" in name}
    assert service.metric("chat_requests_total", stream_type="json") == asked
    assert service.metric("redis_up") == 1
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        assert service.metric("chat_replies_active", stream_type="sse") == 1
        groq.release()
        list(events)
    assert service.metric("chat_replies_active") == 0


def directory_of(service: Service) -> str:
    """Return where the workers keep their figures."""
    environ = psutil.Process(workers_of(service)[0]).environ()
    return environ["PROMETHEUS_MULTIPROC_DIR"]


def test_a_worker_that_dies_is_replaced_and_its_replies_are_no_longer_active(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    service = start_workers(start_service, redis_server)
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with service.stream("held") as (_, events):
        next(events)
        holders = {pid for pid in workers_of(service) if has_connection_to(groq, pid)}
        for pid in holders:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(events)
    wait_until(lambda: len(set(workers_of(service)) - holders) == 3)
    wait_until(lambda: service.metric("chat_replies_active") == 0)
    assert service.reply("hello") == "You said: hello"


def has_connection_to(groq: FakeGroq, pid: int) -> bool:
    connections = psutil.Process(pid).net_connections("tcp")
    return any(x.raddr and x.raddr.port == groq.port for x in connections)


def test_each_worker_shows_all_figures_on_the_port_for_metrics(
    start_service: StartService, groq: FakeGroq, redis_server: RedisServer
) -> None:
    port = free_port()
    service = start_workers(start_service, redis_server, METRICS_PORT=port)
    service.reply("hello")
    for _ in range(5):
        shown = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'chat_requests_total{stream_type="json"} 1.0' in shown
    assert service.http.get("/metrics").status_code == 404


def test_the_directory_of_the_figures_goes_with_the_process(
    start_service: StartService, redis_server: RedisServer
) -> None:
    service = start_workers(start_service, redis_server)
    directory = directory_of(service)
    assert service.process.end() == 0
    assert not os.path.exists(directory)


@pytest.fixture(params=["python", "uvicorn"])
def three_workers(
    request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path: Path
) -> Iterator[Service]:
    """Three workers, under our supervisor and under uvicorn's."""
    shared = {"HISTORY_STORE": "redis", "REDIS_ADDR": redis_server.address, "WEB_CONCURRENCY": 3}
    kind: type[Service] = Service
    if request.param == "uvicorn":
        kind, shared = UvicornService, shared | {"PROMETHEUS_MULTIPROC_DIR": tmp_path}
    with kind(**shared) as service:
        wait_until(lambda: len(workers_of(service)) == 3)
        wait_until(lambda: service.http.get("/ready").status_code == 200)
        yield service


def test_workers_that_are_replaced_or_dismissed_leave_no_gauges_behind(
    three_workers: Service,
) -> None:
    directory, first = directory_of(three_workers), set(workers_of(three_workers))
    three_workers.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(set(workers_of(three_workers)) - first) == 3)
    wait_until(lambda: first.isdisjoint(workers_of(three_workers)))
    assert processes_with_gauges(directory) == set(workers_of(three_workers))
    three_workers.process.send_signal(signal.SIGTTOU)
    wait_until(lambda: len(workers_of(three_workers)) == 2)
    assert processes_with_gauges(directory) == set(workers_of(three_workers))


def processes_with_gauges(directory: str) -> set[int]:
    return {int(path.stem.split("_")[2]) for path in Path(directory).glob("gauge_*.db")}
