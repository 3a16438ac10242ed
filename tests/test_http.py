"""`POST /chat` as JSON, and the paths beside it, over real sockets."""

import gzip
import json
from collections.abc import Iterator

import pytest

from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body, connected, everything_from, raw_chat

USER = {"role": "user", "content": "x"}
STREAM_OR_NOT = [
    (None, "", "*/*", False),
    (None, "", "text/event-stream", True),
    (None, "", "text/html, Text/Event-Stream;q=0.9", True),
    (None, "", "text/event-streams", False),
    (None, "?stream=true", "*/*", True),
    (None, "?stream=false", "*/*", False),
    (True, "", "application/json", True),
    (False, "?stream=true", "text/event-stream", False),
    (False, "", "text/event-stream", False),
]
BAD_BODIES: list[tuple[object, str]] = [
    ("", "the body is empty; send {"),
    ("hello", "the body must be valid JSON"),
    (b'{"messages":[{"role":"user","content":"\xff"}]}', "valid JSON in UTF-8"),
    ({"prompt": "hello"}, "messages is missing; send {"),
    ({"messages": [USER], "stream": "true"}, "stream must be true or false, not a string"),
    ({"messages": [USER, {**USER, "content": " \n\t"}]}, "messages[1].content must not be empty"),
    ({"messages": [{**USER, "role": "system"}]}, "messages[0].role must be exactly 'user' or"),
    ({"messages": [{**USER, "role": "assistant"}]}, "the last message must be from 'user'"),
    ({"messages": [USER], "conversation": "short"}, "conversation must be 16 to 64 characters"),
]


@pytest.fixture(scope="module")
def strict(module_groq: FakeGroq) -> Iterator[Service]:
    """A service with tight limits for bodies."""
    with Service(GROQ_BASE_URL=module_groq.url, MAX_BODY_BYTES=1000, BODY_TIMEOUT=0.3) as running:
        yield running


def test_a_json_reply_is_one_object(service: Service, groq: FakeGroq) -> None:
    answer = service.chat("hello")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {"response": "You said: hello"}
    groq.on("long", Script(["only", " this"], finish_reason="length"))
    assert service.chat("long").json() == {"response": "only this", "truncated": "length"}


def test_the_body_then_the_query_then_accept_decide_on_streaming(service: Service) -> None:
    for stream, query, accept, is_stream in STREAM_OR_NOT:
        asked = body("hello") if stream is None else body("hello", stream=stream)
        answer = service.http.post(f"/chat{query}", json=asked, headers={"accept": accept})
        expected = "text/event-stream; charset=utf-8" if is_stream else "application/json"
        assert answer.headers["content-type"] == expected, (stream, query, accept)
    headers = [("accept", "application/json"), ("accept", "text/event-stream")]
    answer = service.http.post("/chat", json=body("hello"), headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_a_bad_body_gets_a_400_that_says_which_rule_it_breaks(
    service: Service, groq: FakeGroq
) -> None:
    for sent, error in BAD_BODIES:
        content = sent if isinstance(sent, str | bytes) else json.dumps(sent)
        answer = service.http.post("/chat", content=content)
        assert (answer.status_code, list(answer.json())) == (400, ["error"])
        assert error in answer.json()["error"]
    assert groq.requests == []


def test_unknown_fields_and_curls_content_type_are_accepted(service: Service) -> None:
    message = {"role": "user", "content": "hello", "name": "me"}
    sent = json.dumps({"messages": [message], "temperature": 2})
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = service.http.post("/chat", content=sent, headers=form)
    assert answer.json() == {"response": "You said: hello"}


def test_unknown_paths_and_wrong_methods_get_errors_of_the_same_form(service: Service) -> None:
    for path in ("/nope", "/chat/", "/conversations/", "/v1/chat/completions"):
        answer = service.http.post(path)
        assert answer.status_code == 404
        assert answer.json()["error"].startswith("no such path; POST /chat takes chats (no slash")
    answer = service.http.get("/chat")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json() == {"error": "method not allowed; use POST"}


def test_a_body_over_the_limit_gets_a_413_and_is_read_no_further(strict: Service) -> None:
    assert strict.chat("x" * 900).status_code == 200
    answer = strict.chat("x" * 1000)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert answer.json() == {"error": "the request must be at most 1000 bytes"}
    with connected(strict) as connection:
        head = b"POST /chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"7d0\r\n" + b"x" * 2000 + b"\r\n")  # and no end
        assert everything_from(connection).startswith(b"HTTP/1.1 413 ")


def test_a_compressed_body_gets_a_415_that_says_so(service: Service) -> None:
    content = gzip.compress(json.dumps(body("hello")).encode())
    answer = service.http.post("/chat", content=content, headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.headers["connection"]) == (415, "close")
    error = "the body is compressed (gzip); send it without Content-Encoding"
    assert answer.json() == {"error": error}


def test_a_body_that_takes_too_long_gets_a_408(strict: Service) -> None:
    with connected(strict) as connection:
        connection.sendall(raw_chat("hello")[:-1])
        answer = everything_from(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert answer.endswith(b'{"error":"the body must arrive within 0.3 s"}')
    assert strict.log_line(status=408)["error"] == "too_slow"


def test_a_client_that_leaves_during_its_body_is_one_quiet_line(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(raw_chat("hello", "X-Request-ID: left")[:-1])
    line = service.log_line(request_id="left")
    assert (line["level"], line["status"]) == ("INFO", 499)


def test_every_response_has_a_request_id_a_sane_one_of_the_clients(service: Service) -> None:
    def id_for(sent: bytes, method: str = "GET", path: str = "/health") -> str:
        answer = service.http.request(method, path, headers={b"x-request-id": sent})
        (request_id,) = answer.headers.get_list("x-request-id")
        return request_id

    for method, path in (("GET", "/nope"), ("PUT", "/chat"), ("POST", "/chat")):
        assert id_for(b"trace-1_2.3", method, path) == "trace-1_2.3"
    for insane in (b"x" * 129, b'a"b', b"a b", b"", b"\xe9"):
        assert len(id_for(insane)) == 32


def test_health_and_ready_answer(service: Service) -> None:
    health = service.http.get("/health")
    assert (health.status_code, health.text) == (200, "OK")
    assert health.headers["content-type"].startswith("text/plain")
    service.reply("hello")
    ready = service.http.get("/ready")
    models = {"openai/gpt-oss-20b": "available"}
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "redis": "off", "models": models}


def test_a_conversation_can_be_read_and_forgotten(service: Service, conversation: str) -> None:
    path = f"/conversations/{conversation}"
    service.reply("hello", conversation)
    answer = service.http.get(path)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "You said: hello"},
    ]
    for _ in range(2):
        answer = service.http.delete(path)
        assert (answer.status_code, answer.content) == (204, b"")
    answer = service.http.get(path)
    assert (answer.status_code, answer.json()) == (404, {"error": "no such conversation"})


def test_a_conversation_needs_an_id_that_is_hard_to_guess(service: Service) -> None:
    for weak in ("shared", "x" * 65, "%0Aaaaaaaaaaaaaaaaaaa"):
        for method in ("GET", "DELETE"):
            answer = service.http.request(method, f"/conversations/{weak}")
            assert answer.status_code == 400
            assert answer.json()["error"].startswith("conversation must be 16 to 64 characters")
