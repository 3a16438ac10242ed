"""
Everything that can go wrong in a chat, as one tree; each class knows its HTTP status.

ChatError
├── BadRequest                400  what the caller sent breaks a rule
│   ├── BinaryMessage              closes a WebSocket with 1003
│   └── TooManyWasted              closes a WebSocket with 1008
├── OriginNotAllowed          403  closes a WebSocket with 1008
├── ConversationNotFound      404
├── BodyTooSlow               408
├── BodyTooLarge              413  closes a WebSocket with 1009
├── RateLimited               429  too many requests of one client
├── TooManyReplies            429  too many replies to one client at once
├── TooManyConnections        429  of one client; closes a WebSocket with 1013
├── TooBusy                   503  too many replies at once; closes a WebSocket with 1013
├── HistoryUnavailable        503  the shared history cannot be reached
├── Draining                  503  this replica ends; closes a WebSocket with 1012
├── GroqError                 502
│   ├── GroqUnreachable            no connection, or it broke before an answer
│   ├── GroqRefused                an error status; knows `retry_after`
│   │   └── GroqRateLimited         429: the quota is used up
│   ├── GroqFailed                 an error in mid-stream
│   ├── GroqReplyBroken            not what the protocol says
│   │   └── GroqReplyCut           ended before its end
│   ├── GroqReplyEmpty             a reply without text
│   ├── GroqTimeout           504  no answer in time
│   ├── GroqDown              503  not even asked, after a run of failures
│   └── GroqQuotaUsedUp       503  not even asked, since it would refuse
├── CallerLeft                499  seen in the log only
├── CallerIdle                     closes a WebSocket with 1001
└── InternalError             500  a fault of ours; closes a WebSocket with 1011

The text of each is for the caller: no secret, no stack trace, nothing that Groq said.
"""

from typing import ClassVar


class ChatError(Exception):
    """The root of the tree."""

    status: ClassVar[int] = 500
    close_code: ClassVar[int | None] = None
    """The code that a WebSocket is closed with, or None where it stays open."""
    reason: str = "internal"
    """One word for logs and metrics."""
    retry_after: int | None = None
    """Seconds until another try makes sense, where that is known."""
    text: str = ""
    """What the caller is told, where it is always the same."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text or self.text)

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
    text = "a message must be JSON in a text frame, not a binary one"


class TooManyWasted(BadRequest):
    close_code = 1008
    text = "too many messages in a row that ask for no reply"


class OriginNotAllowed(ChatError):
    status = 403
    close_code = 1008
    reason = "origin"
    text = "pages of this origin may not use this service"


class ConversationNotFound(ChatError):
    status = 404
    reason = "not_found"
    text = "there is no such conversation"


class BodyTooSlow(ChatError):
    status = 408
    reason = "too_slow"

    def __init__(self, limit: float) -> None:
        super().__init__(f"the body must arrive within {limit:g} s")


class BodyTooLarge(ChatError):
    status = 413
    close_code = 1009
    reason = "too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request must be at most {limit} bytes")


class RateLimited(ChatError):
    status = 429
    reason = "rate_limited"

    def __init__(self, policy: str, retry_after: int) -> None:
        super().__init__(f"the limit is {policy}; try again in {retry_after} s")
        self.retry_after = retry_after


class TooManyReplies(ChatError):
    status = 429
    reason = "too_many"
    retry_after = 1

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"too many replies at once for one client, which may have {limit}; wait for one to end"
        )


class TooManyConnections(ChatError):
    status = 429
    close_code = 1013
    reason = "too_many"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"too many connections at once for one client, which may have {limit}; close one first"
        )


class TooBusy(ChatError):
    status = 503
    close_code = 1013
    reason = "too_busy"
    retry_after = 1
    text = "too many replies at once; try again in a moment"


class HistoryUnavailable(ChatError):
    status = 503
    reason = "history"
    retry_after = 1
    text = "the conversation cannot be reached; try again in a moment"


class Draining(ChatError):
    status = 503
    close_code = 1012
    reason = "draining"
    retry_after = 1
    text = "the service is restarting; try again in a moment"


class GroqError(ChatError):
    status = 502
    is_temporary: bool = False
    """Whether asking once more may help."""
    is_of_model: bool = False
    """Whether another model may do what this one cannot."""
    is_outage: bool = False
    """Whether it tells that Groq is down, rather than that it is limited or misused."""
    is_answer: bool = False
    """Whether it tells that Groq is not down."""


class GroqUnreachable(GroqError):
    reason = "unreachable"
    is_temporary = is_outage = True
    text = "the language model service cannot be reached"


OF_PROXY = frozenset(range(520, 531))
"""What a proxy in front of Groq says when it cannot reach it."""
TEMPORARY = frozenset((408, 409, 429, 498, 500, 502, 503, 504)) | OF_PROXY
"""Groq's statuses that another try may not meet; 498: flex capacity is used up."""
OF_MODEL = frozenset((404, 429, 498, 503))
"""Gone, rate-limited, or overloaded: each model by itself."""
OUTAGES = frozenset((498, 500, 502, 503, 504)) | OF_PROXY
OPERATORS = frozenset((401, 403, 404))
"""A wrong key or model: nothing that a caller could do anything about."""


class GroqRefused(GroqError):
    """
    An error status.

    Args:
        upstream_status: Groq's.
        retry_after: seconds that Groq wants to be left alone.
        is_too_large: whether the prompt does not fit into what the model takes.
    """

    reason = "refused"

    def __init__(
        self, upstream_status: int, retry_after: int | None, *, is_too_large: bool = False
    ) -> None:
        what = f"answered with status {upstream_status}"
        if upstream_status in OPERATORS:
            what = "cannot be used at the moment"
        super().__init__(f"the language model service {what}")
        self.upstream_status = upstream_status
        self.retry_after = retry_after
        self.is_too_large = is_too_large
        self.is_temporary = upstream_status in TEMPORARY
        self.is_of_model = upstream_status in OF_MODEL
        self.is_outage = upstream_status in OUTAGES
        self.is_answer = not self.is_outage

    @property
    def log_fields(self) -> dict[str, object]:
        return {"error": self.reason, "upstream_status": self.upstream_status}


class GroqRateLimited(GroqRefused):
    reason = "quota"

    def __init__(self, retry_after: int | None) -> None:
        super().__init__(429, retry_after)
        self.is_answer = False  # of a limit in front of the model: it may be down behind it


class GroqFailed(GroqError):
    reason = "failed"
    is_temporary = is_outage = True
    text = "the language model service failed while it was replying"


class GroqReplyBroken(GroqError):
    reason = "broken"
    is_outage = True

    def __init__(self, what: str) -> None:
        super().__init__(f"the language model service {what}")


class GroqReplyCut(GroqReplyBroken):
    reason = "cut"
    is_temporary = True

    def __init__(self) -> None:
        super().__init__("cut its reply short")


class GroqReplyEmpty(GroqError):
    reason = "empty"
    is_answer = True


class GroqTimeout(GroqError):
    status = 504
    reason = "timeout"
    is_temporary = is_outage = True
    text = "the language model service did not answer in time"


class GroqDown(GroqError):
    status = 503
    reason = "down"
    is_of_model = True

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the language model service is down; try again in {retry_after} s")
        self.retry_after = retry_after


class GroqQuotaUsedUp(GroqError):
    status = 503
    reason = "quota"
    is_of_model = True

    def __init__(self, retry_after: int) -> None:
        super().__init__(
            f"the language model service's quota is used up; try again in {retry_after} s"
        )
        self.retry_after = retry_after


class CallerLeft(ChatError):
    status = 499  # nginx's: there is no caller to see it
    reason = "caller_left"
    text = "the caller left before the reply was complete"


class CallerIdle(ChatError):
    status = 200  # no fault of anybody's
    close_code = 1001
    reason = "idle"

    def __init__(self, limit: float) -> None:
        super().__init__(f"no message came for {limit:g} seconds; connect again to go on")


class InternalError(ChatError):
    close_code = 1011
    text = "an internal error occurred"


def reasons(root: type[ChatError] = ChatError) -> set[str]:
    """Return the reasons of a class of errors, as they stand in the log and in metrics."""
    found = {root.reason} if root.status >= 400 else set()
    return found.union(*map(reasons, root.__subclasses__()))
