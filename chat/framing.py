"""
Frames: Groq's event stream coming in, Server-Sent Events and WebSocket messages going out.

Pure functions and small state machines, without I/O. The format of an event stream is
https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

import re

import msgspec

from chat.errors import GroqError, GroqFailed, GroqReplyBroken, GroqReplyCut
from chat.messages import NULL, Usage, decode_chunks

MAX_EVENT_BYTES = 1 << 20
"""More than this without the end of an event is no reply."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DONE = b"[DONE]"
DONE_EVENT = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
SOCKET_DONE = '{"done":"true"}'
SOCKET_CANCELLED = '{"done":"true","cancelled":"true"}'

_LINE_END = re.compile(r"\r\n|\r|\n")


class EventParser:
    """
    Split an event stream into the data of its events, however its bytes are cut.

    Lines end with LF, CRLF or CR and with nothing else. Comments and fields other than `data`
    and `event` are passed over; an event named `error` becomes `{"error":true}`, whatever it says.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._is_at_start = True

    def feed(self, received: bytes) -> list[bytes]:
        """
        Take the bytes of one read; return the data of the events that they complete.

        Raises:
            GroqReplyBroken: an event has grown beyond `MAX_EVENT_BYTES`.
        """
        if b"\r" in received or self._after_cr:
            received = self._normalized(received)
        if self._rest:
            received = self._rest + received
        complete, end, rest = received.rpartition(b"\n\n")
        self._rest = rest
        if len(rest) > MAX_EVENT_BYTES:
            raise GroqReplyBroken("sent an event that is too large")
        return self._events(complete) if end else []

    def close(self) -> list[bytes]:
        """Return the event that the end of the stream completes: some servers leave its end off."""
        rest, self._rest = self._rest, b""
        return self._events(rest)

    def _normalized(self, received: bytes) -> bytes:
        if self._after_cr and received.startswith(b"\n"):
            received = received[1:]
            self._after_cr = False
        if received:
            self._after_cr = received.endswith(b"\r")
        return received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _events(self, block: bytes) -> list[bytes]:
        if self._is_at_start:
            self._is_at_start = False
            block = block.removeprefix(BYTE_ORDER_MARK)
        if block.startswith(b"data: "):
            # The common form, one line an event, is taken apart without a look at each.
            events = block[6:].split(b"\n\ndata: ")
            if block.count(b"\n") == 2 * (len(events) - 1) and b"" not in events:
                return events
        return [data for event in block.split(b"\n\n") if (data := self._event(event))]

    def _event(self, event: bytes) -> bytes:
        data, is_error = [], False
        for line in event.split(b"\n"):
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                is_error = value == b"error"
        return b'{"error":true}' if is_error else b"\n".join(data)


class ReplyParser:
    """
    Read the bytes of a streamed reply from Groq, however they are cut.

    Attributes:
        is_done: whether `[DONE]` has come.
        error: what the stream has failed by; the tokens until then are good.
        progress: how many events have come; comments are none.
        finish_reason: why the model stopped, once it has.
        usage: the last report of what the reply cost.
        groq_id: the id to give to Groq's support.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.error: GroqError | None = None
        self.progress = 0
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.groq_id: str | None = None
        self._parser = EventParser()

    def feed(self, received: bytes) -> list[str]:
        """
        Take the bytes of one read; return the tokens that they complete, none of them empty.

        Raises:
            GroqReplyBroken: an event has grown beyond `MAX_EVENT_BYTES`.
        """
        return self._tokens(self._parser.feed(received))

    def close(self) -> list[str]:
        """Take the end of the bytes; return the tokens of a last event whose end is missing."""
        tokens = self._tokens(self._parser.close())
        if not (self.is_done or isinstance(self.error, GroqFailed)):
            self.error = None if self.finish_reason else GroqReplyCut()
        return tokens

    def _tokens(self, events: list[bytes]) -> list[str]:
        if self.is_done or self.error:
            return []
        self.progress += len(events)
        if DONE in events:
            self.is_done = True
            events = events[: events.index(DONE)]
        chunks = decode_chunks(events)
        tokens = []
        for chunk in chunks:
            if chunk.choices:
                choice = chunk.choices[0]
                if choice.delta and choice.delta.content:
                    tokens.append(choice.delta.content)
                self.finish_reason = choice.finish_reason or self.finish_reason
            if chunk.usage is not NULL or chunk.x_groq is not None or chunk.error is not NULL:
                self.usage = chunk.reported_usage or self.usage
                self.groq_id = chunk.groq_id or self.groq_id
                if chunk.is_error:
                    self.error = GroqFailed()
                    return tokens
        if len(chunks) < len(events):
            self.is_done = events[len(chunks)].strip() == DONE
        if len(chunks) < len(events) and not self.is_done:
            self.error = GroqReplyBroken("sent something that is not a reply")
        return tokens


def sse_events(tokens: list[str]) -> bytes:
    """Return one event for each token; what a reader concatenates is the text again."""
    text = "".join(tokens)
    if "\n" not in text and "\r" not in text and "[DONE]" not in tokens:
        return ("data: " + "\n\ndata: ".join(tokens) + "\n\n").encode()
    return "".join(map(_sse_event, tokens)).encode()


def _sse_event(token: str) -> str:
    if token == "[DONE]":  # noqa: S105
        return _sse_event("[") + _sse_event("DONE]")
    return "data: " + _LINE_END.sub("\ndata: ", token) + "\n\n"


def sse_error(message: str) -> bytes:
    """Return the event that ends a stream which has failed."""
    return b"event: error\ndata: " + error_body(message) + b"\n\n"


def error_body(message: str) -> bytes:
    """Return the JSON of an error, the same over all transports."""
    return msgspec.json.encode({"error": message})


def socket_token(token: str) -> str:
    """Return the WebSocket message for one token."""
    return msgspec.json.encode({"token": token}).decode()
