"""Replies as Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from math import inf

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chat.api.http import cancelled_on_disconnect, in_background
from chat.errors import ChatError, ClientDisconnected
from chat.reply import Reply

START_TIMEOUT = 10.0  # seconds for the first token; proxies give up on a silent upstream
LAST_WRITE_TIMEOUT = 1.0  # seconds for the last error, which the client may not be reading
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
START = {"type": "http.response.start", "status": 200, "headers": HEADERS}
Answer = AbstractAsyncContextManager[AsyncIterator[list[str]]]


class EventStream(Response):
    """A reply, each token as soon as it has come; an error before the first keeps its status."""

    def __init__(self, answer: Answer, reply: Reply, interval: float) -> None:
        self._answer, self._reply, self._interval = answer, reply, interval
        self._written_at = -inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What follows the start skips the middleware, which has nothing to do with it.
        self._start, self._send = send, scope["chat.send"]
        with suppress(ClientDisconnected):
            async with cancelled_on_disconnect(receive):
                try:
                    async with in_background(self._keep_alive()), self._answer as tokens:
                        is_after_cr = False
                        async for some in tokens:
                            await self._write(sse_events(some, is_after_cr=is_after_cr))
                            is_after_cr = some[-1].endswith("\r")
                    cut = self._reply.truncated
                    end = sse_named("truncated", reason=cut) + DONE if cut else DONE
                    await self._write(end, more_body=False)
                except ChatError as error:
                    if self._written_at == -inf:
                        raise
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LAST_WRITE_TIMEOUT):
                            await self._write(sse_named("error", error=str(error)), more_body=False)

    async def _write(self, events: bytes, *, more_body: bool = True) -> None:
        has_started, self._written_at = self._written_at > -inf, time.monotonic()
        if not has_started:
            await self._start(START)
        await self._send({"type": "http.response.body", "body": events, "more_body": more_body})

    async def _keep_alive(self) -> None:
        """Send a comment whenever nothing else has been sent for the interval."""
        wait = min(START_TIMEOUT, self._interval)
        while True:
            await asyncio.sleep(wait)
            wait = self._written_at + self._interval - time.monotonic()
            if wait <= 0:
                await self._write(KEEP_ALIVE)
                wait = self._interval


def sse_events(tokens: Sequence[str], *, is_after_cr: bool = False) -> bytes:
    """Return one event for each token; what a reader concatenates is the text again."""
    text = "".join(tokens)
    if "\r" in text or is_after_cr:
        tokens = [*_with_whole_line_ends(tokens, is_after_cr)]
    if "\n" in text or "\r" in text or "[DONE]" in tokens:
        whole = {"[DONE]": "[\n\ndata: DONE]"}  # two events: the end mark stays unmistakable
        tokens = [whole.get(token) or re.sub(r"\r\n?|\n", "\ndata: ", token) for token in tokens]
    return ("data: " + "\n\ndata: ".join(tokens) + "\n\n").encode() if tokens else b""


def _with_whole_line_ends(tokens: Sequence[str], is_after_cr: bool) -> Iterator[str]:
    """Leave out the LF of a CRLF that was cut in two: its CR has become a line end already."""
    for token in tokens:
        if rest := token[1:] if is_after_cr and token[0] == "\n" else token:
            yield rest
        is_after_cr = token[-1] == "\r"


def sse_named(name: str, **content: str) -> bytes:
    """Return an event that is not a token."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(content))
