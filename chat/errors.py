"""
Everything that can go wrong in a chat, with its HTTP status and the code that closes a WebSocket.

ChatError
├── about the request    BadRequest 400, MissingMessages 400, BinaryMessage /1003,
│                        OriginNotAllowed 403/1008, ConversationNotFound 404, BodyTooSlow 408,
│                        BodyTooLarge 413/1009, BodyCompressed 415
├── about a kept reply   BadPosition 400, ReplyNotFound 404, ReplyConflict 409,
│                        ReplyTakenOver 409, ReplyUnavailable 503, NothingLeft 204
├── over a limit         RateLimited 429, TooManyReplies 429 (of a client), TooBusy 503/1013
├── about the service    HistoryUnavailable 503, Draining 503/1012, InternalError /1011
├── GroqError 502        GroqUnreachable, GroqRefused, GroqFailed, GroqReplyBroken, GroqReplyCut,
│                        GroqReplyEmpty, GroqTimeout 504; not asked:
│                        GroqCircuitOpen 503, GroqQuotaExhausted 503
└── about the client     ClientDisconnected 499, ReplyCancelled, ClientIdle /1001

Messages are for clients: no secret, no stack trace, nothing that Groq said.
"""

from typing import ClassVar


class ChatError(Exception):
    """The root of the tree; `values` are what `text` has placeholders for."""

    status: ClassVar[int] = 500
    close_code: ClassVar[int | None] = None  # of a WebSocket; None if it stays open
    reason: str = "internal"  # one word for logs and metrics
    retry_after: int | None = None  # seconds until another attempt makes sense, if known
    text: ClassVar[str] = "{}"

    def __init__(self, *values: object, retry_after: int | None = None) -> None:
        super().__init__(self.text.format(*values))
        self.retry_after = retry_after or self.retry_after
        self.log_fields: dict[str, object] = {"error": self.reason}


class BadRequest(ChatError):
    status, reason = 400, "bad_request"


class MissingMessages(BadRequest):
    text = 'messages is missing; send {{"messages": [{{"role": "user", "content": "..."}}]}}'


class BinaryMessage(BadRequest):
    close_code, text = 1003, "messages must be JSON in text frames, not binary frames"


class BadPosition(BadRequest):
    pass


class OriginNotAllowed(ChatError):
    status, close_code, reason = 403, 1008, "origin"
    text = "this origin is not allowed to use the service"


class ConversationNotFound(ChatError):
    status, reason, text = 404, "not_found", "no such conversation"


class ReplyNotFound(ChatError):
    status, reason = 404, "reply_gone"
    text = "no such reply; read the conversation, or ask with a new reply id"


class ReplyConflict(ChatError):
    status, reason, text = 409, "reply_conflict", "this reply id was used for another request"


class ReplyTakenOver(ChatError):
    status, reason, text = 409, "reply_taken_over", "another connection has resumed this reply"


class ReplyUnavailable(ChatError):
    status, reason, retry_after = 503, "reply_unavailable", 1
    text = "the reply cannot be reached; try again in a moment"


class NothingLeft(ChatError):
    status, text = 204, "the client has the end of this reply"  # not a failure


class BodyTooSlow(ChatError):
    status, reason, text = 408, "too_slow", "the body must arrive within {:g} s"


class BodyCompressed(ChatError):
    status, reason = 415, "compressed"
    text = "the body is compressed ({}); send it without Content-Encoding"


class BodyTooLarge(ChatError):
    status, close_code, reason = 413, 1009, "too_large"
    text = "the request must be at most {} bytes"


class RateLimited(ChatError):
    status, reason, text = 429, "rate_limited", "the rate limit is {}; try again in {} s"


class TooManyReplies(ChatError):
    status, reason, retry_after = 429, "too_many", 1
    text = "too many concurrent replies for this client (limit {})"


class TooBusy(ChatError):
    status, close_code, reason, retry_after = 503, 1013, "too_busy", 1
    text = "too many concurrent replies; try again in a moment"


class HistoryUnavailable(ChatError):
    status, reason, retry_after = 503, "history", 1
    text = "the conversation history is unreachable; try again in a moment"


class Draining(ChatError):
    status, close_code, reason, retry_after = 503, 1012, "draining", 1
    text = "the service is restarting; try again in a moment"


class GroqError(ChatError):
    """`cause` is for the log: the class of an exception, or what was wrong with a response."""

    status, reason = 502, "failed"
    is_temporary: bool = False  # another attempt may succeed
    is_of_model: bool = False  # another model may succeed
    is_outage: bool = False  # Groq itself is failing: counts towards the circuit breaker

    def __init__(self, *values: object, cause: str = "", retry_after: int | None = None) -> None:
        super().__init__(*values, retry_after=retry_after)
        self.log_fields |= {"cause": cause} if cause else {}


class GroqUnreachable(GroqError):
    reason, text = "unreachable", "the language model service is unreachable"
    is_temporary = is_outage = True


# 498: Groq's flex capacity is exhausted; from 520 on: a proxy in front of Groq cannot reach it.
_OUTAGES = frozenset((498, 500, 502, 503, 504, *range(520, 531)))


class GroqRefused(GroqError):
    """An error status; `is_too_large`: the prompt exceeds what the model accepts."""

    reason, text = "refused", "the language model service {}"

    def __init__(
        self, upstream_status: int, retry_after: int | None = None, *, is_too_large: bool = False
    ) -> None:
        self.reason = "quota" if upstream_status == 429 else self.reason
        is_misconfigured = upstream_status in (401, 403, 404)  # nothing that a client could fix
        what = "is misconfigured" if is_misconfigured else f"answered with status {upstream_status}"
        super().__init__(what, retry_after=retry_after)
        self.log_fields["upstream_status"] = self.upstream_status = upstream_status
        self.is_too_large = is_too_large
        self.is_outage = upstream_status in _OUTAGES
        self.is_temporary = self.is_outage or upstream_status in (408, 409, 429)
        self.is_of_model = upstream_status in (404, 429, 498, 503)


class GroqFailed(GroqError):
    reason, text = "failed", "the language model service failed during the reply"
    is_temporary = is_outage = True


class GroqReplyBroken(GroqError):
    reason, text = "broken", "the language model service sent an invalid response"
    is_outage = True


class GroqReplyCut(GroqError):
    reason, text = "cut", "the language model service cut the reply short"
    is_temporary = is_outage = True


class GroqReplyEmpty(GroqError):
    reason, text = "empty", "the language model {}"


class GroqTimeout(GroqError):
    status, reason, text = 504, "timeout", "the language model service did not respond in time"
    is_temporary = is_outage = True


class GroqCircuitOpen(GroqError):
    status, reason, text = 503, "down", "the language model service is down; try again in {} s"
    is_of_model = True


class GroqQuotaExhausted(GroqError):
    status, reason = 503, "quota"
    is_temporary = is_of_model = True
    text = "the quota of the language model service is exhausted; try again in {} s"


class ClientDisconnected(ChatError):
    status, reason = 499, "client_disconnected"  # nginx's; no client is left to see it
    text = "the client disconnected before the reply was complete"


class ReplyCancelled(ChatError):
    status, reason = 200, "cancelled"  # not a failure
    text = "the reply was cancelled"


class ClientIdle(ChatError):
    status, close_code, reason = 200, 1001, "idle"  # not a failure
    text = "idle for {:g} s; reconnect to continue"


class InternalError(ChatError):
    close_code, text = 1011, "an internal error occurred"


def relayed(name: str, text: str) -> ChatError:
    """Return an error of this name that another replica has raised, or else one of Groq's."""
    known = BadPosition, NothingLeft, ReplyCancelled, ReplyNotFound, ReplyTakenOver
    return {each.__name__: each for each in known}.get(name, GroqError)(text)


def reasons(root: type[ChatError] = ChatError) -> set[str]:
    """Return the reasons of a class of errors and its subclasses, for logs and metrics."""
    found = {root.reason} if root.status >= 400 else set()
    return found.union(*map(reasons, root.__subclasses__()))
