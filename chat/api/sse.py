"""Replies as Server-Sent Events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import asyncio
import re
import time
from contextlib import suppress
from math import inf

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chat.api.http import Answer, cancelled_on_disconnect, in_background
from chat.errors import ChatError, ClientDisconnected
from chat.kept import Reading
from chat.reply import Reply

START_TIMEOUT = 10.0  # seconds for the first token; proxies give up on a silent upstream
LAST_WRITE_TIMEOUT = 1.0  # seconds for the last error, which the client may not be reading
KEEP_ALIVE = b": keep-alive\n\n"
PIECES = {"[DONE]": ["[", "DONE]"]}  # two events, so that the end mark stays unmistakable
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
START = {"type": "http.response.start", "status": 200, "headers": HEADERS}


class EventStream(Response):
    """A reply, each token as soon as it has come; an error before the first keeps its status."""

    def __init__(self, answer: Answer, source: Reply | Reading, interval: float) -> None:
        self._answer, self._source, self._interval = answer, source, interval
        self._reading = source if isinstance(source, Reading) else None
        self._written_at = -inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What follows the start skips the middleware, which has nothing to do with it.
        self._start, self._send = send, scope["chat.send"]
        framer = Framer(self._reading)
        with suppress(ClientDisconnected):
            async with cancelled_on_disconnect(receive):
                try:
                    async with in_background(self._keep_alive()), self._answer as tokens:
                        async for some in tokens:
                            await self._write(framer.events(some))
                    cut = self._source.truncated
                    end = sse_named("truncated", reason=cut) if cut else b""
                    await self._write(framer.last(end + DONE), more_body=False)
                except ChatError as error:
                    if self._written_at == -inf and not (self._reading and self._reading.end):
                        raise
                    end = framer.last(sse_named("error", error=str(error)))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LAST_WRITE_TIMEOUT):
                            await self._write(end, more_body=False)

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
            if time.monotonic() >= self._written_at + self._interval:
                await self._write(KEEP_ALIVE)
            wait = self._written_at + self._interval - time.monotonic()


class Framer:
    """Turns tokens into events, one each; of a reading, each has as its id its end in the text."""

    def __init__(self, reading: Reading | None = None) -> None:
        self._reading, self._is_after_cr = reading, False

    def events(self, tokens: list[str]) -> bytes:
        reading, text = self._reading, "".join(tokens)
        if reading and reading.position == reading.after:
            self._is_after_cr = reading.is_after_cr
        if "[DONE]" in tokens:
            tokens = [piece for token in tokens for piece in PIECES.get(token, [token])]
        lines = tokens
        if self._is_after_cr or "\n" in text or "\r" in text:
            lines = [*map(self._lines, tokens)]
        if reading is None:
            return ("data: " + "\n\ndata: ".join(lines) + "\n\n").encode()
        events = ""
        for token, line in zip(tokens, lines, strict=True):
            reading.position += len(token)
            events += f"data: {line}\nid: {reading.position}\n\n"
        return events.encode()

    def last(self, event: bytes) -> bytes:
        """Return the last event; if a reading has ended, with its id, one further than the text."""
        if self._reading is None or self._reading.end is None:
            return event
        return b"%bid: %d\n\n" % (event[:-1], self._reading.position + 1)

    def _lines(self, token: str) -> str:
        """Return a token with an LF for each line end."""
        # The CR of a CRLF that was cut in two has become a line end already.
        rest = token[1:] if self._is_after_cr and token[0] == "\n" else token
        self._is_after_cr = token[-1] == "\r"
        return re.sub(r"\r\n?|\n", "\ndata: ", rest)


def sse_named(name: str, **content: str) -> bytes:
    """Return an event that is not a token."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(content))
