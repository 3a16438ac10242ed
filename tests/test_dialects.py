"""What is sent to each server, and row by row what its errors and finish reasons mean."""

import json
from typing import Any

import httpx
import pytest

from chat.config import Settings
from chat.errors import GroqError, GroqFailed, GroqRefused, GroqReplyEmpty
from chat.llm.dialects import FINISH_REASONS, error_in, failure, parameters

TPM = "Request too large for model `m` on tokens per minute (TPM): Limit 8000, Requested 9001"
LONG = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens"
TOO_LONG = 413
FAILED, FILTERED = 0, 1

# What an error inside a 200 says, and the status that it means.
ERRORS: list[tuple[Any, int]] = [
    ({"code": 400, "message": "no"}, 400),
    ({"code": "400", "message": "no"}, 400),
    ({"status": 422}, 422),
    ({"type": "invalid_request_error", "code": None}, 400),
    ({"type": "BadRequestError", "code": 400}, 400),
    ({"status": "INVALID_ARGUMENT", "code": 400}, 400),
    ({"type": "invalid_request_error", "code": "invalid_api_key"}, 401),
    ({"type": "authentication_error"}, 401),
    ({"code": 401}, 401),
    ({"type": "permission_error"}, 403),
    ({"type": "invalid_request_error", "code": "model_not_found"}, 404),
    ({"type": "invalid_request_error", "code": "model_decommissioned"}, 404),
    ("model 'llama3' not found, try pulling it first", 404),
    ({"message": "Rate limit reached", "type": "tokens", "code": "rate_limit_exceeded"}, 429),
    ({"code": 429, "status": "RESOURCE_EXHAUSTED"}, 429),
    ({"type": "insufficient_quota"}, 429),
    ({"type": "RateLimitError"}, 429),
    ("Too Many Requests", 429),
    ({"code": 400, "message": "the request exceeds the available context size"}, 400 + TOO_LONG),
    ({"message": LONG, "type": "invalid_request_error"}, TOO_LONG + TOO_LONG),
    ({"code": "context_length_exceeded"}, TOO_LONG + TOO_LONG),
    ({"message": TPM, "type": "tokens", "code": "rate_limit_exceeded"}, TOO_LONG + TOO_LONG),
    ({"type": "request_too_large"}, TOO_LONG + TOO_LONG),
    ({"code": 413}, TOO_LONG + TOO_LONG),
    ({"message": "CUDA out of memory", "type": "server_error", "code": 500}, FAILED),
    ({"type": "overloaded_error"}, 503),
    ({"code": 400, "message": "maximum number of tokens; input token count (9)"}, 400 + TOO_LONG),
    ({"code": 400, "message": "input length and max_tokens exceed context limit"}, 400 + TOO_LONG),
    ({"code": 400, "message": "too many tokens: 9"}, 400 + TOO_LONG),
    ({"code": 400, "message": "Prompt exceeds max length"}, 400 + TOO_LONG),
    ({"code": 400, "message": "must be <= `8192`, the `context_window` for this model"}, 400),
    ({"code": "content_filter"}, FILTERED),
    ({"message": "boom"}, FAILED),
    ({"code": 50001}, FAILED),
    ("boom", FAILED),
    (True, FAILED),
    ([{"error": {"code": 429}}], 429),
    ({"error": {"error": {"code": 429}}}, 429),
]


def meaning(error: GroqError) -> int:
    if isinstance(error, GroqFailed):
        return FAILED
    if isinstance(error, GroqReplyEmpty):
        return FILTERED
    assert isinstance(error, GroqRefused)
    return error.upstream_status + TOO_LONG * error.is_too_large


@pytest.mark.parametrize(("said", "expected"), ERRORS, ids=str)
def test_an_error_inside_a_200_is_classed_by_what_it_says(said: Any, expected: int) -> None:
    for event in ({"error": said}, {"choices": [], "error": said}, {"x_groq": {"error": said}}):
        assert meaning(failure(200, error_in(event))) == expected
    assert meaning(failure(200, error_in({"choices": [{"error": said}]}))) == expected


def test_a_status_means_itself_and_a_400_or_500_what_it_says() -> None:
    for status, said, expected in (
        (401, "", 401),
        (413, "", TOO_LONG + TOO_LONG),
        (429, {"error": {"message": LONG}}, 429),
        (503, {"error": {"code": 400}}, 503),
        (400, {"error": {"message": "no", "code": "model_decommissioned"}}, 404),
        (400, {"error": {"message": LONG}}, 400 + TOO_LONG),
        (422, {"error": "`inputs` must have less than 4096 tokens"}, 422 + TOO_LONG),
        (500, {"error": {"message": "the request exceeds the context size"}}, 413 + TOO_LONG),
        (500, {"error": {"type": "overloaded_error"}}, 503),
        (500, "<html>", 500),
        (400, "", 400),
    ):
        assert meaning(failure(status, said)) == expected, (status, said)


def test_only_an_event_that_tells_of_an_error_has_one() -> None:
    nothings: list[Any] = ["", {}, False, None, [], 0, {"message": "", "code": None}]
    for nothing in nothings:
        for event in (
            {"error": nothing},
            {"x_groq": {"error": nothing}},
            {"choices": [{"error": nothing}]},
        ):
            assert not error_in(json.loads(json.dumps(event))), event
    for event in (
        {},
        {"type": "ping"},
        {"object": "x", "choices": []},
        {"usage": {"a": 1}},
        {"x_groq": 5},
    ):
        assert not error_in(event), event
    for event in (
        {"object": "error", "message": "CUDA out of memory", "code": 500},
        {"type": "error", "message": "m"},
        {"status": "error"},
        {"detail": "Internal Server Error"},
        {"code": "Throttling", "message": "m", "choices": []},
    ):
        assert error_in(event), event


def test_every_finish_reason_is_known_or_a_failure() -> None:
    assert set(FINISH_REASONS.values()) == {"stop", "length", "content_filter", "tool_calls"}
    assert all(word == word.lower() for word in FINISH_REASONS)
    for reason, expected in {"abort": FAILED, "error": FAILED, "rate_limit": 429}.items():
        assert reason not in FINISH_REASONS
        assert meaning(failure(200, reason)) == expected


GPT_OSS = "openai/gpt-oss-20b"
REASONING = {"include_reasoning": False, "reasoning_effort": "high"}


def test_each_server_gets_the_parameters_that_it_knows() -> None:
    settings = Settings(groq_api_key="k", max_tokens=7, reasoning_effort="high")
    for name, model, expected in (
        ("api.groq.com", GPT_OSS, {"max_completion_tokens": 7, **REASONING}),
        ("API.Groq.com", "openai/gpt-oss-120b", {"max_completion_tokens": 7, **REASONING}),
        ("api.groq.com", "openai/gpt-oss-safeguard-20b", {"max_completion_tokens": 7}),
        ("api.groq.com", "qwen/qwen3-32b", {"max_completion_tokens": 7}),
        ("api.openai.com", GPT_OSS, {"max_completion_tokens": 7}),
        ("openrouter.ai", GPT_OSS, {"max_completion_tokens": 7}),
        ("localhost", GPT_OSS, {"max_tokens": 7}),
        ("api.groq.com.example", GPT_OSS, {"max_tokens": 7}),
    ):
        host = httpx.URL(f"https://{name}/v1").host
        whole = parameters(host, model, settings, is_stream=False)
        assert whole == {"model": model, **expected}, (name, model)
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        assert parameters(host, model, settings, is_stream=True) == whole | usage
    mistral = parameters("api.mistral.ai", "m", settings, is_stream=True)
    assert mistral == {"model": "m", "max_tokens": 7, "stream": True}
