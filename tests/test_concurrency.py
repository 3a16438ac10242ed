"""A hundred requests at once, over all transports, in shared and private conversations."""

import json
from collections.abc import Iterator
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


def pairs(contents: list[str]) -> Iterator[tuple[str, str]]:
    return zip(contents[::2], contents[1::2], strict=True)


def is_whole(exchange: tuple[str, str]) -> bool:
    return exchange[1] == f"You said: {exchange[0]}"


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
        exchanges = list(pairs(service.contents(f"private-conversation-{number:03}")))
        assert [asked for asked, _ in exchanges] == [f"caller {number} turn {t}" for t in range(3)]
        assert all(map(is_whole, exchanges))


def test_a_hundred_callers_share_one_conversation_without_tearing_it(
    service: Service, slow: FakeGroq
) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda number: ask(service, number, 0, None), range(CALLERS)))
    ask(service, 0, 1, None)
    seen = list(pairs(slow.requests[-1].contents[:-1]))
    assert len(seen) == 20
    assert all(map(is_whole, seen))
