"""When a caller goes away, Groq's connection is closed: over each transport, in each phase."""

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body, wait_until

Leave = Callable[[], None]


def ask_over_http(service: Service, content: str, conversation: str, *, stream: bool) -> Leave:
    sent = json.dumps(body(content, conversation, stream=stream)).encode()
    connection = socket.create_connection(("127.0.0.1", service.port), 5)
    head = f"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent)}\r\n"
    head += f"X-Request-ID: {request_id_for(conversation)}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection.close


def request_id_for(conversation: str) -> str:
    """Return an id for the log, where the conversation's own must not stand."""
    return f"of-{conversation[::-1]}"


def ask_over_websocket(
    service: Service, content: str, conversation: str, stack: ExitStack, *, politely: bool
) -> Leave:
    websocket = stack.enter_context(service.socket())
    websocket.send(json.dumps(body(content, conversation)))
    if politely:
        return websocket.close
    return lambda: websocket.socket.shutdown(socket.SHUT_RDWR)


def ask(
    transport: str, service: Service, content: str, conversation: str, stack: ExitStack
) -> Leave:
    if transport.startswith("websocket"):
        politely = transport == "websocket"
        return ask_over_websocket(service, content, conversation, stack, politely=politely)
    return ask_over_http(service, content, conversation, stream=transport == "sse")


PHASES = {
    "before Groq's status": Script(hold_before_status=True),
    "while the model thinks": Script(hold_before_token=0),
    "in mid-stream": Script(["a", "b", "c"], hold_before_token=2),
    "while comments come": Script(comments=0.02),
    "in full flow": Script(["t"] * 10_000, interval=0.001),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("transport", ["json", "sse", "websocket", "websocket, cut"])
def test_groqs_connection_is_closed_when_the_caller_leaves(
    service: Service, groq: FakeGroq, conversation: str, transport: str, phase: str
) -> None:
    groq.on("question", PHASES[phase])
    with ExitStack() as stack:
        leave = ask(transport, service, "question", conversation, stack)
        request = groq.wait_for_request("question")
        if transport != "json" and phase in ("in mid-stream", "in full flow"):
            wait_until(lambda: len(request.sent_at) >= 2)
        leave()
        assert request.is_closed_soon(), "long before any time limit of ours"
    assert not request.answered
    assert service.contents(conversation) == []


@pytest.mark.parametrize("transport", ["json", "sse"])
def test_a_caller_who_leaves_before_an_answer_is_one_line_in_the_log(
    service: Service, groq: FakeGroq, conversation: str, transport: str
) -> None:
    groq.on("question", Script(hold_before_status=True))
    with ExitStack() as stack:
        leave = ask(transport, service, "question", conversation, stack)
        groq.wait_for_request("question")
        leave()
        service.log_line(request_id=request_id_for(conversation))
    request_id = request_id_for(conversation)
    lines = [x for x in service.log_lines() if x.get("request_id") == request_id]
    shown = [(line["level"], line["status"], line["outcome"]) for line in lines]
    assert shown == [("INFO", 499, "cancelled")]
