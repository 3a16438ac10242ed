"""What clients send, as msgspec types, and the rules it must keep."""

import re
from collections.abc import Iterable

import msgspec

from chat.errors import BadRequest

MAX_MESSAGES = 1000
CONVERSATION_ID = re.compile(r"[A-Za-z0-9_-]{16,64}")


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation; `role` is user, assistant or, from us alone, system."""

    role: str
    content: str


class Exchange(msgspec.Struct, frozen=True, array_like=True):
    """What a client asked and what was replied; stored whole or not at all."""

    messages: tuple[Message, ...]  # the user's message or messages, and the assistant's reply
    tokens: int  # what they take in a prompt
    number: int = 0  # in the conversation, from 0; concurrent ones may share it
    is_exact: bool = False  # Groq has reported `tokens`


def flatten(exchanges: Iterable[Exchange]) -> list[Message]:
    """Return the messages of the exchanges, oldest first."""
    return [message for exchange in exchanges for message in exchange.messages]


class ChatRequest(msgspec.Struct):
    """The body of `POST /chat`, and a message on the WebSocket; unknown members are ignored."""

    messages: list[Message] = []
    stream: bool | None = None
    conversation: str | None = None
    cancel: bool = False  # on the WebSocket only


_REQUEST = msgspec.json.Decoder(ChatRequest)


def parse_request(body: bytes | str, *, may_cancel: bool = False) -> ChatRequest:
    """Decode and check what a client sent; raise `BadRequest` if it breaks a rule."""
    try:
        request = _REQUEST.decode(body)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`").lstrip(".")
        raise BadRequest(f"{path}: {what}" if path else what) from None
    except (RecursionError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise BadRequest(f"the body must be valid JSON in UTF-8: {error}") from None
    if not (may_cancel and request.cancel):
        _check(request)
    return request


def _check(request: ChatRequest) -> None:
    messages = request.messages
    if not messages:
        raise BadRequest("messages must not be empty")
    if len(messages) > MAX_MESSAGES:
        raise BadRequest(f"messages must not be more than {MAX_MESSAGES}, not {len(messages)}")
    for index, message in enumerate(messages):
        if message.role not in ("user", "assistant"):
            raise BadRequest(f"messages[{index}].role must be exactly 'user' or 'assistant'")
        if not message.content or message.content.isspace():
            raise BadRequest(f"messages[{index}].content must not be empty or only white space")
    if messages[-1].role != "user":
        raise BadRequest("the last message must be from 'user'")
    if request.conversation is not None:
        check_conversation_id(request.conversation)


def check_conversation_id(conversation: str) -> None:
    """Raise `BadRequest` unless the id has the form that makes it hard to guess."""
    if CONVERSATION_ID.fullmatch(conversation) is None:
        raise BadRequest("conversation must be 16 to 64 characters of A-Z a-z 0-9 _ -")
