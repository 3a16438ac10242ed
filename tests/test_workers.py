"""Several workers on one machine: what they need, and what they show together."""

import os
import re
import signal
from collections.abc import Iterator, Sequence

import httpx
import psutil
import pytest

from tests.fake_groq import FakeGroq, Script
from tests.servers import RedisServer, Service, body, free_port, wait_until
from tests.test_server import PYTHON, UVICORN, run


@pytest.mark.parametrize("command", [PYTHON, UVICORN], ids=["python", "uvicorn"])
def test_workers_with_a_history_each_are_refused_at_the_start(command: Sequence[str]) -> None:
    ended = run(command, GROQ_API_KEY="k", REDIS_ADDR="", WEB_CONCURRENCY=2)
    assert ended.returncode == 3 or command != PYTHON  # where it is uvicorn who decides
    assert "error: WEB_CONCURRENCY=2 needs HISTORY_STORE=redis" in ended.stderr


@pytest.fixture(scope="module")
def shared_redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def workers(groq: FakeGroq, shared_redis: RedisServer) -> Iterator[Service]:
    """Two workers with the metrics on a port of their own."""
    redis = {"HISTORY_STORE": "redis", "REDIS_ADDR": shared_redis.address}
    settings = {"GROQ_BASE_URL": groq.url, "WEB_CONCURRENCY": 2, "METRICS_PORT": free_port()}
    with Service(**settings, **redis) as service:
        wait_until(lambda: len(workers_of(service)) == 2)
        wait_until(lambda: service.http.get("/ready").status_code == 200)
        yield service


def workers_of(service: Service) -> set[int]:
    """Return the ids of the processes that serve."""
    started = re.findall(r"Started server process \[(\d+)\]", service.process.output)
    return {pid for pid in map(int, started) if psutil.pid_exists(pid)}


def is_shown(service: Service, line: str) -> bool:
    shown = httpx.get(f"http://127.0.0.1:{service._settings['METRICS_PORT']}/metrics")
    return f"\n{line}\n" in shown.text


def connections_to(groq: FakeGroq, pid: int) -> bool:
    connections = psutil.Process(pid).net_connections("tcp")
    return any(x.raddr and x.raddr.port == groq.port for x in connections)


def test_the_metrics_are_those_of_all_workers_and_a_dead_ones_gauges_go(
    workers: Service, groq: FakeGroq, conversation: str
) -> None:
    asked, used = 0, set[int]()
    while len(used) < 2 and asked < 200:
        answer = httpx.post(f"{workers.url}/chat", json=body("hello"))  # a connection of its own
        assert answer.status_code == 200
        asked += 1
        used = {pid for pid in workers_of(workers) if connections_to(groq, pid)}
    assert is_shown(workers, f'chat_requests_total{{stream_type="json"}} {float(asked)}')
    assert is_shown(workers, "redis_up 1.0")
    assert not is_shown(workers, "event_loop_tasks 0.0")
    assert workers.http.get("/metrics").status_code == 404
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    before = workers_of(workers)
    wait_until(lambda: not any(connections_to(groq, pid) for pid in before))
    with workers.stream("held", conversation) as (_, events):
        next(events)
        assert is_shown(workers, 'chat_replies_active{stream_type="sse"} 1.0')
        for pid in before:
            if connections_to(groq, pid):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(events)
    wait_until(lambda: len(workers_of(workers)) == 2 and workers_of(workers) != before)
    wait_until(lambda: is_shown(workers, 'chat_replies_active{stream_type="sse"} 0.0'))
    assert workers.reply("hello", conversation) == "You said: hello"


def test_workers_that_are_replaced_leave_no_figures_and_no_directory_behind(
    workers: Service,
) -> None:
    first = workers_of(workers)
    directory = psutil.Process(next(iter(first))).environ()["PROMETHEUS_MULTIPROC_DIR"]
    workers.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(workers_of(workers) - first) == 2)
    wait_until(lambda: first.isdisjoint(workers_of(workers)))
    wait_until(lambda: processes_with_gauges(directory) == workers_of(workers))
    assert workers.process.end() == 0
    assert not os.path.exists(directory)


def processes_with_gauges(directory: str) -> set[int]:
    names = [name for name in os.listdir(directory) if name.startswith("gauge_")]
    return {int(name.removesuffix(".db").rpartition("_")[2]) for name in names}
