"""What clients send, as msgspec types, and the rules it must keep."""

import re
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from chat.errors import BadRequest, MissingMessages

MAX_MESSAGES = 1000
NO_MESSAGES: "list[Message]" = []  # is what tells a request without `messages`
JSON_KINDS = {"bool": "true or false", "str": "a string", "array": "an array"}
JSON_KINDS |= {"object": "an object", "int": "a number", "float": "a number"}
HALF_CHARACTER = re.compile(rb"(?i)\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]")


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

    messages: list[Message] = msgspec.field(default_factory=lambda: NO_MESSAGES)
    stream: bool | None = None
    conversation: str | None = None
    reply: str | None = None  # a name under which the reply can be read again
    cancel: bool = False  # on the WebSocket only
    after: Annotated[int, msgspec.Meta(ge=0)] = 0  # likewise: a position in the reply's text


def parse_request(received: bytes, *, may_cancel: bool = False) -> ChatRequest:
    """Decode and check what a client sent; raise `BadRequest` if it breaks a rule."""
    received = received.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    if not received.strip():
        raise BadRequest(str(MissingMessages()).replace("messages is missing", "the body is empty"))
    try:
        request = _decode(received)
    except msgspec.ValidationError as error:
        raise BadRequest(_in_the_words_of_json(str(error))) from None
    except (RecursionError, ValueError) as error:
        raise BadRequest(f"the body must be valid JSON in UTF-8: {_why(error, received)}") from None
    check_id("reply", request.reply)
    if not (may_cancel and (request.cancel or (request.reply and not request.messages))):
        if request.messages is NO_MESSAGES:
            raise MissingMessages
        _check(request)
    return request


def _decode(received: bytes) -> ChatRequest:
    try:
        return msgspec.json.decode(received, type=ChatRequest)
    except msgspec.ValidationError:
        decoded = msgspec.json.decode(received)
        messages = decoded.get("messages") if isinstance(decoded, dict) else None
        for index, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict) and isinstance(message.get("content"), list):
                message["content"] = _joined(message["content"], f"messages[{index}].content")
        return msgspec.convert(decoded, ChatRequest)


def _joined(parts: list[Any], path: str) -> str:
    """Return the text of a content that is a list of parts, as OpenAI's clients send it."""
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            wrong = f", not {kind[:40]}" if isinstance(kind, str) and kind != "text" else ""
            wanted = '{"type": "text", "text": "..."}'
            raise BadRequest(f"{path}[{index}] must be {wanted}{wrong}")
    return "".join(part["text"] for part in parts)


def _in_the_words_of_json(error: str) -> str:
    """Translate an error of msgspec's, such as "Expected `str`, got `int` - at `$.stream`"."""
    what, _, path = error.partition(" - at `$")
    path = path.strip("`.")
    kinds = re.findall(r"`(\w+)[^`]*`", what)  # or the one name of a missing member
    if what.startswith("Object missing"):
        return f"{path}.{kinds[0]} is missing"
    if len(kinds) != 2:
        return "the body has a number that is out of range"
    expected, found = (JSON_KINDS.get(kind, kind) for kind in kinds)
    return f"{path or 'the body'} must be {expected}, not {found}"


def _why(error: Exception, received: bytes) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if HALF_CHARACTER.search(received):
        return "it has half of a character, a \\uD800 to \\uDFFF without its other half"
    if isinstance(error, UnicodeDecodeError):
        return "it has bytes that are not UTF-8"
    return str(error).removeprefix("JSON is malformed: ")


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
    check_id("conversation", request.conversation)


def check_id(name: str, value: str | None) -> None:
    """Raise `BadRequest` if there is an id without the form that makes it hard to guess."""
    if value is not None and not re.fullmatch("[A-Za-z0-9_-]{16,64}", value):
        raise BadRequest(f"{name} must be 16 to 64 characters of A-Z a-z 0-9 _ -")
