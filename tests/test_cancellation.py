"""When a client goes away, Groq's connection is closed: over each transport, in each phase."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.fake_groq import FakeGroq, Script
from tests.servers import Caller, Service, UvicornService, body, connected, raw_chat, wait_until

Leave = Callable[[], None]

TRANSPORTS = ("json", "sse", "websocket", "websocket, cut")
PHASES = {
    "before Groq's status": Script(hold_before_status=True),
    "while the model thinks": Script(hold_before_token=0),
    "in mid-stream": Script(["a", "b", "c"], hold_before_token=2),
    "while comments come": Script(comments=0.02),
    "in full flow": Script(["t"] * 10_000, interval=0.001),
}
LARGE = Script(["x" * 1000] * 12_000)  # more than the kernel's buffers hold


@pytest.fixture(scope="module", params=[Service, UvicornService], ids=["python", "uvicorn"])
def either(request: pytest.FixtureRequest, module_groq: FakeGroq) -> Iterator[Service]:
    with request.param(GROQ_BASE_URL=module_groq.url) as running:
        yield running


def ask(
    transport: str, service: Caller, content: str, conversation: str, stack: ExitStack
) -> Leave:
    """Send a chat; return how to leave."""
    connection = stack.enter_context(connected(service))
    if transport.startswith("websocket"):
        queue = 1 if content == "large" else 16  # the client closes only once it has read
        websocket = stack.enter_context(service.socket(sock=connection, max_queue=queue))
        websocket.send(json.dumps(body(content, conversation)))
        if transport == "websocket":
            return websocket.close
        return lambda: websocket.socket.shutdown(socket.SHUT_RDWR)
    request_id = f"X-Request-ID: {request_id_for(conversation)}"
    is_stream = transport == "sse"
    connection.sendall(raw_chat(content, request_id, conversation=conversation, stream=is_stream))
    return connection.close


def request_id_for(conversation: str) -> str:
    """Return an id for the log, where the conversation's own must not stand."""
    return f"of-{conversation[::-1]}"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_groqs_connection_is_closed_as_soon_as_the_client_leaves(
    either: Service, groq: FakeGroq, conversation: str, transport: str, phase: str
) -> None:
    groq.on("question", PHASES[phase])
    with ExitStack() as stack:
        leave = ask(transport, either, "question", conversation, stack)
        request = groq.wait_for_request("question")
        if transport != "json" and phase in ("in mid-stream", "in full flow"):
            wait_until(lambda: len(request.sent_at) >= 2)
        leave()
        assert request.is_closed_soon(), "long before any time limit of ours"
    assert not request.answered
    assert either.contents(conversation) == []
    if transport in ("json", "sse"):
        line = either.log_line(request_id=request_id_for(conversation), endpoint="/chat")
        shown = (line["level"], line["outcome"], line["error"])
        assert shown == ("INFO", "cancelled", "client_disconnected")
        has_begun = transport == "sse" and phase in ("in mid-stream", "in full flow")
        assert line["status"] == (200 if has_begun else 499)


@pytest.mark.parametrize("transport", ["sse", "websocket, cut"])
def test_it_is_also_closed_while_the_client_does_not_read(
    either: Service, groq: FakeGroq, conversation: str, transport: str
) -> None:
    groq.on("large", LARGE)
    with ExitStack() as stack:
        leave = ask(transport, either, "large", conversation, stack)
        request = groq.wait_for_request("large")
        wait_until(lambda: len(request.sent_at) == len(LARGE.tokens or ()))
        leave()
        assert request.is_closed_soon(), "long before SEND_TIMEOUT"
    assert either.contents(conversation) == []


@pytest.fixture(scope="module")
def impatient(module_groq: FakeGroq) -> Iterator[Service]:
    """A service that gives a client one second to read."""
    with Service(GROQ_BASE_URL=module_groq.url, SEND_TIMEOUT=1) as running:
        yield running


@pytest.mark.parametrize("transport", ["sse", "websocket"])
def test_a_client_that_reads_nothing_is_cut_and_groq_with_it(
    impatient: Service, groq: FakeGroq, conversation: str, transport: str
) -> None:
    groq.on("large", LARGE)
    with ExitStack() as stack:
        connection = stack.enter_context(connected(impatient))
        if transport == "sse":
            connection.sendall(raw_chat("large", conversation=conversation, stream=True))
        else:
            patience = {"max_queue": 1, "close_timeout": 0.1}
            websocket = stack.enter_context(impatient.socket(sock=connection, **patience))
            websocket.send(json.dumps(body("large", conversation)))
        request = groq.wait_for_request("large")
        assert request.closed.wait(10), "SEND_TIMEOUT is a second"
    wait_until(lambda: impatient.metric("chat_replies_active") == 0)
    outcome = impatient.log_line(stream_type=transport)["outcome"]
    assert outcome == "cancelled"
    assert impatient.contents(conversation) == []
