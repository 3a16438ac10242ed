"""Groq's replies as pure functions: any bytes, cut anywhere."""

import itertools
import json
import re
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from chat.errors import GroqError, GroqFailed, GroqRefused, GroqReplyBroken, GroqReplyCut
from chat.llm.stream import BodyParser, EventParser, ReplyParser
from tests.servers import events

PIECES = st.sampled_from(
    [
        *(b"data: ", b"data:", b"event: error", b": comment", b"[DONE]", b"{", b"\xef\xbb\xbf"),
        *(b"\n", b"\n\n", b"\r", b"\r\n"),
        b'{"choices":[{"delta":{"content":"a"}}]}',
        b'{"choices":[{"delta":{"content":"\xe2\x80\xa8"},"finish_reason":"stop"}]}',
        b'{"choices":[],"usage":{"prompt_tokens":1}}',
        b'{"error":"e"}',
        b'{"choices":[{"delta":{"content":"\\ud83d"}}]}',
        b'{"choices":[{"delta":{"content":["x"]},"finish_reason":5}]}',
        b'{"choices":[]},{"choices":[]}',
    ]
)
STREAMS = st.lists(PIECES | st.binary(max_size=8), max_size=30).map(b"".join)


class Parsed(NamedTuple):
    text: str
    error: type[GroqError] | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    borders = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[a:b] for a, b in itertools.pairwise(borders)]


def parse(pieces: list[bytes], parser: ReplyParser | None = None) -> Parsed:
    """Feed some pieces and their end."""
    parser = parser or ReplyParser(EventParser())
    text = "".join(token for piece in (*pieces, b"") for token in parser.feed(piece))
    assert parser.is_over
    error = type(parser.error) if parser.error else None
    prompt_tokens = parser.usage.prompt_tokens if parser.usage else None
    return Parsed(text, error, parser.finish_reason, prompt_tokens)


@example(b"\n\n\n{\n\n", [3])
@given(STREAMS, st.lists(st.integers(0, 1 << 16), max_size=10))
def test_what_is_cut_differently_parses_the_same(stream: bytes, places: list[int]) -> None:
    assert parse(cut(stream, places)) == parse([stream])


@given(STREAMS)
def test_any_bytes_end_in_a_reply_or_in_an_error_of_ours(stream: bytes) -> None:
    parser = ReplyParser(EventParser())
    parsed = parse([stream], parser)
    assert parsed.error or parser.is_done or parsed.finish_reason


@given(STREAMS)
def test_events_without_an_error_are_those_of_the_standard(stream: bytes) -> None:
    unmarked = stream.removeprefix(b"\xef\xbb\xbf")  # an event behind the mark is one as well
    lines = unmarked.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    text = lines.decode("latin-1")
    assume(not re.search(rb"(^|\n)(\{|error(:|\n|$))", lines))  # read though not standard
    expected = [e.data for e in events(iter([text.encode()])) if e.name != "error" and e.data]
    ours = [data.decode("latin-1") for data in EventParser().feed(stream)]
    assert [data for data in ours if not data.startswith('{"error": [')] == expected


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_a_stream_may_be_cut_at_every_byte_even_within_a_character(newline: bytes) -> None:
    tokens = ["Grüße", " 你好", " \U0001f600", "\u2028\x85", " end"]
    chunks = [{"choices": [{"delta": {"content": token}}]} for token in tokens]
    lines = [b"data: " + json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks]
    stream = newline.join(line + newline for line in [*lines, b"data: [DONE]"])
    for size in range(1, 20):
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert parse(pieces) == Parsed("".join(tokens))


HI = 'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n'
DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    "stream",
    [
        HI + DONE,
        HI + "data: [DONE]",
        HI + "data:[DONE]\n\n",
        HI + "data: [DONE] \n\n",
        HI + DONE + HI,
        "\ufeff" + HI + DONE,
        ": comment\n\n" + HI + ":\n\nid: 5\nretry: 9\n\n" + DONE,
        'event: x\ndata: {"choices":[{"delta":\ndata: {"content":"Hi"}}]}\n\n' + DONE,
        'data: {"choices":[{"delta":{"content":null}}]}\n\n' + HI + DONE,
        'data: {"choices":[{"delta":{"reasoning":"hm"}}]}\n\n' + HI + DONE,
        'data: {"choices":[{"delta":{"content":""}}]}\n\n' + HI + DONE,
    ],
)
def test_what_other_servers_leave_out_or_add_does_no_harm(stream: str) -> None:
    assert parse([stream.encode()]) == Parsed("Hi")


@pytest.mark.parametrize("end", ["\n\n" + DONE, "\n\n", ""])
def test_a_reply_is_whole_once_the_model_says_why_it_stopped(end: str) -> None:
    for chunk in (
        '{"choices":[{"delta":{},"finish_reason":"stop"}]}',
        '{"choices":[{"delta":null,"finish_reason":"stop"}],"usage":null}',
        '{"choices":[{"finish_reason":"stop"}],"x_groq":null,"error":null}',
    ):
        assert parse([f"{HI}data: {chunk}{end}".encode()]) == Parsed("Hi", None, "stop")


def test_usage_is_read_wherever_it_stands_and_ignored_if_malformed() -> None:
    for members, tokens in {
        '"usage":{"prompt_tokens":7}': 7,
        '"x_groq":{"usage":{"prompt_tokens":7}}': 7,
        '"usage":null,"x_groq":{"usage":{"prompt_tokens":7}}': 7,
        '"usage":{"prompt_tokens":7,"time":1e400}': 7,
        '"usage":{"prompt_tokens":-5}': None,
        '"usage":{"prompt_tokens":"7"}': None,
        '"usage":{"prompt_tokens":1' + "0" * 400 + "}": None,
        '"x_groq":{"usage":[]}': None,
        '"x_groq":{"usage":1e400}': None,
    }.items():
        stream = HI + f'data: {{"choices":[],{members}}}\n\n' + DONE
        assert parse([stream.encode()]) == Parsed("Hi", None, None, tokens), members


def test_the_last_report_of_usage_counts_and_the_id_for_support_is_kept() -> None:
    parser = ReplyParser(EventParser())
    reports = [f'data: {{"usage":{{"prompt_tokens":{count}}}}}\n\n' for count in (1, 2, 3)]
    stream = 'data: {"x_groq":{"id":"req_1"}}\n\n' + HI + "".join(reports) + DONE
    assert parse([stream.encode()], parser).prompt_tokens == 3
    assert parser.groq_id == "req_1"


@pytest.mark.parametrize(
    ("stream", "parsed"),
    [
        ("", Parsed("", GroqReplyCut)),
        ("<html>sorry</html>", Parsed("", GroqReplyCut)),
        (HI, Parsed("Hi", GroqReplyCut)),
        (HI + 'data: {"choices":[{"del', Parsed("Hi", GroqReplyCut)),
        (HI + 'data: {"error":{"message":"m"}}\n\n' + DONE, Parsed("Hi", GroqFailed)),
        (HI + 'data: {"error":"overloaded"}\n\n' + HI, Parsed("Hi", GroqRefused)),
        (HI + 'error: {"code":500,"message":"m"}\n\n' + DONE, Parsed("Hi", GroqFailed)),
        ('{"error":{"code":429}}', Parsed("", GroqRefused)),
        ('data: [{"error":{"code":429}}]\n\n', Parsed("", GroqRefused)),
        (HI + 'event: error\ndata: {"m": 1}\n\n', Parsed("Hi", GroqFailed)),
        (HI + "event: error\ndata: oops", Parsed("Hi", GroqFailed)),
        (HI + 'data: {"x_groq":{"error":"e"}}\n\n', Parsed("Hi", GroqFailed)),
    ],
)
def test_a_reply_that_is_cut_or_fails_keeps_the_text_before_it(stream: str, parsed: Parsed) -> None:
    assert parse([stream.encode()]) == parsed


def test_an_event_that_is_no_chunk_ends_the_reply() -> None:
    two = '{"choices":[]},{"choices":[]}'
    for data in ("nonsense", "[1, 2]", "[" * 5000, "{}{}", two, '"\\ud800"'):
        parsed = parse([f"{HI}data: {data}\n\n{HI}{DONE}".encode()])
        assert parsed == Parsed("Hi", GroqReplyBroken), data


def test_comments_are_no_progress() -> None:
    parser = ReplyParser(EventParser())
    assert parser.feed(b": still thinking\n\n" * 3) == []
    assert parser.events == 0
    parser.feed((HI + HI).encode())
    assert parser.events == 2


def test_an_event_and_a_reply_have_a_largest_size() -> None:
    megabyte = b"x" * (1 << 20)
    for pieces in ([b"data: ", megabyte, megabyte], [HI.encode() * (1 << 19)]):
        with pytest.raises(GroqReplyBroken):
            parse(pieces)
    with pytest.raises(GroqReplyBroken):
        parse([megabyte] * 17, ReplyParser(BodyParser()))


WHOLE = '{"message":{"content":"Hi"},"finish_reason":"length"}'


@pytest.mark.parametrize(
    ("body", "parsed"),
    [
        (f'{{"choices":[{WHOLE}],"usage":{{"prompt_tokens":7}}}}', Parsed("Hi", None, "length", 7)),
        ('{"choices":[{"message":{"content":"Hi"}}],"usage":[]}', Parsed("Hi")),
        ('{"choices":[{"message":null}]}', Parsed("")),
        ('{"choices":[{"message":{"content":null}}]}', Parsed("")),
        ('{"error":{"message":"no"}}', Parsed("", GroqFailed)),
        ('{"choices":[]}', Parsed("")),
        ("", Parsed("")),
        ('{\r\n"choices": [\n{"message": {"content": "a\\nb"}}\n]\n}\n', Parsed("a\nb")),
        ("nonsense", Parsed("", GroqReplyBroken)),
    ],
)
def test_a_whole_reply_is_one_json_object(body: str, parsed: Parsed) -> None:
    assert parse(cut(body.encode(), [3, 7]), ReplyParser(BodyParser())) == parsed


def chunk(content: str, **members: object) -> str:
    choice = ",".join([f'"delta":{content}', *(f'"{k}":{v}' for k, v in members.items())])
    return f'data: {{"choices":[{{{choice}}}]}}\n\n'


THINKING = '[{"type":"thinking","thinking":[{"type":"text","text":"hm"}]}]'
ODD = [
    chunk(f'{{"content":{THINKING}}}'),
    chunk('{"content":{"a":1}}'),
    chunk('{"content":5}'),
    chunk('"text"'),
    chunk("{}", finish_reason="5"),
    chunk("{}", logprobs="NaN"),
    chunk("{}", error='""'),
    'data: {"choices":["x"]}\n\n',
    'data: {"choices":{}}\n\n',
    'data: {"choices":[],"error":{}}\n\n',
    'data: {"x_groq":[],"usage":5}\n\n',
    chunk("{}", finish_reason='"null"'),
]


def test_an_odd_member_is_passed_over_and_costs_no_reply() -> None:
    for odd in ODD:
        for stream in (odd + HI + DONE, HI + odd + DONE):
            assert parse([stream.encode()]) == Parsed("Hi"), odd
    parts = '[{"type":"text","text":"H"},{"type":"text","text":"i"}]'
    assert parse([(chunk(f'{{"content":{parts}}}') + DONE).encode()]) == Parsed("Hi")


def test_what_is_no_reply_says_where_and_of_which_kind() -> None:
    for odd, cause in (
        (ODD[1], "choices[0].delta.content: object"),
        (ODD[3], "choices[0].delta: str"),
        (ODD[8], "choices: object"),
    ):
        parser = ReplyParser(EventParser())
        parse([(odd + DONE).encode()], parser)
        with pytest.raises(GroqError) as raised:
            parser.check(1)
        assert raised.value.log_fields == {"error": "empty", "cause": cause}


def test_halves_of_characters_are_joined_and_a_half_alone_is_replaced() -> None:
    for tokens, text in (
        ([r"a\ud83d", r"\ude00b"], "a\U0001f600b"),
        ([r"a\ud83d", "b", r"\ude00"], "a\ufffdb\ufffd"),
        ([r"\ud83d"], "\ufffd"),
        ([r"\ude00", r"\ud83d\ude00"], "\ufffd\U0001f600"),
        (["a\udcf0\udc9f", "\udc98\udc80b"], "a\U0001f600b"),
        (["\udcff", "ok"], "\ufffdok"),
    ):
        chunks = "".join(chunk(f'{{"content":"{token}"}}') for token in tokens)
        for end in (DONE, chunk("{}", finish_reason='"stop"')):
            stream = (chunks + end).encode(errors="surrogateescape")
            assert parse([stream]).text == parse(cut(stream, [60, 61, 150])).text == text, tokens


def test_only_a_known_finish_reason_ends_a_reply_and_after_it_nothing_fails() -> None:
    end = chunk("{}", finish_reason='"MAX_TOKENS"')
    assert parse([(HI + end + 'data: {"error":"late"}\n\nx').encode()]) == Parsed(
        "Hi", None, "length"
    )
    both = '"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}],"error":{"code":502}'
    assert parse([f"data: {{{both}}}\n\n".encode()]) == Parsed("Hi", GroqFailed)
    for reason, error in (("abort", GroqFailed), ("error", GroqFailed), ("throttled", GroqRefused)):
        stream = HI + chunk("{}", finish_reason=f'"{reason}"') + DONE
        assert parse([stream.encode()]) == Parsed("Hi", error)


def test_a_refusal_is_a_reply_and_no_text_at_all_is_told_by_its_reason() -> None:
    parser = ReplyParser(EventParser())
    refusal = chunk('{"content":null,"refusal":"I cannot."}')
    assert parse([(refusal + DONE).encode()], parser).text == "I cannot."
    assert parser.is_refusal
    for reason, told in (("length", "its 7 tokens"), ("SAFETY", "filter"), ("tool_use", "a tool")):
        parser = ReplyParser(EventParser())
        parse([chunk("{}", finish_reason=f'"{reason}"').encode()], parser)
        with pytest.raises(GroqError, match=told):
            parser.check(7)


def test_the_data_of_an_error_event_is_classed_too() -> None:
    for data, error in (
        ('{"code":429}', GroqRefused),
        ('{"error":{"code":"context_length_exceeded"}}', GroqRefused),
        ("overloaded", GroqRefused),
        ("", GroqFailed),
        ("null", GroqFailed),
    ):
        assert parse([f"{HI}event: error\ndata: {data}\n\n".encode()]) == Parsed("Hi", error), data
