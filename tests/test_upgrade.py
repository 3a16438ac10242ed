"""Upgrades from HTTP to a WebSocket that come at a wrong moment, or cannot be read."""

import json

import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, wait_until
from tests.test_connection import (
    ask_over_websocket,
    asking,
    connected,
    everything_from,
    handshake,
)


@pytest.mark.parametrize("is_stream", [True, False], ids=["sse", "json"])
def test_an_upgrade_behind_a_reply_ends_both(
    service: Service, groq: FakeGroq, is_stream: bool
) -> None:
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with connected(service) as connection:
        connection.sendall(asking("held", stream=is_stream))
        request = groq.wait_for_request("held")
        connection.sendall(handshake())
        assert b"101 Switching" not in everything_from(connection)
    assert request.is_closed_soon()
    wait_until(lambda: service.metric("chat_replies_active") == 0)


def test_an_upgrade_behind_a_large_answer_ends_both(
    start_service: StartService, conversation: str
) -> None:
    service = start_service(MAX_BODY_BYTES=20 << 20, CONTEXT_TOKENS=100_000_000)
    service.reply("x" * (12 << 20), conversation)
    tasks = service.metric("event_loop_tasks")
    with connected(service) as connection:
        path = f"/conversations/{conversation}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(10)
        connection.sendall(handshake())
        assert b"101 Switching" not in everything_from(connection)
    wait_until(lambda: service.metric("event_loop_tasks") == tasks)


def test_an_upgrade_behind_a_request_in_the_same_packet_is_cut(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + handshake())
        assert b"101 Switching" not in everything_from(connection)


def test_an_upgrade_behind_an_answer_that_has_been_read_is_served(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        while not connection.recv(4096).endswith(b"OK"):
            pass
        ask_over_websocket(connection, service)
        assert connection.recv(4096)


@pytest.mark.parametrize(
    ("headers", "status", "error"),
    [
        ([b"a: " + b"b" * 9000], 431, "the head of the request is too large"),
        ([b"a: b"] * 200, 431, "the head of the request is too large"),
        (
            [b"Content-Length: 9"],
            400,
            "the request for a WebSocket must be valid, and without a body",
        ),
    ],
    ids=["a large header", "many headers", "a body"],
)
def test_a_handshake_that_cannot_be_read_is_an_error(
    service: Service, headers: list[bytes], status: int, error: str
) -> None:
    with connected(service) as connection:
        connection.sendall(handshake(*headers))
        head, _, shown = everything_from(connection).decode().partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert "content-type: application/json" in head.lower()
    assert json.loads(shown) == {"error": error}
