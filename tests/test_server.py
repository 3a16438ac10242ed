"""How the process starts, as `python server.py` and as `uvicorn server:app`."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil
import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq
from tests.servers import ROOT, Service, UvicornService, environment

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
    ],
)
def test_an_invalid_setting_stops_startup_with_one_line(
    command: Sequence[str], settings: dict[str, str], line: str
) -> None:
    stops_with(line, run(command, **settings))


def stops_with(line: str, ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 3
    assert ended.stderr.startswith(line)
    assert (ended.stdout + ended.stderr).count("\n") == 1


def test_a_port_in_use_stops_startup_with_one_line(service: Service) -> None:
    error = f"error: PORT {service.port} cannot be used: Address already in use"
    stops_with(error, run(PYTHON, GROQ_API_KEY="k", REDIS_ADDR="", PORT=service.port))


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
        with service.socket() as socket:
            socket.send("{}")
            assert "error" in json.loads(socket.recv(5))
    messages = [json.loads(line)["message"] for line in service.process.lines]
    assert messages[0].startswith("Started server process")
    assert "POST /chat 200" in messages
    assert messages[-1].startswith("Finished server process")


def test_the_service_listens_on_all_addresses_of_both_families(
    start_service: StartService,
) -> None:
    service = start_service()
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    listening = {x.laddr.ip for x in connections if x.status == "LISTEN"}
    assert "0.0.0.0" in listening  # noqa: S104
    assert listening <= {"0.0.0.0", "::"}  # noqa: S104  (a machine may have no IPv6)
