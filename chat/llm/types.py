"""
What Groq sends, as msgspec types: https://console.groq.com/docs/api-reference#chat-create
Members that other OpenAI-compatible servers leave out, or send as null, are optional.
"""

from typing import Any

import msgspec

from chat.reply import Usage

# A malformed usage or error cannot invalidate a good chunk: they may be anything.


class GroqExtra(msgspec.Struct):
    id: str | None = None
    usage: Any = None
    error: Any = None


class Delta(msgspec.Struct, gc=False):
    content: str | None = None
    refusal: str | None = None


class Choice(msgspec.Struct, gc=False):
    delta: Delta | None = None
    message: Delta | None = None
    finish_reason: str | None = None
    error: Any = None


class Chunk(msgspec.Struct, gc=False):
    """One event of a streamed reply, or a whole reply: they differ in `delta` and `message`."""

    choices: list[Choice] | None = None
    usage: Any = None
    x_groq: GroqExtra | None = None
    error: Any = None


def read_usage(reported: Any) -> Usage | None:
    """Return what a reply cost; None if that is missing or malformed."""
    try:
        return msgspec.convert(reported, Usage | None)
    except msgspec.ValidationError:
        return None
