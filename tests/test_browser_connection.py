"""The chat page while the service stops, hangs or restarts, in a real browser."""

import json
import signal

from playwright.sync_api import Browser, Page, WebSocket, WebSocketRoute, expect

from tests.browser import Chat, begin_reply, browser, chat, needs_browser, open_chat
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service

__all__ = ["browser", "chat"]
pytestmark = needs_browser


def test_the_connection_comes_back_after_a_restart_with_the_conversation(
    service: Service, chat: Chat, groq: FakeGroq
) -> None:
    chat.ask("before")
    service.process.end()
    expect(chat.page.get_by_text("Reconnecting…")).to_be_visible()
    service.start()
    expect(chat.page.get_by_text("Reconnecting…")).to_be_hidden()
    chat.ask("after")
    # The restart lost the history, and the page sends it again.
    assert groq.requests[-1].contents == ["before", "You said: before", "after"]
    chat.page.reload()
    expect(chat.questions).to_have_text(["before", "after"])


def test_a_reply_cut_by_a_lost_connection_can_be_tried_again(
    service: Service, chat: Chat, groq: FakeGroq
) -> None:
    begin_reply(chat, groq)
    service.process.kill()
    service.process.end()
    expect(chat.log.get_by_text("The connection was lost.")).to_be_visible()
    expect(chat.replies.last).to_have_text("a")
    service.start()
    groq.release()
    chat.again.click()
    expect(chat.replies.last).to_have_text("ab")


def test_stop_does_not_wait_for_a_service_that_hangs(
    service: Service, chat: Chat, groq: FakeGroq
) -> None:
    chat.page.clock.install()
    begin_reply(chat, groq)
    service.process.send_signal(signal.SIGSTOP)
    chat.stop.click()
    chat.page.clock.fast_forward("00:06")
    expect(chat.log.get_by_text("The connection was lost.")).to_be_visible()
    service.process.send_signal(signal.SIGCONT)


def test_a_service_that_stays_down_is_an_error_and_once_it_is_back_answers_come_soon(
    service: Service, chat: Chat
) -> None:
    chat.page.clock.install()
    chat.page.reload()
    chat.ask("before")
    service.process.end()
    chat.say("too early")
    expect(chat.log.locator("[data-state=waiting]")).to_be_visible()
    for _ in range(8):
        with chat.page.expect_websocket():
            chat.page.clock.fast_forward("00:20")
    expect(chat.log.get_by_text("The service cannot be reached.")).to_be_visible()
    chat.say("meanwhile")
    expect(chat.log.locator("[data-state=waiting]")).to_be_visible()
    service.start()
    expect(chat.replies.last).to_have_text("You said: meanwhile")
    chat.again.click()
    expect(chat.replies.last).to_have_text("You said: too early")


def test_a_connection_closed_for_idleness_comes_back_with_the_next_or_the_lost_message(
    browser: Browser, start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(IDLE_TIMEOUT=0.5)
    with open_chat(browser, service) as chat:
        chat.ask("before")
        service.log_line(endpoint="/chat", status=101)
        expect(chat.page.get_by_text("Reconnecting…")).to_be_hidden()
        chat.ask("after")
        assert groq.requests[-1].contents == ["before", "You said: before", "after"]
        lost = lose_the_first_message(chat)
        chat.say("hello")
        expect(chat.replies.last).to_have_text("You said: hello")
        assert lost == ["hello"]


def test_a_message_that_crosses_a_shutdown_is_sent_again(service: Service, chat: Chat) -> None:
    lost = lose_the_first_message(chat)
    chat.say("hello")
    chat.wait_until(lambda: lost == ["hello"])
    service.process.end()
    expect(chat.page.get_by_text("Reconnecting…")).to_be_visible()
    service.start()
    expect(chat.replies.last).to_have_text("You said: hello")


def lose_the_first_message(chat: Chat) -> list[str]:
    """Reload the page over a network that loses its first message; return what was lost."""
    lost: list[str] = []

    def connect(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def carry(message: str | bytes) -> None:
            if lost:
                server.send(message)
            else:
                lost.append(json.loads(message)["messages"][-1]["content"])

        socket.on_message(carry)

    chat.page.route_web_socket("**/chat", connect)
    chat.page.reload()
    return lost


def test_a_page_whose_origin_is_not_allowed_says_so(chat: Chat) -> None:
    chat.page.route_web_socket("**/chat", refuse)
    chat.page.reload()
    chat.say("hello")
    expect(chat.log.get_by_text("This origin is not allowed to use")).to_be_visible()
    expect(chat.page.get_by_text("Reconnecting…")).to_be_hidden()


def refuse(socket: WebSocketRoute) -> None:
    socket.send('{"error": "this origin is not allowed to use the service"}')
    socket.close(code=1008)


def test_a_hidden_page_does_not_reconnect(service: Service, chat: Chat) -> None:
    attempts: list[WebSocket] = []
    chat.ask("before")
    chat.page.clock.install()
    chat.page.on("websocket", lambda socket: attempts.append(socket))  # noqa: PLW0108
    hide(chat.page, is_hidden=True)
    service.process.end()
    expect(chat.page.get_by_text("Reconnecting…")).to_be_attached()
    chat.page.clock.fast_forward("10:00")
    assert attempts == []
    service.start()
    hide(chat.page, is_hidden=False)
    expect(chat.page.locator("#notice")).to_be_hidden()
    assert len(attempts) == 1


def hide(page: Page, *, is_hidden: bool) -> None:
    page.evaluate(
        """(isHidden) => {
          Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_hidden,
    )


def test_an_outage_of_the_network_is_shown_and_a_message_without_any_answer_sent_again(
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
