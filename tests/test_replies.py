"""Replies that outlive their connection, in one process: each transport, cuts at each place."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Caller, Event, Service, body, events, part_of, read_whole, wait_until

AWKWARD = ["\n", " a", "\r", "\n\r", "[DONE]", "data: x", "😀é", "\u2028", "\n\n", " \x00", "z\r"]
TEXT = "".join(AWKWARD)
EVENT = len("data: a\nid: 1\n\n")
HELD = Script(["a", "b", "c"], hold_before_token=2)


def with_lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def new(content: str, conversation: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a request for a reply that is kept."""
    return body(content, conversation, reply=uuid4().hex, **fields)


def until_held(service: Caller, asked: dict[str, Any]) -> int:
    """Read the two tokens of `HELD`, break the connection; return the position."""
    part = part_of(service, asked, cut=2 * EVENT)
    assert (part.status, part.text, part.position) == (200, "ab", 2)
    wait_until(lambda: service.metric("chat_replies_unattended") == 1)
    return part.position


@contextmanager
def reading(service: Caller, asked: dict[str, Any]) -> Iterator[Iterator[Event]]:
    """Read a reply over a connection that stays."""
    with service.http.stream("POST", "/chat", json={**asked, "stream": True}) as answer:
        yield events(answer.iter_bytes())


def received(service: Caller, *sent: object) -> list[dict[str, Any]]:
    """Send messages on a WebSocket; return what comes up to the end of a reply."""
    with service.socket() as websocket:
        for message in sent:
            websocket.send(json.dumps(message))
        messages = [json.loads(websocket.recv(20))]
        while "token" in messages[-1]:
            messages.append(json.loads(websocket.recv(20)))
    return messages


def test_without_a_reply_id_all_is_as_it_was(service: Service, start_service: StartService) -> None:
    turned_off = start_service(RESUME_TIMEOUT=0, RATE_LIMIT="3/minute", CHAT_PAGE="no")
    for each, asked in ((service, body("hi")), (turned_off, new("hi"))):
        sse = each.http.post("/chat", json={**asked, "stream": True}).content
        assert sse == b"data: You\n\ndata:  said\n\ndata: :\n\ndata:  hi\n\ndata: [DONE]\n\n"
        assert each.http.post("/chat", json=asked).content == b'{"response":"You said: hi"}'
        tokens = [{"token": token} for token in ("You", " said", ":", " hi")]
        assert received(each, asked) == [*tokens, {"done": "true"}]
    (refused,) = received(turned_off, asked)
    assert "the rate limit is" in refused["error"]
    assert turned_off.http.get(f"/replies/{asked['reply']}").status_code in (404, 429)
    assert "chat_replies_unattended 0.0" in turned_off.http.get("/metrics").text


def test_a_stream_may_be_cut_after_each_byte(service: Service, groq: FakeGroq) -> None:
    groq.on("awkward", Script(AWKWARD, interval=0.001))
    length = len(service.http.post("/chat", json=new("awkward", stream=True)).content)

    def cut(place: int) -> None:
        asked = new(f"awkward {place}.", f"conversation-{uuid4().hex}")
        whole = read_whole(asked, iter([(service, place), (service, place), (service, 1 << 20)]))
        assert (whole.text, whole.end) == (with_lf(TEXT), "[DONE]"), place
        assert len(groq.asked(f"awkward {place}.")) == 1
        assert service.contents(asked["conversation"]) == [f"awkward {place}.", TEXT]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cut, range(length + 1)))


def test_a_websocket_may_be_cut_after_each_message(service: Service, groq: FakeGroq) -> None:
    groq.on("awkward", Script(AWKWARD, interval=0.002))
    for place in range(len(AWKWARD)):
        asked, text, after = new(f"awkward {place}."), "", 0
        with service.socket() as websocket:
            websocket.send(json.dumps(asked))
            for _ in range(place):
                message = json.loads(websocket.recv(5))
                text, after = text + message["token"], message["after"]
            websocket.socket.shutdown(socket.SHUT_RDWR)
        fields = asked if place % 2 else {"reply": asked["reply"]}
        *tokens, last = received(service, {**fields, "after": after} if place else asked)
        assert text + "".join(each["token"] for each in tokens) == TEXT
        assert (last, [each["after"] for each in tokens][-1:]) == ({"done": "true"}, [len(TEXT)])
        assert received(service, {**fields, "after": len(TEXT) + 1}) == [{"done": "true"}]
        assert service.http.post("/chat", json=asked).json() == {"response": TEXT}
        assert len(groq.asked(f"awkward {place}.")) == 1


def test_a_reply_that_ends_in_the_break_is_read_to_its_end_and_stored(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("held", HELD)
    asked = new("held", conversation)
    path, after = f"/replies/{asked['reply']}", until_held(service, asked)
    assert service.contents(conversation) == []
    groq.release()
    wait_until(lambda: service.contents(conversation) == ["held", "abc"])
    assert service.metric("chat_unattended_tokens_total") >= 1
    for how in ("", path):
        assert part_of(service, asked, after, path=how) == (200, "c", 4, "[DONE]")
        assert part_of(service, asked, 4, path=how).status == 204
    rest = service.http.get(f"{path}?after=1").content
    assert rest == b"data: bc\nid: 3\n\ndata: [DONE]\nid: 4\n\n"
    service.reply("next", conversation)
    assert groq.requests[-1].contents == ["held", "abc", "next"]
    assert len(groq.asked("held")) == 1


def test_one_that_fails_says_so_or_begins_anew(service: Service, groq: FakeGroq) -> None:
    asked, early = new("fails"), new("early")
    groq.on("fails", Script(["a", "b"], error_before_token=2, interval=0.02))
    groq.on("early", Script(status=500), Script(status=500), Script(["ok"]))
    assert part_of(service, asked, cut=15).text == "a"
    wait_until(lambda: service.log_line(message="reply failed")["error"] == "failed")
    for _ in range(2):
        part = part_of(service, asked, 1)
        assert (part.text, part.position) == ("b", 3)
        assert "failed during the reply" in part.end
    assert part_of(service, asked, 2).status == 200
    assert part_of(service, asked, 3).status == 204
    assert part_of(service, early).status == 502
    assert "answered with status 500" in received(service, early)[0]["error"]
    assert part_of(service, early) == (200, "ok", 3, "[DONE]")
    assert (len(groq.asked("fails")), len(groq.asked("early"))) == (1, 3)


def test_nobody_comes_back_and_nothing_is_left(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service(RESUME_TIMEOUT=0.5, MAX_CONCURRENT=10_000)
    groq.on("held", HELD)
    asked = [new(f"held {number}", f"conversation-{uuid4().hex}") for number in range(1000)]
    service.reply("first")
    tasks = service.metric("event_loop_tasks")
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda each: part_of(service, each, cut=30), asked))
    wait_until(lambda: service.metric("chat_replies_active") == 0)
    assert all(request.is_closed_soon() for request in groq.asked("held"))
    assert service.metric("chat_replies_unattended") == 0
    wait_until(lambda: service.metric("event_loop_tasks") <= tasks)
    assert service.metric("history_conversations") == 1, "that of the first chat"
    assert service.metric("chat_replies_total", outcome="cancelled") == 1000
    assert {part_of(service, each, 2).status for each in asked[:20]} == {404}
    assert len(groq.asked("held")) == 1000


def test_a_full_process_makes_room(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service(MAX_CONCURRENT=2)
    groq.on("held", HELD)
    asked = [new(f"held {number}") for number in range(2)]
    with reading(service, asked[1]) as events_of_it:
        next(events_of_it)
        until_held(service, asked[0])
        assert service.reply("hello") == "You said: hello"
        assert groq.asked("held 0")[0].is_closed_soon()
        assert part_of(service, asked[0], 2).status == 404
        with reading(service, new("held 2")) as also:
            next(also)
            assert service.chat("hello").status_code == 503
        groq.release()
        assert [event.data for event in events_of_it] == ["b", "c", "[DONE]"]


def test_a_client_over_its_own_limit_ends_nothing(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(MAX_CONCURRENT=1, MAX_CONCURRENT_PER_CLIENT=1)
    groq.on("held", HELD)
    asked = new("held")
    after = until_held(service, asked)
    assert service.chat("hello").status_code == 429
    groq.release()
    assert part_of(service, asked, after) == (200, "c", 4, "[DONE]")


def test_the_rate_limit_is_for_what_may_begin_a_reply(start_service: StartService) -> None:
    service = start_service(RATE_LIMIT="4/hour")
    asked = new("hello")
    for after in (*[0] * 5, 4, 15, 16, 17, "x"):
        assert part_of(service, asked, after).status != 429
    assert received(service, {"reply": asked["reply"]})[-1] == {"done": "true"}
    statuses = [part_of(service, new("x"), after).status for after in (3, 0)]
    statuses.append(part_of(service, {}, path=f"/replies/{uuid4().hex}").status)
    assert statuses == [404, 200, 404]
    assert {part_of(service, new("x"), after).status for after in (0, 3)} == {429}
    assert "the rate limit" in received(service, {"reply": uuid4().hex})[0]["error"]
    assert part_of(service, asked, 4).status == 200


def test_each_reply_is_counted_once(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service()
    groq.on("held", HELD)
    asked = new("held")
    after = until_held(service, asked)
    groq.release()
    assert part_of(service, asked, after).text == "c"
    assert service.log_line(endpoint="/chat", outcome="detached")["status"] == 200
    line = service.log_line(message="reply completed")
    assert (line["completion_tokens"], line["level"]) == (3, "INFO")
    assert line["resumed"] in (0, 1)  # it may have ended before
    assert received(service, {"reply": uuid4().hex})[0]["error"]
    assert service.log_line(endpoint="/chat", status=404)["error"] == "reply_gone"
    shown = [service.metric(f"chat_{name}_total") for name in ("requests", "replies", "resumes")]
    assert shown == [1, 1, 2]
