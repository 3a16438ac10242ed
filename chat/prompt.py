"""The prompt: which exchanges are sent along with a question. Pure functions."""

from collections.abc import Sequence

from chat.errors import BadRequest
from chat.messages import Exchange, Message


def split(
    messages: Sequence[Message],
) -> tuple[list[Message], list[tuple[Message, ...]], list[Message]]:
    """Return the assistant's messages at the beginning, the exchanges, and the new messages."""
    parts: list[tuple[Message, ...]] = []
    begin = 0
    for end in range(1, len(messages)):
        if messages[end - 1].role == "assistant" and messages[end].role == "user":
            parts.append(tuple(messages[begin:end]))
            begin = end
    leading = parts.pop(0) if parts and parts[0][0].role == "assistant" else ()
    return list(leading), parts, list(messages[begin:])


def fit(history: Sequence[Exchange], *, fixed: int, room: int, step: int) -> Sequence[Exchange]:
    """
    Return the newest exchanges that fit into `room`, in tokens, beside what is `fixed`; raise
    `BadRequest` if that alone does not fit.

    Groq's prompt cache holds only for an unchanged beginning: if any must be left out, the prompt
    begins at a number that is a multiple of `step`, so that the next prompts begin there too.
    """
    if (excess := fixed - room) > 0:
        raise BadRequest(f"the message is too large by about {excess} tokens: at most {room} fit")
    total, fitting = fixed + sum(exchange.tokens for exchange in history), []
    for begin, exchange in enumerate(history):
        if total <= room:
            fitting.append(begin)
        total -= exchange.tokens
    aligned = [begin for begin in fitting if begin == 0 or history[begin].number % step == 0]
    return history[min(aligned or fitting, default=len(history)) :]
