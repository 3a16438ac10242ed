"""Which exchanges go along: overlap with a transcript, and fitting into the context."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.context import fit, newest, split, without_overlap
from chat.errors import BadRequest
from chat.history import Exchange
from chat.messages import Message


def messages(text: str) -> list[Message]:
    """Return one message for each letter; capitals are the assistant's."""
    return [Message("assistant" if each.isupper() else "user", each) for each in text]


def history(*exchanges: str) -> list[Exchange]:
    return [Exchange(tuple(messages(each))) for each in exchanges]


def letters(new: list[Message]) -> str:
    return "".join(message.content for message in new)


@pytest.mark.parametrize(
    ("stored", "sent", "new"),
    [
        ([], "a", "a"),
        (["aA"], "b", "b"),
        (["aA"], "aAb", "b"),
        (["aA", "bB"], "aAbBc", "c"),
        (["aA", "bB"], "bBc", "c"),
        (["aA", "bB"], "Bc", "c"),
        (["aA", "bB"], "aAc", "aAc"),
        (["aA", "aA"], "aAaAb", "b"),
        (["aA", "aA"], "aAb", "b"),
        (["aA"], "xaAb", "xaAb"),
        (["aA"], "a", "a"),
        (["abB"], "bBc", "c"),
        (["aA"], "aAbBc", "bBc"),
    ],
)
def test_the_longest_tail_that_a_request_begins_with_is_not_new(
    stored: list[str], sent: str, new: str
) -> None:
    assert letters(without_overlap(history(*stored), messages(sent), is_full=False)) == new


@pytest.mark.parametrize(
    ("sent", "new"), [("aAbBcCd", "d"), ("bBcCd", "d"), ("cCd", "d"), ("aAcCd", "aAcCd")]
)
def test_a_full_history_is_found_further_on_in_a_long_transcript(sent: str, new: str) -> None:
    stored = history("bB", "cC")
    assert letters(without_overlap(stored, messages(sent), is_full=True)) == new


@pytest.mark.parametrize(
    ("sent", "told", "new"),
    [
        ("a", [], "a"),
        ("ab", [], "ab"),
        ("aAb", ["aA"], "b"),
        ("abAcBd", ["abA", "cB"], "d"),
        ("AbBCcd", ["A", "bB", "C"], "cd"),
    ],
)
def test_a_transcript_is_exchanges_and_what_is_asked_after_them(
    sent: str, told: list[str], new: str
) -> None:
    exchanges, asked = split(messages(sent))
    assert [letters([*each.messages]) for each in exchanges] == told
    assert letters(asked) == new


def kept(costs: list[int], *, fixed: int = 10, context: int = 100, preceding: int = 99) -> int:
    stored = [Exchange((), preceding) for _ in costs]
    return fit(stored, costs, fixed=fixed, max_tokens=10, context_tokens=context)


def test_all_goes_along_while_it_fits() -> None:
    assert kept([]) == 0
    assert kept([40, 40]) == 2


def test_when_some_must_go_a_quarter_is_left_free() -> None:
    assert kept([20, 20, 20, 21]) == 2  # 41 + 10 + 10 fit into 75, with another 20 not


def test_a_large_message_leaves_all_the_history_out() -> None:
    assert kept([20, 20], fixed=80) == 0


def test_a_message_too_large_by_itself_is_refused_with_the_excess() -> None:
    assert kept([], fixed=90) == 0
    with pytest.raises(BadRequest, match=r"too large by about 7 tokens: at most 90 fit beside"):
        kept([], fixed=97)


def test_the_prompt_begins_where_the_last_one_began_while_that_fits() -> None:
    assert kept([30, 20, 20, 20], preceding=2) == 3
    assert kept([30, 20, 20, 20], preceding=1) == 2
    assert kept([10, 10], preceding=0) == 2, "what fits is not left out"


@given(st.lists(st.integers(1, 30), max_size=60))
def test_a_long_conversation_changes_its_beginning_rarely(costs: list[int]) -> None:
    stored: list[Exchange] = []
    beginnings = []
    for number, cost in enumerate(costs):
        count = fit(stored, costs[:number], fixed=cost, max_tokens=10, context_tokens=200)
        assert sum(costs[number - count : number]) + cost + 10 <= 200
        beginnings.append(number - count)
        stored.append(Exchange((), count))
    assert beginnings == sorted(beginnings)
    changes = len(set(beginnings)) - 1
    assert changes <= sum(costs) / 20, (
        "each change frees a quarter, 50 tokens, but for one exchange"
    )


def test_only_so_many_messages_of_the_history_are_looked_at() -> None:
    history = [Exchange(tuple(Message("user", "m") for _ in range(size))) for size in (1, 5, 3, 2)]
    assert newest(history, 100) == history
    assert newest(history, 5) == history[2:]
    assert newest(history, 1) == []
    assert newest([], 5) == []
