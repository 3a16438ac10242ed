"""A reply in progress: what is known about it, and how it is ended from outside."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Any, Literal

import msgspec

from chat.errors import ChatError, ReplyCancelled

LOGGED = """stream_type outcome finish_reason duration_ms ttft_ms prompt_tokens completion_tokens
model groq_id"""
Tokens = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)] | None


class Usage(msgspec.Struct):
    """What a reply cost, in tokens, as Groq reports it."""

    class Details(msgspec.Struct):
        reasoning_tokens: Tokens = None

    prompt_tokens: Tokens = None
    completion_tokens: Tokens = None
    completion_tokens_details: Details | None = None

    @property
    def reply_tokens(self) -> int:
        """The tokens of the reply's text, without those of the model's reasoning."""
        details = self.completion_tokens_details
        return (self.completion_tokens or 0) - ((details and details.reasoning_tokens) or 0)


@dataclass(slots=True, eq=False)
class Reply:
    """One reply; times are in seconds of the event loop's clock."""

    stream_type: Literal["json", "sse", "websocket"]
    client: str  # whose concurrent replies it counts among
    started_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    ttft_ms: float | None = None  # the time to the first token, once that has come
    deadline: float = inf
    sent: list[str] = field(default_factory=list)  # the tokens that the transport has taken
    model: str | None = None  # the one that was asked last
    finish_reason: str | None = None  # why the model stopped, once it has
    groq_id: str | None = None  # to be given to Groq's support
    usage: Usage = field(default_factory=Usage)
    estimated_tokens: int = 0  # of the prompt
    prompt_tokens: int | None = None  # as Groq reported them, otherwise estimated
    completion_tokens: int | None = None
    is_whole: bool = False  # all tokens have come
    is_cancelled: bool = False
    unattended_since: float = inf  # when the last reader of a reply that is kept has left
    task: asyncio.Task[Any] | None = None  # in which it runs
    timeout: asyncio.Timeout | None = None  # of the deadline
    expiry: ChatError | None = None  # why it ends before it
    outcome: Literal["completed", "cancelled", "failed"] = "failed"
    error: ChatError | None = None

    def cancel(self) -> None:
        """End it for a client that asks for no more: what was sent is kept as the reply."""
        self.is_cancelled = True
        self.expire(ReplyCancelled())

    def expire(self, error: ChatError) -> None:
        """End it with an error, unless it is whole; a later one is of no effect."""
        if self.timeout and not self.is_whole:
            self.expiry = self.expiry or error
            with suppress(RuntimeError):  # it is expiring already
                self.timeout.reschedule(0)

    @property
    def is_stream(self) -> bool:
        return self.stream_type != "json"

    @property
    def text(self) -> str:
        return "".join(self.sent)

    @property
    def truncated(self) -> str | None:
        """Why the reply was cut off, if it was."""
        return self.finish_reason if self.finish_reason in ("length", "content_filter") else None

    @property
    def duration_ms(self) -> float:
        return round((asyncio.get_running_loop().time() - self.started_at) * 1000, 1)

    def summary(self) -> dict[str, Any]:
        """Return what a log line says about it."""
        fields = {name: getattr(self, name) for name in LOGGED.split()}
        found = {name: value for name, value in fields.items() if value is not None}
        return found | (self.error.log_fields if self.error else {})
