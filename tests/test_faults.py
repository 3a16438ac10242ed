"""
Each fault of Groq's over each transport: what the caller sees, what is kept, what is counted, and
that Groq's connection is closed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body, wait_until

TRANSPORTS = ("json", "sse", "websocket")


@dataclass(frozen=True)
class Fault:
    """What Groq does, and what comes of it."""

    script: Script
    status: int
    """Of an answer that has not begun."""
    outcome: str
    """How `groq_requests_total` counts it."""
    error: str
    text: str = ""
    """What has come before it, where the reply streams."""
    json_outcome: str = ""
    """Where a whole reply is counted otherwise than a stream."""
    json_error: str = ""

    def counted(self, transport: str) -> str:
        return self.json_outcome if transport == "json" and self.json_outcome else self.outcome

    def told(self, transport: str) -> str:
        return self.json_error if transport == "json" and self.json_error else self.error


REFUSED = "the language model service answered with status"
MISUSED = "the language model service cannot be used at the moment"
UNREACHABLE = "the language model service cannot be reached"
TIMEOUT = "the language model service did not answer in time"
CUT = "the language model service cut its reply short"
FAILED = "the language model service failed while it was replying"
NONSENSE = "the language model service sent something that is not a reply"
EMPTY = "the language model sent an empty reply"

FAULTS = {
    **{
        f"status {status}": Fault(Script(status=status), 502, "refused", f"{REFUSED} {status}")
        for status in (302, 400, 408, 409, 413, 422, 498, 500, 502, 503, 504)
    },
    "status 429": Fault(Script(status=429), 502, "quota", f"{REFUSED} 429"),
    **{
        f"status {status}": Fault(Script(status=status), 502, "refused", MISUSED)
        for status in (401, 403, 404)
    },
    "a status line that is no UTF-8": Fault(
        Script(status=503, reason="\xfcberlastet"), 502, "unreachable", UNREACHABLE
    ),
    "hangs up": Fault(Script(cut_before_status=True), 502, "unreachable", UNREACHABLE),
    "silent before its status": Fault(Script(hold_before_status=True), 504, "timeout", TIMEOUT),
    "silent before a token": Fault(Script(hold_before_token=0), 504, "timeout", TIMEOUT),
    "silent between tokens": Fault(
        Script(["a", "b"], hold_before_token=1), 504, "timeout", TIMEOUT, "a"
    ),
    "says nothing but comments": Fault(Script(comments=0.02), 504, "timeout", TIMEOUT),
    "cuts before a token": Fault(
        Script(["a"], cut_before_token=0), 502, "cut", CUT, "", "unreachable", UNREACHABLE
    ),
    "cuts between tokens": Fault(
        Script(["a", "b"], cut_before_token=1), 502, "cut", CUT, "a", "unreachable", UNREACHABLE
    ),
    "fails before a token": Fault(Script(["a"], error_before_token=0), 502, "failed", FAILED),
    "fails between tokens": Fault(
        Script(["a", "b"], error_before_token=1), 502, "failed", FAILED, "a"
    ),
    "nonsense": Fault(Script(body=b"data: nonsense\n\n"), 502, "broken", NONSENSE),
    "empty": Fault(Script([]), 502, "empty", EMPTY),
}


@dataclass(frozen=True)
class Seen:
    text: str
    status: int
    error: str


def ask(service: Service, transport: str, conversation: str) -> Seen:
    if transport == "websocket":
        return ask_over_websocket(service, conversation)
    if transport == "json":
        answer = service.chat("question", conversation, stream=False)
        return Seen("", answer.status_code, answer.json()["error"])
    with service.stream("question", conversation) as (answer, stream):
        if answer.status_code != 200:
            return Seen("", answer.status_code, json.loads(answer.read())["error"])
        *tokens, last = list(stream)
        assert last.name == "error"
        return Seen("".join(x.data for x in tokens), 200, json.loads(last.data)["error"])


def ask_over_websocket(service: Service, conversation: str) -> Seen:
    text = ""
    with service.socket() as socket:
        socket.send(json.dumps(body("question", conversation)))
        while "token" in (message := json.loads(socket.recv(5))):
            text += message["token"]
        error = message["error"]
        socket.send(json.dumps(body("another question")))  # the socket is still of use
        assert "token" in json.loads(socket.recv(5))
    return Seen(text, 0, error)


@pytest.fixture(scope="module")
def impatient_service(module_groq: FakeGroq) -> Iterator[Service]:
    limits = {"GROQ_FIRST_EVENT_TIMEOUT": 0.5, "GROQ_TIMEOUT": 0.5}
    with Service(GROQ_BASE_URL=module_groq.url, **limits) as running:
        yield running


def counted(service: Service, transport: str, outcome: str) -> tuple[float, ...]:
    return (
        service.metric("chat_replies_total", stream_type=transport, outcome="failed"),
        service.metric("groq_requests_total", outcome=outcome),
        service.metric("chat_errors_total", reason=outcome),
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_counted_and_leaves_nothing_behind(
    service: Service,
    impatient_service: Service,
    groq: FakeGroq,
    conversation: str,
    name: str,
    transport: str,
) -> None:
    fault = FAULTS[name]
    service = impatient_service if fault.outcome == "timeout" else service
    groq.on("question", fault.script)
    groq.on("another question", Script(["good"]))
    before = counted(service, transport, fault.counted(transport))
    seen = ask(service, transport, conversation)
    assert seen.error == fault.told(transport)
    assert seen.text == ("" if transport == "json" else fault.text)
    begun = transport == "sse" and name not in FAULTS_BEFORE_A_STATUS
    assert seen.status == (0 if transport == "websocket" else 200 if begun else fault.status)
    assert service.contents(conversation) == []
    after = tuple(number + 1 for number in before)
    wait_until(lambda: counted(service, transport, fault.counted(transport)) == after)
    request = groq.asked("question")[0]
    if not request.answered:
        assert request.is_closed_soon()
    assert service.metric("chat_replies_active", stream_type=transport) == 0


FAULTS_BEFORE_A_STATUS = {name for name, fault in FAULTS.items() if fault.script.status != 200} | {
    "hangs up",
    "silent before its status",
}
