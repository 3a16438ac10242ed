"""
Groq's replies: bytes in, tokens out. Pure state machines, without I/O. The format of a stream is
https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from collections.abc import Mapping

from chat import errors
from chat.llm.types import NULL, Chunk, GroqExtra, decode_chunks, decode_usage
from chat.reply import Usage

MAX_REPLY_BYTES = 16 << 20
MAX_EVENT_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DONE = b"[DONE]"


class EventParser:
    """
    Split an event stream, however it is cut, into the data of its events; its lines end with LF,
    CRLF or CR alone. An event named `error` becomes `{"error":true}`, whatever its data.
    """

    def __init__(self) -> None:
        self._rest, self._after_cr, self._is_at_start = b"", False, True

    def feed(self, received: bytes) -> list[bytes]:
        """Take the bytes of one read, or none at their end; return the events they complete."""
        if not received:
            received = b"\n\n"  # some servers omit the end of the last event
        elif b"\r" in received or self._after_cr:
            received = received[1:] if self._after_cr and received[:1] == b"\n" else received
            self._after_cr = received.endswith(b"\r")
            received = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        complete, end, self._rest = (self._rest + received).rpartition(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise errors.GroqReplyBroken
        return self._events(complete) if end else []

    def _events(self, block: bytes) -> list[bytes]:
        if self._is_at_start:
            self._is_at_start = False
            block = block.removeprefix(BYTE_ORDER_MARK)
        if block.startswith(b"data: "):
            # The common form, one line an event, needs no look at each event.
            events = block[6:].split(b"\n\ndata: ")
            if block.count(b"\n") == 2 * (len(events) - 1) and b"" not in events:
                return events
        return [data for event in block.split(b"\n\n") if (data := _data(event))]


def _data(event: bytes) -> bytes:
    fields = [line.partition(b":")[::2] for line in event.split(b"\n")]
    if dict(fields).get(b"event", b"").removeprefix(b" ") == b"error":
        return b'{"error":true}'
    return b"\n".join(value.removeprefix(b" ") for field, value in fields if field == b"data")


class BodyParser(EventParser):
    """Take a reply that is one JSON object for a stream of one event and `[DONE]`."""

    def feed(self, received: bytes) -> list[bytes]:
        self._rest += received
        return [] if received else [data for data in (self._rest, DONE) if data]


class ReplyParser:
    """Read the bytes of a reply, however they are cut, and decide how it ends."""

    def __init__(self, parser: EventParser) -> None:
        self.is_over = False  # no more tokens can come
        self.is_done = False  # `[DONE]` has come
        self.has_text = False
        self.error: errors.GroqError | None = None  # the tokens before it are good
        self.events = 0  # comments do not count
        self.finish_reason: str | None = None
        self.usage: Usage | None = None  # the last report
        self.groq_id: str | None = None
        self._parser, self._size = parser, 0

    def feed(self, received: bytes) -> list[str]:
        """Take one read, or no bytes at their end; return its tokens; raise if it is too large."""
        self._size += len(received)
        if self._size > MAX_REPLY_BYTES:
            raise errors.GroqReplyBroken
        events, tokens = self._parser.feed(received), []
        if not self.is_over:
            tokens = self._tokens(events)
            self.has_text = self.has_text or bool(tokens)
            if not (received or self.is_done or isinstance(self.error, errors.GroqFailed)):
                self.error = None if self.finish_reason else errors.GroqReplyCut()
        self.is_over = self.is_over or not received
        return tokens

    def check(self, max_tokens: int) -> None:
        """Raise `GroqError` unless what came until it was over, or finished, is a reply."""
        if self.error:
            raise self.error
        if not self.has_text and self.finish_reason == "length":
            raise errors.GroqReplyEmpty(f"used up its {max_tokens} tokens before it wrote any text")
        if not self.has_text:
            raise errors.GroqReplyEmpty("sent an empty reply")

    def _tokens(self, events: list[bytes]) -> list[str]:
        self.events += len(events)
        if DONE in events:
            self.is_done = self.is_over = True
            events = events[: events.index(DONE)]
        chunks, tokens = decode_chunks(events), []
        for chunk in chunks:
            if chunk.choices:
                choice = chunk.choices[0]
                delta = choice.delta or choice.message
                if delta and delta.content:
                    tokens.append(delta.content)
                self.finish_reason = choice.finish_reason or self.finish_reason
            if chunk.usage is not NULL or chunk.x_groq is not None or chunk.error is not NULL:
                self._note(chunk)
                if self.error:
                    return tokens
        if len(chunks) < len(events):
            self.is_over = True
            if events[len(chunks)].strip() == DONE:
                self.is_done = True
            else:
                self.error = errors.GroqReplyBroken()
        return tokens

    def _note(self, chunk: Chunk) -> None:
        extra = chunk.x_groq or GroqExtra()
        self.groq_id = extra.id or self.groq_id
        self.usage = decode_usage(chunk.usage) or decode_usage(extra.usage) or self.usage
        if chunk.error != NULL or extra.error != NULL:
            self.error, self.is_over = errors.GroqFailed(), True


PARSERS = {"text/event-stream": EventParser, "application/json": BodyParser}


def parser_for(headers: Mapping[str, str], *, is_stream: bool) -> ReplyParser:
    """Return the parser for a response; raise `GroqReplyBroken` if it cannot be a reply."""
    asked_for = "text/event-stream" if is_stream else "application/json"
    media_type = (headers.get("content-type") or asked_for).partition(";")[0].strip().lower()
    parser = PARSERS.get(media_type)
    if parser is None or headers.get("content-encoding", "identity").lower() != "identity":
        raise errors.GroqReplyBroken
    return ReplyParser(parser())
