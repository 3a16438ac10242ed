"""Groq asked with patience: what is tried again, when another model is asked, and when neither."""

from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Request, Script
from tests.servers import Service, body, wait_until

RETRIES = {"GROQ_MAX_RETRIES": 2}
TEMPORARY = [
    Script(cut_before_status=True),
    Script(cut_before_token=0),
    Script(error_before_token=0),
    Script(error_before_token=0, error="event: error\ndata: overloaded"),
    *(Script(status=status) for status in (408, 409, 429, 498, 500, 502, 503, 504)),
]


def names(script: Script) -> str:
    return str(script.status) if script.status != 200 else "a connection that is cut, or an error"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", TEMPORARY, ids=names)
def test_what_may_help_is_tried_again(
    start_service: StartService, groq: FakeGroq, conversation: str, fault: Script, stream: bool
) -> None:
    service = start_service(**RETRIES)
    groq.on("question", fault, Script(["good"]))
    answer = service.chat("question", conversation, stream=stream)
    assert "good" in answer.text
    assert len(groq.asked("question")) == 2
    assert service.metric("groq_retries_total") == 1
    assert service.contents(conversation) == ["question", "good"]


def test_it_is_tried_so_often_and_no_more(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service(**RETRIES)
    groq.on("question", Script(status=503))
    assert service.chat("question").status_code == 502
    assert len(groq.asked("question")) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_help_is_not_tried_again(
    start_service: StartService, groq: FakeGroq, status: int
) -> None:
    service = start_service(**RETRIES)
    groq.on("question", Script(status=status))
    assert service.chat("question").status_code == 502
    assert len(groq.asked("question")) == 1


def test_after_the_first_token_nothing_is_tried_again(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(**RETRIES)
    groq.on("question", Script(["a", "b"], cut_before_token=1))
    with service.stream("question", conversation) as (_, events):
        assert [event.name for event in events] == ["message", "error"]
    assert len(groq.asked("question")) == 1
    assert service.contents(conversation) == []


def test_each_attempt_has_its_own_clock_until_the_first_event(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**RETRIES, GROQ_FIRST_EVENT_TIMEOUT=0.3)
    groq.on("question", Script(hold_before_status=True), Script(["good"]))
    assert service.tokens("question") == ["good"]
    assert groq.asked("question")[0].is_closed_soon()


def gap(requests: list[Request]) -> float:
    return requests[1].received_at - requests[0].received_at


def test_groqs_wish_to_be_left_alone_for_a_while_is_obeyed(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**RETRIES)
    groq.on("question", Script(status=429, headers=(("retry-after", "2"),)), Script(["good"]))
    assert service.reply("question") == "good"
    assert gap(groq.asked("question")) >= 2


def test_a_longer_wish_is_passed_on_at_once(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service(**RETRIES)
    groq.on("question", Script(status=429, headers=(("retry-after", "11"),)))
    answer = service.chat("question")
    assert (answer.status_code, answer.headers["retry-after"]) == (502, "11")
    assert len(groq.asked("question")) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_ends_the_retries(
    start_service: StartService, groq: FakeGroq, stream: bool
) -> None:
    service = start_service(**RETRIES)
    groq.on("question", Script(status=429, headers=(("retry-after", "9"),)))
    with suppress(httpx.ReadTimeout):
        httpx.post(f"{service.url}/chat", json=body("question", stream=stream), timeout=0.5)
    wait_until(lambda: service.metric("chat_replies_total", outcome="cancelled") == 1)
    assert service.metric("chat_replies_active") == 0
    assert len(groq.asked("question")) == 1


@pytest.mark.parametrize("transport", ["json", "sse"])
def test_the_whole_reply_has_a_limit(
    start_service: StartService, groq: FakeGroq, conversation: str, transport: str
) -> None:
    service = start_service(REPLY_TIMEOUT=0.5)
    groq.on("question", Script(["t"] * 1000, interval=0.01))
    answer = service.chat("question", conversation, stream=transport == "sse")
    assert "did not answer in time" in answer.text
    assert answer.status_code == (504 if transport == "json" else 200)
    assert groq.asked("question")[0].is_closed_soon()
    assert service.contents(conversation) == []


@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_waited_for_within_the_limit_is_passed_on_at_once(
    start_service: StartService, groq: FakeGroq, stream: bool
) -> None:
    service = start_service(**RETRIES, REPLY_TIMEOUT=3)
    groq.on("question", Script(status=503, headers=(("retry-after", "9"),)))
    answer = service.chat("question", stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (502, "9")
    groq.on("first", Script(["good"], headers=quota_of(0, "60s")))
    service.reply("first")
    answer = service.chat("second", stream=stream)
    assert answer.status_code == 503
    assert 3 < int(answer.headers["retry-after"]) <= 10, "some 1,030 of 8,000 tokens"


TOO_LONG = b'{"error":{"code":"context_length_exceeded","message":"Please reduce the length"}}'


@pytest.mark.parametrize(
    "refusal", [Script(status=413), Script(status=400, body=TOO_LONG)], ids=["413", "400"]
)
def test_a_prompt_that_is_too_long_is_sent_again_with_half_of_the_history(
    start_service: StartService, groq: FakeGroq, conversation: str, refusal: Script
) -> None:
    service = start_service()
    for number in range(4):
        service.reply(f"n{number}", conversation)
    groq.on("question", refusal, Script(["good"]))
    assert service.reply("question", conversation) == "good"
    whole, half = (request.contents for request in groq.asked("question"))
    assert (len(whole), half) == (9, whole[4:])
    assert service.contents(conversation) == [*whole, "good"]


def test_it_is_shortened_only_once(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service()
    for number in range(4):
        service.reply(f"n{number}", conversation)
    groq.on("question", Script(status=413))
    assert service.chat("question", conversation).status_code == 502
    assert len(groq.asked("question")) == 2
    groq.on("another", Script(status=400, body=b'{"error":{"message":"temperature is odd"}}'))
    assert service.chat("another", conversation).status_code == 502
    assert len(groq.asked("another")) == 1


def test_a_groq_that_is_down_is_left_alone_until_a_probe_finds_it(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(GROQ_CIRCUIT_FAILURES=3)
    groq.on("question", Script(status=503))
    for _ in range(3):
        assert service.chat("question").status_code == 502
    answer = service.chat("question", conversation)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert len(groq.asked("question")) == 3
    assert service.metric("groq_circuit_state", model="openai/gpt-oss-20b") == 2
    service.log_line(level="ERROR", message="Groq is down: it is left alone but for probes")
    groq.on("question", Script(["good"]))
    wait_until(lambda: service.chat("question").status_code == 200)
    assert service.metric("groq_circuit_state", model="openai/gpt-oss-20b") == 0
    service.log_line(level="INFO", message="Groq answers again")


def quota_of(tokens: int, reset: str) -> tuple[tuple[str, str], ...]:
    return (
        ("x-ratelimit-limit-tokens", "8000"),
        ("x-ratelimit-remaining-tokens", str(tokens)),
        ("x-ratelimit-reset-tokens", reset),
    )


def test_a_quota_that_is_used_up_for_long_is_not_tried(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service()
    groq.on("first", Script(["good"], headers=quota_of(0, "10m")))
    service.reply("first")
    answer = service.chat("second")
    assert answer.status_code == 503
    assert 60 < int(answer.headers["retry-after"]) < 120  # some 1,030 of 8,000 tokens
    assert groq.asked("second") == []


def test_what_a_429_refuses_for_long_is_not_tried_by_others(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**RETRIES)
    minute = quota_of(8000, "0s")
    groq.on("question", Script(status=429, headers=(("retry-after", "600"), *minute)))
    assert service.chat("question").status_code == 502
    for _ in range(3):
        answer = service.chat("question")
        assert answer.status_code == 503
        assert 500 < int(answer.headers["retry-after"]) <= 600
    assert len(groq.asked("question")) == 1


def test_a_quota_that_is_there_again_soon_is_waited_for(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service()
    groq.on("first", Script(["good"], headers=quota_of(0, "8s")))
    service.reply("first")
    assert service.reply("second") == "You said: second"
    requests = groq.asked("first") + groq.asked("second")
    assert gap(requests) >= 0.9


FALLBACK = {"FALLBACK_MODEL": "openai/gpt-oss-120b", "GROQ_MAX_RETRIES": 2}


@pytest.mark.parametrize("status", [404, 429, 498, 503])
@pytest.mark.parametrize("transport", ["json", "sse"])
def test_the_fallback_is_asked_when_the_model_cannot(
    start_service: StartService, groq: FakeGroq, transport: str, status: int
) -> None:
    service = start_service(**FALLBACK)
    groq.on("question", Script(status=status), Script(["good"]))
    headers = {"x-request-id": "fell-back"}
    asked = body("question", stream=transport == "sse")
    assert "good" in service.http.post("/chat", json=asked, headers=headers).text
    models = [request.body["model"] for request in groq.asked("question")]
    assert models == ["openai/gpt-oss-20b", "openai/gpt-oss-120b"]
    assert service.metric("groq_fallbacks_total") == 1
    line = service.log_line(request_id="fell-back", status=200)
    assert line["model"] == "openai/gpt-oss-120b"
    service.log_line(request_id="fell-back", message="the fallback model is asked")


@pytest.mark.parametrize("status", [400, 401, 422])
def test_the_fallback_is_not_asked_for_what_it_could_not_do_either(
    start_service: StartService, groq: FakeGroq, status: int
) -> None:
    service = start_service(**FALLBACK)
    groq.on("question", Script(status=status))
    assert service.chat("question").status_code == 502
    assert len(groq.asked("question")) == 1


def test_a_model_that_is_down_is_passed_over_for_the_fallback(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**FALLBACK, GROQ_CIRCUIT_FAILURES=1)
    groq.on("question", Script(status=503), Script(["good"]))
    assert service.reply("question") == "good"
    assert service.reply("question") == "good"
    models = [request.body["model"] for request in groq.asked("question")]
    assert models == ["openai/gpt-oss-20b", "openai/gpt-oss-120b", "openai/gpt-oss-120b"]


def test_a_quota_is_not_waited_for_where_there_is_a_fallback(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**FALLBACK)
    groq.on("first", Script(["good"], headers=quota_of(0, "60s")))
    service.reply("first")
    service.reply("second")
    assert groq.asked("second")[0].body["model"] == "openai/gpt-oss-120b"
    assert service.metric("groq_fallbacks_total") == 1


def test_the_fallback_is_waited_for_in_its_turn(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**FALLBACK)
    refused = Script(status=429, headers=(("retry-after", "1"),))
    groq.on("question", refused, refused, Script(["good"]))
    assert service.reply("question") == "good"
    models = [request.body["model"] for request in groq.asked("question")]
    assert models == ["openai/gpt-oss-20b", "openai/gpt-oss-120b", "openai/gpt-oss-120b"]


def test_a_model_that_refuses_for_long_is_passed_over_for_the_fallback(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**FALLBACK)
    groq.on("question", Script(status=429, headers=(("retry-after", "600"),)), Script(["good"]))
    assert service.reply("question") == "good"
    assert service.reply("question") == "good"
    models = [request.body["model"] for request in groq.asked("question")]
    assert models == ["openai/gpt-oss-20b", "openai/gpt-oss-120b", "openai/gpt-oss-120b"]


def test_what_the_fallback_counted_is_not_taken_for_the_models_own(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**FALLBACK)
    groq.on("question", Script(status=404), Script(["good"], prompt_tokens=70))
    service.reply("question")
    assert service.metric("token_cache_lookups_total", result="hit") == 0
    service.reply("question")
    assert service.metric("token_cache_lookups_total", result="hit") == 0


def states(service: Service) -> dict[str, Any]:
    models: dict[str, Any] = service.http.get("/ready").json()["models"]
    return models


def test_a_refused_key_is_told_at_the_start(start_service: StartService, groq: FakeGroq) -> None:
    groq.models, groq.models_status = [], 401
    service = start_service()
    service.log_line(level="ERROR", message="Groq refuses the key: check GROQ_API_KEY")
    assert states(service) == {"openai/gpt-oss-20b": "refused"}
    assert service.metric("groq_model_available", model="openai/gpt-oss-20b") == 0
    assert service.http.get("/ready").status_code == 200


def test_a_missing_model_is_told_at_the_start(start_service: StartService, groq: FakeGroq) -> None:
    groq.models = ["openai/gpt-oss-20b", "llama3:latest"]
    service = start_service(FALLBACK_MODEL="switched-off")
    service.log_line(level="ERROR", model="switched-off")
    wait_until(lambda: "unknown" not in states(service).values())
    assert states(service) == {"openai/gpt-oss-20b": "available", "switched-off": "missing"}
    assert service.metric("groq_model_available", model="openai/gpt-oss-20b") == 1
    one = start_service(MODEL="llama3")
    wait_until(lambda: states(one) == {"llama3": "available"})


def test_a_server_that_lists_no_models_is_fine(start_service: StartService, groq: FakeGroq) -> None:
    service = start_service()
    assert service.reply("hello") == "You said: hello"
    assert states(service) == {"openai/gpt-oss-20b": "unknown"}
    assert not [line for line in service.log_lines() if line["level"] == "ERROR"]
