"""
Everything that can go wrong in a chat, as one tree; each class knows its HTTP status.

ChatError
├── BadRequest                400  what the caller sent breaks a rule
│   └── BinaryMessage              closes a WebSocket with 1003
├── ConversationNotFound      404
├── BodyTooLarge              413  closes a WebSocket with 1009
├── GroqError                 502
│   ├── GroqUnreachable            no connection, or it broke before an answer
│   ├── GroqRefused                an error status; knows `retry_after`
│   ├── GroqFailed                 an error in mid-stream
│   ├── GroqReplyBroken            cut, or not what the protocol says
│   ├── GroqReplyEmpty             a reply without text
│   └── GroqTimeout           504  no answer in time
├── CallerLeft                499  seen in the log only
└── InternalError             500  a fault of ours; closes a WebSocket with 1011

The text of each is for the caller: no secret, no stack trace, nothing that Groq said.
"""

from typing import ClassVar


class ChatError(Exception):
    """The root of the tree."""

    status: ClassVar[int] = 500
    close_code: ClassVar[int | None] = None
    """The code that a WebSocket is closed with, or None where it stays open."""
    reason: ClassVar[str] = "internal"
    """One word for logs and metrics."""
    retry_after: int | None = None
    """Seconds until another try makes sense, where that is known."""

    @property
    def message(self) -> str:
        """What the caller is told."""
        return str(self)

    @property
    def log_fields(self) -> dict[str, object]:
        """What a log line says of it."""
        return {"error": self.reason}


class BadRequest(ChatError):
    status = 400
    reason = "bad_request"


class BinaryMessage(BadRequest):
    close_code = 1003

    def __init__(self) -> None:
        super().__init__("a message must be JSON in a text frame, not a binary one")


class ConversationNotFound(ChatError):
    status = 404
    reason = "not_found"

    def __init__(self) -> None:
        super().__init__("there is no such conversation")


class BodyTooLarge(ChatError):
    status = 413
    close_code = 1009
    reason = "too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request must be at most {limit} bytes")


class GroqError(ChatError):
    status = 502
    reason = "groq"


class GroqUnreachable(GroqError):
    reason = "unreachable"

    def __init__(self) -> None:
        super().__init__("the language model service cannot be reached")


class GroqRefused(GroqError):
    reason = "refused"

    def __init__(self, upstream_status: int, retry_after: int | None) -> None:
        super().__init__(f"the language model service answered with status {upstream_status}")
        self.upstream_status = upstream_status
        self.retry_after = retry_after

    @property
    def log_fields(self) -> dict[str, object]:
        return {"error": self.reason, "upstream_status": self.upstream_status}


class GroqFailed(GroqError):
    reason = "failed"

    def __init__(self) -> None:
        super().__init__("the language model service failed while it was replying")


class GroqReplyBroken(GroqError):
    reason = "broken"

    def __init__(self, what: str) -> None:
        super().__init__(f"the language model service {what}")


class GroqReplyEmpty(GroqError):
    reason = "empty"


class GroqTimeout(GroqError):
    status = 504
    reason = "timeout"

    def __init__(self) -> None:
        super().__init__("the language model service did not answer in time")


class CallerLeft(ChatError):
    status = 499  # nginx's: there is no caller to see it
    reason = "caller_left"

    def __init__(self) -> None:
        super().__init__("the caller left before the reply was complete")


class InternalError(ChatError):
    close_code = 1011

    def __init__(self) -> None:
        super().__init__("an internal error occurred")
