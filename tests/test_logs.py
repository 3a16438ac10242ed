"""What the service logs: one JSON object a line, one line a request, nothing that is secret."""

import errno
import io
import json
import logging
import sys
import threading
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import pytest

from chat import logs
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import KEY, PATIENCE, Service, UvicornService


def lines_for(service: Service, request_id: str, **fields: object) -> list[dict[str, object]]:
    """Return the lines of a request, once there is the one with the fields."""
    service.log_line(request_id=request_id, **fields)
    return [line for line in service.log_lines() if line.get("request_id") == request_id]


@pytest.mark.parametrize(("stream", "stream_type"), [(True, "sse"), (False, "json")])
def test_a_chat_is_one_line_with_everything_about_it(
    service: Service, groq: FakeGroq, conversation: str, stream: bool, stream_type: str
) -> None:
    groq.on("question", Script(["a", "b"], reasoning=["hm"], prompt_tokens=17))
    asked = {"messages": [{"role": "user", "content": "question"}], "stream": stream}
    headers = {"x-request-id": f"one-line-{stream_type}"}
    service.http.post("/chat", json={**asked, "conversation": conversation}, headers=headers)
    (line,) = lines_for(service, f"one-line-{stream_type}")
    assert line.pop("duration_ms") >= line.pop("ttft_ms") > 0  # type: ignore[operator]
    timestamp = datetime.fromisoformat(str(line.pop("timestamp")))
    assert abs((datetime.now(UTC) - timestamp).total_seconds()) < 60
    assert line == {
        "level": "INFO",
        "message": "POST /chat 200",
        "request_id": f"one-line-{stream_type}",
        "method": "POST",
        "endpoint": "/chat",
        "status": 200,
        "client": "127.0.0.1",
        "stream_type": stream_type,
        "outcome": "completed",
        "prompt_tokens": 17,
        "completion_tokens": 3,
        "model": "openai/gpt-oss-20b",
        "groq_id": "req_fake",
    }


def test_a_failed_chat_is_one_warning_that_says_why(service: Service, groq: FakeGroq) -> None:
    groq.on("question", Script(status=401))
    headers = {"x-request-id": "refused"}
    asked = {"messages": [{"role": "user", "content": "question"}]}
    service.http.post("/chat", json=asked, headers=headers)
    hint, line = lines_for(service, "refused", status=502)
    assert (hint["level"], hint["message"]) == (
        "ERROR",
        "Groq refuses the key: check GROQ_API_KEY",
    )
    assert (line["level"], line["outcome"]) == ("WARNING", "failed")
    assert (line["error"], line["upstream_status"]) == ("refused", 401)


def test_a_bad_request_is_one_line(service: Service) -> None:
    service.http.post("/chat", content="{", headers={"x-request-id": "bad"})
    (line,) = lines_for(service, "bad")
    assert (line["level"], line["status"], line["error"]) == ("INFO", 400, "bad_request")


def test_the_endpoint_is_the_template_and_never_the_path(
    service: Service, conversation: str
) -> None:
    service.http.get(f"/conversations/{conversation}", headers={"x-request-id": "read"})
    service.http.get(f"/{conversation}", headers={"x-request-id": "lost"})
    assert lines_for(service, "read")[0]["endpoint"] == "/conversations/{id}"
    assert lines_for(service, "lost")[0]["endpoint"] == "unmatched"


@pytest.mark.parametrize("options", [[], ["--log-level", "trace"], ["--log-level", "debug"]])
def test_no_content_conversation_or_key_is_logged_at_any_level(
    groq: FakeGroq, conversation: str, options: list[str]
) -> None:
    service = TalkativeService(options, GROQ_BASE_URL=groq.url)
    with service:
        talk_of_secrets(service, groq, conversation)
    assert len(service.process.lines) > 10
    for secret in ("confidential", "classified", conversation, KEY):
        assert secret not in service.process.output


class TalkativeService(UvicornService):
    """A service that logs all it can."""

    def __init__(self, options: list[str], **settings: object) -> None:
        super().__init__(LOG_LEVEL="debug", PYTHONASYNCIODEBUG="1", **settings)
        self._options = options

    @property
    def command(self) -> list[str]:
        return [*super().command, *self._options]


def talk_of_secrets(service: Service, groq: FakeGroq, conversation: str) -> None:
    groq.on("confidential", Script(["classified", "reply"]))
    groq.on("confidential failure", Script(["classified"], cut_before_token=1))
    for content in ("confidential question", "confidential failure"):
        service.chat(content, conversation, stream=True)
        service.chat(content, conversation)
        with service.socket() as socket:
            asked = {"messages": [{"role": "user", "content": content}]}
            socket.send(json.dumps({**asked, "conversation": conversation}))
            while "token" in json.loads(socket.recv(5)):
                pass
    service.http.get(f"/conversations/{conversation}?secret=confidential")
    service.http.post("/chat", json={"messages": [{"role": "confidential", "content": "x"}]})


def test_only_lines_of_the_level_and_above_are_logged(start_service: StartService) -> None:
    service = start_service(LOG_LEVEL="warning")
    service.http.get("/health")
    service.http.get("/nowhere")
    service.chat("hello")
    service.process.end()
    assert service.process.output == ""


def test_a_callers_line_break_makes_no_line(service: Service) -> None:
    service.http.get("/%0a%7B%22level%22%3A1%7D", headers={"x-request-id": 'a","level":"x'})
    service.http.get("/health", headers={"x-request-id": "after"})
    service.log_line(request_id="after")
    assert all(isinstance(line["level"], str) for line in service.log_lines())
    assert not any('"' in line.get("request_id", "") for line in service.log_lines())


def test_an_exception_is_logged_by_its_kind_and_place_without_its_text() -> None:
    try:
        raise ValueError("the caller's words")
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "it failed", None, sys.exc_info())
    line = json.loads(logs.JSONFormatter().format(record))
    assert line["exception"] == "ValueError"
    assert "test_logs.py" in line["traceback"]
    assert "caller's words" not in json.dumps({**line, "traceback": ""})


class StuckStream(io.StringIO):
    """A stream that takes nothing until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def write(self, text: str) -> int:
        self.released.wait(10)
        return super().write(text)


def test_the_oldest_lines_that_nobody_takes_are_dropped_rather_than_waited_for() -> None:
    stream = StuckStream()
    handler = logs.BackgroundHandler(stream)
    count = 3 * logs.QUEUED_LINES
    for number in range(count):
        handler.emit(logging.LogRecord("x", 20, "f", 1, f"line {number}", None, None))
    stream.released.set()
    handler.close()
    written = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert written[-1] == f"line {count - 1}"
    assert len(written) < count


class FullStream(io.StringIO):
    """A stream to a disk that is full at first."""

    def __init__(self) -> None:
        super().__init__()
        self.is_full = True
        self.has_failed = threading.Event()

    def write(self, text: str) -> int:
        if self.is_full:
            self.has_failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_line_that_cannot_be_written_is_not_the_last() -> None:
    stream = FullStream()
    handler = logs.BackgroundHandler(stream)
    handler.emit(logging.LogRecord("x", 20, "f", 1, "lost", None, None))
    assert stream.has_failed.wait(PATIENCE)
    stream.is_full = False
    handler.emit(logging.LogRecord("x", 20, "f", 1, "told", None, None))
    handler.close()
    assert json.loads(stream.getvalue())["message"] == "told"


def test_a_line_after_the_end_is_written_at_once() -> None:
    stream = io.StringIO()
    handler = logs.BackgroundHandler(stream)
    handler.close()
    handler.emit(logging.LogRecord("x", 20, "f", 1, "last words", None, None))
    assert json.loads(stream.getvalue())["message"] == "last words"


def test_the_end_may_come_by_a_signal_in_the_midst_of_a_line() -> None:
    for number in range(1, 1000):
        stream = io.StringIO()
        handler = logs.BackgroundHandler(stream)
        interrupted = threading.Event()
        emitting = threading.Thread(
            target=emit_interrupted, args=(handler, number, interrupted), daemon=True
        )
        emitting.start()
        emitting.join(PATIENCE)
        assert not emitting.is_alive(), f"it hangs at step {number}"
        handler.close()
        assert json.loads(stream.getvalue())["message"] == "hello"
        if not interrupted.is_set():
            assert number > 3
            return


def emit_interrupted(
    handler: logs.BackgroundHandler, number: int, interrupted: threading.Event
) -> None:
    """Log a line, and as a signal would, close the handler before the step of that number."""
    left = number

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0 and not interrupted.is_set():
            sys.settrace(None)
            interrupted.set()
            handler.close()
        return trace

    record = logging.LogRecord("x", 20, "f", 1, "hello", None, None)
    sys.settrace(trace)
    handler.handle(record)
    sys.settrace(None)


def test_a_stdout_that_nobody_reads_holds_up_no_request(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service()
    service.process.pause_reading()
    try:
        for number in range(500):  # more than a pipe's 64 KiB
            answer = service.http.get("/health", headers={"x-request-id": f"{number:0128}"})
            assert answer.status_code == 200
    finally:
        service.process.resume_reading()
