"""What /metrics tells, read with Prometheus' own parser."""

import socket
from contextlib import suppress

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from chat.errors import reasons
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import (
    ROOT,
    Process,
    Service,
    UvicornService,
    environment,
    free_port,
    wait_until,
)

NAMES = {
    "http_requests",
    "http_request_duration_seconds",
    "chat_requests",
    "chat_time_to_first_token_seconds",
    "chat_reply_duration_seconds",
    "chat_replies",
    "chat_errors",
    "chat_tokens",
    "chat_replies_active",
    "groq_requests",
    "groq_retries",
    "groq_fallbacks",
    "groq_circuit_state",
    "groq_model_available",
    "event_loop_tasks",
    "token_cache_lookups",
    "history_conversations",
    "redis_up",
}


@pytest.fixture
def fresh(start_service: StartService) -> Service:
    """A service that has counted nothing."""
    return start_service()


def test_a_scrape_parses_and_every_metric_is_there(fresh: Service) -> None:
    answer = fresh.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert {family.name for family in text_string_to_metric_families(answer.text)} >= NAMES


def test_chats_are_counted_by_transport_and_outcome(fresh: Service, groq: FakeGroq) -> None:
    groq.on("fail", Script(status=500))
    fresh.reply("hello")
    fresh.tokens("hello")
    fresh.chat("fail", stream=True)
    assert fresh.metric("chat_requests_total", stream_type="json") == 1
    assert fresh.metric("chat_requests_total", stream_type="sse") == 2
    assert fresh.metric("chat_replies_total", stream_type="sse", outcome="completed") == 1
    assert fresh.metric("chat_replies_total", stream_type="sse", outcome="failed") == 1
    assert fresh.metric("groq_requests_total", outcome="completed") == 2
    assert fresh.metric("groq_requests_total", outcome="refused") == 1
    assert fresh.metric("chat_reply_duration_seconds_count") == 3
    assert fresh.metric("chat_time_to_first_token_seconds_count") == 1


def test_requests_are_counted_by_template_and_status(fresh: Service, conversation: str) -> None:
    fresh.http.get(f"/conversations/{conversation}")
    fresh.http.get("/nope/1")
    fresh.http.get("/nope/2")
    labels = {"method": "GET", "endpoint": "/conversations/{id}", "status": "404"}
    assert fresh.metric("http_requests_total", **labels) == 1
    assert fresh.metric("http_requests_total", endpoint="unmatched") == 2
    labels = {"method": "GET", "endpoint": "unmatched"}
    assert fresh.metric("http_request_duration_seconds_count", **labels) == 2


def test_errors_are_counted_by_the_reason_that_is_logged(fresh: Service, groq: FakeGroq) -> None:
    groq.on("fail", Script(status=429))
    fresh.chat("fail")
    fresh.http.post("/chat", content=b"nonsense")
    with fresh.socket() as socket:
        socket.send("nonsense")
        assert "error" in socket.recv(5)
    assert fresh.metric("chat_errors_total", reason="quota") == 1
    assert fresh.metric("chat_errors_total", reason="bad_request") == 2
    assert fresh.metric("chat_errors_total") == 3


def test_every_reason_is_there_from_the_start_so_that_its_first_error_is_seen(
    fresh: Service,
) -> None:
    families = text_string_to_metric_families(fresh.http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    found = {s.labels["reason"] for s in samples if s.name == "chat_errors_total"}
    assert found == reasons() >= {"internal", "history", "too_busy"}


def test_tokens_are_counted_as_groq_reports_them(fresh: Service, groq: FakeGroq) -> None:
    groq.on("hello", Script(["a", "b"], prompt_tokens=40, completion_tokens=30, reasoning=["hm"]))
    fresh.tokens("hello")
    fresh.reply("hello")
    assert fresh.metric("chat_tokens_total", direction="prompt") == 80
    assert fresh.metric("chat_tokens_total", direction="completion") == 62


def test_tokens_are_estimated_where_nothing_is_reported(fresh: Service, groq: FakeGroq) -> None:
    groq.on("hello", Script(["Hello", " there"], prompt_tokens=None))
    fresh.tokens("hello")
    assert 1 <= fresh.metric("chat_tokens_total", direction="prompt") <= 10
    assert 1 <= fresh.metric("chat_tokens_total", direction="completion") <= 4


def test_an_active_reply_and_a_cancelled_one_are_seen(fresh: Service, groq: FakeGroq) -> None:
    groq.on("hold", Script(["a", "b"], hold_before_token=1))
    with fresh.stream("hold") as (_, stream):
        next(stream)
        assert fresh.metric("chat_replies_active", stream_type="sse") == 1
    wait_until(lambda: fresh.metric("chat_replies_active") == 0)
    assert fresh.metric("chat_replies_total", stream_type="sse", outcome="cancelled") == 1
    assert fresh.metric("groq_requests_total", outcome="cancelled") == 1


def test_an_odd_method_makes_no_new_label(fresh: Service) -> None:
    fresh.http.request("PROPFIND", "/chat")
    assert fresh.metric("http_requests_total", method="OTHER", status="405") == 1


def test_metrics_may_have_a_port_of_their_own(start_service: StartService) -> None:
    port = free_port()
    service = start_service(METRICS_PORT=port)
    service.chat("hello", "0123456789abcdef")
    with httpx.Client() as client:
        shown = client.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'chat_requests_total{stream_type="json"} 1.0' in shown
        assert "history_conversations 1.0" in shown
        assert client.get(f"http://127.0.0.1:{port}/chat").status_code == 404
    assert service.http.get("/metrics").status_code == 404


@pytest.mark.parametrize("command", [Service, UvicornService])
def test_a_metrics_port_that_is_taken_ends_the_start_with_one_line(
    service: Service, command: type[Service]
) -> None:
    second = command(METRICS_PORT=service.port)
    process = Process(second.command, environment(second._settings), ROOT)
    process.wait()
    assert process.end() == 3
    assert process.output.startswith(
        f"error: METRICS_PORT must be free, not {service.port}: Address already in use"
    )
    assert process.output.count("\n") == 1


def test_the_port_for_metrics_is_guarded_as_the_other_one(start_service: StartService) -> None:
    port = free_port()
    start_service(METRICS_PORT=port)
    with (
        suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", port), 5) as connection,
    ):
        connection.sendall(b"GET /metrics HTTP/1.1\r\na: ")
        for _ in range(2_000):
            connection.sendall(b"b" * 6000)
        pytest.fail("12 MB of a head were taken")
    handshake = {"connection": "upgrade", "upgrade": "websocket"}
    assert httpx.get(f"http://127.0.0.1:{port}/metrics", headers=handshake).status_code == 200
