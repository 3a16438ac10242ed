"""Conversations on the chat page: reloaded, started anew and loaded late, in a real browser."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Route, expect

from tests.browser import Chat, begin_reply, browser, chat, needs_browser
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service

__all__ = ["browser", "chat"]
pytestmark = needs_browser


@pytest.mark.parametrize("is_new", [True, False])
def test_a_tab_whose_storage_is_full_can_still_chat(chat: Chat, is_new: bool) -> None:
    if not is_new:
        chat.ask("before")
    chat.page.evaluate(
        """() => {
          for (let size = 1 << 22; size; size >>= 1)
            try { sessionStorage.setItem(`filler ${size}`, "x".repeat(size)); } catch {}
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


def test_a_reload_shows_the_conversation_and_a_message_it_cut_off_can_be_tried_again(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("first", Script(["**bold** reply"]))
    chat.ask("first")
    begin_reply(chat, groq)
    chat.page.reload()
    expect(chat.questions).to_have_text(["first", "slow"])
    expect(chat.replies.first.locator("strong")).to_have_text("bold")
    expect(chat.log.get_by_text("This message got no reply.")).to_be_visible()
    groq.release()
    chat.again.click()
    expect(chat.replies.last).to_have_text("ab")
    chat.page.reload()
    expect(chat.replies).to_have_text(["bold reply", "ab"])
    expect(chat.again).to_be_hidden()
    chat.ask("next")
    assert groq.requests[-1].contents[-3:] == ["slow", "ab", "next"]


def test_a_new_conversation_ends_a_running_reply_and_is_empty(chat: Chat, groq: FakeGroq) -> None:
    begin_reply(chat, groq)
    old = chat.conversation
    chat.page.get_by_role("button", name="New conversation").click()
    expect(chat.stop).to_be_hidden()
    assert groq.asked("slow")[-1].is_closed_soon()
    expect(chat.questions).to_have_count(0)
    expect(chat.page.get_by_role("heading", name="What would you like to know?")).to_be_visible()
    expect(chat.message).to_be_focused()
    chat.ask("new words")
    assert chat.conversation != old
    assert re.fullmatch("[A-Za-z0-9_-]{32}", chat.conversation)
    assert groq.requests[-1].contents == ["new words"]


def test_two_tabs_have_conversations_of_their_own(chat: Chat, service: Service) -> None:
    chat.ask("one")
    with chat.page.context.new_page() as page:
        page.goto(service.url)
        other = Chat(page)
        other.ask("two")
        assert other.conversation != chat.conversation
        expect(other.questions).to_have_count(1)


def test_messages_loaded_late_do_not_enter_another_conversation(chat: Chat) -> None:
    chat.ask("old words")
    loading = held_loading(chat, chat.page.reload)
    chat.page.get_by_role("button", name="New conversation").click()
    with chat.page.expect_response("**/conversations/*"):
        loading.continue_()
    chat.ask("new words")
    expect(chat.questions).to_have_text(["new words"])
    expect(chat.replies).to_have_text(["You said: new words"])


def test_messages_that_cannot_be_loaded_are_tried_again_before_a_failed_one(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("fails", Script(status=400))
    chat.ask("before")
    chat.say("fails")
    expect(chat.again).to_be_visible()
    chat.page.route("**/conversations/*", lambda route: route.fulfill(status=503))
    chat.page.reload()
    expect(chat.again).to_have_count(2)
    expect(chat.page.get_by_text("The earlier messages could not be loaded.")).to_be_visible()
    chat.page.unroute("**/conversations/*")
    loading = held_loading(chat, chat.again.first.click)
    expect(chat.again).to_have_count(0)
    loading.continue_()
    expect(chat.page.get_by_text("The earlier messages could not be loaded.")).to_be_hidden()
    expect(chat.replies.first).to_have_text("You said: before")
    expect(chat.questions).to_have_text(["before", "fails"])
    chat.again.click()
    expect(chat.log.locator("[data-state=failed]")).to_have_count(1)
    expect(chat.page.locator("body[data-state=idle]")).to_be_visible()


def held_loading(chat: Chat, load: Callable[[], object]) -> Route:
    """Load the earlier messages; return the request, which nothing has answered yet."""
    held: list[Route] = []
    chat.page.route("**/conversations/*", lambda route: held.append(route), times=1)  # noqa: PLW0108
    load()
    chat.wait_until(lambda: held != [])
    return held[0]


# The browser's own ignores the clock that Playwright installs.
TIMEOUT_BY_THE_CLOCK = """
  AbortSignal.timeout = (milliseconds) => {
    const controller = new AbortController();
    setTimeout(() => controller.abort(new DOMException("", "TimeoutError")), milliseconds);
    return controller.signal;
  };
"""


def test_the_page_can_be_used_while_the_earlier_messages_do_not_load(
    chat: Chat, groq: FakeGroq
) -> None:
    chat.ask("before")
    chat.page.clock.install()
    chat.page.add_init_script(TIMEOUT_BY_THE_CLOCK)
    held_loading(chat, chat.page.reload)
    chat.page.clock.fast_forward("00:10")
    expect(chat.page.get_by_text("The earlier messages could not be loaded.")).to_be_visible()
    chat.ask("after")
    assert groq.requests[-1].contents == ["before", "You said: before", "after"]
