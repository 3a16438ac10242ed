"""The WebSocket at /chat, over real sockets."""

import json
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body, closing_code, wait_until

DONE = {"done": "true"}


def ask(socket: ClientConnection, content: str, conversation: str | None = None) -> None:
    socket.send(json.dumps(body(content, conversation)))


def next_message(socket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(5))
    return message


def read_reply(socket: ClientConnection) -> tuple[list[str], dict[str, Any]]:
    """Return the tokens up to the message that is none, and that message."""
    tokens = []
    while "token" in (message := next_message(socket)):
        tokens.append(message["token"])
    return tokens, message


def test_a_reply_comes_token_by_token_and_ends_with_done(service: Service) -> None:
    with service.socket() as socket:
        ask(socket, "hello")
        assert read_reply(socket) == (["You", " said", ":", " hello"], DONE)


def test_the_socket_stays_open_for_the_next_message(service: Service, conversation: str) -> None:
    with service.socket() as socket:
        for number in range(3):
            ask(socket, f"n{number}", conversation)
            assert read_reply(socket) == (["You", " said", ":", f" n{number}"], DONE)
    assert service.contents(conversation)[::2] == ["n0", "n1", "n2"]


def test_tokens_of_any_kind_arrive_as_they_are(service: Service, groq: FakeGroq) -> None:
    tokens = ["a\r\nb", '"\\', "\u2028", "[DONE]", "\x00", "\U0001f600"]
    groq.on("odd", Script(tokens))
    with service.socket() as socket:
        ask(socket, "odd")
        assert read_reply(socket) == (tokens, DONE)


def test_cancel_stops_the_reply_and_groq_and_keeps_what_was_sent(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("long", Script([f"t{n} " for n in range(1000)], interval=0.01))
    with service.socket() as socket:
        ask(socket, "long", conversation)
        seen = [next_message(socket)["token"] for _ in range(5)]
        socket.send('{"cancel": true}')
        more, end = read_reply(socket)
        assert end == {"done": "true", "cancelled": "true"}
        assert groq.wait_for_request("long").is_closed_soon()
        assert service.contents(conversation) == ["long", "".join(seen + more)]
        ask(socket, "next", conversation)
        assert read_reply(socket)[1] == DONE


def test_cancel_before_the_first_token_keeps_nothing(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("silent", Script(hold_before_token=0))
    with service.socket() as socket:
        ask(socket, "silent", conversation)
        request = groq.wait_for_request("silent")
        socket.send('{"cancel": true}')
        assert next_message(socket) == {"done": "true", "cancelled": "true"}
        assert request.is_closed_soon()
    assert service.contents(conversation) == []


def test_cancel_right_behind_the_message_still_ends_the_reply(
    service: Service, groq: FakeGroq
) -> None:
    groq.on("silent", Script(hold_before_token=0))
    with service.socket() as socket:
        ask(socket, "silent")
        socket.send('{"cancel": true}')
        assert next_message(socket) == {"done": "true", "cancelled": "true"}


def test_cancel_without_a_reply_says_nothing(service: Service) -> None:
    with service.socket() as socket:
        socket.send('{"cancel": true}')
        ask(socket, "hello")
        assert read_reply(socket)[1] == DONE
        socket.send('{"cancel": true}')
        ask(socket, "again")
        assert read_reply(socket) == (["You", " said", ":", " again"], DONE)


def test_a_second_message_meanwhile_gets_an_error_and_the_reply_goes_on(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("first", Script(["a", "b"], hold_before_token=1))
    with service.socket() as socket:
        ask(socket, "first", conversation)
        assert next_message(socket) == {"token": "a"}
        ask(socket, "second", conversation)
        assert "still running" in next_message(socket)["error"]
        groq.release()
        assert read_reply(socket) == (["b"], DONE)
    assert service.contents(conversation) == ["first", "ab"]


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ("hello", "the body must be valid JSON"),
        ("{}", "messages must not be empty"),
        ('{"messages": []}', "messages must not be empty"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "role must be exactly"),
        ('{"cancel": "yes"}', "cancel: Expected `bool`, got `str`"),
    ],
)
def test_an_invalid_message_gets_an_error_and_the_socket_stays_open(
    service: Service, sent: str, error: str
) -> None:
    with service.socket() as socket:
        socket.send(sent)
        assert error in next_message(socket)["error"]
        ask(socket, "hello")
        assert read_reply(socket)[1] == DONE


def test_an_error_of_groqs_leaves_the_socket_open(service: Service, groq: FakeGroq) -> None:
    groq.on("fail", Script(["a"], cut_before_token=1))
    with service.socket() as socket:
        ask(socket, "fail")
        tokens, end = read_reply(socket)
        assert (tokens, list(end)) == (["a"], ["error"])
        ask(socket, "hello")
        assert read_reply(socket)[1] == DONE


def test_a_binary_message_gets_an_error_and_code_1003(service: Service) -> None:
    with service.socket() as socket:
        socket.send(b'{"messages": []}')
        assert "not a binary one" in next_message(socket)["error"]
        assert closing_code(socket) == 1003


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_message_beyond_the_limit_gets_an_error_and_code_1009(
    start_service: StartService, letter: str
) -> None:
    service = start_service(MAX_BODY_BYTES=1000)
    with service.socket() as socket:
        ask(socket, "hello")
        assert read_reply(socket)[1] == DONE
        socket.send(json.dumps(body(letter * (1000 // len(letter.encode()))), ensure_ascii=False))
        assert next_message(socket) == {"error": "the request must be at most 1000 bytes"}
        assert closing_code(socket) == 1009
    assert service.log_line(status=413)["error"] == "too_large"


def test_a_message_of_just_the_limit_is_taken(start_service: StartService) -> None:
    service = start_service(MAX_BODY_BYTES=1000)
    question = json.dumps(body("é" * 400), ensure_ascii=False)
    with service.socket() as socket:
        socket.send(question + " " * (1000 - len(question.encode())))
        assert read_reply(socket)[1] == DONE


@pytest.mark.parametrize("piece", [20 << 20, 100_000], ids=["a frame", "many frames"])
def test_a_message_far_beyond_the_limit_is_told_so_too(service: Service, piece: int) -> None:
    with service.socket() as socket:
        with suppress(ConnectionClosed):  # it may well be refused while it is sent
            socket.send("x" * piece for _ in range(20))
        assert next_message(socket) == {"error": "the request must be at most 262144 bytes"}
        assert closing_code(socket) == 1009


def test_a_message_beyond_the_limit_ends_the_reply_that_runs(
    service: Service, groq: FakeGroq
) -> None:
    groq.on("hold", Script(["a", "b"], hold_before_token=1))
    with service.socket() as socket:
        ask(socket, "hold")
        assert next_message(socket) == {"token": "a"}
        socket.send("x" * 300_000)
        assert "at most" in next_message(socket)["error"]
    assert groq.wait_for_request("hold").is_closed_soon()


def test_an_error_that_closes_the_socket_ends_its_reply(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("hold", Script(["a", "b"], hold_before_token=1))
    with service.socket() as socket:
        ask(socket, "hold", conversation)
        assert next_message(socket) == {"token": "a"}
        socket.send(b"binary")
        assert "error" in next_message(socket)
        assert closing_code(socket) == 1003
    assert groq.wait_for_request("hold").is_closed_soon()
    assert service.contents(conversation) == []


def test_the_handshake_bears_a_request_id(service: Service) -> None:
    with service.socket(additional_headers={"x-request-id": "mine"}) as socket:
        assert socket.response
        assert socket.response.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("path", ["/other", "/health", "/"])
def test_a_websocket_on_another_path_is_a_404(service: Service, path: str) -> None:
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(f"ws://127.0.0.1:{service.port}{path}"),
    ):
        pass
    answer = refused.value.response
    assert answer.status_code == 404
    assert json.loads(answer.body or b"") == {"error": "there is no such path"}
    assert len(answer.headers["x-request-id"]) == 32


def test_an_error_that_closes_a_socket_in_full_flow_is_no_fault_of_ours(
    service: Service, groq: FakeGroq
) -> None:
    groq.on("flow", Script(["t"] * 20_000, interval=0.0001))
    for _ in range(20):
        with service.socket() as socket:
            ask(socket, "flow")
            next_message(socket)
            socket.send(b"binary")
            while "token" in next_message(socket):
                pass
            assert closing_code(socket) == 1003
    assert "ERROR" not in {line["level"] for line in service.log_lines()}


def test_each_reply_is_a_line_in_the_log_and_so_is_the_socket(service: Service) -> None:
    with service.socket(additional_headers={"x-request-id": "socket-lines"}) as socket:
        for number in range(2):
            ask(socket, f"n{number}")
            read_reply(socket)
        socket.send("nonsense")
        next_message(socket)
    service.log_line(request_id="socket-lines", status=101)
    lines = [x for x in service.log_lines() if x.get("request_id") == "socket-lines"]
    assert [line["status"] for line in lines] == [200, 200, 400, 101]
    assert {"stream_type", "outcome", "ttft_ms", "duration_ms", "model"} <= set(lines[0])


def test_replies_are_counted_by_outcome(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service()
    groq.on("fail", Script(status=500))
    groq.on("silent", Script(hold_before_token=0))
    with service.socket() as socket:
        ask(socket, "hello")
        read_reply(socket)
        ask(socket, "fail")
        read_reply(socket)
        ask(socket, "silent")
        groq.wait_for_request("silent")
        assert service.metric("chat_replies_active", stream_type="websocket") == 1
        socket.send('{"cancel": true}')
        read_reply(socket)
    for outcome in ("completed", "failed", "cancelled"):
        labels = {"stream_type": "websocket", "outcome": outcome}
        assert service.metric("chat_replies_total", **labels) == 1
    assert service.metric("chat_requests_total", stream_type="websocket") == 3
    wait_until(lambda: service.metric("http_requests_total", status="101") == 1)
