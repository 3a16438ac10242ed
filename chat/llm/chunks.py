"""What Groq sends: https://console.groq.com/docs/api-reference#chat-create, and odd forms of it."""

import codecs
import json
import re
from functools import reduce
from operator import getitem
from typing import Any

import msgspec

from chat.errors import GroqReplyBroken
from chat.reply import Usage

# Halves of surrogate pairs; those that are left out here stand for bytes that are not UTF-8.
LONE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


class GroqExtra(msgspec.Struct):
    id: str | None = None
    usage: Usage | None = None
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
    usage: Usage | None = None
    x_groq: GroqExtra | None = None
    error: Any = None


_CHUNKS = msgspec.json.Decoder(list[Chunk])


def decode(events: list[bytes]) -> list[Chunk] | None:
    """Decode the data of some events in one call; None if the strict decoder refuses them."""
    try:
        chunks = _CHUNKS.decode(b"[" + b",".join(events) + b"]")
    except (ValueError, RecursionError):
        return None
    return chunks if len(chunks) == len(events) else None  # two objects in one event


def load(received: bytes) -> Any:
    """Decode any JSON, with surrogates for what is not UTF-8; return anything else as text."""
    try:
        loaded = json.loads(received.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return received.decode(errors="replace")
    return loaded[0] if isinstance(loaded, list) and loaded else loaded  # as Gemini sends errors


def decode_leniently(event: bytes) -> tuple[Chunk, str]:
    """Decode one event; return also the path and kind of the first member that was passed over."""
    loaded, odd = load(event), ""
    for _ in range(100 if isinstance(loaded, dict) else 0):
        try:
            return msgspec.convert(loaded, Chunk), odd
        except msgspec.ValidationError as error:
            kind, path = re.findall(r"(?:, got `(\w+)`)? - at `\$\.(.+)`", str(error))[0]
        *way, last = [int(n) if n.isdigit() else n for n in re.findall(r"\w+", path)]
        holder = reduce(getitem, way, loaded)
        found, odd = holder.pop(last), odd or f"{path}: {kind or 'out of range'}"
        if last == "content" and isinstance(found, list):
            parts = [part for part in found if isinstance(part, dict)]
            texts = [part.get("text") for part in parts if part.get("type") == "text"]
            holder[last] = "".join(text for text in texts if isinstance(text, str))
    raise GroqReplyBroken(cause=odd or "an event that is no JSON object")


class CharacterJoiner:
    """Join the halves of characters that were cut between tokens; a half alone becomes U+FFFD."""

    def __init__(self) -> None:
        self._pairs = codecs.getincrementaldecoder("utf-16-le")("surrogatepass")
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def join(self, token: str, *, is_last: bool) -> str:
        text = self._pairs.decode(token.encode("utf-16-le", "surrogatepass"), is_last)
        received = LONE.sub("\ufffd", text).encode(errors="surrogateescape")
        return self._bytes.decode(received, is_last)
