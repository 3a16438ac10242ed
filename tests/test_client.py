"""Retries, circuit breaking, fallback and quota: everything before the first token."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Request, Script
from tests.servers import Service, body, wait_until

MODEL, FALLBACK_MODEL = "openai/gpt-oss-20b", "openai/gpt-oss-120b"
RETRIES = {"GROQ_MAX_RETRIES": 2}
FALLBACK = {**RETRIES, "FALLBACK_MODEL": FALLBACK_MODEL}
SHORT = {"GROQ_FIRST_EVENT_TIMEOUT": 0.5}


@pytest.fixture(scope="module")
def retrying(module_groq: FakeGroq) -> Iterator[Service]:
    with Service(GROQ_BASE_URL=module_groq.url, **RETRIES, **SHORT) as running:
        yield running  # tests whose responses name a quota start their own


@pytest.fixture(scope="module")
def falling_back(module_groq: FakeGroq) -> Iterator[Service]:
    with Service(GROQ_BASE_URL=module_groq.url, **FALLBACK) as running:
        yield running


def retry_after(seconds: object) -> Script:
    return Script(status=429, headers=(("retry-after", str(seconds)),))


def used_up(reset: str) -> Script:
    """A reply that uses up the quota."""
    headers = (("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", reset))
    return Script(["good"], headers=headers)


def gap(first: Request, second: Request) -> float:
    return second.received_at - first.received_at


def models(requests: list[Request]) -> list[str]:
    return [request.body["model"] for request in requests]


@pytest.mark.parametrize(
    "fault",
    [
        Script(cut_before_token=0),
        Script(error_before_token=0),
        Script(error_before_token=0, error="event: error\ndata: overloaded"),
        Script(hold_before_status=True),
        *(Script(status=status) for status in (408, 409, 429, 498, 500, 502, 503, 504, 522)),
    ],
    ids=str,
)
def test_a_temporary_fault_is_retried(
    retrying: Service, groq: FakeGroq, conversation: str, fault: Script
) -> None:
    groq.on("question", fault, Script(["good"]))
    retries = retrying.metric("groq_retries_total")
    assert retrying.tokens("question", conversation) == ["good"]
    assert len(groq.asked("question")) == 2
    assert retrying.metric("groq_retries_total") == retries + 1
    assert retrying.contents(conversation) == ["question", "good"]


def test_a_pooled_connection_that_groq_has_closed_is_neither_a_failure_nor_a_retry(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(GROQ_CIRCUIT_FAILURES=1)
    for stream in (True, False):
        service.reply("opens a connection")
        groq.on(f"question {stream}", Script(cut_before_status=True), Script(["good"]))
        assert "good" in service.chat(f"question {stream}", stream=stream).text
        assert len({request.connection for request in groq.asked(f"question {stream}")}) == 2
    assert service.metric("groq_retries_total") == 0
    assert service.metric("groq_requests_total", outcome="unreachable") == 0
    groq.on("hopeless", Script(cut_before_status=True))
    assert service.chat("hopeless").status_code == 502
    assert len(groq.asked("hopeless")) == 1, "on a new connection it is a failure"


def test_the_fallback_is_asked_when_a_200_says_that_the_quota_is_used_up(
    falling_back: Service, groq: FakeGroq
) -> None:
    error = '{"error":{"message":"org_secret","type":"tokens","code":"rate_limit_exceeded"}}'
    for stream in (True, False):
        refusal = Script([], error_before_token=0, error=f"data: {error}")
        groq.on(f"question {stream}", refusal, Script(["good"]))
        assert "good" in falling_back.chat(f"question {stream}", stream=stream).text
        assert models(groq.asked(f"question {stream}")) == [MODEL, FALLBACK_MODEL]


def test_a_context_that_is_full_in_mid_reply_is_an_error_and_no_second_reply(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service()
    service.reply("hello", conversation)
    said = 'data: {"error":{"code":400,"message":"Context size has been exceeded."}}'
    groq.on("question", Script(["Once"], error_before_token=1, error=said))
    with service.stream("question", conversation) as (_, events):
        assert [event.name for event in events] == ["message", "error"]
    assert len(groq.asked("question")) == 1
    assert service.contents(conversation) == ["hello", "You said: hello"]


def test_odd_text_that_is_too_long_costs_others_no_history(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service()
    groq.on("odd", Script(status=413), Script(["good"]))
    messages = [("user", "\x7f" * 9000), ("assistant", "ok"), ("user", "odd")]
    sent = [{"role": role, "content": content} for role, content in messages]
    assert service.http.post("/chat", json={"messages": sent}).status_code == 200
    for number in range(4):
        service.reply(f"n{number}", conversation)
    assert len(groq.asked("n3")[0].contents) == 7


def test_a_mistake_of_one_client_opens_no_circuit(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(GROQ_CIRCUIT_FAILURES=2, **RETRIES)
    said = 'data: {"error":{"code":400,"message":"the request exceeds the available context size"}}'
    groq.on("long question", Script([], error_before_token=0, error=said))
    assert [service.chat("long question").status_code for _ in range(4)] == [400] * 4
    assert len(groq.asked("long question")) == 4
    assert service.reply("question") == "You said: question"


def test_the_number_of_retries_is_limited(retrying: Service, groq: FakeGroq) -> None:
    groq.on("question", Script(status=503))
    assert retrying.chat("question").status_code == 502
    assert len(groq.asked("question")) == 3


def test_a_permanent_fault_is_neither_retried_nor_given_to_the_fallback(
    falling_back: Service, groq: FakeGroq
) -> None:
    faults = [Script(status=status) for status in (400, 401, 403, 422)]
    faults += [Script(body=b"data: nonsense\n\n"), Script([])]
    for fault in faults:
        groq.reset()
        groq.on("question", fault)
        assert falling_back.chat("question", stream=True).status_code == 502
        assert models(groq.asked("question")) == [MODEL]


def test_after_the_first_token_nothing_is_retried(
    falling_back: Service, groq: FakeGroq, conversation: str
) -> None:
    groq.on("question", Script(["a", "b"], cut_before_token=1))
    with falling_back.stream("question", conversation) as (_, events):
        assert [event.name for event in events] == ["message", "error"]
    assert models(groq.asked("question")) == [MODEL]
    assert falling_back.contents(conversation) == []


def test_a_short_wait_that_groq_asks_for_is_kept_even_by_the_fallback(
    start_service: StartService, groq: FakeGroq
) -> None:
    for settings, asked in ((RETRIES, [MODEL] * 2), (FALLBACK, [MODEL, *[FALLBACK_MODEL] * 2])):
        groq.reset()
        groq.on("question", *[retry_after(1)] * (len(asked) - 1), Script(["good"]))
        assert start_service(**settings).reply("question") == "good"
        assert models(groq.asked("question")) == asked
        assert gap(*groq.asked("question")[-2:]) >= 1


def test_a_long_wait_that_groq_asks_for_is_passed_on_at_once(
    retrying: Service, groq: FakeGroq
) -> None:
    waits = {"11": "11", "100000": "86400"}
    for asked, told in waits.items():
        groq.on(f"question {asked}", Script(status=503, headers=(("retry-after", asked),)))
        for stream in (True, False):
            answer = retrying.chat(f"question {asked}", stream=stream)
            assert (answer.status_code, answer.headers["retry-after"]) == (502, told)
    assert len(groq.requests) == 2 * len(waits)


def test_a_client_that_leaves_ends_the_retries(retrying: Service, groq: FakeGroq) -> None:
    groq.on("question", Script(status=503, headers=(("retry-after", "9"),)))
    before = retrying.metric("chat_replies_total", outcome="cancelled")
    for stream in (True, False):
        with suppress(httpx.ReadTimeout):
            httpx.post(f"{retrying.url}/chat", json=body("question", stream=stream), timeout=0.5)
    wait_until(lambda: retrying.metric("chat_replies_total", outcome="cancelled") == before + 2)
    assert retrying.metric("chat_replies_active") == 0
    assert len(groq.asked("question")) == 2


def test_the_whole_reply_has_a_limit(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(REPLY_TIMEOUT=0.5)
    groq.on("question", Script(["t"] * 1000, interval=0.01))
    for stream, status in ((True, 200), (False, 504)):
        answer = service.chat("question", conversation, stream=stream)
        assert answer.status_code == status
        assert "did not respond in time" in answer.text
        assert groq.asked("question")[-1].is_closed_soon()
    assert service.contents(conversation) == []


def test_no_wait_is_begun_that_exceeds_the_limit_of_the_reply(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(**RETRIES, REPLY_TIMEOUT=3)
    groq.on("question", Script(status=503, headers=(("retry-after", "9"),)))
    answer = service.chat("question")
    assert (answer.status_code, answer.headers["retry-after"]) == (502, "9")
    groq.on("first", used_up("8s"))
    service.reply("first")
    answer = service.chat("second")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "8")
    assert answer.elapsed.total_seconds() < 2
    assert groq.asked("second") == []


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
    groq.on("hopeless", refusal)
    answer = service.chat("hopeless", conversation, stream=True)
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        "the message is too long for the model",
    )
    assert [len(request.contents) for request in groq.asked("hopeless")] == [9, 5, 3, 1]
    groq.on("odd", Script(status=400, body=b'{"error":{"message":"temperature is odd"}}'))
    assert service.chat("odd", conversation).status_code == 502
    assert len(groq.asked("odd")) == 1
    groq.on("question", refusal, Script(["good"]))
    assert service.reply("question", conversation) == "good"
    whole, half = (request.contents for request in groq.asked("question"))
    assert half == whole[4:]
    assert service.contents(conversation) == [*whole, "good"]
    service.reply("next", conversation)
    assert len(groq.asked("next")) == 1
    assert len(groq.asked("next")[0].contents) < len(whole), "what was refused is remembered"


def circuit_state(service: Service) -> float:
    return service.metric("groq_circuit_state", model=MODEL)


def test_a_groq_that_is_down_is_left_alone_until_a_probe_succeeds(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(GROQ_CIRCUIT_FAILURES=3)
    groq.on("question", Script(status=503), Script(status=429), Script(status=503))
    statuses = [service.chat("question").status_code for _ in range(4)]
    assert statuses == [502] * 4, "a 429 neither counts nor ends the run"
    answer = service.chat("question", stream=True)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert len(groq.asked("question")) == 4
    assert circuit_state(service) == 2
    service.log_line(level="ERROR", message="circuit breaker opened")
    groq.on("question", Script(["good"]))
    wait_until(lambda: service.chat("question").status_code == 200)
    assert circuit_state(service) == 0
    service.log_line(level="INFO", message="circuit breaker closed")


def test_only_outages_before_the_first_token_count_towards_opening_the_circuit(
    start_service: StartService, groq: FakeGroq
) -> None:
    harmless = [Script(status=status) for status in (302, 400, 401, 404, 408, 413, 429)]
    harmless += [Script([]), Script(["a", "b"], cut_before_token=1), Script(["good"])]
    outages = [Script(status=status) for status in (498, 500, 502, 503, 504, 522)]
    outages += [Script(cut_before_status=True), Script(hold_before_status=True)]
    outages += [Script(["a"], cut_before_token=0), Script(["a"], error_before_token=0)]
    outages += [Script(body=b"data: nonsense\n\n")]
    for scripts, failures in ((harmless, 1), (outages, len(outages))):
        service = start_service(GROQ_CIRCUIT_FAILURES=failures, **SHORT)
        for script in scripts:
            assert circuit_state(service) == 0, script
            groq.on("question", script)
            service.chat("question", stream=True)
        assert circuit_state(service) == (0 if scripts is harmless else 2)


@pytest.mark.parametrize(
    ("first", "status"), [(used_up("10m"), 200), (retry_after(600), 502)], ids=["reset", "429"]
)
def test_a_model_is_not_asked_until_the_moment_that_groq_names(
    start_service: StartService, groq: FakeGroq, first: Script, status: int
) -> None:
    service = start_service(**RETRIES)
    groq.on("first", first)
    assert service.chat("first").status_code == status
    for stream in (True, False):
        answer = service.chat("second", stream=stream)
        assert answer.status_code == 503
        assert 590 < int(answer.headers["retry-after"]) <= 600
        assert "quota" in answer.json()["error"]
    assert len(groq.requests) == 1


def test_a_quota_that_returns_soon_is_waited_for_like_a_retry(
    start_service: StartService, groq: FakeGroq
) -> None:
    groq.on("first", used_up("0.9s"))
    for retries, status in ((0, 503), (1, 200)):
        groq.requests.clear()
        service = start_service(GROQ_MAX_RETRIES=retries)
        service.reply("first")
        assert service.chat("second").status_code == status
    assert gap(*groq.requests) >= 0.9


@pytest.mark.parametrize("status", [404, 429, 498, 503])
@pytest.mark.parametrize("stream", [True, False])
def test_the_fallback_is_asked_when_the_model_cannot_answer(
    falling_back: Service, groq: FakeGroq, status: int, stream: bool
) -> None:
    groq.on("question", Script(status=status), Script(["good"]))
    fallbacks = falling_back.metric("groq_fallbacks_total")
    answer = falling_back.chat("question", stream=stream)
    assert "good" in answer.text
    assert models(groq.asked("question")) == [MODEL, FALLBACK_MODEL]
    assert falling_back.metric("groq_fallbacks_total") == fallbacks + 1
    request_id = answer.headers["x-request-id"]
    falling_back.log_line(request_id=request_id, status=200, model=FALLBACK_MODEL)
    falling_back.log_line(request_id=request_id, message="asking the fallback model")


@pytest.mark.parametrize(
    "first",
    [Script(status=503), retry_after(600), used_up("60s")],
    ids=["circuit open", "429", "quota used up"],
)
def test_a_model_that_cannot_answer_for_long_is_passed_over_for_the_fallback(
    start_service: StartService, groq: FakeGroq, first: Script
) -> None:
    service = start_service(**FALLBACK, GROQ_CIRCUIT_FAILURES=1)
    groq.on("first", first, Script(["good"]))
    assert service.reply("first") == "good"
    service.reply("second")
    assert models(groq.asked("second")) == [FALLBACK_MODEL]


def states(service: Service) -> Any:
    return service.http.get("/ready").json()["models"]


def test_a_rejected_key_or_a_missing_model_is_told_at_the_start(
    start_service: StartService, groq: FakeGroq
) -> None:
    groq.models = [MODEL, "llama3:latest"]
    service = start_service(FALLBACK_MODEL="switched-off")
    service.log_line(level="ERROR", model="switched-off")
    wait_until(lambda: "unknown" not in states(service).values())
    assert states(service) == {MODEL: "available", "switched-off": "missing"}
    service.log_line(level="INFO", message="model available", model=MODEL)
    assert service.metric("groq_model_available", model=MODEL) == 1
    tagged = start_service(MODEL="llama3")
    wait_until(lambda: states(tagged) == {"llama3": "available"})
    groq.models_status = 401
    rejected = start_service()
    assert "GROQ_API_KEY" in rejected.log_line(level="ERROR", model=MODEL)["message"]
    assert states(rejected) == {MODEL: "refused"}
    assert rejected.metric("groq_model_available", model=MODEL) == 0
    assert rejected.http.get("/ready").status_code == 200


def test_whether_a_model_is_available_is_learned_from_each_answer(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service()
    assert states(service) == {MODEL: "unknown"}, "this server lists no models"
    for status, state in {200: "available", 404: "missing", 503: "missing", 401: "refused"}.items():
        groq.on("question", Script(status=status))
        service.chat("question")
        assert states(service) == {MODEL: state}
        assert service.metric("groq_model_available", model=MODEL) == (state == "available")
    service.log_line(message="model refused")
    advice = [line["message"] for line in service.log_lines() if line["level"] == "ERROR"]
    assert ["MODEL" in advice[0], "GROQ_API_KEY" in advice[1]] == [True, True]
    service.reply("good")
    assert states(service) == {MODEL: "available"}
