"""Replies as Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from math import inf

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chat.api.http import Answer, cancelled_on_disconnect, in_background
from chat.errors import ChatError, ClientDisconnected
from chat.reading import Reading
from chat.reply import Reply

START_TIMEOUT = 10.0  # seconds for the first token; proxies give up on a silent upstream
LAST_WRITE_TIMEOUT = 1.0  # seconds for the last error, which the client may not be reading
KEEP_ALIVE = b": keep-alive\n\n"
END_MARK = "[DONE]"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
START = {"type": "http.response.start", "status": 200, "headers": HEADERS}


class EventStream(Response):
    """A reply, each token as soon as it has come; an error before the first keeps its status."""

    def __init__(self, answer: Answer, reply: Reply | Reading, interval: float) -> None:
        self._answer, self._reply, self._interval = answer, reply, interval
        self._written_at = -inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What follows the start skips the middleware, which has nothing to do with it.
        self._start, self._send = send, scope["chat.send"]
        reading = None if isinstance(self._reply, Reply) else self._reply
        framer = Framer(reading)
        with suppress(ClientDisconnected):
            async with cancelled_on_disconnect(receive):
                try:
                    async with in_background(self._keep_alive()), self._answer as tokens:
                        async for some in tokens:
                            await self._write(framer.events(some))
                    cut = self._reply.truncated
                    end = sse_named("truncated", reason=cut) if cut else b""
                    await self._write(end + framer.end(DONE), more_body=False)
                except ChatError as error:
                    has_ended = reading and reading.end
                    if self._written_at == -inf and not has_ended:
                        raise
                    end = sse_named("error", error=str(error))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LAST_WRITE_TIMEOUT):
                            await self._write(
                                framer.end(end) if has_ended else end, more_body=False
                            )

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


class Framer:
    """
    Turns tokens into events, one each; what a reader concatenates is the text again, with an LF for
    each line end. For a reading, each event has as its id the position of its end in the text.
    """

    def __init__(self, reading: Reading | None = None) -> None:
        self._reading, self._is_after_cr = reading, False
        self._position = reading.after if reading else None

    def events(self, tokens: Sequence[str]) -> bytes:
        if self._reading:  # which knows the text before its first tokens by now
            self._is_after_cr, self._reading = self._reading.is_after_cr, None
        text, lengths = "".join(tokens), list[int]()
        if self._is_after_cr or "\n" in text or "\r" in text or END_MARK in tokens:
            pieces = [*self._pieces(tokens)]
            tokens, lengths = [piece for piece, _ in pieces], [length for _, length in pieces]
        if self._position is None:
            return ("data: " + "\n\ndata: ".join(tokens) + "\n\n").encode()
        _, *ends = accumulate(lengths or map(len, tokens), initial=self._position)
        self._position = ends[-1]
        return "".join(map("data: {}\nid: {}\n\n".format, tokens, ends)).encode()

    def end(self, event: bytes) -> bytes:
        """Return the last event with its id, one further than the text."""
        return (
            event if self._position is None else b"%bid: %d\n\n" % (event[:-1], self._position + 1)
        )

    def _pieces(self, tokens: Sequence[str]) -> Iterator[tuple[str, int]]:
        for token in tokens:
            # Two events, so that the end mark stays unmistakable.
            for piece in ("[", "DONE]") if token == END_MARK else (token,):
                # The CR of a CRLF that was cut in two has become a line end already.
                rest = piece[1:] if self._is_after_cr and piece[0] == "\n" else piece
                self._is_after_cr = piece[-1] == "\r"
                yield re.sub(r"\r\n?|\n", "\ndata: ", rest), len(piece)


def sse_named(name: str, **content: str) -> bytes:
    """Return an event that is not a token."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(content))
