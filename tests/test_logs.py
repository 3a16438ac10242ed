"""What the service logs: one JSON object a line, one line a request, and no secrets."""

import json
import logging
import resource
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chat import logs
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import KEY, ROOT, Service, UvicornService, body, environment, wait_until

PROBES = ("/health", "/ready", "/metrics")
COUNT = 3 * logs.MAX_QUEUED
CHATTERBOX = f"""
import logging, sys
from chat import logs
logs.configure("info")
for number in range({COUNT}):
    logging.getLogger("chat").info("line %d", number)
print("done", file=sys.stderr, flush=True)
"""
"""A program that logs more than may wait, however long its output is not read."""


def lines_for(service: Service, request_id: str, **fields: object) -> list[dict[str, object]]:
    """Return the lines of a request, once there is the one with the fields."""
    service.log_line(request_id=request_id, **fields)
    return [line for line in service.log_lines() if line.get("request_id") == request_id]


def test_a_chat_is_one_line_with_everything_about_it(service: Service, groq: FakeGroq) -> None:
    service.reply("hello")  # after which the model is known to be available
    groq.on("question", Script(["a", "b"], reasoning=["hm"], prompt_tokens=17))
    for stream_type in ("sse", "json"):
        asked = body("question", stream=stream_type == "sse")
        service.http.post("/chat", json=asked, headers={"x-request-id": stream_type})
        (line,) = lines_for(service, stream_type, endpoint="/chat")
        assert line.pop("duration_ms") >= line.pop("ttft_ms") >= 0  # type: ignore[operator]
        timestamp = datetime.fromisoformat(str(line.pop("timestamp")))
        assert abs((datetime.now(UTC) - timestamp).total_seconds()) < 60
        assert line == {
            "level": "INFO",
            "message": "POST /chat 200",
            "request_id": stream_type,
            "method": "POST",
            "endpoint": "/chat",
            "status": 200,
            "client": "127.0.0.1",
            "stream_type": stream_type,
            "outcome": "completed",
            "finish_reason": "stop",
            "prompt_tokens": 17,
            "completion_tokens": 3,
            "model": "openai/gpt-oss-20b",
            "groq_id": "req_fake",
        }


def test_a_failed_chat_is_one_warning_that_says_why(service: Service, groq: FakeGroq) -> None:
    groq.on("question", Script(status=401))
    service.http.post("/chat", json=body("question"), headers={"x-request-id": "refused"})
    hint, *_, line = lines_for(service, "refused", status=502)
    assert hint["level"] == "ERROR"
    assert "check GROQ_API_KEY" in str(hint["message"])
    assert (line["level"], line["outcome"]) == ("WARNING", "failed")
    assert (line["error"], line["upstream_status"]) == ("refused", 401)
    groq.on("too long", Script(status=413))
    service.chat("too long")
    line = service.log_line(status=400)
    assert (line["level"], line["outcome"]) == ("INFO", "failed"), "the client's own mistake"
    groq.on("cut", Script(["a"], cut_before_token=1))
    service.chat("cut", stream=True)
    with service.socket() as socket:
        socket.send(json.dumps(body("cut")))
        for stream_type, status in (("sse", 200), ("websocket", 502)):
            line = service.log_line(stream_type=stream_type, status=status, error="cut")
            assert (line["level"], line["outcome"]) == ("WARNING", "failed")


def test_a_probe_that_succeeds_is_logged_at_debug_alone(start_service: StartService) -> None:
    for level in ("debug", "info"):
        service = start_service(LOG_LEVEL=level)
        for path in ("/health", "/ready", "/metrics", "/nowhere"):
            service.http.get(path)
        service.http.post("/health")
        service.log_line(status=405, endpoint="/health", level="INFO")
        statuses = [line for line in service.log_lines() if line.get("status") == 200]
        levels = {line["level"] for line in statuses if line["endpoint"] in PROBES}
        assert levels == ({"DEBUG"} if level == "debug" else set())


def test_a_bad_request_is_one_line_and_an_endpoint_is_never_the_path(
    service: Service, conversation: str
) -> None:
    service.http.post("/chat", content="{", headers={"x-request-id": "bad"})
    service.http.get(f"/conversations/{conversation}", headers={"x-request-id": "read"})
    service.http.get(f"/{conversation}", headers={"x-request-id": "lost"})
    (line,) = lines_for(service, "bad")
    assert (line["level"], line["status"], line["error"]) == ("INFO", 400, "bad_request")
    assert lines_for(service, "read")[0]["endpoint"] == "/conversations/{id}"
    assert lines_for(service, "lost")[0]["endpoint"] == "unmatched"


class TalkativeService(UvicornService):
    """A service that logs all it can."""

    @property
    def command(self) -> list[str]:
        return [*super().command, "--log-level", "trace"]


def test_no_content_conversation_or_key_is_logged_at_any_level(
    groq: FakeGroq, conversation: str
) -> None:
    settings = {"LOG_LEVEL": "debug", "PYTHONASYNCIODEBUG": "1", "GROQ_BASE_URL": groq.url}
    with TalkativeService(**settings) as service:
        talk_of_secrets(service, groq, conversation)
    assert len(service.process.lines) > 10
    assert all(json.loads(line) for line in service.process.lines)
    for secret in ("confidential", "classified", conversation, KEY):
        assert secret not in service.process.output


def talk_of_secrets(service: Service, groq: FakeGroq, conversation: str) -> None:
    groq.on("confidential", Script(["classified", "reply"]))
    groq.on("confidential failure", Script(["classified"], cut_before_token=1))
    for content in ("confidential question", "confidential failure"):
        service.chat(content, conversation, stream=True)
        service.chat(content, conversation)
        with service.socket() as socket:
            socket.send(json.dumps(body(content, conversation)))
            while "token" in json.loads(socket.recv(5)):
                pass
    service.http.get(f"/conversations/{conversation}?secret=confidential")
    service.http.post("/chat", json={"messages": [{"role": "confidential", "content": "x"}]})


def test_only_lines_of_the_level_and_above_are_logged(start_service: StartService) -> None:
    service = start_service(LOG_LEVEL="warning")
    service.http.get("/nowhere")
    service.chat("hello")
    service.process.end()
    assert service.process.output == ""


def test_a_clients_line_break_makes_no_line(service: Service) -> None:
    service.http.get("/%0a%7B%22level%22%3A1%7D", headers={"x-request-id": 'a","level":"x'})
    lines_for(service, service.http.get("/nowhere").headers["x-request-id"])
    assert all(isinstance(line["level"], str) for line in service.log_lines())
    assert not any('"' in line.get("request_id", "") for line in service.log_lines())


def test_an_exception_is_logged_by_its_kind_and_place_without_its_text() -> None:
    try:
        raise ValueError("the client's words")
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "it failed", None, sys.exc_info())
    line = json.loads(logs.json_line(record))
    assert line["exception"] == "ValueError"
    assert "test_logs.py" in line["traceback"]
    assert "client's words" not in json.dumps({**line, "traceback": ""})


def test_the_oldest_lines_that_nobody_reads_are_dropped_rather_than_waited_for() -> None:
    command, pipe = [sys.executable, "-c", CHATTERBOX], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment({}), text=True, stdout=pipe, stderr=pipe
    ) as process:
        assert process.stderr
        assert process.stdout
        assert process.stderr.readline() == "done\n"
        written = [json.loads(line)["message"] for line in process.stdout]
    assert process.returncode == 0
    assert written[-1] == f"line {COUNT - 1}"
    assert len(written) < COUNT


def test_a_stdout_that_nobody_reads_holds_up_no_request_and_not_the_end(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(LOG_LEVEL="debug")
    service.process.may_read.clear()
    try:
        for number in range(500):  # more than a pipe's 64 KiB
            answer = service.http.get("/health", headers={"x-request-id": f"{number:0128}"})
            assert answer.status_code == 200
        service.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        wait_until(lambda: not service.process.is_running)
        assert time.monotonic() - begun < 10
    finally:
        service.process.may_read.set()
    assert service.process.wait() == 0


def test_a_full_disk_holds_up_nothing_and_lines_are_written_again_once_it_is_not(
    groq: FakeGroq, tmp_path: Path
) -> None:
    service, file = Service(GROQ_BASE_URL=groq.url, LOG_LEVEL="debug"), tmp_path / "log"
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(service._settings)}
    with ExitStack() as stack:
        options["stdout"] = stack.enter_context(file.open("wb"))
        process = stack.enter_context(subprocess.Popen(service.command, **options))
        stack.callback(process.kill)
        stack.enter_context(service.http)
        wait_until(lambda: file.exists() and file.stat().st_size > 0)
        full = (file.stat().st_size + 10_000, resource.RLIM_INFINITY)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, full)
        wait_until(service.is_up)
        wait_until(lambda: service.is_up() and file.stat().st_size >= full[0])
        for _ in range(50):
            assert service.is_up()
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (full[1], full[1]))
        service.http.get("/health", headers={"x-request-id": "after"})
        wait_until(lambda: '"request_id":"after"' in file.read_text().splitlines()[-1])
        process.terminate()
        assert process.wait(20) == 0
