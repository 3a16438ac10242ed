"""
What callers send and what Groq sends, as types that msgspec decodes and checks.

Groq's side is https://console.groq.com/docs/api-reference#chat-create; members that other
OpenAI-compatible servers leave out, or send as null, are optional here.
"""

import re
from collections.abc import Iterator
from typing import Annotated, TypeVar

import msgspec

from chat.errors import BadRequest

MAX_MESSAGES = 1000
CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation; `role` is user, assistant or, from us alone, system."""

    role: str
    content: str


class ChatRequest(msgspec.Struct):
    """The body of `POST /chat`; fields that are not named here are ignored."""

    messages: list[Message] = []
    stream: bool | None = None
    conversation: str | None = None

    def __post_init__(self) -> None:
        check_messages(self.messages)
        if self.conversation is not None:
            check_conversation_id(self.conversation)


class SocketRequest(ChatRequest):
    """A text message on the WebSocket: the same body, or `{"cancel": true}`."""

    cancel: bool = False

    def __post_init__(self) -> None:
        if not self.cancel:
            super().__post_init__()


def check_messages(messages: list[Message]) -> None:
    """Raise `BadRequest` where the messages break a rule of the contract."""
    if not messages:
        raise BadRequest("messages must not be empty")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"messages must be at most {MAX_MESSAGES}, not {len(messages)}")
    for index, message in enumerate(messages):
        if message.role not in ("user", "assistant"):
            raise BadRequest(f"messages[{index}].role must be exactly 'user' or 'assistant'")
        if not message.content or message.content.isspace():
            raise BadRequest(f"messages[{index}].content must not be empty or only white space")
    if messages[-1].role != "user":
        raise BadRequest("the last of the messages must be from 'user'")


def check_conversation_id(conversation: str) -> None:
    """Raise `BadRequest` unless the id has the form that makes it hard to guess."""
    if CONVERSATION_ID.fullmatch(conversation) is None:
        raise BadRequest("conversation must be 16 to 64 characters of A-Z a-z 0-9 _ -")


RequestType = TypeVar("RequestType", bound=ChatRequest)


def parse_request(kind: type[RequestType], body: bytes | str) -> RequestType:
    """
    Decode and check what a caller sent.

    Raises:
        BadRequest: it is not JSON, or it breaks a rule; the text says which.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise BadRequest(_readable(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = str(error)
        if isinstance(error, RecursionError):
            what = "nested too deeply"
        elif isinstance(error, UnicodeDecodeError):
            what = "a string is not UTF-8"
        raise BadRequest(f"the body must be valid JSON in UTF-8: {what}") from None


def _readable(text: str) -> str:
    what, _, place = text.partition(" - at `$")
    place = place.rstrip("`").lstrip(".")
    return f"{place}: {what}" if place else what


Tokens = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] | None


class Usage(msgspec.Struct):
    """What a reply cost, in tokens."""

    class Details(msgspec.Struct):
        reasoning_tokens: Tokens = None

    prompt_tokens: Tokens = None
    completion_tokens: Tokens = None
    completion_tokens_details: Details | None = None

    @property
    def reply_tokens(self) -> int:
        """The tokens of the reply's text, without those of the model's reasoning."""
        details = self.completion_tokens_details
        reasoning = details.reasoning_tokens if details else None
        return (self.completion_tokens or 0) - (reasoning or 0)


NULL = msgspec.Raw(b"null")
"""What may be anything is not decoded with the rest, which is good where that is nonsense."""


class GroqExtra(msgspec.Struct):
    """Groq's own member of a chunk."""

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

    @property
    def is_error(self) -> bool:
        return self.error != NULL or (self.x_groq is not None and self.x_groq.error != NULL)

    @property
    def reported_usage(self) -> Usage | None:
        """What the reply cost; None where that is not said, or is nonsense: a reply is good
        without it."""
        return _usage(self.usage) or (_usage(self.x_groq.usage) if self.x_groq else None)

    @property
    def groq_id(self) -> str | None:
        return self.x_groq.id if self.x_groq else None


def _usage(reported: msgspec.Raw) -> Usage | None:
    try:
        return _USAGE.decode(reported)
    except (ValueError, RecursionError):
        return None


_CHUNK = msgspec.json.Decoder(Chunk)
_USAGE: msgspec.json.Decoder[Usage | None] = msgspec.json.Decoder(Usage | None)
_CHUNKS = msgspec.json.Decoder(list[Chunk])


def decode_chunks(events: list[bytes]) -> list[Chunk]:
    """Decode the data of some events in one go; stop before the first that is not a chunk."""
    try:
        if len(events) == 1:
            return [_CHUNK.decode(events[0])]
        chunks = _CHUNKS.decode(b"[" + b",".join(events) + b"]")
        if len(chunks) == len(events):  # else one holds several, which by itself is none
            return chunks
    except (ValueError, RecursionError):
        pass
    return list(_decode_one_by_one(events))


def _decode_one_by_one(events: list[bytes]) -> Iterator[Chunk]:
    for event in events:
        try:
            yield _CHUNK.decode(event)
        except (ValueError, RecursionError):
            return


def decode_reply(body: bytes) -> Chunk | None:
    """Decode a reply that came as a whole; None where it is none."""
    chunks = decode_chunks([body])
    return chunks[0] if len(chunks) == 1 else None


class _Models(msgspec.Struct):
    class Entry(msgspec.Struct):
        id: str

    data: list[Entry]


def decode_model_names(body: bytes) -> set[str] | None:
    """Decode the answer of `GET /models` to the names in it; None where it is none."""
    try:
        return {entry.id for entry in msgspec.json.decode(body, type=_Models).data}
    except (ValueError, RecursionError):
        return None
