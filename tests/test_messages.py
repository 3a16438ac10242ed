"""What callers send and what Groq sends: any bytes are read, or refused by an error of ours."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat.errors import BadRequest
from chat.messages import (
    ChatRequest,
    SocketRequest,
    decode_chunks,
    decode_model_names,
    decode_reply,
    parse_request,
)
from chat.quota import Quota, parse_duration, parse_retry_after

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "role",
                    "content",
                    "stream",
                    "conversation",
                    "cancel",
                    "choices",
                    "delta",
                    "message",
                    "usage",
                    "x_groq",
                    "error",
                    "finish_reason",
                    "data",
                    "id",
                ]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)
BODIES = st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode())


@given(BODIES, st.sampled_from([ChatRequest, SocketRequest]))
def test_any_body_is_a_request_or_an_error_that_says_why(
    received: bytes, kind: type[ChatRequest]
) -> None:
    try:
        request = parse_request(kind, received)
    except BadRequest:
        return
    if not getattr(request, "cancel", False):
        assert request.messages[-1].role == "user"
        assert all(message.content.strip() for message in request.messages)


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"messages":['])
@pytest.mark.parametrize("depth", [100, 10_000, 100_000])
def test_a_body_that_is_nested_too_deeply_is_an_error_too(opening: str, depth: int) -> None:
    with pytest.raises(BadRequest):
        parse_request(ChatRequest, opening * depth)


@given(BODIES)
def test_anything_that_groq_may_send_is_read_or_passed_over(received: bytes) -> None:
    whole = decode_reply(received)
    assert whole is None or isinstance(whole.is_error, bool)
    assert len(decode_chunks([received, received])) in (0, 2)
    names = decode_model_names(received)
    assert names is None or all(isinstance(name, str) for name in names)


@given(st.text(max_size=30) | st.from_regex(r"\d+(\.\d+)?(ms|s|m|h|d)?"))
def test_any_header_of_groqs_is_read_or_passed_over(value: str) -> None:
    seconds = parse_retry_after(value)
    assert seconds is None or seconds >= 0
    duration = parse_duration(value)
    assert duration is None or duration >= 0
    quota = Quota()
    for kind in ("limit", "remaining", "reset"):
        quota.note(200, {f"x-ratelimit-{kind}-tokens": value, "x-ratelimit-reset-tokens": "1s"})
    assert 0 <= quota.wait_for(10) <= 1
