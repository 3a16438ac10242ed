"""POST /chat as JSON and as Server-Sent Events, and the paths beside it, over real sockets."""

import json
import socket

import httpx
import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body


def test_a_json_reply_is_one_object(service: Service, conversation: str) -> None:
    answer = service.chat("hello", conversation)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"response": "You said: hello"}


def test_an_event_stream_has_its_headers_and_one_event_a_token(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    with service.stream("hello", conversation) as (answer, stream):
        received = [(event.name, event.data) for event in stream]
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    tokens = ["You", " said", ":", " hello", "[DONE]"]
    assert received == [("message", token) for token in tokens]


@pytest.mark.parametrize(
    "tokens",
    [
        ["a\nb"],
        ["\n", "\n\n", "x\n"],
        [" two", "  spaces"],
        ["[DONE]", "after"],
        ["data: x", ": no comment", "event: error"],
        ["snow\u2028man\u0085 ☃", "\x00", "\U0001f600"],
    ],
)
def test_an_event_stream_loses_nothing_of_a_token(
    service: Service, groq: FakeGroq, conversation: str, tokens: list[str]
) -> None:
    groq.on("odd", Script(tokens))
    received = service.tokens("odd", conversation)
    assert "".join(received) == "".join(tokens)
    assert service.contents(conversation)[-1] == "".join(tokens)


def test_a_carriage_return_reaches_an_event_stream_as_a_newline(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("returns", Script(["a\r\nb", "c\rd"]))
    assert service.tokens("returns", conversation) == ["a\nb", "c\nd"]


def test_the_first_token_comes_while_groq_is_silent_before_the_second(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("hold", Script(["first", "second"], hold_before_token=1))
    with service.stream("hold", conversation) as (_, stream):
        assert next(stream).data == "first"
        groq.release()
        assert [event.data for event in stream] == ["second", "[DONE]"]


@pytest.mark.parametrize(
    ("stream", "query", "accept", "is_stream"),
    [
        (None, "", "*/*", False),
        (None, "", "text/event-stream", True),
        (None, "", "text/html, Text/Event-Stream;q=0.9", True),
        (None, "", "text/event-streams", False),
        (None, "?stream=true", "*/*", True),
        (None, "?stream=false", "*/*", False),
        (True, "", "application/json", True),
        (False, "?stream=true", "text/event-stream", False),
        (False, "", "text/event-stream", False),
    ],
)
def test_the_body_then_the_query_then_accept_decide_on_streaming(
    service: Service, stream: bool | None, query: str, accept: str, is_stream: bool
) -> None:
    asked = body("hello", stream=stream) if stream is not None else body("hello")
    answer = service.http.post(f"/chat{query}", json=asked, headers={"accept": accept})
    expected = "text/event-stream" if is_stream else "application/json"
    assert answer.headers["content-type"] == expected


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ("", "the body must be valid JSON in UTF-8: Input data was truncated"),
        ("{", "the body must be valid JSON in UTF-8: Input data was truncated"),
        ("hello", "the body must be valid JSON"),
        ('{"a":' * 20_000, "nested too deeply"),
        (b'{"messages":[{"role":"user","content":"\xff"}]}', "in UTF-8: a string is not UTF-8"),
        ([], "Expected `object`, got `array`"),
        ({}, "messages must not be empty"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": [USER] * 1001}, "messages must be at most 1000, not 1001"),
        ({"messages": "x"}, "messages: Expected `array`, got `str`"),
        ({"messages": None}, "messages: Expected `array`, got `null`"),
        ({"messages": [{"role": "user"}]}, "messages[0]: Object missing required field `content`"),
        ({"messages": [{"content": "x"}]}, "messages[0]: Object missing required field `role`"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: Expected `str`"),
        ({"messages": [{**USER, "role": "User"}]}, "messages[0].role must be exactly 'user' or"),
        ({"messages": [{**USER, "role": "system"}]}, "messages[0].role must be exactly 'user' or"),
        ({"messages": [{**USER, "content": ""}]}, "messages[0].content must not be empty"),
        ({"messages": [USER, {**USER, "content": " \n\t"}]}, "messages[1].content must not be"),
        ({"messages": [{**USER, "role": "assistant"}]}, "the last of the messages must be from"),
        ({"messages": [USER], "stream": "yes"}, "stream: Expected `bool | null`, got `str`"),
        ({"messages": [USER], "conversation": "short"}, "conversation must be 16 to 64"),
        ({"messages": [USER], "conversation": "x" * 65}, "conversation must be 16 to 64"),
        ({"messages": [USER], "conversation": "ä" * 16}, "conversation must be 16 to 64"),
        ({"messages": [USER], "conversation": "x" * 16 + "\n"}, "conversation must be 16 to 64"),
    ],
)
def test_a_bad_body_gets_a_400_that_says_which_rule_it_breaks(
    service: Service, groq: FakeGroq, sent: object, error: str
) -> None:
    content = sent if isinstance(sent, str | bytes) else json.dumps(sent)
    answer = service.http.post("/chat", content=content)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert error in answer.json()["error"]
    assert groq.requests == []


def test_the_accept_header_may_come_in_several_lines(service: Service) -> None:
    headers = [("accept", "application/json"), ("accept", "text/event-stream")]
    answer = service.http.post("/chat", json=body("hello"), headers=headers)
    assert answer.headers["content-type"] == "text/event-stream"


def test_unknown_fields_are_ignored(service: Service) -> None:
    message = {"role": "user", "content": "hello", "name": "me"}
    answer = service.http.post("/chat", json={"messages": [message], "temperature": 2})
    assert answer.json() == {"response": "You said: hello"}


def test_unknown_paths_and_wrong_methods_get_errors_of_the_same_form(service: Service) -> None:
    for path in ("/nope", "/chat/", "/conversations/"):
        answer = service.http.post(path)
        assert (answer.status_code, answer.json()) == (404, {"error": "there is no such path"})
    answer = service.http.get("/chat")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json() == {"error": "the method must be one of POST"}


def test_a_body_beyond_the_limit_gets_a_413(start_service: StartService) -> None:
    service = start_service(MAX_BODY_BYTES=1000)
    assert service.chat("x" * 900).status_code == 200
    announced = service.chat("x" * 1000)
    chunked = service.http.post("/chat", content=(b"x" * 100 for _ in range(20)))
    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert answer.json() == {"error": "the request must be at most 1000 bytes"}
        assert answer.headers["connection"] == "close"


def test_a_body_is_read_no_further_than_the_limit(start_service: StartService) -> None:
    service = start_service(MAX_BODY_BYTES=1000)
    with socket.create_connection(("127.0.0.1", service.port), 5) as connection:
        head = "POST /chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"7d0\r\n" + b"x" * 2000 + b"\r\n")
        received = b""
        while data := connection.recv(65536):  # the end of the stream, without the body's end
            received += data
    assert received.startswith(b"HTTP/1.1 413 ")


def test_every_answer_bears_a_request_id(service: Service) -> None:
    for method, path in (("GET", "/health"), ("GET", "/nope"), ("PUT", "/chat"), ("POST", "/chat")):
        assert len(service.http.request(method, path).headers["x-request-id"]) == 32


def test_a_sane_request_id_of_the_callers_is_kept_and_another_is_not(service: Service) -> None:
    def id_for(sent: bytes) -> str:
        answer = service.http.get("/health", headers={b"x-request-id": sent})
        (request_id,) = answer.headers.get_list("x-request-id")
        return request_id

    assert id_for(b"trace-1_2.3") == "trace-1_2.3"
    for mad in (b"x" * 129, b'a"b', b"a b", b"", b"\xe9"):
        assert len(id_for(mad)) == 32


READY = {"status": "ready", "redis": "off", "models": {"openai/gpt-oss-20b": "unknown"}}


def test_health_and_ready_answer(service: Service) -> None:
    health = service.http.get("/health")
    assert (health.status_code, health.text) == (200, "OK")
    assert health.headers["content-type"].startswith("text/plain")
    ready = service.http.get("/ready")
    assert (ready.status_code, ready.json()) == (200, READY)


def test_a_conversation_can_be_read_and_forgotten(service: Service, conversation: str) -> None:
    assert service.http.get(f"/conversations/{conversation}").status_code == 404
    service.reply("hello", conversation)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "You said: hello"},
    ]
    assert service.http.get(f"/conversations/{conversation}").json() == {"messages": messages}
    for _ in range(2):
        answer = service.http.delete(f"/conversations/{conversation}")
        assert (answer.status_code, answer.content) == (204, b"")
    missing = service.http.get(f"/conversations/{conversation}")
    assert missing.status_code == 404
    assert missing.json() == {"error": "there is no such conversation"}


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_conversation_needs_an_id_that_is_hard_to_guess(service: Service, method: str) -> None:
    for weak in ("shared", "x" * 65, "%0Aaaaaaaaaaaaaaaaaaa"):
        answer = service.http.request(method, f"/conversations/{weak}")
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("conversation must be 16 to 64 characters")


def test_a_silent_groq_makes_the_stream_begin_with_keep_alives(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(KEEP_ALIVE_INTERVAL=0.1)
    groq.on("silence", Script(["late"], hold_before_status=True))
    with service.http.stream("POST", "/chat", json=body("silence", stream=True)) as answer:
        received = answer.iter_bytes()
        assert next(received) == b": keep-alive\n\n"
        assert next(received) == b": keep-alive\n\n"
        groq.release()
        assert b"".join(received).endswith(b"data: late\n\ndata: [DONE]\n\n")


def test_a_stream_that_pauses_is_kept_alive_and_goes_on(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(KEEP_ALIVE_INTERVAL=0.1)
    groq.on("pause", Script(["a", "b"], hold_before_token=1))
    with service.http.stream("POST", "/chat", json=body("pause", stream=True)) as answer:
        received = answer.iter_bytes()
        assert next(received) == b"data: a\n\n"
        assert next(received) == b": keep-alive\n\n"
        groq.release()
        rest = b"".join(received)
    assert rest.replace(b": keep-alive\n\n", b"") == b"data: b\n\ndata: [DONE]\n\n"


def test_an_error_after_a_silent_beginning_is_an_event(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(KEEP_ALIVE_INTERVAL=0.1)
    groq.on("silence", Script(status=500, hold_before_status=True))
    with service.stream("silence") as (answer, stream):
        assert answer.status_code == 200
        groq.release()
        event = next(stream)
        assert event.name == "error"
        assert "status 500" in json.loads(event.data)["error"]
        assert list(stream) == []


def test_a_request_that_ends_before_its_body_is_no_fault_of_ours(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), 5) as connection:
        head = (
            b"POST /chat HTTP/1.1\r\nHost: x\r\nX-Request-ID: left\r\nContent-Length: 99\r\n\r\n{"
        )
        connection.sendall(head)
    line = service.log_line(request_id="left")
    assert (line["level"], line["status"]) == ("INFO", 499)


def test_curls_content_type_is_no_hindrance(service: Service) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = service.http.post("/chat", content=json.dumps(body("hi")), headers=form)
    assert answer.json() == {"response": "You said: hi"}


def test_requests_on_one_connection_follow_each_other(service: Service) -> None:
    with httpx.Client(base_url=service.url) as client:
        for number in range(5):
            asked = body(f"n{number}", stream=bool(number % 2))
            assert client.post("/chat", json=asked).status_code == 200
