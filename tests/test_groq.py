"""How Groq is asked, which responses are understood, and how long the service waits for them."""

import socket
import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import KEY, Service, free_port

INVALID = "the language model service sent an invalid response"
FAILED = "the language model service failed during the reply"


def test_groq_is_asked_as_its_protocol_says(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    service.reply("json please", conversation)
    service.tokens("stream please", conversation)
    whole, streamed = groq.requests
    assert whole.path == "/openai/v1/chat/completions"
    assert whole.headers["authorization"] == f"Bearer {KEY}"
    assert whole.headers["content-type"] == "application/json"
    options = {"model": "openai/gpt-oss-20b", "max_tokens": 1024}  # all that any server knows
    assert whole.body == {**options, "messages": [{"role": "user", "content": "json please"}]}
    messages = streamed.body.pop("messages")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    stream_options = {"stream": True, "stream_options": {"include_usage": True}}
    assert streamed.body == options | stream_options


def test_the_system_prompt_goes_first_and_is_never_stored(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(SYSTEM_PROMPT="Be kind.")
    service.reply("one", conversation)
    service.reply("two", conversation)
    assert groq.requests[-1].body["messages"][0] == {"role": "system", "content": "Be kind."}
    assert groq.requests[-1].contents[1:] == ["one", "You said: one", "two"]
    assert "Be kind." not in service.contents(conversation)


def test_connections_are_reused_and_cookies_are_not(
    start_service: StartService, groq: FakeGroq
) -> None:
    # A cookie jar ignores what an IP address sets.
    service = start_service(GROQ_BASE_URL=groq.url.replace("127.0.0.1", "localhost"))
    for cookie in ("\xff=\x01;;;=", "session=of-one-client; Path=/"):
        groq.on("question", Script(headers=(("set-cookie", cookie),)))
        for _ in range(2):
            service.tokens("question")
            service.reply("question")
    assert len({request.connection for request in groq.requests}) == 1
    assert not any("cookie" in request.headers for request in groq.requests)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"newline": "\r\n", "piece": 7},
        {"prompt_tokens": None, "reasoning": ["hm", "hm"]},
        {"done": False, "cut_at_end": True},
        {"finish_reason": None},
        {"headers": (("content-type", ""),)},
        {"headers": (("content-type", "Text/Event-Stream;charset=utf-8"),)},
    ],
    ids=str,
)
def test_each_form_of_a_good_stream_is_understood(
    service: Service, groq: FakeGroq, conversation: str, options: dict[str, Any]
) -> None:
    groq.on("question", Script(["Hello", "", " you"], **options))
    assert "".join(service.tokens("question", conversation)) == "Hello you"
    assert service.contents(conversation) == ["question", "Hello you"]


@pytest.mark.parametrize("content_type", ["", "application/json", "Application/JSON ; charset=x"])
def test_a_whole_reply_is_understood_even_from_a_server_that_cannot_stream(
    service: Service, groq: FakeGroq, content_type: str
) -> None:
    whole = b'{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}]}'
    headers = (("content-type", content_type),)
    groq.on("question", Script(body=whole, headers=headers))
    groq.on("failing question", Script(body=b'{"error":{"message":"no"}}', headers=headers))
    assert service.reply("question") == "Hi"
    if content_type:
        assert service.tokens("question") == ["Hi"]
        answer = service.chat("failing question", stream=True)
        assert (answer.status_code, answer.json()["error"]) == (502, FAILED)


def test_what_is_no_reply_by_its_headers_is_not_asked_for_again(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(GROQ_MAX_RETRIES=2)
    for header in (("content-type", "text/html"), ("content-encoding", "gzip")):
        groq.on("question", Script(body=b"<html>a wrong address</html>", headers=(header,)))
        for stream in (True, False):
            answer = service.chat("question", stream=stream)
            assert (answer.status_code, answer.json()["error"]) == (502, INVALID)
    assert len(groq.asked("question")) == 4


def test_a_server_that_is_not_there_is_a_502(start_service: StartService) -> None:
    for url in (f"http://127.0.0.1:{free_port()}/v1", "http://groq.invalid"):
        service = start_service(GROQ_BASE_URL=url)
        for stream in (True, False):
            answer = service.chat("question", stream=stream)
            assert answer.status_code == 502
            assert answer.json()["error"] == "the language model service is unreachable"


def test_a_server_that_does_not_accept_the_connection_is_a_504(start_service: StartService) -> None:
    with ExitStack() as stack:  # a queue of one, taken: the next connection gets no answer
        full, *waiting = [stack.enter_context(socket.socket()) for _ in range(4)]
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for connection in waiting:
            connection.setblocking(False)
            connection.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        service = start_service(GROQ_BASE_URL=url, GROQ_CONNECT_TIMEOUT=0.2)
        answer = service.chat("question", stream=False)
    assert answer.status_code == 504
    assert answer.elapsed.total_seconds() < 5


def test_only_silence_of_groqs_is_limited(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service(GROQ_TIMEOUT=0.8, GROQ_FIRST_EVENT_TIMEOUT=0.8)
    groq.on("steady", Script(["t"] * 12, interval=0.1))
    assert service.tokens("steady") == ["t"] * 12
    token = "x" * 65_536
    groq.on("large", Script([token] * 200))
    with service.stream("large") as (_, events):
        assert next(events).data == token
        time.sleep(1)  # a client that reads slowly
        assert [event.data for event in events] == [token] * 199 + ["[DONE]"]
    groq.on("thinks", Script(["t"], comments=0.05))
    groq.on("stalls", Script(["t", "t"], hold_before_token=1))
    for silent in ("thinks", "stalls"):
        assert "did not respond in time" in service.chat(silent, stream=True).text
        assert groq.wait_for_request(silent).is_closed_soon()


@pytest.mark.parametrize("done", [True, False])
def test_the_end_of_a_reply_does_not_wait_for_groq_to_end_the_response(
    service: Service, groq: FakeGroq, done: bool
) -> None:
    groq.on("question", Script(["a", "b"], prompt_tokens=None, done=done, hold_at_end=True))
    started = time.monotonic()
    assert service.tokens("question") == ["a", "b"]
    assert time.monotonic() - started < (0.9 if done else 3)
    assert groq.asked("question")[0].is_closed_soon()


def test_groq_is_reached_through_the_proxy_of_the_environment(
    start_service: StartService, groq: FakeGroq
) -> None:
    proxy = {
        "HTTP_PROXY": groq.url.removesuffix("/openai/v1"),
        "GROQ_BASE_URL": "http://groq.invalid/v1",
    }
    assert start_service(**proxy).reply("question") == "You said: question"
    assert groq.requests[-1].path == "http://groq.invalid/v1/chat/completions"
    assert start_service(**proxy, NO_PROXY=".invalid").chat("question").status_code == 502


def test_the_log_says_why_groq_cannot_be_reached_and_what_was_no_reply(
    start_service: StartService, groq: FakeGroq
) -> None:
    for settings, script, cause in (
        ({"GROQ_BASE_URL": "http://groq.invalid"}, Script(), "ClientConnectorDNSError"),
        ({"GROQ_BASE_URL": f"http://127.0.0.1:{free_port()}"}, Script(), "ClientConnectorError"),
        ({}, Script(body=b'data: {"choices":{}}\n\ndata: [DONE]\n\n'), "choices: object"),
        (
            {},
            Script(headers=(("content-encoding", "br"),)),
            "content type text/event-stream, encoding br",
        ),
    ):
        groq.reset()
        groq.on("question", script)
        service = start_service(**settings)
        assert service.chat("question", stream=True).status_code == 502
        assert service.log_line(status=502)["cause"] == cause
