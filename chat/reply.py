"""
A reply in progress: the service writes it, a transport has it relayed to its socket.

It is an object of its own and keeps its tokens, so that it can outlive the connection that asked
for it. What Groq sends is passed on by the task that has read it: a second task for each caller
would cost a turn of the event loop for each read (bench/README.md).
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from chat.errors import ChatError
from chat.messages import Usage

StreamType = Literal["json", "sse", "websocket"]
Outcome = Literal["completed", "cancelled", "failed"]
Write = Callable[[list[str]], Awaitable[None]]


class Reply:
    """
    The tokens of one reply, and how it goes with it. One transport at a time.

    Args:
        time_limit: seconds after which it is given up.

    Attributes:
        deadline: when it is given up, by the event loop's clock.
        is_accepted: whether Groq has begun to answer.
        outcome: how the reply ended; None while it runs.
        error: what it failed by.
        was_stopped: whether its caller asked for no more of it, rather than leaving.
        interruption: what it was ended by, where it was neither its caller nor Groq.
        usage: the tokens that it cost, as Groq reported them.
        prompt_tokens, completion_tokens: the same, estimated where Groq reports nothing.
        model: the model that is asked.
        is_delivering: whether tokens wait for the caller.
        progress: how much has come from Groq, whether or not there are tokens in it.
        groq_id: the id to give to Groq's support.
    """

    def __init__(self, stream_type: StreamType, model: str, time_limit: float) -> None:
        self.stream_type = stream_type
        self.model = model
        self.is_accepted = False
        self.outcome: Outcome | None = None
        self.error: ChatError | None = None
        self.was_stopped = False
        self.interruption: ChatError | None = None
        self.usage: Usage | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.groq_id: str | None = None
        self.progress = 0
        self._cancel: Callable[[], object] = lambda: None
        self._cancelling: asyncio.Handle | None = None
        self.is_delivering = False
        self._tokens: list[str] = []
        self._sent = 0
        self._write: Write | None = None
        self._at_once = sys.maxsize
        self._is_relaying = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._started_at = self._loop.time()
        self.deadline = self._started_at + time_limit
        self._first_token_at: float | None = None
        self._ended_at: float | None = None

    # The service's side.

    def begin(self, cancel: Callable[[], object]) -> None:
        """Take the function that ends the work on this reply."""
        self._cancel = cancel

    def accept(self) -> None:
        """Note that Groq has begun to answer."""
        self.is_accepted = True
        self.wake()

    def add(self, tokens: list[str]) -> None:
        """Append tokens, none of them empty."""
        if self._first_token_at is None:
            self._first_token_at = self._loop.time()
        self._tokens += tokens

    async def deliver(self) -> None:
        """Write what has been added to the caller, as soon as a transport relays."""
        self.is_delivering = True
        try:
            while (write := self._write) is None:
                await self._is_relaying.wait()
            while tokens := self._tokens[self._sent : self._sent + self._at_once]:
                await write(tokens)
                self._sent += len(tokens)
        finally:
            self.is_delivering = False

    def keep_what_was_sent(self) -> None:
        """Drop the tokens that no transport has written."""
        del self._tokens[self._sent :]

    def end(self, outcome: Outcome, error: ChatError | None = None) -> None:
        """End the reply; nothing changes after that."""
        self.outcome = outcome
        self.error = error
        self._ended_at = self._loop.time()
        self.wake()

    @property
    def tokens_sent(self) -> int:
        return self._sent

    @property
    def has_tokens(self) -> bool:
        return bool(self._tokens)

    @property
    def text(self) -> str:
        return "".join(self._tokens)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until the first token came."""
        if self._first_token_at is None:
            return None
        return self._first_token_at - self._started_at

    @property
    def duration(self) -> float:
        """Seconds from its beginning to its end, or until now."""
        return (self._ended_at or self._loop.time()) - self._started_at

    @property
    def time_left(self) -> float:
        """Seconds until it is given up."""
        return self.deadline - self._loop.time()

    # The transport's side.

    async def wait_accepted(self, timeout: float) -> bool:
        """
        Wait until Groq has begun to answer; return False if that takes longer than `timeout`.

        Raises:
            ChatError: the reply failed before that.
        """
        if not self.is_accepted and self.outcome is None:
            timer = self._loop.call_later(timeout, self.wake)
            await self._wait()
            timer.cancel()
        if self.error and not self.is_accepted:
            raise self.error
        return self.is_accepted

    async def relay(
        self,
        write: Write,
        *,
        at_once: int = sys.maxsize,
        on_wake: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """
        Have the tokens written as they come, until the reply has ended.

        Args:
            write: writes some tokens to the caller, all or (cancelled) none; it must not raise.
            at_once: how many tokens it takes at most.
            on_wake: is called when `wake` was, while the reply goes on.
        """
        self._write, self._at_once = write, at_once
        self._is_relaying.set()
        try:
            while self.outcome is None:
                await self._wait()
                if self.outcome is None and on_wake and not self.is_delivering:
                    await on_wake()
            await self.deliver()
        finally:
            self._write = None
            self._is_relaying.clear()

    async def read_all(self) -> str:
        """
        Wait for the end and return the whole text.

        Raises:
            ChatError: the reply failed.
        """
        while self.outcome is None:
            await self._wait()
        if self.error:
            raise self.error
        return self.text

    def stop(self) -> None:
        """End it for a caller who has seen enough: what was sent is kept as the reply."""
        if self.outcome is None:
            self.was_stopped = True
            self._cancel_once()

    def abandon(self) -> None:
        """End it for a caller who has left: nothing of it is kept."""
        if self.outcome is None:
            self._cancel_once()

    def interrupt(self, error: ChatError) -> None:
        """End it as failed, for a reason of ours: nothing of it is kept."""
        if self.outcome is None:
            self.interruption = error
            self._cancel_once()

    def settle(self) -> None:
        """Let nothing cancel the work from here on: how it ends is known."""
        self._cancel = lambda: None
        if self._cancelling:
            self._cancelling.cancel()

    def _cancel_once(self) -> None:
        # Not at once: a task that is cancelled before its first step never gets to end its reply.
        if self._cancelling is None:
            self._cancelling = self._loop.call_soon(self._cancel)

    def summary(self) -> dict[str, Any]:
        """Return what a log line says of the reply."""
        fields = {
            "stream_type": self.stream_type,
            "outcome": self.outcome or "cancelled",
            "duration_ms": milliseconds(self.duration),
            "ttft_ms": milliseconds(self.time_to_first_token),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "model": self.model,
            "groq_id": self.groq_id,
            **(self.error.log_fields if self.error else {}),
        }
        return {name: value for name, value in fields.items() if value is not None}

    def delivery(self) -> object:
        """Return the same for as long as one write waits for the caller."""
        return self._sent if self.is_delivering else object()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def wake(self) -> None:
        """Let a transport go that waits."""
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


def milliseconds(seconds: float | None) -> float | None:
    """Return `seconds` as a log line shows them."""
    return None if seconds is None else round(seconds * 1000, 1)
