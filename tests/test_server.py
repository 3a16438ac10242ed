"""How the process starts, as `python server.py` and as `uvicorn server:app`."""

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

import psutil
import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq
from tests.servers import (
    ROOT,
    Service,
    UvicornService,
    connected,
    environment,
    everything_from,
    free_port,
)
from tests.test_protocols import read_until

KEEP_ALIVE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = KEEP_ALIVE.replace(b"x", b"x\r\nConnection: close")
HOST = {"GROQ_API_KEY": "k", "METRICS_PORT": free_port()}
PYTHON = Service().command
UVICORN = UvicornService().command


def run(command: Sequence[str], **settings: object) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "timeout": 30}
    return subprocess.run(command, check=False, cwd=ROOT, env=environment(settings), **options)


@pytest.mark.parametrize("command", [PYTHON, UVICORN], ids=["python", "uvicorn"])
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "error: GROQ_API_KEY must be an API key from https://console.groq.com"),
        ({"GROQ_API_KEY": "k", "PORT": "x"}, "error: PORT must be a whole number from 1 to 65,535"),
        ({**HOST, "HOST": "no.invalid"}, "error: HOST no.invalid cannot be used: this machine"),
        ({**HOST, "HOST": "192.0.2.1"}, "error: HOST 192.0.2.1 cannot be used: this machine has"),
    ],
)
def test_an_invalid_setting_stops_startup_with_one_line(
    command: Sequence[str], settings: dict[str, object], line: str
) -> None:
    stops_with(line, run(command, **settings))


def stops_with(line: str, ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 3
    assert ended.stderr.startswith(line)
    assert (ended.stdout + ended.stderr).count("\n") == 1


def test_a_port_in_use_stops_startup_with_one_line(service: Service) -> None:
    for command, name in ((PYTHON, "PORT"), (PYTHON, "METRICS_PORT"), (UVICORN, "METRICS_PORT")):
        error = f"error: {name} {service.port} cannot be used: Address already in use"
        stops_with(error, run(command, **{**HOST, "PORT": free_port(), name: service.port}))
    both = {"PORT": (port := free_port()), "METRICS_PORT": port}
    error = f"error: METRICS_PORT {port} cannot be used: Address already in use"
    stops_with(error, run(PYTHON, **{**HOST, **both}))


def test_importing_the_server_does_nothing() -> None:
    program = "import server, logging; assert not logging.getLogger().handlers; server.nope"
    ended = run((sys.executable, "-c", program))
    assert ended.stdout == ""
    assert "module 'server' has no attribute 'nope'" in ended.stderr


def test_uvicorn_serves_the_same_and_all_its_lines_are_json(
    groq: FakeGroq, conversation: str
) -> None:
    with UvicornService(GROQ_BASE_URL=groq.url) as service:
        assert service.reply("hello", conversation) == "You said: hello"
        with service.socket() as client:
            client.send("{}")
            assert "error" in json.loads(client.recv(5))
    messages = [json.loads(line)["message"] for line in service.process.lines]
    assert messages[0].startswith("Started server process")
    assert "POST /chat 200" in messages
    assert messages[-1].startswith("Finished server process")


def test_the_service_listens_on_all_addresses_of_both_families(
    start_service: StartService,
) -> None:
    service = start_service()
    families = {"0.0.0.0", "::"} if socket.has_dualstack_ipv6() else {"0.0.0.0"}  # noqa: S104
    assert listening(service) == {(address, service.port) for address in families}
    service = start_service(METRICS_PORT=(port := free_port()))
    assert (max(families), port) in listening(service)


def listening(service: Service) -> set[tuple[str, int]]:
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return {(x.laddr.ip, x.laddr.port) for x in connections if x.status == "LISTEN"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_service_and_its_metrics_listen_on_host_alone(
    start_service: StartService, host: str
) -> None:
    service = start_service(HOST=host, METRICS_PORT=(port := free_port()))
    found = listening(service)
    assert {("127.0.0.1", service.port), ("127.0.0.1", port)} <= found
    assert {address for address, _ in found} <= {"127.0.0.1", "::1"}
    line = service.process.wait_for_line(lambda line: "listening" in line)
    assert f'"listening on port {service.port} of ' in line
    assert "127.0.0.1" in line


def test_an_idle_connection_is_closed_after_the_keep_alive_timeout(
    service: Service, start_service: StartService
) -> None:
    with connected(service) as patient, connected(start_service(KEEP_ALIVE_TIMEOUT=0.3)) as new:
        assert everything_from(new) == b""
        patient.sendall(KEEP_ALIVE)
        read_until(patient, b"OK")
        with connected(start_service(KEEP_ALIVE_TIMEOUT=0.3)) as used:
            used.sendall(KEEP_ALIVE)
            assert everything_from(used).endswith(b"OK")
        patient.sendall(LAST)
        assert everything_from(patient).endswith(b"OK")


OFFER = b"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %b\r\n"


def test_under_plain_uvicorn_the_body_behind_an_offered_upgrade_is_no_request(
    groq: FakeGroq,
) -> None:
    length = b"Content-Length: %d\r\n\r\n" % len(KEEP_ALIVE)
    heads = [OFFER % name + length for name in (b"h2c", b"foo")]
    with UvicornService(GROQ_BASE_URL=groq.url) as service:
        for head, body in product(heads, (KEEP_ALIVE, b"")):  # which would come after the answer
            with connected(service) as connection:
                connection.sendall(head + body)
                answer = everything_from(connection)
            assert answer.count(b"HTTP/1.1 ") == 1
            assert b"\r\nconnection: close\r\n" in answer
