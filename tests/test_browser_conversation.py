"""Conversations on the chat page: reloaded, edited, asked again and started anew, in a browser."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser import Chat, begin_reply, browser, chat, needs_browser
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, wait_until

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


def test_a_reload_shows_the_conversation_and_reads_on_where_it_cut_a_reply_off(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("first", Script(["**bold** reply"]))
    chat.ask("first")
    begin_reply(chat, groq)
    chat.page.reload()
    expect(chat.questions).to_have_text(["first", "slow"])
    expect(chat.replies.first.locator("strong")).to_have_text("bold")
    expect(chat.replies.last).to_have_text("a")
    expect(chat.stop).to_be_visible()
    groq.release()
    expect(chat.replies.last).to_have_text("ab")
    expect(chat.finished).to_have_count(2)
    chat.page.reload()
    expect(chat.replies).to_have_text(["bold reply", "ab"])
    assert len(groq.asked("slow")) == 1
    chat.ask("next")
    assert groq.requests[-1].contents == ["first", "**bold** reply", "slow", "ab", "next"]


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


def test_the_last_question_can_be_edited_and_takes_the_place_of_what_was_stored(
    chat: Chat, service: Service, groq: FakeGroq
) -> None:
    chat.ask("first")
    old = chat.conversation
    chat.message.press("ArrowUp")
    chat.message.fill("better")
    chat.message.press("Enter")
    expect(chat.replies).to_have_text(["You said: better"])
    assert chat.conversation != old  # nothing tells the service to replace a first question
    chat.ask("second")
    chat.message.fill("a draft")
    chat.edit.click()
    expect(chat.message).to_have_value("second")
    chat.message.fill("third")
    chat.message.press("Enter")
    expect(chat.questions).to_have_text(["better", "third"])
    expect(chat.replies.last).to_have_text("You said: third")
    expect(chat.message).to_have_value("a draft")
    assert groq.requests[-1].contents == ["better", "You said: better", "third"]
    kept = ["better", "You said: better", "third", "You said: third"]
    wait_until(lambda: service.contents(chat.conversation) == kept)


def test_editing_can_be_cancelled(chat: Chat) -> None:
    chat.ask("first")
    for key in ("Escape", "Shift+Tab"):
        chat.edit.click()
        expect(chat.message).to_be_focused()
        expect(chat.cancel).to_be_visible()
        chat.message.press(key)
        if key == "Shift+Tab":
            chat.page.keyboard.press("Enter")
        expect(chat.cancel).to_be_hidden()
        expect(chat.message).to_have_value("")
        expect(chat.message).to_be_focused()
    expect(chat.replies).to_have_text(["You said: first"])


def test_a_question_can_be_asked_again(chat: Chat, groq: FakeGroq) -> None:
    groq.on("dice", Script(["one"]), Script(["six"]))
    chat.ask("before")
    chat.ask("dice")
    chat.page.get_by_role("button", name="Ask again").click()
    expect(chat.replies).to_have_text(["You said: before", "six"])
    expect(chat.message).to_be_focused()
    assert groq.requests[-1].contents == ["before", "You said: before", "dice"]


def test_a_reply_that_was_cut_short_says_so_and_goes_on(chat: Chat, groq: FakeGroq) -> None:
    groq.on("long", Script(["half **a"], finish_reason="length"))
    groq.on("bad", Script(["half"], finish_reason="content_filter"))
    go_on = chat.page.get_by_role("button", name="Go on")
    expect(chat.ask("long").locator("strong")).to_have_text("a")
    expect(chat.log.get_by_text("This reply reached its length limit.")).to_be_visible()
    go_on.click()
    expect(chat.replies.last).to_contain_text("You said: Go on")
    assert groq.requests[-1].contents[:2] == ["long", "half **a"]
    expect(go_on).to_be_hidden()
    chat.ask("bad")
    expect(chat.log.get_by_text("A content filter cut this reply off.")).to_be_visible()
    expect(go_on).to_be_hidden()


def test_a_question_stopped_before_its_reply_is_known_to_the_model(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("silent", Script(hold_before_token=0))
    chat.say("silent")
    groq.wait_for_request("silent")
    chat.stop.click()
    chat.ask("in French")
    assert groq.requests[-1].contents == ["silent", "in French"]


def test_of_a_conversation_too_long_for_a_request_the_newest_part_is_sent(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.default = Script(["€" * 20_000])
    for number in range(5):
        chat.ask(str(number))
    assert groq.requests[-1].contents[::2] == ["1", "2", "3", "4"]
    chat.ask("x" * 200_000)
    assert len(groq.requests[-1].contents) == 1
