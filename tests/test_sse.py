"""Replies as Server-Sent Events: the format, as pure functions, and the stream, over sockets."""

import json
import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.api.sse import Framer, sse_named
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body, connected, events, raw_chat, wait_until

INTERVAL = 0.5
KEEP_ALIVE = b": keep-alive\n\n"
TOKENS = st.lists(
    st.text(min_size=1) | st.sampled_from(["\n", "[DONE]", " ", ": x", "\r"]), min_size=1
)


@given(TOKENS)
def test_an_event_stream_carries_every_token(tokens: list[str]) -> None:
    received = [event.data for event in events(iter([Framer().events(tokens)]))]
    assert "".join(received) == re.sub("\r\n?", "\n", "".join(tokens))
    assert "[DONE]" not in received


@given(st.lists(st.text("\r\nab", min_size=1), min_size=1), st.integers(0, 20))
def test_line_ends_are_the_same_wherever_tokens_and_reads_are_cut(
    tokens: list[str], place: int
) -> None:
    reads = [read for read in (tokens[:place], tokens[place:]) if read]
    framer = Framer()
    sent = b"".join(map(framer.events, reads))
    whole = "".join(tokens).replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(event.data for event in events(iter([sent]))) == whole


def test_line_ends_errors_and_ends_keep_to_the_format() -> None:
    received = events(
        iter([Framer().events(["a\r\nb", "c\rd"]), sse_named("error", error='a "quoted"\nline')])
    )
    first, second, error = received
    assert (first.data, second.data) == ("a\nb", "c\nd")
    assert (error.name, json.loads(error.data)) == ("error", {"error": 'a "quoted"\nline'})


@pytest.fixture(scope="module")
def lively(module_groq: FakeGroq) -> Iterator[Service]:
    """A service whose streams are kept alive, and whose silences end, after a short time."""
    url = module_groq.url
    with Service(GROQ_BASE_URL=url, KEEP_ALIVE_INTERVAL=INTERVAL, GROQ_TIMEOUT=3) as running:
        yield running


def test_an_event_stream_has_its_headers_and_one_event_a_token(
    service: Service, groq: FakeGroq
) -> None:
    with service.stream("hello") as (answer, stream):
        received = list(stream)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert len(answer.headers["x-request-id"]) == 32
    tokens = ["You", " said", ":", " hello", "[DONE]"]
    assert received == [("message", token) for token in tokens]


def test_an_event_stream_loses_nothing_of_odd_tokens(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    tokens = ["a\nb", "\n", "\n\n", " two", "[DONE]", "data: x", ": no", "\u2028\x85", "\x00", "😀"]
    groq.on("odd", Script(tokens))
    assert "".join(service.tokens("odd", conversation)) == "".join(tokens)
    assert service.contents(conversation)[-1] == "".join(tokens)


def test_the_200_comes_with_the_first_token_and_each_token_at_once(
    service: Service, groq: FakeGroq
) -> None:
    cut = Script(["first", "second"], hold_before_token=1, finish_reason="content_filter")
    groq.on("hold", cut)
    with service.stream("hold") as (answer, stream):
        assert answer.status_code == 200
        assert next(stream).data == "first"
        groq.release()
        assert list(stream) == [
            ("message", "second"),
            ("truncated", '{"reason":"content_filter"}'),
            ("message", "[DONE]"),
        ]


def test_an_error_before_the_first_token_keeps_its_status(service: Service, groq: FakeGroq) -> None:
    failures = (Script(status=500), Script(error_before_token=0), Script(cut_before_token=0))
    for number, script in enumerate(failures):
        groq.on(f"fail {number}", script)
        answer = service.chat(f"fail {number}", stream=True)
        assert (answer.status_code, list(answer.json())) == (502, ["error"])
        assert answer.headers["content-type"] == "application/json"


def test_an_error_after_the_first_token_is_an_event_and_the_last(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("fail", Script(["a", "b"], error_before_token=1))
    with service.stream("fail", conversation) as (answer, stream):
        first, last = stream
    assert (answer.status_code, first.data) == (200, "a")
    assert (last.name, list(json.loads(last.data))) == ("error", ["error"])
    assert service.contents(conversation) == []


@pytest.mark.parametrize(
    ("script", "end"),
    [
        (Script(["late"], hold_before_status=True), b"data: late\n\ndata: [DONE]\n\n"),
        (Script(status=500, hold_before_status=True), b'answered with status 500"}\n\n'),
    ],
    ids=["reply", "error"],
)
def test_a_silent_groq_makes_the_stream_begin_with_keep_alives(
    lively: Service, groq: FakeGroq, script: Script, end: bytes
) -> None:
    groq.on("silence", script)
    with lively.http.stream("POST", "/chat", json=body("silence", stream=True)) as answer:
        received = answer.iter_bytes()
        assert [next(received), next(received)] == [KEEP_ALIVE, KEEP_ALIVE]
        groq.release()
        assert b"".join(received).endswith(end)


def test_a_stream_is_kept_alive_only_after_silence(lively: Service, groq: FakeGroq) -> None:
    groq.on("steady", Script(["t"] * 20, interval=INTERVAL / 5))
    groq.on("pause", Script(["a", "b"], hold_before_token=1))
    answer = lively.chat("steady", stream=True)
    assert answer.elapsed.total_seconds() > 3 * INTERVAL
    assert answer.content == b"data: t\n\n" * 20 + b"data: [DONE]\n\n"
    with lively.http.stream("POST", "/chat", json=body("pause", stream=True)) as paused:
        received = paused.iter_bytes()
        assert next(received) == b"data: a\n\n"
        begun = time.monotonic()
        assert next(received) == KEEP_ALIVE
        assert time.monotonic() - begun > 0.9 * INTERVAL
        groq.release()
        rest = b"".join(received).replace(KEEP_ALIVE, b"")
    assert rest == b"data: b\n\ndata: [DONE]\n\n"


def test_a_silence_that_lasts_too_long_ends_a_stream_that_was_kept_alive(
    lively: Service, groq: FakeGroq
) -> None:
    groq.on("stuck", Script(["a", "b"], hold_before_token=1))
    with lively.stream("stuck") as (_, stream):
        first, last = stream
    assert (first.data, last.name) == ("a", "error")
    assert "did not respond in time" in last.data
    assert groq.wait_for_request("stuck").is_closed_soon()


def test_a_deadline_that_passes_while_nobody_reads_ends_the_reply_and_the_connection(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(REPLY_TIMEOUT=1)
    groq.on("large", Script(["x" * 1000] * 12_000))
    with connected(service) as connection:
        connection.sendall(raw_chat("large", conversation=conversation, stream=True))
        request = groq.wait_for_request("large")
        assert request.closed.wait(5), "soon after the deadline"
        line = service.log_line(endpoint="/chat", outcome="failed")
    assert (line["status"], line["error"]) == (200, "timeout")
    assert service.contents(conversation) == []


def test_a_client_that_leaves_a_kept_alive_stream_stops_groq(
    lively: Service, groq: FakeGroq
) -> None:
    groq.on("silence", Script(hold_before_status=True))
    with lively.http.stream("POST", "/chat", json=body("silence", stream=True)) as answer:
        assert next(answer.iter_bytes()) == KEEP_ALIVE
    assert groq.wait_for_request("silence").is_closed_soon()
    wait_until(lambda: lively.metric("chat_replies_active") == 0)
