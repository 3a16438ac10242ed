"""The chat page while the service stops, hangs, fails or is cut off, in a real browser."""

import signal
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.browser import Chat, begin_reply, browser, chat, needs_browser, open_chat
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service

__all__ = ["browser", "chat"]
pytestmark = needs_browser


def test_a_service_that_is_down_is_an_error_and_a_restart_loses_nothing(
    service: Service, chat: Chat, groq: FakeGroq
) -> None:
    chat.ask("before")
    service.process.end()
    chat.say("too early")
    expect(chat.log.get_by_text("The service cannot be reached.")).to_be_visible()
    service.start()
    chat.again.click()
    expect(chat.replies.last).to_have_text("You said: too early")
    assert groq.requests[-1].contents == ["before", "You said: before", "too early"]
    assert service.contents(chat.conversation)[:2] == ["before", "You said: before"]


def test_a_reply_cut_by_a_lost_connection_can_be_continued_or_tried_again(
    service: Service, chat: Chat, groq: FakeGroq
) -> None:
    begin_reply(chat, groq)
    service.process.kill()
    service.process.end()
    service.start()  # which knows nothing of the reply
    expect(chat.log.get_by_text("The connection was lost.")).to_be_visible()
    expect(chat.replies.last).to_have_text("a")
    groq.release()
    chat.page.get_by_role("button", name="Go on").click()
    expect(chat.finished).to_have_count(1)
    assert groq.requests[-1].contents == ["slow", "a", "Go on where you stopped."]
    chat.again.click()
    expect(chat.replies.last).to_have_text("ab")


def test_stop_does_not_wait_for_a_service_that_hangs(
    service: Service, chat: Chat, groq: FakeGroq
) -> None:
    begin_reply(chat, groq)
    service.process.send_signal(signal.SIGSTOP)
    chat.stop.click()
    expect(chat.log.get_by_text("You stopped this reply.")).to_be_visible()
    service.process.send_signal(signal.SIGCONT)
    chat.ask("next")
    assert groq.requests[-1].contents == ["slow", "a", "next"]


@pytest.mark.parametrize("sign", ["silence", "online", "visibilitychange"])
def test_a_connection_that_may_be_dead_is_replaced_by_another(
    chat: Chat, groq: FakeGroq, sign: str
) -> None:
    chat.page.clock.install()
    begin_reply(chat, groq)
    with chat.page.expect_request("**/replies/*?after=1"):
        chat.page.clock.fast_forward("01:01" if sign == "silence" else "00:02")
        chat.page.evaluate(f"document.dispatchEvent(new Event('{sign}', {{bubbles: true}}))")
    groq.release()
    expect(chat.replies.last).to_have_text("ab")
    expect(chat.status).to_have_text("Reply: ab")
    assert len(groq.asked("slow")) == 1


# Gives the test a hand on the connection, which the browser closes.
BREAKABLE = """() => { const whole = fetch; window.fetch = (address, request) => whole(address, {
  ...request, signal: AbortSignal.any([request.signal, (window.cut = new AbortController()).signal])
}); }"""


def test_a_reply_is_read_on_after_each_break_without_a_gap_or_a_repeated_token(
    chat: Chat, groq: FakeGroq
) -> None:
    words = [f"{number} 😀 " for number in range(200)]
    groq.on("long", Script(words, interval=0.02, hold_before_token=190))
    chat.page.evaluate(BREAKABLE)
    chat.say("long")
    for word in words[::60]:
        expect(chat.replies.last).to_contain_text(word)
        with chat.page.expect_event("requestfailed", lambda each: "/replies/" in each.url):
            chat.page.context.set_offline(True)
            chat.page.evaluate("cut.abort()")
        chat.page.context.set_offline(False)
    groq.release()
    expect(chat.finished).to_have_count(1)
    expect(chat.replies.last).to_have_text("".join(words))
    assert len(groq.asked("long")) == 1


def test_without_resuming_a_break_is_an_error_at_once(
    browser: Browser, start_service: StartService, groq: FakeGroq
) -> None:
    with open_chat(browser, start_service(RESUME_TIMEOUT=0)) as chat:
        begin_reply(chat, groq)
        chat.page.evaluate("window.dispatchEvent(new Event('online'))")  # it is left alone
        chat.page.reload()
        expect(chat.log.get_by_text("The connection was lost.")).to_be_visible()
        expect(chat.replies.last).to_have_text("a")
        assert groq.asked("slow")[-1].is_closed_soon()


ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"status": 429, "json": {"error": "the rate limit is 1/hour"}}, "The rate limit is 1/hour."),
    ({"status": 502, "body": "<html>Bad gateway"}, "The service answered with the status 502."),
    ({"body": "data: half\n\n"}, "The connection was lost."),
    ({"body": 'data: x\n\nevent: error\ndata: {"error": "it failed"}\n\n'}, "It failed."),
]


@pytest.mark.parametrize(("answer", "message"), ANSWERS, ids=lambda value: str(value)[:20])
def test_an_error_is_told_in_its_own_words(chat: Chat, answer: Any, message: str) -> None:
    chat.page.route("**/chat", lambda route: route.fulfill(**answer))
    chat.say("hello")
    expect(chat.log.locator("[data-state=failed] .note-text")).to_have_text(message)
    expect(chat.status).to_have_text(f"There was an error: {message}")


# What https://html.spec.whatwg.org/multipage/server-sent-events.html says of each.
STREAMS: dict[str, list[list[str]]] = {
    "\ufeffdata: a\n\ndata:b\n\ndata:  c\n\n": [["message", "a", ""], ["message", "b", ""],
        ["message", " c", ""]],
    "data: a\r\ndata\r\ndata: b\r\n\r\n: comment\r\rdata: c\r\r\n": [["message", "a\n\nb", ""],
        ["message", "c", ""]],
    "event: x\nid: 1\ndata: a:b\n\nevent: y\n\nretry: 5\ndata: é\u2028\n\nid\ndata: z\n\n": [
        ["x", "a:b", "1"], ["message", "é\u2028", "1"], ["message", "z", ""]],
    "id: a\0\ndata: a\n\ndata: never dispatched\n": [["message", "a", ""]],
}  # fmt: skip
READ = """async ([text, size]) => {
  const { eventsOf } = await import("/static/events.js");
  const bytes = new TextEncoder().encode(text);
  const body = new ReadableStream({
    start(stream) {
      for (let at = 0; at < bytes.length; at += size) stream.enqueue(bytes.slice(at, at + size));
      stream.close();
    },
  });
  window.fetch = async () => new Response(body);
  const read = [];
  const { signal } = new AbortController();
  for await (const { event, data, id } of eventsOf("x", { signal })) read.push([event, data, id]);
  return read;
}"""


def test_event_streams_are_read_as_the_standard_says_however_they_are_cut(chat: Chat) -> None:
    for text, expected in STREAMS.items():
        for size in (1, 2, 1000):
            assert chat.page.evaluate(READ, [text, size]) == expected, (text, size)
