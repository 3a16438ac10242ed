"""The chat page in a real browser, Debian's Chromium, in front of the stand-in for Groq."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Locator, Page, Route, WebSocket, WebSocketRoute, expect

from tests.browser import HOSTILE, RICH, Chat, browser, closing_context, needs_browser, open_chat
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, wait_until

__all__ = ["browser"]
pytestmark = needs_browser
PHONE = {"width": 320, "height": 640}


@pytest.fixture
def chat(browser: Browser, service: Service, groq: FakeGroq) -> Iterator[Chat]:
    with open_chat(browser, service) as opened:
        yield opened


@pytest.fixture
def own_service(start_service: StartService) -> Service:
    """A service that the test may end, and start again."""
    return start_service()


@pytest.fixture
def own_chat(browser: Browser, own_service: Service) -> Iterator[Chat]:
    with open_chat(browser, own_service) as opened:
        yield opened


def test_a_message_is_typed_sent_with_enter_and_answered(chat: Chat, service: Service) -> None:
    expect(chat.message).to_be_focused()
    chat.message.press_sequentially("Hello!")
    chat.message.press("Enter")
    expect(chat.replies.last).to_have_text("You said: Hello!")
    expect(chat.questions).to_have_text(["Hello!"])
    expect(chat.message).to_have_value("")
    expect(chat.message).to_be_focused()
    wait_until(lambda: service.contents(chat.conversation) == ["Hello!", "You said: Hello!"])


def test_shift_enter_begins_a_new_line_and_the_field_grows(chat: Chat) -> None:
    before = height(chat.message)
    chat.message.press_sequentially("one")
    chat.message.press("Shift+Enter")
    chat.message.press_sequentially("two")
    expect(chat.message).to_have_value("one\ntwo")
    assert height(chat.message) > before
    chat.message.press("Enter")
    expect(chat.questions).to_have_text("one\ntwo", use_inner_text=True)
    expect(chat.finished).to_have_count(1)
    assert height(chat.message) == before


def height(element: Locator) -> float:
    box = element.bounding_box()
    assert box
    return box["height"]


def test_nothing_but_white_space_is_not_sent(chat: Chat, groq: FakeGroq) -> None:
    chat.say(" \n ")
    expect(chat.questions).to_have_count(0)
    chat.ask("something")
    expect(chat.questions).to_have_text(["something"])
    assert [each.contents for each in groq.asked("something")] == [["something"]]


def test_a_reply_is_seen_while_it_runs(chat: Chat, groq: FakeGroq) -> None:
    groq.on("slow", Script(["The **first", " part**", " and", " the rest"], hold_before_token=2))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("The first part")
    expect(chat.replies.last.locator("strong")).to_have_text("first part")
    expect(chat.stop).to_be_visible()
    expect(chat.status).to_have_text("Waiting for the reply.")
    groq.release()
    expect(chat.replies.last).to_have_text("The first part and the rest")
    expect(chat.status).to_have_text("Reply: The first part and the rest")
    expect(chat.stop).to_be_hidden()


def test_text_may_be_typed_while_a_reply_runs_and_is_sent_after_it(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("a")
    chat.say("next")
    expect(chat.message).to_have_value("next")
    expect(chat.questions).to_have_count(1)
    groq.release()
    expect(chat.finished).to_have_count(1)
    expect(chat.replies.last).to_have_text("ab")
    chat.message.press("Enter")
    expect(chat.replies.last).to_have_text("You said: next")


def test_stop_keeps_what_has_come(chat: Chat, groq: FakeGroq, service: Service) -> None:
    groq.on("slow", Script(["a", "b", "c"], hold_before_token=2))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("ab")
    chat.stop.click()
    expect(chat.log.get_by_text("You stopped this reply.")).to_be_visible()
    expect(chat.replies.last).to_have_text("ab")
    expect(chat.message).to_be_focused()
    assert groq.asked("slow")[-1].is_closed_soon()
    wait_until(lambda: service.contents(chat.conversation) == ["slow", "ab"])
    assert chat.ask("next").inner_text() == "You said: next"


def test_escape_stops_too_and_what_had_not_begun_can_be_tried_again(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("silent", Script(["now"], hold_before_token=0))
    chat.say("silent")
    groq.wait_for_request("silent")
    chat.message.press("Escape")
    expect(chat.log.get_by_text("You stopped this before the reply began.")).to_be_visible()
    groq.release()
    chat.again.click()
    expect(chat.replies.last).to_have_text("now")
    expect(chat.questions).to_have_count(1)


def test_stop_twice_stops_one_reply(chat: Chat, groq: FakeGroq) -> None:
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    chat.page.clock.install()
    chat.say("slow")
    expect(chat.replies.last).to_have_text("a")
    for _ in range(200):
        chat.message.dispatch_event("keydown", {"key": "Escape", "bubbles": True})
    expect(chat.log.get_by_text("You stopped this reply.")).to_be_visible()
    chat.say("slow")
    expect(chat.replies.last).to_have_text("a")
    chat.page.clock.fast_forward("00:06")
    groq.release()
    expect(chat.replies.last).to_have_text("ab")


def test_an_escape_or_enter_of_an_input_method_is_its_own(chat: Chat, groq: FakeGroq) -> None:
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("a")
    chat.message.dispatch_event("keydown", {"key": "Escape", "isComposing": True, "bubbles": True})
    groq.release()
    expect(chat.replies.last).to_have_text("ab")
    chat.message.fill("half a word")
    chat.message.dispatch_event("keydown", {"key": "Enter", "keyCode": 229, "bubbles": True})
    expect(chat.message).to_have_value("half a word")


@pytest.mark.parametrize("is_new", [True, False])
def test_a_tab_whose_storage_is_full_can_still_chat(chat: Chat, is_new: bool) -> None:
    if not is_new:
        chat.ask("before")
    chat.page.evaluate(
        """() => {
          for (let size = 1 << 22; size; size >>= 1) {
            try {
              sessionStorage.setItem(`filler ${size}`, "x".repeat(size));
            } catch {}
          }
        }"""
    )
    assert chat.ask("after").inner_text() == "You said: after"


def test_a_conversation_that_is_no_longer_kept_says_so(chat: Chat, service: Service) -> None:
    chat.ask("hello")
    service.http.delete(f"/conversations/{chat.conversation}")
    chat.page.reload()
    expect(chat.page.get_by_text("are no longer kept")).to_be_visible()
    chat.ask("again")
    expect(chat.page.get_by_text("are no longer kept")).to_be_hidden()


def test_a_reload_shows_the_conversation_again(chat: Chat, groq: FakeGroq) -> None:
    groq.on("one", Script(["**bold** reply"]))
    chat.ask("one")
    chat.ask("two")
    chat.page.reload()
    expect(chat.questions).to_have_text(["one", "two"])
    expect(chat.replies).to_have_text(["bold reply", "You said: two"])
    expect(chat.replies.first.locator("strong")).to_have_text("bold")
    chat.ask("three")
    assert groq.requests[-1].contents[-3:] == ["two", "You said: two", "three"]


def test_a_message_cut_off_by_a_reload_can_be_tried_again(chat: Chat, groq: FakeGroq) -> None:
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    chat.ask("first")
    chat.say("slow")
    expect(chat.replies.last).to_have_text("a")
    chat.page.reload()
    expect(chat.questions).to_have_text(["first", "slow"])
    expect(chat.log.get_by_text("This message got no reply.")).to_be_visible()
    groq.release()
    chat.again.click()
    expect(chat.replies.last).to_have_text("ab")
    chat.page.reload()
    expect(chat.replies).to_have_text(["You said: first", "ab"])
    expect(chat.again).to_be_hidden()


def test_a_new_conversation_is_empty_and_has_another_id(chat: Chat, groq: FakeGroq) -> None:
    chat.ask("old words")
    old = chat.conversation
    chat.page.get_by_role("button", name="New conversation").click()
    expect(chat.questions).to_have_count(0)
    expect(chat.page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    expect(chat.message).to_be_focused()
    chat.ask("new words")
    assert chat.conversation != old
    assert re.fullmatch("[A-Za-z0-9_-]{32}", chat.conversation)
    assert groq.requests[-1].contents == ["new words"]


def test_a_new_conversation_ends_a_running_reply(chat: Chat, groq: FakeGroq) -> None:
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("a")
    chat.page.get_by_role("button", name="New conversation").click()
    expect(chat.stop).to_be_hidden()
    assert groq.asked("slow")[-1].is_closed_soon()
    assert chat.ask("next").inner_text() == "You said: next"
    assert groq.requests[-1].contents == ["next"]


def test_two_tabs_have_conversations_of_their_own(chat: Chat, service: Service) -> None:
    chat.ask("one")
    with chat.page.context.new_page() as page:
        page.goto(service.url)
        other = Chat(page)
        other.ask("two")
        assert other.conversation != chat.conversation
        expect(other.questions).to_have_count(1)


def test_an_error_shows_where_it_happened_and_try_again_works(chat: Chat, groq: FakeGroq) -> None:
    groq.on("fragile", Script(["half a"], error_before_token=1))
    chat.ask("before")
    chat.say("fragile")
    failure = chat.log.locator(".reply").last.locator(".failure")
    expect(failure).to_contain_text("The language model service failed while it was replying.")
    expect(chat.replies.last).to_have_text("half a")
    expect(chat.status).to_contain_text("There was an error")
    groq.on("fragile", Script(["whole"]))
    chat.again.click()
    expect(chat.replies).to_have_text(["You said: before", "whole"])
    expect(chat.questions).to_have_text(["before", "fragile"])
    expect(failure).to_be_hidden()


def test_a_failed_message_that_is_tried_again_later_goes_to_the_end(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("fragile", Script(status=500))
    chat.say("fragile")
    expect(chat.again).to_be_visible()
    chat.ask("later")
    groq.on("fragile", Script(["whole"]))
    chat.again.click()
    expect(chat.questions).to_have_text(["later", "fragile"])
    expect(chat.replies).to_have_text(["You said: later", "whole"])


def test_a_message_that_is_too_big_is_an_error_like_any_other(chat: Chat) -> None:
    chat.say("x" * (256 << 10))
    expect(chat.log.locator(".failure")).to_contain_text("must be at most 262144 bytes")
    assert chat.ask("smaller").inner_text() == "You said: smaller"


def test_html_and_script_in_a_reply_stay_text(chat: Chat, groq: FakeGroq) -> None:
    groq.on("hostile", Script([HOSTILE[at : at + 7] for at in range(0, len(HOSTILE), 7)]))
    reply = chat.ask("hostile")
    for text in ("<script>document.title", "<img src=x", "<b>bold</b>", "<iframe", "&lt;b&gt;"):
        expect(reply).to_contain_text(text)
    expect(reply.locator("script, img, iframe, svg, style, b, i, object, form")).to_have_count(0)
    links = reply.locator("a").evaluate_all("links => links.map((link) => link.href)")
    assert links == ["https://example.invalid/track.png", "https://example.invalid/"]
    assert attributes(reply) <= SAFE_ATTRIBUTES
    expect(chat.page).to_have_title("Chat")


def test_html_in_a_message_stays_text(chat: Chat) -> None:
    chat.say("<img src=x onerror=alert(1)> **not bold**")
    expect(chat.questions.last).to_have_text("<img src=x onerror=alert(1)> **not bold**")
    expect(chat.questions.last.locator("*")).to_have_count(0)


SAFE_ATTRIBUTES = {"href", "target", "rel", "class", "dir", "start", "tabindex", "role", "type"} | {
    "aria-label",
    "aria-level",
}


def attributes(element: Locator) -> set[str]:
    names: list[str] = element.evaluate(
        "node => [...node.querySelectorAll('*')].flatMap((each) => each.getAttributeNames())"
    )
    return set(names)


def test_the_connection_comes_back_after_a_restart_with_the_conversation(
    own_service: Service, own_chat: Chat, groq: FakeGroq
) -> None:
    own_chat.ask("before")
    own_service.process.end()
    expect(own_chat.page.get_by_text("Reconnecting…")).to_be_visible()
    own_service.start()
    expect(own_chat.page.get_by_text("Reconnecting…")).to_be_hidden(timeout=15_000)
    own_chat.ask("after")
    # The service has forgotten what was in its memory, and is told again.
    assert groq.requests[-1].contents == ["before", "You said: before", "after"]
    own_chat.page.reload()
    expect(own_chat.questions).to_have_text(["before", "after"])


def test_a_reply_that_a_lost_connection_cuts_can_be_tried_again(
    own_service: Service, own_chat: Chat, groq: FakeGroq
) -> None:
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    own_chat.say("slow")
    expect(own_chat.replies.last).to_have_text("a")
    own_service.process.send_signal(signal.SIGKILL)
    own_service.process.end()
    expect(own_chat.log.get_by_text("The connection was lost.")).to_be_visible()
    expect(own_chat.replies.last).to_have_text("a")
    own_service.start()
    groq.release()
    own_chat.again.click()
    expect(own_chat.replies.last).to_have_text("ab")


def test_a_message_of_which_nothing_was_heard_is_sent_once_more(
    own_service: Service, own_chat: Chat, groq: FakeGroq
) -> None:
    groq.on("silent", Script(["now"], hold_before_token=0))
    own_chat.say("silent")
    groq.wait_for_request("silent")
    own_service.process.send_signal(signal.SIGKILL)
    own_service.process.end()
    groq.release()
    own_service.start()
    expect(own_chat.replies.last).to_have_text("now", timeout=15_000)
    assert len(groq.asked("silent")) == 2


def test_stop_does_not_wait_for_a_service_that_hangs(
    own_service: Service, own_chat: Chat, groq: FakeGroq
) -> None:
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    own_chat.page.clock.install()
    own_chat.say("slow")
    expect(own_chat.replies.last).to_have_text("a")
    own_service.process.send_signal(signal.SIGSTOP)
    own_chat.stop.click()
    own_chat.page.clock.fast_forward("00:06")
    expect(own_chat.log.get_by_text("The connection was lost.")).to_be_visible()
    own_service.process.send_signal(signal.SIGCONT)


def test_a_message_waits_for_a_service_that_restarts(own_service: Service, own_chat: Chat) -> None:
    own_chat.ask("before")
    own_service.process.end()
    own_chat.say("meanwhile")
    expect(own_chat.log.locator("[data-state=waiting]")).to_be_visible()
    own_service.start()
    expect(own_chat.replies.last).to_have_text("You said: meanwhile", timeout=15_000)


def test_a_service_that_stays_away_is_an_error(own_service: Service, own_chat: Chat) -> None:
    own_chat.page.clock.install()
    own_chat.page.reload()
    own_chat.ask("before")
    own_service.process.end()
    own_chat.say("hello")
    expect(own_chat.log.locator("[data-state=waiting]")).to_be_visible()
    own_chat.page.clock.fast_forward("00:20")
    expect(own_chat.log.get_by_text("The service cannot be reached.")).to_be_visible()
    own_service.start()
    own_chat.again.click()
    expect(own_chat.replies.last).to_have_text("You said: hello")


def test_a_question_is_not_left_waiting_by_a_service_that_was_away_for_long(
    own_service: Service, own_chat: Chat
) -> None:
    own_chat.page.clock.install()
    own_chat.page.reload()
    own_chat.ask("before")
    own_service.process.end()
    for _ in range(8):
        with own_chat.page.expect_websocket():
            own_chat.page.clock.fast_forward("00:20")
    own_chat.say("hello")
    own_service.start()
    expect(own_chat.replies.last).to_have_text("You said: hello", timeout=10_000)


def test_a_connection_closed_for_idleness_comes_back_with_the_next_message(
    browser: Browser, groq: FakeGroq
) -> None:
    with (
        Service(GROQ_BASE_URL=groq.url, IDLE_TIMEOUT=0.3) as service,
        open_chat(browser, service) as chat,
    ):
        chat.ask("before")
        service.log_line(endpoint="/chat", status=101)
        expect(chat.page.get_by_text("Reconnecting…")).to_be_hidden()
        chat.ask("after")
        assert groq.requests[-1].contents == ["before", "You said: before", "after"]


def test_a_question_that_crosses_the_close_for_idleness_is_asked_again(
    browser: Browser, groq: FakeGroq
) -> None:
    with (
        Service(GROQ_BASE_URL=groq.url, IDLE_TIMEOUT=2) as service,
        open_chat(browser, service) as chat,
    ):
        on_its_way = never_deliver_the_first(chat)
        chat.say("hello")
        expect(chat.replies.last).to_have_text("You said: hello", timeout=10_000)
        assert on_its_way == ["hello"]


def test_a_question_that_crosses_the_end_of_a_replica_is_asked_again(
    own_service: Service, own_chat: Chat
) -> None:
    on_its_way = never_deliver_the_first(own_chat)
    own_chat.say("hello")
    own_chat.wait_until(lambda: on_its_way == ["hello"])
    own_service.process.end()
    expect(own_chat.page.get_by_text("Reconnecting…")).to_be_visible()
    own_service.start()
    expect(own_chat.replies.last).to_have_text("You said: hello", timeout=15_000)


def never_deliver_the_first(chat: Chat) -> list[str]:
    """Load the page again over a network that never delivers the first thing that it says."""
    on_its_way: list[str] = []

    def connect(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def carry(message: str | bytes) -> None:
            if on_its_way:
                server.send(message)
            else:
                on_its_way.append(json.loads(message)["messages"][-1]["content"])

        socket.on_message(carry)

    chat.page.route_web_socket("**/chat", connect)
    chat.page.reload()
    return on_its_way


def test_a_page_whose_origin_is_not_allowed_says_so(browser: Browser, groq: FakeGroq) -> None:
    with Service(GROQ_BASE_URL=groq.url) as service, closing_context(browser) as context:
        page = context.new_page()
        page.route_web_socket("**/chat", refuse)
        page.goto(service.url)
        chat = Chat(page)
        chat.say("hello")
        expect(chat.log.get_by_text("This origin is not allowed.")).to_be_visible()
        expect(chat.page.get_by_text("Reconnecting…")).to_be_hidden()


def refuse(socket: WebSocketRoute) -> None:
    socket.send('{"error": "this origin is not allowed"}')
    socket.close(code=1008)


def test_a_hidden_page_does_not_go_on_reconnecting(own_service: Service, own_chat: Chat) -> None:
    attempts: list[WebSocket] = []
    own_chat.ask("before")
    own_chat.page.clock.install()
    own_chat.page.on("websocket", lambda socket: attempts.append(socket))  # noqa: PLW0108
    hide(own_chat.page, is_hidden=True)
    own_service.process.end()
    expect(own_chat.page.get_by_text("Reconnecting…")).to_be_attached()
    own_chat.page.clock.fast_forward("10:00")
    assert attempts == []
    own_service.start()
    hide(own_chat.page, is_hidden=False)
    expect(own_chat.page.locator("#notice")).to_be_hidden()
    assert len(attempts) == 1


def hide(page: Page, *, is_hidden: bool) -> None:
    page.evaluate(
        """(isHidden) => {
          Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_hidden,
    )


def test_a_network_that_goes_and_comes_back_is_told_and_asked_again(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("lost on the way", Script(["now"], hold_before_token=0))
    chat.say("lost on the way")
    groq.wait_for_request("lost on the way")
    chat.page.evaluate("dispatchEvent(new Event('offline'))")
    expect(chat.page.get_by_text("Reconnecting…")).to_be_visible()
    chat.page.evaluate("dispatchEvent(new Event('online'))")
    groq.wait_for(lambda: len(groq.asked("lost on the way")) == 2)
    groq.release()
    expect(chat.replies.last).to_have_text("now")
    expect(chat.page.get_by_text("Reconnecting…")).to_be_hidden()


def test_messages_that_cannot_be_loaded_can_be_tried_again(chat: Chat) -> None:
    chat.ask("hello")
    chat.page.route("**/conversations/*", lambda route: route.fulfill(status=503))
    chat.page.reload()
    expect(chat.page.get_by_text("The earlier messages could not be loaded.")).to_be_visible()
    chat.page.unroute("**/conversations/*")
    chat.again.click()
    expect(chat.replies).to_have_text("You said: hello")
    expect(chat.page.get_by_text("The earlier messages could not be loaded.")).to_be_hidden()


def test_messages_that_come_late_do_not_enter_another_conversation(chat: Chat) -> None:
    chat.ask("old words")
    loading = held_loading(chat, chat.page.reload)
    chat.page.get_by_role("button", name="New conversation").click()
    with chat.page.expect_response("**/conversations/*"):
        loading.continue_()
    chat.ask("new words")
    expect(chat.questions).to_have_text(["new words"])
    expect(chat.replies).to_have_text(["You said: new words"])


def test_a_failed_message_waits_until_the_earlier_ones_are_loaded(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("fails", Script(status=400))
    chat.ask("before")
    chat.say("fails")
    expect(chat.again).to_be_visible()
    chat.page.route("**/conversations/*", lambda route: route.fulfill(status=503))
    chat.page.reload()
    expect(chat.again).to_have_count(2)
    chat.page.unroute("**/conversations/*")
    loading = held_loading(chat, chat.again.first.click)
    expect(chat.again).to_have_count(0)
    loading.continue_()
    expect(chat.questions).to_have_text(["before", "fails"])
    chat.again.click()
    expect(chat.log.locator("[data-state=failed]")).to_have_count(1)
    expect(chat.page.locator("body[data-state=idle]")).to_be_visible()


def held_loading(chat: Chat, load: Callable[[], object]) -> Route:
    """Have the page ask for the earlier messages; give the request, which nothing answers yet."""
    held: list[Route] = []
    chat.page.route("**/conversations/*", lambda route: held.append(route), times=1)  # noqa: PLW0108
    load()
    chat.wait_until(lambda: held != [])
    return held[0]


def test_a_service_that_hangs_does_not_keep_the_page_from_being_used(
    chat: Chat, groq: FakeGroq
) -> None:
    chat.ask("before")
    chat.page.route("**/conversations/*", lambda route: None)  # it is never answered
    chat.page.reload()
    warning = chat.page.get_by_text("The earlier messages could not be loaded.")
    expect(warning).to_be_visible(timeout=20_000)
    chat.ask("after")
    assert groq.requests[-1].contents == ["before", "You said: before", "after"]


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_code_and_replies_can_be_copied(
    browser: Browser, service: Service, groq: FakeGroq, has_clipboard: bool
) -> None:
    groq.on("code", Script(["Look:\n```python\n", "if a < b:\n    ", "swap()\n```\nDone."]))
    permissions = ["clipboard-read", "clipboard-write"]
    with open_chat(browser, service, permissions=permissions) as chat:
        if not has_clipboard:  # as it is over plain http from another machine
            chat.page.evaluate("Object.defineProperty(navigator.clipboard, 'writeText', {})")
        reply = chat.ask("code")
        expect(reply.locator(".code-head span")).to_have_text("python")
        button = reply.get_by_role("button", name="Copy")
        button.click()
        expect(reply.get_by_role("button", name="Copied")).to_be_visible()
        assert clipboard(chat.page) == "if a < b:\n    swap()"
        chat.page.get_by_role("button", name="Copy the reply").click()
        expect(chat.status).to_have_text("Copied")
        assert clipboard(chat.page).startswith("Look:\n```python\nif a < b:")


def clipboard(page: Page) -> str:
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def test_all_can_be_done_with_the_keyboard(chat: Chat, groq: FakeGroq) -> None:
    groq.on("rainbow", Script(["```\ncode\n```"]))
    press = chat.page.keyboard.press
    expect(chat.message).to_be_focused()
    chat.message.press("Shift+Tab")
    for _ in range(3):
        press("Shift+Tab")
    expect(focused(chat.page)).to_have_text(re.compile("rainbow"))
    press("Enter")
    expect(chat.finished).to_have_count(1)
    expect(chat.message).to_be_focused()
    press("Shift+Tab")
    expect(focused(chat.page)).to_have_accessible_name("Copy the reply")
    press("Shift+Tab")
    expect(focused(chat.page)).to_have_accessible_name("Code")
    press("Shift+Tab")
    expect(focused(chat.page)).to_have_text("Copy")
    press("Shift+Tab")
    expect(focused(chat.page)).to_have_accessible_name("Messages")
    press("Shift+Tab")
    press("Space")
    expect(chat.questions).to_have_count(0)
    expect(chat.message).to_be_focused()


def focused(page: Page) -> Locator:
    return page.locator(":focus")


def test_a_touch_screens_enter_begins_a_new_line(browser: Browser, service: Service) -> None:
    with open_chat(browser, service, has_touch=True, is_mobile=True, viewport=PHONE) as chat:
        chat.message.press_sequentially("one")
        chat.message.press("Enter")
        chat.message.press_sequentially("two")
        expect(chat.message).to_have_value("one\ntwo")
        chat.page.get_by_role("button", name="Send").tap()
        expect(chat.questions).to_have_count(1)


def test_the_end_stays_in_sight_unless_the_reader_has_scrolled_up(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("long", Script(["line\n\n"] * 100 + ["more\n\n"] * 50, hold_before_token=100))
    chat.say("long")
    expect(chat.replies.last.locator("p")).to_have_count(100)
    expect(chat.replies.last.locator("p").last).to_be_in_viewport()
    chat.page.locator("#scroller").hover()
    chat.page.mouse.wheel(0, -600)
    jump = chat.page.get_by_role("button", name="Go to the newest message")
    expect(jump).to_be_visible()
    groq.release()
    expect(chat.replies.last.locator("p")).to_have_count(150)
    expect(chat.replies.last.locator("p").last).not_to_be_in_viewport()
    jump.click()
    expect(chat.replies.last.locator("p").last).to_be_in_viewport()
    expect(jump).to_be_hidden()
    expect(focused(chat.page)).to_have_accessible_name("Messages")


def test_a_selection_in_a_reply_that_grows_is_kept(chat: Chat, groq: FakeGroq) -> None:
    groq.on("slow", Script(["some words", " and more"], hold_before_token=1))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("some words")
    chat.replies.last.evaluate(
        "(reply) => getSelection().setBaseAndExtent(reply.firstChild.firstChild, 0,"
        " reply.firstChild.firstChild, 4)"
    )
    groq.release()
    expect(chat.replies.last).to_have_text("some words and more")
    assert chat.page.evaluate("String(getSelection())") == "some"


@pytest.mark.parametrize("viewport", [{"width": 1440, "height": 900}, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(
    browser: Browser, service: Service, groq: FakeGroq, scheme: Any, viewport: Any
) -> None:
    groq.on("rich", Script([RICH]))
    groq.on("fail", Script(status=500))
    groq.on("slow", Script(["a", "b"], hold_before_token=1))
    with open_chat(browser, service, color_scheme=scheme, viewport=viewport) as chat:
        expect(chat.page.locator("#welcome")).to_be_visible()
        check_access(chat.page)
        chat.ask("rich")
        chat.say("fail")
        expect(chat.again).to_be_visible()
        check_access(chat.page)
        chat.say("slow")
        expect(chat.replies.last).to_have_text("a")
        check_access(chat.page)
        width = chat.page.evaluate("document.querySelector('#scroller').scrollWidth")
        assert width <= viewport["width"]


def check_access(page: Page) -> None:
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
