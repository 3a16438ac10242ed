"""Frames in and out, as pure functions: any bytes, cut anywhere."""

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from chat.errors import GroqError
from chat.framing import EventParser, ReplyParser, sse_error, sse_events
from tests.servers import events

PIECES = st.sampled_from(
    [
        b"data: ",
        b"data:",
        b"event: error",
        b": comment",
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\xef\xbb\xbf",
        b'{"choices":[{"delta":{"content":"a"}}]}',
        b'{"choices":[{"delta":{"content":"\xe2\x80\xa8"},"finish_reason":"stop"}]}',
        b'{"choices":[],"usage":{"prompt_tokens":1}}',
        b'{"error":{}}',
        b'{"choices":[]},{"choices":[]}',
        b"[DONE]",
        b"{",
    ]
)
STREAMS = st.lists(PIECES | st.binary(max_size=8), max_size=30).map(b"".join)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    borders = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[a:b] for a, b in itertools.pairwise(borders)]


def parse(pieces: list[bytes]) -> tuple[str, bool, str | None, str]:
    parser = ReplyParser()
    tokens = [token for piece in pieces for token in parser.feed(piece)]
    tokens += parser.close()
    return "".join(tokens), parser.is_done, parser.finish_reason, repr(parser.error)


@given(STREAMS, st.lists(st.integers(0, 1 << 16), max_size=10))
def test_what_is_cut_differently_parses_the_same(stream: bytes, places: list[int]) -> None:
    assert parse(cut(stream, places)) == parse([stream])


@given(STREAMS)
def test_any_bytes_end_in_a_reply_or_in_an_error_of_ours(stream: bytes) -> None:
    parser = ReplyParser()
    parser.feed(stream)
    parser.close()
    assert parser.error is None or isinstance(parser.error, GroqError)
    assert parser.error or parser.is_done or parser.finish_reason


@given(STREAMS)
def test_events_are_those_of_the_standard(stream: bytes) -> None:
    parser = EventParser()
    lines = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    text = lines.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    expected = [e.data for e in events(iter([text.encode()])) if e.name != "error" and e.data]
    ours = [data.decode("latin-1") for data in parser.feed(stream)]
    assert [data for data in ours if not data.startswith('{"error":')] == [
        data for data in expected if not data.startswith('{"error":')
    ]


TOKENS = st.lists(st.text(min_size=1) | st.sampled_from(["\n", "[DONE]", " ", ": x", "\r"]))


@given(TOKENS)
def test_an_event_stream_carries_every_token(tokens: list[str]) -> None:
    received = [event.data for event in events(iter([sse_events(tokens)] if tokens else []))]
    text = "".join(tokens).replace("\r\n", "\n").replace("\r", "\n")
    if "\r" not in "".join(tokens):
        assert "".join(received) == text
    assert "[DONE]" not in received


def test_an_error_event_is_json_on_one_line() -> None:
    (event,) = events(iter([sse_error('a "quoted"\nline')]))
    assert (event.name, json.loads(event.data)) == ("error", {"error": 'a "quoted"\nline'})
