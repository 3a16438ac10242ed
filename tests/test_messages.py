"""What clients send: any bytes are a request, or refused with a reason."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.errors import BadRequest
from chat.messages import Message, parse_request

MEMBERS = ["messages", "role", "content", "stream", "conversation", "cancel"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(MEMBERS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=15,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=3)}
    )
)
BODIES = JSON | st.fixed_dictionaries({"messages": MESSAGES}, optional={"conversation": JSON})


@given(st.binary(max_size=40) | BODIES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_a_good_request_or_an_error_that_says_why(received: bytes) -> None:
    with suppress(BadRequest):
        request = parse_request(received)
        assert request.messages[-1].role == "user"
        assert all(message.content.strip() for message in request.messages)
        assert {message.role for message in request.messages} <= {"user", "assistant"}


@given(st.text(max_size=40) | BODIES.map(json.dumps))
def test_any_message_on_a_websocket_is_a_request_a_cancel_or_an_error(received: str) -> None:
    with suppress(BadRequest):
        request = parse_request(received.encode(), may_cancel=True)
        assert request.cancel == bool(json.loads(received).get("cancel"))
        assert request.cancel or request.messages[-1].role == "user"


def test_only_a_websocket_knows_a_cancel() -> None:
    assert parse_request(b'{"cancel": true}', may_cancel=True).cancel
    with pytest.raises(BadRequest, match="messages is missing"):
        parse_request(b'{"cancel": true}')


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"messages":['])
def test_a_body_that_is_nested_too_deeply_is_an_error_too(opening: str) -> None:
    for depth in (100, 10_000, 100_000):
        with pytest.raises(BadRequest):
            parse_request((opening * depth).encode())


HALF = r"the body must be valid JSON in UTF-8: it has half of a character"
PART = 'messages[0].content[0] must be {"type": "text", "text": "..."}'


def one(content: str) -> bytes:
    return f'{{"messages":[{{"role":"user","content":{content}}}]}}'.encode()


def test_each_error_says_what_is_wrong_in_the_words_of_json() -> None:
    cases = {
        b"": "the body is empty; send {",
        b" \n": "the body is empty; send {",
        b'{"prompt":"Hi"}': "messages is missing; send {",
        b'{"messages":[]}': "messages must not be empty",
        b'{"messages":"Hi"}': "messages must be an array, not a string",
        b'{"messages":[5]}': "messages[0] must be an object, not a number",
        b'{"messages":[{"role":"user"}]}': "messages[0].content is missing",
        b'{"stream":"true"}': "stream must be true or false, not a string",
        b'{"conversation":{}}': "conversation must be a string, not an object",
        b'{"input":{"messages":[]}}': "messages is missing",
        b'{"stream":1e999}': "the body has a number that is out of range",
        b"[]": "the body must be an object, not an array",
        b"[" * 9999: "the body must be valid JSON in UTF-8: it is nested too deeply",
        one("null"): "messages[0].content must be a string, not null",
        one(r'"\ud83d"'): HALF,
        one(r'"\ude00 x"'): HALF,
        one('"') + b'\xff"': "the body must be valid JSON in UTF-8: it has bytes",
        one('[{"type":"image_url"}]'): f"{PART}, not image_url",
        one('["Hi"]'): PART,
        one('[{"type":"text","text":5}]'): PART,
        one("[]"): "messages[0].content must not be empty",
    }
    for received, error in cases.items():
        with pytest.raises(BadRequest) as raised:
            parse_request(received)
        assert str(raised.value).startswith(error), received
        assert "`" not in str(raised.value)


def test_what_other_clients_send_is_understood() -> None:
    parts = '[{"type":"text","text":"a"},{"type":"text","text":"b","cache_control":{}}]'
    assert parse_request(one(parts)).messages == [Message("user", "ab")]
    marked = "\ufeff".encode() + one(r'"\ud83d\ude00"')
    assert parse_request(marked).messages == [Message("user", "\U0001f600")]
