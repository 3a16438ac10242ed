"""The prompt: which exchanges are sent along with a question. Pure functions."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from chat.errors import BadRequest
from chat.messages import Exchange, Message

Messages = tuple[Message, ...]


def split(messages: Sequence[Message]) -> tuple[Messages, list[Messages], Messages]:
    """Return the assistant's messages at the beginning, the exchanges, and the new messages."""
    turns = enumerate(pairwise(message.role for message in messages), 1)
    begins = [number for number, roles in turns if roles == ("assistant", "user")]
    *parts, new = [tuple(messages[a:b]) for a, b in pairwise([0, *begins, len(messages)])]
    leading = parts.pop(0) if parts and parts[0][0].role == "assistant" else ()
    return leading, parts, new


def fit(history: Sequence[Exchange], *, fixed: int, room: int, step: int) -> Sequence[Exchange]:
    """Return the newest exchanges that fit into `room` tokens beside what is `fixed`."""
    if (excess := fixed - room) > 0:
        raise BadRequest(f"the message is too large by about {excess} tokens: at most {room} fit")
    sizes = accumulate(exchange.tokens for exchange in reversed(history))
    begin = len(history) - sum(size <= room - fixed for size in sizes)
    # The next prompts begin there too: Groq's prompt cache holds for an unchanged beginning only.
    aligned = (n for n in range(begin, len(history)) if n == 0 or history[n].number % step == 0)
    return history[next(aligned, begin) :]
