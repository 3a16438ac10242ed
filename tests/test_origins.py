"""Which pages may use the service: as a browser asks for them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq
from tests.servers import Service, body, connected, error_and_code, wait_until

FOREIGN = "https://elsewhere.example"
LOCAL = "http://localhost:3000"
THIRD = "https://third.example"
NOT_ALLOWED = "this origin is not allowed to use the service"


@pytest.fixture(scope="module")
def shared(module_groq: FakeGroq) -> Iterator[Service]:
    """A service that pages of two other origins may use."""
    origins = f"{FOREIGN}:443/, {LOCAL}/"
    with Service(GROQ_BASE_URL=module_groq.url, ALLOWED_ORIGINS=origins) as running:
        yield running


def ask(service: Service, origin: str, **fields: Any) -> Any:
    headers = {"origin": origin, "content-type": "text/plain"}  # which needs no preflight
    return service.http.post("/chat", json=body("hello", **fields), headers=headers)


def is_answered_over_websocket(service: Service, origin: str) -> bool:
    with service.socket(origin=origin) as socket:
        socket.send(json.dumps(body("hello")))
        return "token" in json.loads(socket.recv(5))


def test_a_page_of_another_origin_is_refused_before_groq_is_asked(
    service: Service, groq: FakeGroq
) -> None:
    for origin in (FOREIGN, "null", "http://127.0.0.1", "http://127.0.0.1:1"):
        answer = ask(service, origin)
        assert (answer.status_code, answer.json()) == (403, {"error": NOT_ALLOWED})
        assert "access-control-allow-origin" not in answer.headers
    with service.socket(origin=FOREIGN) as socket:
        assert error_and_code(socket) == (NOT_ALLOWED, 1008)
    assert groq.requests == []
    service.log_line(status=403, error="origin", origin=FOREIGN, host=service.url[7:])


def test_a_refused_socket_that_is_gone_at_once_is_no_bug(service: Service) -> None:
    key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    head = "GET /chat HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    before = service.metric("chat_errors_total", reason="origin")
    for _ in range(20):
        with connected(service) as connection:
            connection.sendall(f"{head}Origin: {FOREIGN}\r\n{key}".encode())
    wait_until(lambda: service.metric("chat_errors_total", reason="origin") == before + 20)
    assert service.metric("chat_errors_total", reason="internal") == 0


def test_a_page_of_the_same_origin_and_what_is_no_page_may(service: Service) -> None:
    assert ask(service, service.url).status_code == 200
    assert service.chat("hello").status_code == 200
    assert is_answered_over_websocket(service, service.url)


def test_a_default_port_says_nothing_in_host_and_origin(service: Service) -> None:
    for host, origin, status in (
        ("chat.example.com:443", "https://chat.example.com", 200),
        ("Chat.example.com", "https://chat.example.com:443", 200),
        ("chat.example.com:80", "http://chat.example.com", 200),
        ("chat.example.com:8443", "https://chat.example.com", 403),
        ("chat.example.com", "https://chat.example.com:444", 403),
        ("chat.example.com", "http://chat.example.com:443", 403),
        ("", "null", 403),
    ):
        answer = service.http.get("/health", headers={"host": host, "origin": origin})
        assert answer.status_code == status, (host, origin)


def test_an_allowed_origin_may_and_is_told_so(shared: Service) -> None:
    for origin in (FOREIGN, LOCAL):
        answer = ask(shared, origin, stream=origin == LOCAL)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert is_answered_over_websocket(shared, origin)
    assert ask(shared, THIRD).status_code == 403


def test_a_preflight_is_answered(shared: Service) -> None:
    def preflight(origin: str) -> Any:
        headers = {"access-control-request-method": "DELETE", "origin": origin}
        headers["access-control-request-headers"] = "content-type, x-request-id"
        return shared.http.options("/conversations/0123456789abcdef", headers=headers)

    answer = preflight(FOREIGN)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == FOREIGN
    assert "DELETE" in answer.headers["access-control-allow-methods"]
    assert preflight(THIRD).status_code == 403


def test_any_origin_may_where_that_is_set(start_service: StartService) -> None:
    service = start_service(ALLOWED_ORIGINS="*")
    answer = ask(service, FOREIGN)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
