"""The prompt: what a request consists of, and which exchanges go along."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.errors import BadRequest
from chat.messages import Exchange, Message
from chat.prompt import fit, split


def messages(text: str) -> tuple[Message, ...]:
    """Return one message for each letter; capitals are the assistant's."""
    return tuple(Message("assistant" if each.isupper() else "user", each) for each in text)


def test_a_request_is_exchanges_and_what_is_new() -> None:
    for sent, leading, exchanges, new in (
        ("a", "", (), "a"),
        ("ab", "", (), "ab"),
        ("aAb", "", ("aA",), "b"),
        ("abAcBd", "", ("abA", "cB"), "d"),
        ("AbBCcd", "A", ("bBC",), "cd"),
        ("ABc", "AB", (), "c"),
    ):
        expected = (messages(leading), [messages(each) for each in exchanges], messages(new))
        assert split(messages(sent)) == expected


def sent(costs: list[int], *, first: int = 0, fixed: int = 10) -> list[int]:
    """Return the numbers of the exchanges that are sent, of some that take so many tokens."""
    history = [Exchange((), tokens, number) for number, tokens in enumerate(costs, first)]
    return [exchange.number for exchange in fit(history, fixed=fixed, room=90, step=5)]


def test_the_history_is_sent_while_it_fits_and_then_from_a_multiple_of_the_step_on() -> None:
    assert sent([]) == []
    assert sent([40, 40], first=3) == [3, 4]
    assert sent([10] * 9, first=3) == [5, 6, 7, 8, 9, 10, 11]
    assert sent([10] * 9, first=1) == [5, 6, 7, 8, 9]
    assert sent([50, 40, 40], first=5) == [6, 7], "no multiple fits, so the earliest that does"
    assert sent([20, 20], fixed=80) == []


def test_a_message_too_large_by_itself_is_refused_with_the_excess() -> None:
    assert sent([], fixed=90) == []
    with pytest.raises(BadRequest, match=r"too large by about 7 tokens: at most 90 fit"):
        sent([], fixed=97)


@given(st.lists(st.integers(1, 10), min_size=20, max_size=60))
def test_a_long_conversation_changes_its_beginning_every_few_turns_only(costs: list[int]) -> None:
    beginnings = []
    for number, cost in enumerate(costs):
        numbers = sent(costs[:number], fixed=cost)
        assert numbers == list(range(number - len(numbers), number))
        assert sum(costs[number - len(numbers) : number]) + cost <= 90
        beginnings.append(number - len(numbers))
    assert beginnings == sorted(beginnings)
    assert all(begin % 5 == 0 for begin in beginnings)


def test_exchanges_that_share_a_number_are_left_out_together_or_not() -> None:
    history = [Exchange((), 20, number) for number in (4, 5, 5, 6)]
    assert fit(history, fixed=10, room=70, step=5) == history[1:]
