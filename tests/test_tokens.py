"""Token counts: estimated, learned from Groq, and used to fit the history into the context."""

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chat import tokens as tokens_module
from chat.messages import Message
from chat.tokens import Count, TokenCounts, estimate_tokens
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service

MEASURED = json.loads((Path(__file__).parent / "token_counts.json").read_text())


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def samples(language: str) -> list[dict[str, Any]]:
    return [each for each in MEASURED["samples"] if each["language"] == language]


@pytest.mark.parametrize("language", ["english", "code", "arabic", "chinese"])
def test_an_estimate_is_close_to_a_real_tokenizer(language: str) -> None:
    errors = [
        abs(estimate_tokens(each["text"]) - each["tokens"]) / each["tokens"]
        for each in samples(language)
    ]
    assert len(errors) >= 10
    assert sum(errors) / len(errors) <= 0.15


@pytest.mark.parametrize("language", sorted({each["language"] for each in MEASURED["samples"]}))
def test_an_estimate_is_sensible_for_any_text(language: str) -> None:
    for each in samples(language):
        assert 0.6 < estimate_tokens(each["text"]) / each["tokens"] < 1.6, each["text"]


def test_no_text_is_free() -> None:
    assert all(estimate_tokens(text) >= 1 for text in ("a", " ", "\n", "é", "你", "\x00"))


@pytest.mark.parametrize("unit", ["\r", " \r", " \n", "\u00a0", "(", "aB", "1a", "\u3000x", "\x00"])
def test_an_estimate_of_any_text_takes_time_that_grows_with_its_length_only(unit: str) -> None:
    estimate_tokens("x" + unit * (1 << 19) + "zz")  # hours, if it grew with the square


class Counted:
    """The counts of a model, asked and taught as the service does it."""

    def __init__(self) -> None:
        self.counts = TokenCounts("a-model", None)

    def count(self, *messages: Message) -> list[Count]:
        return asyncio.run(self.counts.count(messages))

    def learn(
        self, prompt: Sequence[Message], prompt_tokens: int, reply: str, reply_tokens: int
    ) -> None:
        self.counts.learn(
            prompt,
            self.count(*prompt),
            prompt_tokens=prompt_tokens,
            reply=assistant(reply),
            reply_tokens=reply_tokens,
        )


def test_a_count_is_estimated_until_it_is_learned() -> None:
    counted = Counted()
    assert not counted.count(user("one"))[0].is_exact
    counted.learn([user("one")], 71, "reply", 5)
    assert counted.count(user("one"), assistant("reply")) == [Count(71, True), Count(5, True)]
    assert not counted.count(assistant("one"))[0].is_exact, "the role is part of what was counted"


def test_a_new_message_is_learned_by_difference() -> None:
    counted = Counted()
    counted.learn([user("one")], 71, "reply", 5)
    counted.learn([user("one"), assistant("reply"), user("two")], 90, "again", 3)
    assert counted.count(user("two")) == [Count(14, True)]


def test_nothing_is_learned_by_difference_from_two_unknown_messages() -> None:
    counted = Counted()
    counted.learn([user("one"), assistant("unseen"), user("two")], 90, "reply", 3)
    exact = [count.is_exact for count in counted.count(user("one"), user("two"))]
    assert exact == [False, False]


def test_what_makes_no_sense_is_not_learned() -> None:
    counted = Counted()
    counted.learn([user("one")], 0, "reply", 0)
    counted.learn([user("one")], 10**9, "reply", 10**9)
    exact = [count.is_exact for count in counted.count(user("one"), assistant("reply"))]
    assert exact == [False, False]


def test_the_counts_in_the_process_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "REMEMBERED", 3)
    counted = Counted()
    counted.learn([user("one")], 10, "first reply", 5)
    counted.learn([user("two")], 10, "second reply", 5)
    exact = [count.is_exact for count in counted.count(user("one"), user("two"))]
    assert exact[1]
    counted.learn([user("three")], 10, "third reply", 5)
    exact = [count.is_exact for count in counted.count(user("one"), user("three"))]
    assert exact == [False, True]


def talk(service: Service, groq: FakeGroq, conversation: str, turns: int, cost: int) -> list[int]:
    """Hold a conversation in which each message costs as much; return how many went along."""
    went = []
    for turn in range(turns):
        groq.on(f"n{turn}.", Script(["ok"], prompt_tokens=None))
        service.reply(f"n{turn}." + " word" * cost, conversation)
        went.append((len(groq.requests[-1].contents) - 1) // 2)
    return went


def test_the_oldest_exchanges_are_left_out_but_not_forgotten(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(CONTEXT_TOKENS=2000, MAX_TOKENS=100)
    went = talk(service, groq, conversation, 10, 300)
    assert went[:4] == [0, 1, 2, 3]
    assert max(went) < 7
    assert len(service.contents(conversation)) == 20
    first = groq.requests[-1].body["messages"][0]
    assert first["role"] == "user"


def test_the_prompt_keeps_its_beginning_over_several_turns(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(CONTEXT_TOKENS=4000, MAX_TOKENS=100)
    talk(service, groq, conversation, 30, 300)
    beginnings = [request.contents[0] for request in groq.requests]
    changes = sum(a != b for a, b in itertools.pairwise(beginnings))
    assert 2 <= changes <= 8


@pytest.mark.parametrize("stream", [True, False])
def test_a_message_too_large_by_itself_is_a_400_that_says_by_how_much(
    start_service: StartService, groq: FakeGroq, stream: bool
) -> None:
    service = start_service(CONTEXT_TOKENS=1000, MAX_TOKENS=100)
    answer = service.chat("word " * 2000, stream=stream)
    assert answer.status_code == 400
    assert "the message is too large by about 1" in answer.json()["error"]
    assert "at most 900 fit beside a reply of up to 100" in answer.json()["error"]
    assert groq.requests == []


def test_what_groq_reports_decides_what_fits(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    """A message that looks small but was reported as large leaves no room beside it."""
    service = start_service(CONTEXT_TOKENS=1000, MAX_TOKENS=100)
    groq.on("looks small", Script(["ok"], prompt_tokens=850, completion_tokens=10))
    service.reply("looks small", conversation)
    service.reply(
        "and then another question of some words to fill the rest of the room " * 4, conversation
    )
    assert len(groq.requests[-1].contents) == 1
    assert service.contents(conversation)[0] == "looks small"
