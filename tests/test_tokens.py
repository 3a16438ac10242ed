"""Token counts: estimated, learned from Groq, and used to fit the history into the context."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import pytest

from chat.messages import Message
from chat.tokens import REMEMBERED, Count, TokenCounts, estimate, estimate_tokens
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service

TURNS = ("user", "assistant")
MEASURED = json.loads((Path(__file__).parent / "token_counts.json").read_text())


def user(content: str) -> Message:
    return Message("user", content)


@pytest.mark.parametrize("language", sorted({each["language"] for each in MEASURED["samples"]}))
def test_an_estimate_is_sensible_for_any_text_and_close_for_common_ones(language: str) -> None:
    samples = [each for each in MEASURED["samples"] if each["language"] == language]
    ratios = [estimate_tokens(each["text"]) / each["tokens"] for each in samples]
    assert 0.6 < min(ratios) <= max(ratios) < 1.6
    if language in ("english", "code", "arabic", "chinese"):
        assert len(ratios) >= 10
        assert sum(abs(ratio - 1) for ratio in ratios) / len(ratios) <= 0.15


def test_no_text_is_free() -> None:
    assert all(estimate_tokens(text) >= 1 for text in ("a", " ", "\n", "é", "你", "\x00"))


@pytest.mark.parametrize("unit", ["\r", " \r", " \n", "\u00a0", "(", "aB", "1a", "\u3000x", "\x00"])
def test_estimating_takes_time_that_grows_no_faster_than_the_text(unit: str) -> None:
    def duration(length: int) -> float:
        started_at = time.process_time()
        estimate_tokens("x" + unit * length + "zz")
        return time.process_time() - started_at

    short = min(duration(1 << 12) for _ in range(5))
    assert duration(1 << 17) < 20 * 32 * short, "32 times as long; its square would be 1024"


def count(counts: TokenCounts, *messages: Message) -> list[Count]:
    return asyncio.run(counts.count(messages))


def test_a_count_is_estimated_until_it_is_learned() -> None:
    counts = TokenCounts("a-model", None)
    assert not any(counts.learn(user("one"), nonsense) for nonsense in (-1, 0, 10**6))
    assert count(counts, user("one")) == [Count(estimate(user("one")), False)]
    assert counts.learn(user("one"), 71)
    other = Message("assistant", "one")  # the role is part of what was counted
    assert count(counts, user("one"), other) == [Count(71, True), Count(estimate(other), False)]


def test_only_the_counts_of_the_latest_messages_are_kept_in_the_process() -> None:
    counts = TokenCounts("a-model", None)
    for number in range(REMEMBERED):
        counts.learn(user(f"m{number}"), 7)
    count(counts, user("m0"))  # is used again
    counts.learn(user("another"), 7)
    exact = [each.is_exact for each in count(counts, user("m0"), user("m1"), user("another"))]
    assert exact == [True, False, True]


def lookups(service: Service) -> tuple[float, float]:
    """Return how many counts were known, and how many were not."""
    name = "token_cache_lookups_total"
    return service.metric(name, result="hit"), service.metric(name, result="miss")


def send(service: Service, texts: list[str], roles: Sequence[str] = TURNS, **fields: str) -> None:
    turns = zip(cycle(roles), texts, strict=False)
    messages = [{"role": role, "content": text} for role, text in turns]
    service.http.post("/chat", json={"messages": messages, **fields}).raise_for_status()


def test_a_turn_looks_up_what_is_new_and_never_the_history(
    service: Service, conversation: str
) -> None:
    for number in range(4):
        service.reply(f"{number} {conversation}", conversation)
    before = lookups(service)
    service.reply(f"new {conversation}", conversation)
    assert lookups(service) == (before[0], before[1] + 1)


def test_a_transcripts_counts_were_learned_from_the_replies_to_it(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on(f"one {conversation}", Script(["ok", conversation], prompt_tokens=71))
    groq.on(f"two {conversation}", Script(["fine", conversation], prompt_tokens=90))
    for content in ("one", "two"):
        service.reply(f"{content} {conversation}", conversation)
    contents = service.contents(conversation)
    before = lookups(service)
    send(service, [*contents, "three"], conversation=conversation)
    assert lookups(service) == (before[0] + 4, before[1] + 1), "by difference, the questions' too"


def test_nothing_is_learned_by_difference_from_two_unknown_messages(
    service: Service, conversation: str
) -> None:
    for first, misses in (("user", 4), ("assistant", 2)):  # the latter is only estimated
        before = lookups(service)
        for _ in range(2):
            send(service, [f"{misses} {conversation}"] * 2, (first, "user"))
        assert lookups(service) == (before[0], before[1] + misses)


@pytest.fixture(scope="module")
def narrow(module_groq: FakeGroq) -> Iterator[Service]:
    """A service whose prompts have room for 900 tokens."""
    settings = {"CONTEXT_TOKENS": 1000, "MAX_TOKENS": 100}
    with Service(GROQ_BASE_URL=module_groq.url, **settings) as running:
        yield running


def test_the_oldest_exchanges_are_left_out_in_quarters_of_max_exchanges_but_not_forgotten(
    narrow: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("n", Script(["ok"], prompt_tokens=None))
    for turn in range(40):
        narrow.reply(f"n{turn}." + " word" * 60, conversation)
    assert all(request.body["messages"][0]["role"] == "user" for request in groq.requests)
    begins = [int(request.contents[0].partition(".")[0][1:]) for request in groq.requests]
    assert begins == sorted(begins)
    assert set(begins) == set(range(0, 35, 5))
    assert len(narrow.contents(conversation)) == 40, "the last 20 exchanges"


def test_of_a_transcript_that_is_too_long_the_newest_exchanges_are_sent_and_all_are_stored(
    narrow: Service, groq: FakeGroq, conversation: str
) -> None:
    sent = [f"{number} {'word ' * 45}" for number in range(21)]
    send(narrow, sent, conversation=conversation)
    assert groq.requests[-1].contents == sent[10:], "from the sixth exchange, number 5"
    assert narrow.contents(conversation)[:-1] == sent


def test_a_message_too_large_by_itself_is_a_400_that_says_by_how_much(
    narrow: Service, groq: FakeGroq
) -> None:
    for stream in (True, False):
        answer = narrow.chat("word " * 2000, stream=stream)
        assert answer.status_code == 400
        assert "the message is too large by about 1" in answer.json()["error"]
        assert "at most 900 fit" in answer.json()["error"]
    assert groq.requests == []


def test_what_groq_reports_decides_what_fits(
    narrow: Service, groq: FakeGroq, conversation: str
) -> None:
    """A message that looks small but was reported as large leaves no room beside it."""
    groq.on("looks small", Script(["ok"], prompt_tokens=850, completion_tokens=10))
    narrow.reply("looks small", conversation)
    narrow.reply("and then a question of some words to fill the rest " * 4, conversation)
    assert len(groq.requests[-1].contents) == 1
    assert narrow.contents(conversation)[0] == "looks small"
