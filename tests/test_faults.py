"""
Each fault of Groq's over each transport: what the client sees, what is kept, what is counted, and
that Groq's connection is closed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body, wait_until


@dataclass(frozen=True)
class Fault:
    """What Groq does, and what comes of it."""

    script: Script
    outcome: str  # how `groq_requests_total` counts it
    error: str
    text: str = ""  # what came before it in a stream; if nothing did, the error has a status

    def status(self, transport: str) -> int:
        """Return the status of the response; a WebSocket has none."""
        if transport == "websocket":
            return 0
        if transport == "sse" and self.text:
            return 200
        return {"timeout": 504, "too long": 400}.get(self.outcome, 502)


REFUSED = "the language model service answered with status {}"
MISCONFIGURED = "the language model service is misconfigured"
UNREACHABLE = "the language model service is unreachable"
TIMEOUT = "the language model service did not respond in time"
CUT = "the language model service cut the reply short"
FAILED = "the language model service failed during the reply"
INVALID = "the language model service sent an invalid response"
EMPTY = "the language model sent an empty reply"
USED_UP = "the language model used up its 1024 tokens before it wrote any text"

WITHHELD = "the language model wrote no text that its content filter passed"
TOOL = "the language model asked for a tool, and wrote no text"


def said(error: str) -> Script:
    """An error inside a 200, as an event or as a whole body."""
    return Script([], error_before_token=0, error=f'data: {{"error":{error}}}')


STATUSES = {
    **dict.fromkeys((302, 400, 498, 503), REFUSED),
    **dict.fromkeys((401, 403, 404), MISCONFIGURED),
}
FAULTS = {
    **{
        f"status {status}": Fault(Script(status=status), "refused", error.format(status))
        for status, error in STATUSES.items()
    },
    "status 429": Fault(Script(status=429), "quota", REFUSED.format(429)),
    "a status line that is not UTF-8": Fault(
        Script(status=503, reason="\xfcberlastet"), "broken", INVALID
    ),
    "a header that is too long": Fault(Script(headers=(("x", "x" * 70_000),)), "broken", INVALID),
    "says in a 200 that the request is wrong": Fault(
        said('{"code":400,"message":"no"}'), "refused", REFUSED.format(400)
    ),
    "says in a 200 that the key is wrong": Fault(
        said('{"type":"authentication_error"}'), "refused", MISCONFIGURED
    ),
    "says in a 200 that the quota is used up": Fault(
        said('{"type":"tokens","code":"rate_limit_exceeded"}'), "quota", REFUSED.format(429)
    ),
    "aborts": Fault(Script([], finish_reason="abort"), "failed", FAILED),
    "aborts after a token": Fault(Script(["a"], finish_reason="abort"), "failed", FAILED, "a"),
    "withholds its text": Fault(Script([], finish_reason="safety"), "empty", WITHHELD),
    "asks for a tool": Fault(Script([], finish_reason="tool_calls"), "empty", TOOL),
    "hangs up": Fault(Script(cut_before_status=True), "unreachable", UNREACHABLE),
    "silent before its status": Fault(Script(hold_before_status=True), "timeout", TIMEOUT),
    "silent before a token": Fault(Script(hold_before_token=0), "timeout", TIMEOUT),
    "silent between tokens": Fault(
        Script(["a", "b"], hold_before_token=1), "timeout", TIMEOUT, "a"
    ),
    "sends nothing but comments": Fault(Script(comments=0.02), "timeout", TIMEOUT),
    "cuts before a token": Fault(Script(["a"], cut_before_token=0), "cut", CUT),
    "cuts between tokens": Fault(Script(["a", "b"], cut_before_token=1), "cut", CUT, "a"),
    "fails before a token": Fault(Script(["a"], error_before_token=0), "failed", FAILED),
    "fails between tokens": Fault(Script(["a", "b"], error_before_token=1), "failed", FAILED, "a"),
    "nonsense": Fault(Script(body=b"data: nonsense\n\n"), "broken", INVALID),
    "half a character for an object": Fault(
        Script(body=b'data: {"choices":"\\ud83d"}\n\n'), "broken", INVALID
    ),
    "a reply that is too large": Fault(Script(body=b"x" * (17 << 20)), "broken", INVALID),
    "empty": Fault(Script([]), "empty", EMPTY),
    "nothing but reasoning": Fault(
        Script([], reasoning=["hm"], finish_reason="length"), "empty", USED_UP
    ),
}


def ask(service: Service, transport: str, conversation: str) -> tuple[str, int, str]:
    """Return the text of the reply, its status, and the error."""
    if transport == "websocket":
        return ask_over_websocket(service, conversation)
    if transport == "json":
        answer = service.chat("question", conversation, stream=False)
        return "", answer.status_code, answer.json()["error"]
    with service.stream("question", conversation) as (answer, stream):
        if answer.status_code != 200:
            return "", answer.status_code, json.loads(answer.read())["error"]
        *tokens, last = list(stream)
        assert last.name == "error"
        return "".join(token.data for token in tokens), 200, json.loads(last.data)["error"]


def ask_over_websocket(service: Service, conversation: str) -> tuple[str, int, str]:
    text = ""
    with service.socket() as socket:
        socket.send(json.dumps(body("question", conversation)))
        while "token" in (message := json.loads(socket.recv(5))):
            text += message["token"]
        socket.send(json.dumps(body("another question")))  # the socket is still usable
        assert "token" in json.loads(socket.recv(5))
    return text, 0, message["error"]


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


@pytest.mark.parametrize("transport", ["json", "sse", "websocket"])
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
    before = counted(service, transport, fault.outcome)
    seen = ask(service, transport, conversation)
    text = "" if transport == "json" else fault.text
    assert seen == (text, fault.status(transport), fault.error)
    assert service.contents(conversation) == []
    after = tuple(number + 1 for number in before)
    wait_until(lambda: counted(service, transport, fault.outcome) == after)
    request = groq.asked("question")[0]
    if not request.answered:
        assert request.is_closed_soon()
    assert service.metric("chat_replies_active", stream_type=transport) == 0
    assert "org_secret" not in service.process.output
