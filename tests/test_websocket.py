"""The WebSocket at /chat, over real sockets."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, UvicornService, body, connected, error_and_code, wait_until
from tests.test_protocols import frame

DONE = {"done": "true"}
CANCELLED = {"done": "true", "cancelled": "true"}
CANCEL = '{"cancel": true}'
BUSY = "this message is refused, since a reply is in progress and goes on; wait for it or cancel it"
LIMIT = 1000
HELD = Script(["a", "b"], hold_before_token=1)


@pytest.fixture(scope="module")
def strict(module_groq: FakeGroq) -> Iterator[Service]:
    """A service with tight limits for messages."""
    limits = {"MAX_BODY_BYTES": LIMIT, "IDLE_TIMEOUT": 0.4}
    with Service(GROQ_BASE_URL=module_groq.url, **limits) as running:
        yield running


@pytest.fixture(scope="module", params=[Service, UvicornService], ids=["python", "uvicorn"])
def either(request: pytest.FixtureRequest, module_groq: FakeGroq) -> Iterator[Service]:
    """A service over each of the two WebSocket protocols: ours and uvicorn's own."""
    with request.param(GROQ_BASE_URL=module_groq.url) as running:
        yield running


def ask(socket: ClientConnection, content: str, conversation: str | None = None) -> None:
    socket.send(json.dumps(body(content, conversation)))


def next_message(socket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(10))
    return message


def read_reply(socket: ClientConnection) -> tuple[list[str], dict[str, Any]]:
    """Return the tokens up to the message that is none, and that message."""
    tokens = []
    while "token" in (message := next_message(socket)):
        tokens.append(message["token"])
    return tokens, message


def test_each_reply_comes_token_by_token_and_the_socket_stays_open(
    either: Service, groq: FakeGroq, conversation: str
) -> None:
    with either.socket() as socket:
        for number in range(3):
            ask(socket, f"n{number}", conversation)
            assert read_reply(socket) == (["You", " said", ":", f" n{number}"], DONE)
    assert either.contents(conversation)[::2] == ["n0", "n1", "n2"]


def test_tokens_arrive_as_they_are_and_a_reply_that_was_cut_off_says_so(
    either: Service, groq: FakeGroq
) -> None:
    tokens = ["a\r\nb", '"\\', "\u2028", "[DONE]", "\x00", "\U0001f600"]
    groq.on("odd", Script(tokens, finish_reason="length"))
    with either.socket() as socket:
        ask(socket, "odd")
        assert read_reply(socket) == (tokens, {**DONE, "truncated": "length"})


def test_cancel_stops_the_reply_and_groq_and_keeps_what_was_sent(
    either: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("long", Script([f"t{n} " for n in range(1000)], interval=0.01))
    with either.socket() as socket:
        ask(socket, "long", conversation)
        seen = [next_message(socket)["token"] for _ in range(5)]
        socket.send(CANCEL)
        more, end = read_reply(socket)
        assert end == CANCELLED
        assert groq.wait_for_request("long").is_closed_soon()
        assert either.contents(conversation) == ["long", "".join(seen + more)]
        ask(socket, "next", conversation)
        assert read_reply(socket)[1] == DONE


def test_cancel_while_the_client_does_not_read_keeps_what_it_reads_later(
    either: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("large", Script([f"{n:05} " * 200 for n in range(12_000)]))
    with connected(either) as slow, either.socket(sock=slow, max_queue=1) as client:
        ask(client, "large", conversation)
        request = groq.wait_for_request("large")
        wait_until(lambda: len(request.sent_at) == 12_000)
        seen = [next_message(client)["token"]]
        client.send(CANCEL)
        more, end = read_reply(client)
    assert end == CANCELLED
    assert request.is_closed_soon()
    assert len(more) < 11_000
    assert either.contents(conversation) == ["large", "".join(seen + more)]


def test_cancel_before_the_first_token_keeps_nothing(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("silent", Script(hold_before_token=0))
    with service.socket() as socket:
        ask(socket, "silent", conversation)
        request = groq.wait_for_request("silent")
        socket.send(CANCEL)
        assert next_message(socket) == CANCELLED
        assert request.is_closed_soon()
        ask(socket, "silent", conversation)
        socket.send(CANCEL)  # right behind it
        assert next_message(socket) == CANCELLED
    assert service.contents(conversation) == []


def test_cancel_without_a_reply_or_across_its_end_says_nothing(service: Service) -> None:
    with service.socket() as socket:
        socket.send(CANCEL)
        for content in ("hello", "again"):
            ask(socket, content)
            assert read_reply(socket) == (["You", " said", ":", f" {content}"], DONE)
            socket.send(CANCEL)


def test_a_cancel_that_crosses_the_end_ends_the_reply_once_and_keeps_it(
    either: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("short", Script(["a"] * 10))
    with either.socket() as socket:
        for number in range(60):
            ask(socket, f"short {number}", conversation)
            tokens = list[str]()
            end = {"token": ""}
            while "token" in end:
                if len(tokens) == number % 11:
                    socket.send(CANCEL)
                end = next_message(socket)
                tokens.append(end.get("token", ""))
            assert end in (DONE, CANCELLED)
            last = either.contents(conversation)[-2:]
            assert not any(tokens) or last == [f"short {number}", "".join(tokens)]


def test_a_message_right_behind_a_cancel_waits_for_its_end_and_is_answered(
    either: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("first", Script(["a"] * 1000, interval=0.005))
    with either.socket() as socket:
        for number in range(20):
            ask(socket, f"first {number}", conversation)
            seen = [next_message(socket)["token"]]
            if number % 2:
                socket.send(CANCEL)
                ask(socket, "second", conversation)
            else:  # in one read
                second = json.dumps(body("second", conversation)).encode()
                socket.socket.sendall(frame(CANCEL.encode()) + frame(second))
            more, end = read_reply(socket)
            assert end == CANCELLED
            assert read_reply(socket) == (["You", " said", ":", " second"], DONE)
            stored = either.contents(conversation)[-4:]
            assert stored[:2] == [f"first {number}", "".join(seen + more)]


def test_a_second_message_meanwhile_gets_an_error_and_the_reply_goes_on(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("first", HELD)
    with service.socket() as socket:
        ask(socket, "first", conversation)
        assert next_message(socket) == {"token": "a"}
        ask(socket, "second", conversation)
        assert next_message(socket) == {"error": BUSY}
        groq.release()
        assert read_reply(socket) == (["b"], DONE)
    assert service.contents(conversation) == ["first", "ab"]


def test_an_invalid_message_or_a_failed_reply_leaves_the_socket_open(
    service: Service, groq: FakeGroq
) -> None:
    groq.on("fail", Script(["a"], cut_before_token=1))
    with service.socket() as socket:
        for sent, error in (
            ("hello", "the body must be valid JSON"),
            ("{}", "messages is missing"),
            ('{"messages": [{"role": "bot", "content": "x"}]}', "role must be exactly"),
            ('{"cancel": "yes"}', "cancel"),
        ):
            socket.send(sent)
            assert error in next_message(socket)["error"]
        ask(socket, "fail")
        tokens, end = read_reply(socket)
        assert (tokens, list(end)) == (["a"], ["error"])
        ask(socket, "hello")
        assert read_reply(socket)[1] == DONE


def test_a_message_without_messages_takes_nothing_from_the_rate_limit(
    start_service: StartService,
) -> None:
    with start_service(RATE_LIMIT="1/hour").socket() as socket:
        for limited in (False, True):
            for ping in ('{"type": "ping"}', "{}"):
                socket.send(ping)
                assert "messages is missing" in next_message(socket)["error"]
            ask(socket, "hello")
            assert ("error" in read_reply(socket)[1]) == limited
        socket.send("nonsense")
        assert "the rate limit is 1/hour" in next_message(socket)["error"]


def test_a_message_over_the_limit_gets_an_error_and_code_1009(strict: Service) -> None:
    for letter in ("x", "é"):
        with strict.socket() as socket:
            exact = json.dumps(body(letter * 400), ensure_ascii=False)
            socket.send(exact + " " * (LIMIT - len(exact.encode())))
            assert read_reply(socket)[1] == DONE
            socket.send(json.dumps(body(letter * LIMIT), ensure_ascii=False))
            assert error_and_code(socket) == ("the request must be at most 1000 bytes", 1009)
    assert strict.log_line(status=413)["error"] == "too_large"


def test_a_message_far_over_the_limit_is_told_so_too(service: Service) -> None:
    for piece in (20 << 20, 100_000):  # one frame is too large, or many together
        with service.socket() as socket:
            with suppress(ConnectionClosed):  # it may well be refused while it is sent
                socket.send("x" * piece for _ in range(20))
            assert error_and_code(socket) == ("the request must be at most 262144 bytes", 1009)


@pytest.mark.parametrize(("sent", "code"), [(b"binary", 1003), ("x" * 300_000, 1009)])
def test_an_error_that_closes_the_socket_ends_its_reply(
    service: Service, groq: FakeGroq, conversation: str, sent: bytes | str, code: int
) -> None:
    groq.on("hold", HELD)
    with service.socket() as socket:
        ask(socket, "hold", conversation)
        assert next_message(socket) == {"token": "a"}
        socket.send(sent)
        assert error_and_code(socket)[1] == code
    assert groq.wait_for_request("hold").is_closed_soon()
    assert service.contents(conversation) == []


def test_an_error_or_a_client_that_ends_a_socket_in_full_flow_is_no_bug(
    either: Service, groq: FakeGroq
) -> None:
    groq.on("flow", Script(["t"] * 20_000, interval=0.0001))
    for number in range(30):
        with either.socket() as client:
            ask(client, "flow")
            next_message(client)
            if number % 3:
                client.send(b"binary")
                error = "messages must be JSON in text frames, not binary frames"
                assert error_and_code(client) == (error, 1003)
            else:
                client.socket.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: either.metric("chat_replies_active") == 0)
    assert [line for line in either.log_lines() if line["level"] == "ERROR"] == []


def test_an_idle_socket_is_closed_but_not_while_a_reply_is_in_progress(
    strict: Service, groq: FakeGroq
) -> None:
    groq.on("slow", Script(["a", "b", "c"], interval=0.5))
    with strict.socket() as socket:
        ask(socket, "slow")
        assert read_reply(socket) == (["a", "b", "c"], DONE)
        assert error_and_code(socket) == ("idle for 0.4 s; reconnect to continue", 1001)
    with strict.socket() as socket:
        assert error_and_code(socket)[1] == 1001


def test_a_websocket_on_another_path_is_refused(service: Service) -> None:
    for path in ("/other", "/health", "/"):
        address = f"ws://127.0.0.1:{service.port}{path}"
        with pytest.raises(InvalidStatus) as refused, connect(address):
            pass
        assert refused.value.response.status_code == 403


def test_each_reply_is_a_line_in_the_log_and_so_is_the_socket(service: Service) -> None:
    with service.socket(additional_headers={"x-request-id": "socket-lines"}) as socket:
        assert socket.response
        assert socket.response.headers["x-request-id"] == "socket-lines"
        for number in range(2):
            ask(socket, f"n{number}")
            read_reply(socket)
        socket.send("nonsense")
        next_message(socket)
    service.log_line(request_id="socket-lines", status=101)
    requests = [line for line in service.log_lines() if "status" in line]
    lines = [line for line in requests if line.get("request_id") == "socket-lines"]
    assert [line["status"] for line in lines] == [200, 200, 400, 101]
    assert {"stream_type", "outcome", "ttft_ms", "duration_ms", "model"} <= set(lines[0])
