"""What callers see, and what is kept, when Groq answers in each of its ways."""

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body, free_port

TRANSPORTS = ("json", "sse", "websocket")


def outcome_of(service: Service, transport: str, content: str, conversation: str) -> Any:
    """Return what came: the text, or the status and the text before it where there is one."""
    if transport == "websocket":
        return over_websocket(service, content, conversation)
    if transport == "json":
        answer = service.chat(content, conversation, stream=False)
        return answer.json().get("response", (answer.status_code, answer.json().get("error")))
    with service.stream(content, conversation) as (answer, stream):
        if answer.status_code != 200:
            return answer.status_code, json.loads(answer.read())["error"]
        *tokens, last = list(stream)
        text = "".join(event.data for event in tokens)
        return (text, json.loads(last.data)["error"]) if last.name == "error" else text


def over_websocket(service: Service, content: str, conversation: str) -> Any:
    text = ""
    with service.socket() as socket:
        socket.send(json.dumps(body(content, conversation)))
        while "token" in (message := json.loads(socket.recv(5))):
            text += message["token"]
    return (text, message["error"]) if "error" in message else text


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "script",
    [
        Script(["Hello", " you"]),
        Script(["Hello", " you"], newline="\r\n"),
        Script(["Hello", " you"], newline="\r"),
        Script(["Hello", " you"], reasoning=["hm", "hm"]),
        Script(["Hello", " you"], prompt_tokens=None),
        Script(["Hello", " you"], done=False),
        Script(["Hello", " you"], finish_reason=None),
        Script(["Hello", " you"], finish_reason="length"),
        Script(["Hello", "", " you"]),
    ],
    ids=str,
)
def test_every_form_of_a_good_reply_is_understood(
    service: Service, groq: FakeGroq, conversation: str, transport: str, script: Script
) -> None:
    groq.on("question", script)
    assert outcome_of(service, transport, "question", conversation) == "Hello you"
    assert service.contents(conversation) == ["question", "Hello you"]


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_stream_may_be_cut_anywhere(
    service: Service, groq: FakeGroq, conversation: str, piece: int, newline: str
) -> None:
    tokens = ["Grüße", " 你好", " \U0001f600", "\u2028", " end"]
    groq.on("question", Script(tokens, piece=piece, newline=newline))
    assert "".join(service.tokens("question", conversation)) == "".join(tokens)


def raw(chunks: str) -> Script:
    return Script(["x"], body=chunks.encode())


GOOD = 'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n'


@pytest.mark.parametrize(
    "chunks",
    [
        GOOD + "data: [DONE]\n\n",
        GOOD + "data: [DONE]",
        GOOD + "data:[DONE]\n\n",
        "\ufeff" + GOOD + "data: [DONE]\n\n",
        ": comment\n\n" + GOOD + ":\n\nid: 5\nretry: 9\n\ndata: [DONE]\n\n",
        'event: x\ndata: {"choices":[{"delta":\ndata: {"content":"Hi"}}]}\n\ndata: [DONE]\n\n',
        GOOD + 'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
        GOOD + 'data: {"choices":[{"delta":null,"finish_reason":"stop"}],"usage":null}',
        'data: {"choices":[{"delta":{"content":null}}]}\n\n' + GOOD + "data: [DONE]\n\n",
        GOOD + 'data: {"choices":[],"usage":{"prompt_tokens":3}}\n\ndata: [DONE]\n\n',
        GOOD + "data: [DONE]\n\n" + GOOD,
        GOOD + "data: [DONE] \n\n",
        GOOD + 'data: {"choices":[],"usage":{"prompt_tokens":-5}}\n\ndata: [DONE]\n\n',
        GOOD + 'data: {"choices":[],"usage":{"prompt_tokens":"7"}}\n\ndata: [DONE]\n\n',
        GOOD + 'data: {"choices":[],"x_groq":{"usage":[]}}\n\ndata: [DONE]\n\n',
        GOOD + 'data: {"choices":[],"x_groq":{"usage":1e400}}\n\ndata: [DONE]\n\n',
        GOOD + 'data: {"usage":{"prompt_tokens":7,"time":1e400}}\n\ndata: [DONE]\n\n',
        GOOD + 'data: {"usage":{"prompt_tokens":1' + "0" * 400 + "}}\n\ndata: [DONE]\n\n",
    ],
)
def test_what_other_servers_leave_out_or_add_does_no_harm(
    service: Service, groq: FakeGroq, conversation: str, chunks: str
) -> None:
    groq.on("question", raw(chunks))
    assert service.tokens("question", conversation) == ["Hi"]


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_cannot_stream_is_understood(
    service: Service, groq: FakeGroq, conversation: str, stream: bool, content_type: str
) -> None:
    json_type = (("content-type", content_type),)
    whole = b'{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}]}'
    groq.on("question", Script(body=whole, headers=json_type))
    groq.on("failing question", Script(body=b'{"error":{"message":"no"}}', headers=json_type))
    if stream:
        assert service.tokens("question", conversation) == ["Hi"]
        with service.stream("failing question") as (_, events):
            assert FAILED in next(events).data
    else:
        assert service.reply("question", conversation) == "Hi"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("content_type", ["", "Text/Event-Stream;charset=utf-8"])
def test_a_content_type_may_be_missing_or_written_otherwise(
    service: Service, groq: FakeGroq, conversation: str, transport: str, content_type: str
) -> None:
    if content_type and transport == "json":
        content_type = "APPLICATION/JSON ; charset=utf-8"
    groq.on("question", Script(["Hi"], headers=(("content-type", content_type),)))
    assert outcome_of(service, transport, "question", conversation) == "Hi"


@pytest.mark.parametrize("transport", ["json", "sse"])
@pytest.mark.parametrize("header", [("content-type", "text/html"), ("content-encoding", "gzip")])
def test_what_is_no_reply_by_its_headers_is_told_before_the_stream_and_not_asked_for_again(
    start_service: StartService,
    groq: FakeGroq,
    conversation: str,
    transport: str,
    header: tuple[str, str],
) -> None:
    service = start_service(GROQ_MAX_RETRIES=2)
    groq.on("question", Script(body=b"<html>a wrong address</html>", headers=(header,)))
    assert outcome_of(service, transport, "question", conversation) == (502, NONSENSE)
    assert len(groq.asked("question")) == 1


def test_a_cookie_of_groqs_is_neither_kept_nor_sent(service: Service, groq: FakeGroq) -> None:
    for cookie in ("\xff=\x01;;;=", "session=of-one-caller; Path=/"):
        groq.on("first", Script(headers=(("set-cookie", cookie),)))
        assert service.tokens("first")
        assert service.reply("second")
        assert "cookie" not in groq.requests[-1].headers


def test_a_stream_that_is_cut_behind_its_finish_is_whole(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("question", Script(["a", "b"], done=False, cut_at_end=True))
    assert service.tokens("question", conversation) == ["a", "b"]


CUT = "the language model service cut its reply short"
NONSENSE = "the language model service sent something that is not a reply"
FAILED = "the language model service failed while it was replying"
EMPTY = "the language model sent an empty reply"
USED_UP = "the model used up its 1024 tokens before it wrote any text"


@pytest.mark.parametrize(
    ("script", "text", "error"),
    [
        (Script(["a", "b"], cut_before_token=1), "a", CUT),
        (Script(["a", "b"], done=False, finish_reason=None), "ab", CUT),
        (Script(["a", "b"], error_before_token=1), "a", FAILED),
        (Script(["a"], error_before_token=1, error='event: error\ndata: {"m": 1}'), "a", FAILED),
        (Script(["a"], error_before_token=1, error="event: error\ndata: oops"), "a", FAILED),
        (Script(["a"], error_before_token=1, error='data: {"x_groq":{"error":"e"}}'), "a", FAILED),
        (Script([]), "", EMPTY),
        (Script([], reasoning=["hm"], finish_reason="length"), "", USED_UP),
        (raw(GOOD + "data: nonsense\n\n"), "Hi", NONSENSE),
        (raw("<html>sorry</html>"), "", CUT),
        (raw(""), "", CUT),
        (raw(GOOD + 'data: {"choices":[{"del'), "Hi", CUT),
        (raw("data: [1, 2]\n\n"), "", NONSENSE),
        (raw("data: " + "[" * 5000 + "\n\n"), "", NONSENSE),
        (raw("data: " + "x" * 1_100_000), "", "sent an event that is too large"),
    ],
    ids=lambda value: repr(value)[:70],
)
@pytest.mark.parametrize("transport", ["sse", "websocket"])
def test_a_broken_stream_ends_in_an_error_and_is_not_remembered(
    service: Service,
    groq: FakeGroq,
    conversation: str,
    transport: str,
    script: Script,
    text: str,
    error: str,
) -> None:
    groq.on("question", script)
    seen, message = outcome_of(service, transport, "question", conversation)
    assert seen == text
    assert error in message
    assert service.contents(conversation) == []


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(["a"], cut_before_token=0), "the language model service cannot be reached"),
        (Script(["a"], error_before_token=0), FAILED),
        (Script([]), EMPTY),
        (Script([], finish_reason="length"), USED_UP),
        (raw("nonsense"), NONSENSE),
        (raw("{}"), NONSENSE),
        (raw('{"choices":[]}'), NONSENSE),
        (raw('{"choices":[{"message":null}]}'), EMPTY),
        (raw("x" * (17 << 20)), "sent a reply that is too large"),
    ],
    ids=lambda value: repr(value)[:70],
)
def test_a_broken_json_reply_is_a_502_and_is_not_remembered(
    service: Service, groq: FakeGroq, conversation: str, script: Script, error: str
) -> None:
    groq.on("question", script)
    status, message = outcome_of(service, "json", "question", conversation)
    assert (status, error in message) == (502, True), message
    assert service.contents(conversation) == []


@pytest.mark.parametrize("transport", ["json", "sse"])
@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 498, 500, 503, 302])
def test_an_error_of_groqs_is_a_502_without_its_text(
    service: Service, groq: FakeGroq, conversation: str, transport: str, status: int
) -> None:
    groq.on("question", Script(status=status))
    what = f"answered with status {status}"
    if status in (401, 404):  # nothing for a caller to know
        what = "cannot be used at the moment"
    expected = (502, f"the language model service {what}")
    assert outcome_of(service, transport, "question", conversation) == expected
    assert service.contents(conversation) == []
    assert "org_secret" not in service.process.output


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("retry_after", ["11", "100000", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_long_retry_after_is_passed_on_at_once(
    start_service: StartService, groq: FakeGroq, stream: bool, retry_after: str
) -> None:
    service = start_service(GROQ_MAX_RETRIES=2)
    groq.on("question", Script(status=503, headers=(("retry-after", retry_after),)))
    answer = service.chat("question", stream=stream)
    passed_on = "11" if retry_after == "11" else "86400"
    assert (answer.status_code, answer.headers["retry-after"]) == (502, passed_on)
    assert len(groq.asked("question")) == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_hangs_up_or_is_not_there_is_a_502(
    start_service: StartService, groq: FakeGroq, transport: str, conversation: str
) -> None:
    groq.on("question", Script(cut_before_status=True))
    nowhere = f"http://127.0.0.1:{free_port()}/v1"
    expected = ("" if transport == "websocket" else 502, "cannot be reached")
    for settings in ({}, {"GROQ_BASE_URL": nowhere}, {"GROQ_BASE_URL": "http://groq.invalid"}):
        service = start_service(**settings)
        first, message = outcome_of(service, transport, "question", conversation)
        assert (first, expected[1] in message) == (expected[0], True)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "silence",
    [
        Script(hold_before_status=True),
        Script(hold_before_token=0),
        Script(["a", "b"], hold_before_token=1),
        Script(comments=0.05),
    ],
    ids=["before its status", "before a token", "between tokens", "but for comments"],
)
def test_a_silent_groq_is_given_up(
    start_service: StartService,
    groq: FakeGroq,
    transport: str,
    silence: Script,
    conversation: str,
) -> None:
    service = start_service(GROQ_TIMEOUT=0.4, GROQ_FIRST_EVENT_TIMEOUT=0.4)
    groq.on("question", silence)
    first, message = outcome_of(service, transport, "question", conversation)
    assert message == "the language model service did not answer in time"
    assert first in (504, "", "a")
    assert groq.wait_for_request("question").is_closed_soon()
    assert service.contents(conversation) == []


def test_a_server_that_does_not_take_the_connection_is_a_504(start_service: StartService) -> None:
    import socket

    with socket.socket() as full:  # a queue of one, taken: the next connection gets no answer
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        service = start_service(
            GROQ_BASE_URL=f"http://127.0.0.1:{port}", GROQ_CONNECT_TIMEOUT=0.2, GROQ_TIMEOUT=30
        )
        answer = service.chat("question", stream=False)
        for each in waiting:
            each.close()
    assert answer.status_code == 504


def test_a_reply_that_goes_on_outlives_the_limit_between_two_tokens(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(GROQ_TIMEOUT=0.4, GROQ_FIRST_EVENT_TIMEOUT=0.4)
    groq.on("question", Script(["t"] * 12, interval=0.1))
    assert service.tokens("question") == ["t"] * 12


def test_groq_is_asked_as_its_protocol_says(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    service.reply("json please", conversation)
    service.tokens("stream please", conversation)
    whole, streamed = groq.requests
    assert whole.path == "/openai/v1/chat/completions"
    assert whole.headers["authorization"] == "Bearer gsk_secret_of_the_operator"
    assert whole.headers["content-type"] == "application/json"
    options = {
        "model": "openai/gpt-oss-20b",
        "max_completion_tokens": 1024,
        "include_reasoning": False,
        "reasoning_effort": "low",
    }
    assert whole.body == {**options, "messages": [{"role": "user", "content": "json please"}]}
    messages = streamed.body.pop("messages")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert streamed.body == {
        **options,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_other_models_are_not_asked_about_reasoning(
    start_service: StartService, groq: FakeGroq
) -> None:
    for model in ("llama3.2:1b", "gpt-oss:20b", "openai/gpt-oss-safeguard-20b"):
        start_service(MODEL=model, MAX_TOKENS=7).reply("question")
        options = {"model": model, "max_completion_tokens": 7}
        assert groq.requests[-1].body.items() >= options.items()
        assert set(groq.requests[-1].body) == {*options, "messages"}


def test_the_system_prompt_goes_first_and_is_never_stored(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(SYSTEM_PROMPT="Be kind.")
    service.reply("one", conversation)
    service.reply("two", conversation)
    assert groq.requests[-1].body["messages"][0] == {"role": "system", "content": "Be kind."}
    assert groq.requests[-1].contents[1:] == ["one", "You said: one", "two"]
    assert "Be kind." not in service.contents(conversation)


def test_connections_to_groq_are_used_again(service: Service, groq: FakeGroq) -> None:
    groq.default = replace(groq.default)
    for number in range(6):
        service.chat(f"n{number}", stream=bool(number % 2)).read()
    assert len({request.connection for request in groq.requests}) == 1
