"""A hundred requests at once, over all transports, in shared and private conversations."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body

CALLERS = 100


def ask(service: Service, number: int, turn: int, conversation: str | None) -> str:
    content = f"caller {number} turn {turn}"
    if number % 3 == 0:
        return service.reply(content, conversation)
    if number % 3 == 1:
        return "".join(service.tokens(content, conversation))
    with service.socket() as socket:
        socket.send(json.dumps(body(content, conversation)))
        text = ""
        while "token" in (message := json.loads(socket.recv(30))):
            text += message["token"]
        assert message == {"done": "true"}
        return text


def exchanges(contents: list[str]) -> list[str]:
    """Return the questions, each of which has its own reply."""
    asked, replies = contents[::2], contents[1::2]
    assert replies == [f"You said: {question}" for question in asked]
    return asked


@pytest.fixture
def slow(groq: FakeGroq) -> FakeGroq:
    """A Groq whose replies take long enough to overlap."""
    groq.on("caller", Script(interval=0.02))
    return groq


def test_a_hundred_private_conversations_stay_whole_and_apart(
    service: Service, slow: FakeGroq
) -> None:
    def converse(number: int) -> None:
        for turn in range(3):
            reply = ask(service, number, turn, f"private-conversation-{number:03}")
            assert reply == f"You said: caller {number} turn {turn}"

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(converse, range(CALLERS)))
    for number in range(CALLERS):
        asked = exchanges(service.contents(f"private-conversation-{number:03}"))
        assert asked == [f"caller {number} turn {turn}" for turn in range(3)]


def test_a_hundred_callers_share_one_conversation_without_tearing_it(
    service: Service, slow: FakeGroq
) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda number: ask(service, number, 0, None), range(CALLERS)))
    ask(service, 0, 1, None)
    assert len(exchanges(slow.requests[-1].contents[:-1])) == 20
