"""
The prompt: which of the exchanges before it go along with what a caller asks.

Pure functions of messages and token counts.
"""

from collections.abc import Sequence

from chat.errors import BadRequest
from chat.history import Exchange, flatten
from chat.messages import Message


def without_overlap(
    history: Sequence[Exchange], sent: list[Message], *, is_full: bool
) -> list[Message]:
    """
    Return what is new in a request that may send the transcript over again.

    The longest tail of the history that the request begins with is left out. A history that
    `is_full` has forgotten its beginning: then a transcript is also known by the whole history
    standing further on in it, and what comes before that is forgotten too.
    """
    stored = flatten(history)
    longest = len(sent) if is_full else min(len(sent), len(stored) + 1)
    for end in range(longest - 1, 0, -1):
        if sent[end - 1] != stored[-1]:
            continue
        tail = stored[-end:]
        if sent[max(0, end - len(tail)) : end] == tail:
            return sent[end:]
    return sent


def split(
    sent: Sequence[Message], history: Sequence[Exchange] = ()
) -> tuple[list[Exchange], list[Message]]:
    """
    Return the exchanges that a request tells of, and the messages that it asks to reply to.

    Args:
        sent: the messages that are new.
        history: the stored exchanges before them, which then go along as far as they did before.
    """
    preceding = history[-1].preceding + 1 if history else 0
    told: list[Exchange] = []
    begin = 0
    for end, message in enumerate(sent, 1):
        if message.role == "assistant":
            told.append(Exchange(tuple(sent[begin:end]), preceding=preceding + len(told)))
            begin = end
    return told, list(sent[begin:])


def fit(
    history: Sequence[Exchange],
    costs: Sequence[int],
    *,
    fixed: int,
    max_tokens: int,
    context_tokens: int,
) -> int:
    """
    Return how many of the newest exchanges go along.

    All of them, if they fit. Else they begin where the last prompt began, as long as that fits:
    Groq's prompt cache holds only for an unchanged beginning. When more must be left out, enough
    are to leave a quarter of the context free, so that the next turns can begin there again.

    Args:
        history: the exchanges before the new messages, oldest first.
        costs: the tokens of each of them.
        fixed: the tokens of what always goes: the system prompt and the new messages.
        max_tokens: the tokens kept free for the reply.
        context_tokens: what all of it has to fit into.

    Raises:
        BadRequest: `fixed` does not fit even by itself.
    """
    room = context_tokens - max_tokens - fixed
    if room < 0:
        raise BadRequest(
            f"the message is too large by about {-room} tokens: at most "
            f"{context_tokens - max_tokens} fit beside a reply of up to {max_tokens}"
        )
    kept = len(history)
    if sum(costs) <= room:
        return kept
    kept = min(kept, history[-1].preceding + 1)
    if _newest(costs, kept) <= room:
        return kept
    while kept and _newest(costs, kept) > room - context_tokens // 4:
        kept -= 1
    return kept


def newest(history: Sequence[Exchange], max_messages: int) -> Sequence[Exchange]:
    """Return the newest exchanges that have no more messages than that: each is looked at."""
    kept, messages = 0, 0
    for exchange in reversed(history):
        messages += len(exchange.messages)
        if messages > max_messages:
            break
        kept += 1
    return history[len(history) - kept :]


def _newest(costs: Sequence[int], count: int) -> int:
    return sum(costs[len(costs) - count :])
