"""The chat page in a real browser; test_browser_*.py have its conversations and its connection."""

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser import HOSTILE, RICH, Chat, begin_reply, browser, chat, needs_browser, open_chat
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, wait_until

__all__ = ["browser", "chat"]
pytestmark = needs_browser
PHONE = {"width": 320, "height": 640}
SAFE_ATTRIBUTES = {"href", "target", "rel", "class", "dir", "start", "tabindex", "role", "type"}
SAFE_ATTRIBUTES |= {"aria-label", "aria-level"}


def test_a_message_with_text_is_typed_sent_with_enter_and_answered(
    chat: Chat, service: Service
) -> None:
    expect(chat.message).to_be_focused()
    chat.say(" \n ")
    expect(chat.questions).to_have_count(0)
    chat.message.fill("")
    chat.message.press_sequentially("Hello!")
    chat.message.press("Enter")
    expect(chat.replies.last).to_have_text("You said: Hello!")
    expect(chat.questions).to_have_text(["Hello!"])
    expect(chat.message).to_have_value("")
    expect(chat.message).to_be_focused()
    wait_until(lambda: service.contents(chat.conversation) == ["Hello!", "You said: Hello!"])


def test_shift_enter_starts_a_new_line_and_the_field_grows(chat: Chat) -> None:
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


def test_a_reply_is_shown_while_it_streams_and_the_next_message_is_typed(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("slow", Script(["The **first", " part**", " and", " the rest"], hold_before_token=2))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("The first part")
    expect(chat.replies.last.locator("strong")).to_have_text("first part")
    expect(chat.stop).to_be_visible()
    expect(chat.status).to_have_text("Waiting for the reply.")
    chat.say("next")
    expect(chat.message).to_have_value("next")
    expect(chat.questions).to_have_count(1)
    groq.release()
    expect(chat.replies.last).to_have_text("The first part and the rest")
    expect(chat.status).to_have_text("Reply: The first part and the rest")
    expect(chat.stop).to_be_hidden()
    chat.message.press("Enter")
    expect(chat.replies.last).to_have_text("You said: next")


def test_stop_keeps_the_text_so_far(chat: Chat, groq: FakeGroq, service: Service) -> None:
    groq.on("slow", Script(["a", "b", "c"], hold_before_token=2))
    chat.say("slow")
    expect(chat.replies.last).to_have_text("ab")
    chat.stop.click()
    expect(chat.log.get_by_text("You stopped this reply.")).to_be_visible()
    expect(chat.replies.last).to_have_text("ab")
    expect(chat.message).to_be_focused()
    assert groq.asked("slow")[-1].is_closed_soon()
    chat.page.reload()
    expect(chat.replies.last).to_have_text("ab")
    chat.ask("next")
    assert groq.requests[-1].contents == ["slow", "ab", "next"]
    assert service.contents(chat.conversation) == ["slow", "ab", "next", "You said: next"]


def test_escape_stops_too_and_a_reply_without_text_can_be_tried_again(
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


def test_an_escape_or_enter_of_an_input_method_is_ignored(chat: Chat, groq: FakeGroq) -> None:
    begin_reply(chat, groq)
    chat.message.dispatch_event("keydown", {"key": "Escape", "isComposing": True, "bubbles": True})
    groq.release()
    expect(chat.replies.last).to_have_text("ab")
    chat.message.fill("half a word")
    chat.message.dispatch_event("keydown", {"key": "Enter", "keyCode": 229, "bubbles": True})
    expect(chat.message).to_have_value("half a word")


def test_an_error_shows_where_it_happened_and_try_again_works(chat: Chat, groq: FakeGroq) -> None:
    groq.on("fragile", Script(["half a"], error_before_token=1), Script(["whole"]))
    chat.ask("before")
    chat.say("fragile")
    failure = chat.log.locator("[data-state=failed] .note")
    expect(failure).to_contain_text("The language model service failed during the reply.")
    expect(chat.replies.last).to_have_text("half a")
    expect(chat.status).to_contain_text("There was an error")
    chat.again.click()
    expect(chat.replies).to_have_text(["You said: before", "whole"])
    expect(chat.questions).to_have_text(["before", "fragile"])
    expect(failure).to_be_hidden()


def test_a_failed_message_tried_again_later_moves_to_the_end(chat: Chat, groq: FakeGroq) -> None:
    groq.on("fragile", Script(status=500), Script(["whole"]))
    chat.say("fragile")
    expect(chat.again).to_be_visible()
    chat.ask("later")
    chat.again.click()
    expect(chat.questions).to_have_text(["later", "fragile"])
    expect(chat.replies).to_have_text(["You said: later", "whole"])
    chat.say("x" * (256 << 10))
    expect(chat.log.locator(".note:visible")).to_contain_text("must be at most 262144 bytes")
    chat.ask("small")
    assert groq.requests[-1].contents[-1] == "small"


def test_html_and_script_stay_text_in_messages_and_replies(chat: Chat, groq: FakeGroq) -> None:
    groq.on("hostile", Script([HOSTILE[at : at + 7] for at in range(0, len(HOSTILE), 7)]))
    reply = chat.ask("<img src=x onerror=alert(1)> **hostile**")
    expect(chat.questions.last).to_have_text("<img src=x onerror=alert(1)> **hostile**")
    expect(chat.questions.last.locator("*")).to_have_count(0)
    for text in ("<script>document.title", "<img src=x", "<b>bold</b>", "<iframe", "<style>"):
        expect(reply).to_contain_text(text)
    expect(reply.locator("script, img, iframe, svg, style, b, i, object, form")).to_have_count(0)
    links = reply.locator("a").evaluate_all("links => links.map((link) => link.href)")
    assert links == ["https://example.invalid/track.png", "https://example.invalid/"]
    attributes = reply.locator("*").evaluate_all(
        "nodes => nodes.flatMap((node) => node.getAttributeNames())"
    )
    assert set(attributes) <= SAFE_ATTRIBUTES
    expect(chat.page).to_have_title("Chat")


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


def test_everything_works_with_the_keyboard(chat: Chat, groq: FakeGroq) -> None:
    groq.on("rainbow", Script(["```\ncode\n```"]))
    press = chat.page.keyboard.press
    expect(chat.message).to_be_focused()
    for _ in range(4):
        press("Shift+Tab")
    expect(focused(chat.page)).to_have_text(re.compile("rainbow"))
    press("Enter")
    expect(chat.finished).to_have_count(1)
    expect(chat.message).to_be_focused()
    for name in ("Ask again", "Copy the reply", "Code", "Copy", "Edit the message", "Messages"):
        press("Shift+Tab")
        expect(focused(chat.page)).to_have_accessible_name(name)
    press("Shift+Tab")
    press("Space")
    expect(chat.questions).to_have_count(0)
    expect(chat.message).to_be_focused()


def focused(page: Page) -> Locator:
    return page.locator(":focus")


def test_enter_starts_a_new_line_on_a_touch_screen(browser: Browser, service: Service) -> None:
    with open_chat(browser, service, has_touch=True, is_mobile=True, viewport=PHONE) as chat:
        chat.message.press_sequentially("one")
        chat.message.press("Enter")
        chat.message.press_sequentially("two")
        expect(chat.message).to_have_value("one\ntwo")
        chat.page.get_by_role("button", name="Send").tap()
        expect(chat.questions).to_have_count(1)


def test_the_newest_text_stays_in_view_unless_the_reader_has_scrolled_up(
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


def test_a_selection_in_a_growing_reply_is_kept(chat: Chat, groq: FakeGroq) -> None:
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_the_screen(
    browser: Browser, service: Service, groq: FakeGroq, scheme: Any
) -> None:
    viewport: Any = {"light": {"width": 1440, "height": 900}, "dark": PHONE}[scheme]
    groq.on("rich", Script([RICH]))
    groq.on("short", Script(["cut"], finish_reason="length"))
    groq.on("fail", Script(status=500))
    with open_chat(browser, service, color_scheme=scheme, viewport=viewport) as chat:
        expect(chat.page.locator("#welcome")).to_be_visible()
        check_access(chat.page)
        chat.ask("rich")
        chat.ask("short")
        chat.edit.click()
        check_access(chat.page)
        chat.cancel.click()
        chat.say("fail")
        expect(chat.again).to_be_visible()
        check_access(chat.page)
        begin_reply(chat, groq)
        check_access(chat.page)
        width = chat.page.evaluate("document.querySelector('#scroller').scrollWidth")
        assert width <= viewport["width"]
        groq.release()  # the service would wait for the reply


def check_access(page: Page) -> None:
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
