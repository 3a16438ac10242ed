"""What /metrics shows, read with Prometheus' own parser."""

import json

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from chat.errors import reasons
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, UvicornService, body, free_port, wait_until

NAMES = """http_requests http_request_duration_seconds chat_requests chat_replies chat_errors
    chat_tokens chat_time_to_first_token_seconds chat_reply_duration_seconds chat_replies_active
    groq_requests groq_retries groq_fallbacks groq_circuit_state groq_model_available
    event_loop_tasks token_cache_lookups history_conversations redis_up chat_build_info
    chat_finish_reasons chat_resumes chat_replies_unattended chat_unattended_tokens"""


@pytest.fixture
def fresh(start_service: StartService) -> Service:
    """A service that has counted nothing."""
    return start_service()


def test_every_metric_is_there_and_every_reason_before_its_first_error(service: Service) -> None:
    answer = service.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert families.keys() >= set(NAMES.split())
    found = {sample.labels["reason"] for sample in families["chat_errors"].samples}
    assert found == reasons() >= {"internal", "history", "too_busy"}


def test_chats_are_counted_by_transport_and_outcome(fresh: Service, groq: FakeGroq) -> None:
    groq.on("fail", Script(status=500))
    groq.on("hold", Script(hold_before_token=0))
    fresh.reply("hello")
    fresh.tokens("hello")
    fresh.chat("fail", stream=True)
    with fresh.socket() as socket:
        for content in ("hello", "fail", "hold"):
            socket.send(json.dumps(body(content)))
            if content == "hold":
                groq.wait_for_request("hold")
                assert fresh.metric("chat_replies_active", stream_type="websocket") == 1
                socket.send('{"cancel": true}')
            while "token" in json.loads(socket.recv(5)):
                pass
    for name, labels, value in (
        ("chat_requests_total", {"stream_type": "json"}, 1),
        ("chat_requests_total", {"stream_type": "sse"}, 2),
        ("chat_replies_total", {"stream_type": "sse", "outcome": "completed"}, 1),
        ("chat_replies_total", {"stream_type": "sse", "outcome": "failed"}, 1),
        ("chat_replies_total", {"stream_type": "websocket", "outcome": "completed"}, 1),
        ("chat_replies_total", {"stream_type": "websocket", "outcome": "failed"}, 1),
        ("chat_replies_total", {"stream_type": "websocket", "outcome": "cancelled"}, 1),
        ("groq_requests_total", {"outcome": "completed"}, 3),
        ("groq_requests_total", {"outcome": "refused"}, 2),
        ("chat_reply_duration_seconds_count", {}, 6),
        ("chat_time_to_first_token_seconds_count", {}, 2),
    ):
        assert fresh.metric(name, **labels) == value, (name, labels)
    wait_until(lambda: fresh.metric("http_requests_total", status="101") == 1)


def test_requests_and_errors_are_counted_by_template_status_and_reason(
    fresh: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("fail", Script(status=429))
    fresh.http.get(f"/conversations/{conversation}")
    fresh.http.get("/nope/1")
    fresh.http.get("/nope/2")
    fresh.http.request("PROPFIND", "/chat")
    fresh.chat("fail")
    fresh.http.post("/chat", content=b"nonsense")
    with fresh.socket() as socket:
        socket.send("nonsense")
        assert "error" in socket.recv(5)
    labels = {"method": "GET", "endpoint": "/conversations/{id}", "status": "404"}
    assert fresh.metric("http_requests_total", **labels) == 1
    assert fresh.metric("http_requests_total", method="OTHER", status="405") == 1
    for name in ("http_requests_total", "http_request_duration_seconds_count"):
        assert fresh.metric(name, method="GET", endpoint="unmatched") == 2
    assert fresh.metric("chat_errors_total", reason="quota") == 1
    assert fresh.metric("chat_errors_total", reason="bad_request") == 2
    assert fresh.metric("chat_errors_total", reason="not_found") == 1


def test_tokens_are_counted_as_groq_reports_them_or_else_estimated(
    fresh: Service, groq: FakeGroq
) -> None:
    groq.on("hello", Script(["a", "b"], prompt_tokens=40, completion_tokens=30, reasoning=["hm"]))
    fresh.tokens("hello")
    fresh.reply("hello")
    assert fresh.metric("chat_tokens_total", direction="prompt") == 80
    assert fresh.metric("chat_tokens_total", direction="completion") == 62
    groq.on("silent", Script(["Hello", " there"], prompt_tokens=None))
    fresh.tokens("silent", "a-new-conversation")
    assert 81 <= fresh.metric("chat_tokens_total", direction="prompt") <= 90
    assert 63 <= fresh.metric("chat_tokens_total", direction="completion") <= 66


def test_an_active_reply_and_a_cancelled_one_are_seen(fresh: Service, groq: FakeGroq) -> None:
    groq.on("hold", Script(["a", "b"], hold_before_token=1))
    tasks = fresh.metric("event_loop_tasks")
    with fresh.stream("hold") as (_, stream):
        next(stream)
        assert fresh.metric("chat_replies_active", stream_type="sse") == 1
        assert fresh.metric("event_loop_tasks") > tasks
    wait_until(lambda: fresh.metric("chat_replies_active") == 0)
    wait_until(lambda: fresh.metric("event_loop_tasks") <= tasks)
    assert fresh.metric("chat_replies_total", stream_type="sse", outcome="cancelled") == 1
    assert fresh.metric("groq_requests_total", outcome="cancelled") == 1


@pytest.mark.parametrize("command", [Service, UvicornService])
def test_metrics_may_have_a_port_of_their_own(groq: FakeGroq, command: type[Service]) -> None:
    port = free_port()
    with command(GROQ_BASE_URL=groq.url, METRICS_PORT=port) as service:
        service.chat("hello", "0123456789abcdef")
        shown = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'chat_requests_total{stream_type="json"} 1.0' in shown
        assert "history_conversations 1.0" in shown
        assert service.http.get("/metrics").status_code == 404
