"""
Everything that can go wrong in a chat, with its HTTP status and the code that closes a WebSocket.

ChatError
├── about the request    BadRequest 400, MissingMessages 400, BinaryMessage /1003,
│                        OriginNotAllowed 403/1008, ConversationNotFound 404, BodyTooSlow 408,
│                        BodyTooLarge 413/1009, BodyCompressed 415
├── about a kept reply   ReplyNotFound 404, ReplyConflict 409, ReplyTakenOver 409,
│                        ReplyUnavailable 503, NothingLeft 204
├── over a limit         RateLimited 429, TooManyReplies 429 (of a client), TooBusy 503/1013
├── about the service    HistoryUnavailable 503, Draining 503/1012, InternalError /1011
├── GroqError 502        GroqUnreachable, GroqRefused, GroqFailed, GroqReplyBroken, GroqTimeout 504,
│                        GroqReplyCut, GroqReplyEmpty, GroqCircuitOpen 503, GroqQuotaExhausted 503
└── about the client     ClientDisconnected 499, ReplyCancelled, ClientIdle /1001

Messages are for clients: no secret, no stack trace, nothing that Groq said.
"""

from typing import Any, ClassVar


class ChatError(Exception):
    """The root: a class's keywords are its attributes; `values` fill `text`, `cause` is logged."""

    status: ClassVar[int] = 500
    close_code: ClassVar[int | None] = None  # of a WebSocket; None if it stays open
    reason: str = "internal"  # one word for logs and metrics
    retry_after: int | None = None  # seconds until another attempt makes sense, if known
    text: ClassVar[str] = "{}"

    def __init_subclass__(cls, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(cls, name, value)

    def __init__(self, *values: object, cause: str = "", retry_after: int | None = None) -> None:
        super().__init__(self.text.format(*values))
        self.retry_after = retry_after or self.retry_after
        self.log_fields: dict[str, object] = {"error": self.reason}
        self.log_fields |= {"cause": cause} if cause else {}


class BadRequest(ChatError, status=400, reason="bad_request"):
    """The request breaks a rule."""


class MissingMessages(BadRequest):
    text = 'messages is missing; send {{"messages": [{{"role": "user", "content": "..."}}]}}'


class BinaryMessage(BadRequest):
    close_code, text = 1003, "messages must be JSON in text frames, not binary frames"


class OriginNotAllowed(ChatError, status=403, reason="origin"):
    close_code, text = 1008, "this origin is not allowed to use the service"


class ConversationNotFound(ChatError, status=404, reason="not_found"):
    text = "no such conversation"


class ReplyNotFound(ChatError, status=404, reason="reply_gone"):
    text = "no such reply; read the conversation, or ask with a new reply id"


class ReplyConflict(ChatError, status=409, reason="reply_conflict"):
    text = "this reply id was used for another request"


class ReplyTakenOver(ChatError, status=409, reason="reply_taken_over"):
    text = "another connection has resumed this reply"


class ReplyUnavailable(ChatError, status=503, reason="reply_unavailable", retry_after=1):
    text = "the reply cannot be reached; try again in a moment"


class NothingLeft(ChatError, status=204):  # not a failure
    text = "the client has the end of this reply"


class BodyTooSlow(ChatError, status=408, reason="too_slow"):
    text = "the body must arrive within {:g} s"


class BodyCompressed(ChatError, status=415, reason="compressed"):
    text = "the body is compressed ({}); send it without Content-Encoding"


class BodyTooLarge(ChatError, status=413, reason="too_large"):
    close_code, text = 1009, "the request must be at most {} bytes"


class RateLimited(ChatError, status=429, reason="rate_limited"):
    text = "the rate limit is {}; try again in {} s"


class TooManyReplies(ChatError, status=429, reason="too_many", retry_after=1):
    text = "too many concurrent replies for this client (limit {})"


class TooBusy(ChatError, status=503, reason="too_busy", retry_after=1):
    close_code, text = 1013, "too many concurrent replies; try again in a moment"


class HistoryUnavailable(ChatError, status=503, reason="history", retry_after=1):
    text = "the conversation history is unreachable; try again in a moment"


class Draining(ChatError, status=503, reason="draining", retry_after=1):
    close_code, text = 1012, "the service is restarting; try again in a moment"


class GroqError(ChatError, status=502, reason="failed"):
    is_temporary: bool = False  # another attempt may succeed
    is_of_model: bool = False  # another model may succeed
    is_outage: bool = False  # Groq itself is failing: counts towards the circuit breaker


class GroqUnreachable(GroqError, reason="unreachable", is_temporary=True, is_outage=True):
    text = "the language model service is unreachable"


class GroqRefused(GroqError, reason="refused"):
    """An error status; `is_too_large`: the prompt exceeds what the model accepts."""

    text = "the language model service {}"

    def __init__(
        self, upstream_status: int, retry_after: int | None = None, *, is_too_large: bool = False
    ) -> None:
        self.reason = "quota" if upstream_status == 429 else self.reason
        is_misconfigured = upstream_status in (401, 403, 404)  # nothing that a client could fix
        what = "is misconfigured" if is_misconfigured else f"answered with status {upstream_status}"
        super().__init__(what, retry_after=retry_after)
        self.log_fields["upstream_status"] = self.upstream_status = upstream_status
        self.is_too_large = is_too_large
        # 498: its flex capacity is exhausted; from 520 on: a proxy in front of it cannot reach it.
        self.is_outage = upstream_status in (498, 500, 502, 503, 504, *range(520, 531))
        self.is_temporary = self.is_outage or upstream_status in (408, 409, 429)
        self.is_of_model = upstream_status in (404, 429, 498, 503)


class GroqFailed(GroqError, is_temporary=True, is_outage=True):
    text = "the language model service failed during the reply"


class GroqReplyBroken(GroqError, reason="broken", is_outage=True):
    text = "the language model service sent an invalid response"


class GroqReplyCut(GroqError, reason="cut", is_temporary=True, is_outage=True):
    text = "the language model service cut the reply short"


class GroqReplyEmpty(GroqError, reason="empty"):
    text = "the language model {}"


class GroqTimeout(GroqError, status=504, reason="timeout", is_temporary=True, is_outage=True):
    text = "the language model service did not respond in time"


class GroqCircuitOpen(GroqError, status=503, reason="down", is_of_model=True):
    text = "the language model service is down; try again in {} s"


class GroqQuotaExhausted(GroqError, status=503, reason="quota"):
    is_temporary = is_of_model = True
    text = "the quota of the language model service is exhausted; try again in {} s"


class ClientDisconnected(ChatError, status=499, reason="client_disconnected"):  # nginx's status
    text = "the client disconnected before the reply was complete"  # no client is left to see it


class ReplyCancelled(ChatError, status=200, reason="cancelled"):  # not a failure
    text = "the reply was cancelled"


class ClientIdle(ChatError, status=200, reason="idle"):  # not a failure
    close_code, text = 1001, "idle for {:g} s; reconnect to continue"


class InternalError(ChatError):
    close_code, text = 1011, "an internal error occurred"


def reasons(root: type[ChatError] = ChatError) -> set[str]:
    """Return the reasons of a class of errors and its subclasses, for logs and metrics."""
    found = {root.reason} if root.status >= 400 else set()
    return found.union(*map(reasons, root.__subclasses__()))
