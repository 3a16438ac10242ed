"""What clients send: any bytes are a request, or refused with a reason."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.errors import BadRequest
from chat.messages import parse_request

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
        request = parse_request(received, may_cancel=True)
        assert request.cancel == bool(json.loads(received).get("cancel"))
        assert request.cancel or request.messages[-1].role == "user"


def test_only_a_websocket_knows_a_cancel() -> None:
    assert parse_request('{"cancel": true}', may_cancel=True).cancel
    with pytest.raises(BadRequest, match="messages must not be empty"):
        parse_request(b'{"cancel": true}')


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"messages":['])
def test_a_body_that_is_nested_too_deeply_is_an_error_too(opening: str) -> None:
    for depth in (100, 10_000, 100_000):
        with pytest.raises(BadRequest):
            parse_request((opening * depth).encode())
