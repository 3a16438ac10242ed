"""The start and the end of the process, as `python server.py` and as `uvicorn server:app`."""

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.fake_groq import FakeGroq
from tests.servers import ROOT, Service, UvicornService, environment

PYTHON = Service().command
UVICORN = UvicornService().command


def run(command: Sequence[str], **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(settings),
        capture_output=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("command", [PYTHON, UVICORN], ids=["python", "uvicorn"])
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "error: GROQ_API_KEY is not set; it must be an API key from https://console.groq.com"),
        ({"GROQ_API_KEY": "k", "PORT": "x"}, "error: PORT must be a whole number from 1 to 65,535"),
    ],
)
def test_a_bad_setting_ends_the_start_with_one_line(
    command: Sequence[str], settings: dict[str, str], line: str
) -> None:
    ended = run(command, **settings)
    assert ended.returncode != 0
    assert ended.stderr.startswith(line)
    assert (ended.stdout + ended.stderr).count("\n") == 1


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


def test_a_port_in_use_ends_the_start(service: Service) -> None:
    ended = run(PYTHON, GROQ_API_KEY="k", REDIS_ADDR="", PORT=service.port)
    assert ended.returncode != 0
    assert "address already in use" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
