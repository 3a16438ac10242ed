"""
What Groq sends, as msgspec types: https://console.groq.com/docs/api-reference#chat-create
Members that other OpenAI-compatible servers leave out, or send as null, are optional.
"""

from contextlib import suppress

import msgspec

from chat.reply import Usage

NULL = msgspec.Raw(b"null")  # decoded lazily, so that a malformed one cannot invalidate the chunk
MALFORMED = (ValueError, RecursionError)  # raised by decoding


class GroqExtra(msgspec.Struct):
    id: str | None = None
    usage: msgspec.Raw = NULL
    error: msgspec.Raw = NULL


class Delta(msgspec.Struct, gc=False):
    content: str | None = None


class Choice(msgspec.Struct, gc=False):
    delta: Delta | None = None
    message: Delta | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct, gc=False):
    """One event of a streamed reply, or a whole reply: they differ in `delta` and `message`."""

    choices: list[Choice] | None = None
    usage: msgspec.Raw = NULL
    x_groq: GroqExtra | None = None
    error: msgspec.Raw = NULL


_CHUNK = msgspec.json.Decoder(Chunk)
_CHUNKS = msgspec.json.Decoder(list[Chunk])
_USAGE: msgspec.json.Decoder[Usage | None] = msgspec.json.Decoder(Usage | None)


def decode_usage(reported: msgspec.Raw) -> Usage | None:
    """Return what a reply cost; None if that is missing or malformed."""
    with suppress(*MALFORMED):
        return _USAGE.decode(reported)
    return None


def decode_chunks(events: list[bytes]) -> list[Chunk]:
    """Decode the data of some events in one call; stop before the first that is not a chunk."""
    try:
        chunks = _CHUNKS.decode(b"[" + b",".join(events) + b"]")
        if len(chunks) == len(events):  # one event with a comma in it could be read as two
            return chunks
    except MALFORMED:
        pass
    chunks = []
    with suppress(*MALFORMED):
        for event in events:
            chunks.append(_CHUNK.decode(event))
    return chunks
