"""Groq's replies: bytes in, tokens out. Pure state machines, without I/O."""

import json
from collections.abc import Iterator, Mapping

from chat import errors
from chat.llm import chunks
from chat.llm.dialects import EMPTY, FINISH_REASONS, error_in, failure
from chat.reply import Usage

MAX_REPLY_BYTES = 16 << 20
MAX_EVENT_BYTES = 1 << 20
DONE = b"[DONE]"


class EventParser:
    """Split https://html.spec.whatwg.org/multipage/server-sent-events.html into events' data."""

    def __init__(self) -> None:
        self._rest, self._after_cr = b"", False

    def feed(self, received: bytes) -> list[bytes]:
        """Take the bytes of one read, or none at their end; return the events they complete."""
        if not received:
            received = b"\n\n"  # some servers omit the end of the last event
        elif b"\r" in received or self._after_cr:
            received = received[1:] if self._after_cr and received[:1] == b"\n" else received
            self._after_cr = received.endswith(b"\r")
            received = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        block, _, self._rest = (self._rest + received).rpartition(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise errors.GroqReplyBroken(cause=f"an event over {MAX_EVENT_BYTES} bytes")
        block = block.removeprefix(b"\xef\xbb\xbf")  # a byte order mark; an odd field elsewhere
        if block.startswith(b"data: "):
            # The common form, one line an event, needs no look at each event.
            events = block[6:].split(b"\n\ndata: ")
            if block.count(b"\n") == 2 * (len(events) - 1) and b"" not in events:
                return events
        return [data for event in block.split(b"\n\n") if (data := _data(event))]


def _data(event: bytes) -> bytes:
    if event.lstrip(b"\n").startswith(b"{"):
        return event  # an error that is not framed
    fields = [line.partition(b":")[::2] for line in event.split(b"\n")]
    kinds = (b"data", b"error")  # the latter from llama.cpp
    data = b"\n".join(value.removeprefix(b" ") for field, value in fields if field in kinds)
    last = dict(fields)
    if b"error" in last or last.get(b"event", b"").removeprefix(b" ") == b"error":
        return json.dumps({"error": [chunks.load(data)]}).encode()
    return data


class BodyParser(EventParser):
    """Take a reply that is one JSON object for a stream of one event and `[DONE]`."""

    def feed(self, received: bytes) -> list[bytes]:
        self._rest += received
        return [] if received else [data for data in (self._rest, DONE) if data]


class ReplyParser:
    """Read the bytes of a reply, however they are cut, and note how it ends."""

    def __init__(self, parser: EventParser) -> None:
        self.is_over = False  # no more tokens can come
        self.is_done = False  # `[DONE]` has come
        self.has_text = self.is_refusal = False
        self.error: errors.GroqError | None = None  # the tokens before it are good
        self.events = 0  # comments do not count
        self.finish_reason: str | None = None  # in OpenAI's words; once it is known, nothing fails
        self.usage = Usage()  # the last report
        self.groq_id: str | None = None
        self._parser, self._size, self._odd = parser, 0, ""
        self._joiner: chunks.CharacterJoiner | None = None

    def feed(self, received: bytes) -> list[str]:
        """Take one read, or no bytes at their end; return its tokens; raise if it is too large."""
        self._size += len(received)
        if self._size > MAX_REPLY_BYTES:
            raise errors.GroqReplyBroken(cause=f"a reply over {MAX_REPLY_BYTES} bytes")
        events = self._parser.feed(received)
        if self.is_over:
            return []
        tokens = self._tokens(events)
        if not (received or self.is_done) and isinstance(self.error, errors.GroqReplyBroken | None):
            self._fail(errors.GroqReplyCut())
        if self._joiner:
            text = self._joiner.join("".join(tokens), is_last=self.is_over)
            tokens = [text] if text else []
        self.has_text = self.has_text or bool(tokens)
        return tokens

    def check(self, max_tokens: int) -> None:
        """Raise `GroqError` unless what came until it was over, or finished, is a reply."""
        if self.error:
            raise self.error
        if not self.has_text:
            what = EMPTY.get(self.finish_reason or "", "sent an empty reply")
            raise errors.GroqReplyEmpty(what.format(max_tokens), cause=self._odd)

    def _tokens(self, events: list[bytes]) -> list[str]:
        self.events += len(events)
        if DONE in events:
            self.is_done = self.is_over = True
            events = events[: events.index(DONE)]
        tokens = []
        decoded = chunks.decode(events) or self._decode(events)
        for event, chunk in zip(events, decoded, strict=False):
            choice = chunk.choices[0] if chunk.choices else chunks.Choice()
            delta = choice.delta or choice.message
            if delta and delta.content:
                tokens.append(delta.content)
            elif delta and delta.refusal:
                tokens.append(delta.refusal)
                self.is_refusal = True
            has_more = chunk.usage or chunk.x_groq or chunk.error or choice.error
            if has_more or choice.finish_reason or not chunk.choices:
                self._note(chunk, choice, event)
                if self.error:
                    break
        return tokens

    def _decode(self, events: list[bytes]) -> Iterator[chunks.Chunk]:
        """Decode events one by one, as far as they are chunks."""
        self._joiner = self._joiner or chunks.CharacterJoiner()
        for event in events:
            if event.strip() == DONE:
                self.is_done = self.is_over = True
                return
            try:
                chunk, odd = chunks.decode_leniently(event)
            except errors.GroqReplyBroken as error:
                return self._fail(error)
            self._odd = self._odd or odd
            yield chunk

    def _note(self, chunk: chunks.Chunk, choice: chunks.Choice, event: bytes) -> None:
        extra, reason = chunk.x_groq or chunks.GroqExtra(), (choice.finish_reason or "null").lower()
        self.groq_id = extra.id or self.groq_id
        self.usage = chunk.usage or extra.usage or self.usage
        is_suspect = not chunk.choices or chunk.error or extra.error or choice.error
        if is_suspect and (error := error_in(chunks.load(event))):
            self._fail(failure(200, error))
        elif reason in FINISH_REASONS:
            self.finish_reason = FINISH_REASONS[reason]
        elif reason != "null":
            self._fail(failure(200, choice.finish_reason))

    def _fail(self, error: errors.GroqError) -> None:
        self.is_over = True
        self.error = None if self.finish_reason else error


def parser_for(headers: Mapping[str, str], *, is_stream: bool) -> ReplyParser:
    """Return the parser for a response; raise `GroqReplyBroken` if it cannot be a reply."""
    asked_for = "text/event-stream" if is_stream else "application/json"
    media_type = (headers.get("content-type") or asked_for).partition(";")[0].strip().lower()
    parsers = {"text/event-stream": EventParser, "application/json": BodyParser}
    parser, encoding = parsers.get(media_type), headers.get("content-encoding", "")
    if parser and encoding.lower() not in ("gzip", "deflate", "br", "zstd"):
        return ReplyParser(parser())
    raise errors.GroqReplyBroken(cause=f"content type {media_type:.100}, encoding {encoding:.100}")
