"""The description of the API is true: compared with the routes, and tried on a running service."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from starlette.routing import Route

import server
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, body

FILE = Path(__file__).parent.parent / "openapi.yaml"
DESCRIPTION: dict[str, Any] = yaml.safe_load(FILE.read_text())
schema = schemathesis.openapi.from_dict(DESCRIPTION)

bounded = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),  # a busy machine is no failure
)


def test_it_is_a_valid_description() -> None:
    schema.validate()


def test_it_describes_every_route_and_no_other() -> None:
    described = {
        (path, method.upper())
        for path, operations in DESCRIPTION["paths"].items()
        for method in operations
        if method != "parameters"
    }
    served = {
        (route.path, method)
        for route in server.ROUTES
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert described == served


def test_it_is_served_as_it_is(service: Service) -> None:
    answer = service.http.get("/openapi.yaml")
    assert answer.headers["content-type"] == "application/yaml"
    assert answer.content == FILE.read_bytes()


@pytest.mark.timeout(120)
@schema.parametrize()
@bounded
def test_the_service_answers_as_described(case: schemathesis.Case[Any], service: Service) -> None:
    let_the_user_speak_last(case)
    case.call_and_validate(base_url=service.url)


@pytest.mark.timeout(120)
@schema.include(path="/chat").parametrize()
@bounded
def test_a_caller_who_accepts_a_stream_is_answered_as_described(
    case: schemathesis.Case[Any], service: Service
) -> None:
    let_the_user_speak_last(case)
    case.call_and_validate(base_url=service.url, headers={"Accept": "text/event-stream"})


GOOD = Script()
BAD = Script(status=500)
LIMITED = Script(status=429, headers=(("retry-after", "7"),))
SILENT = Script(hold_before_status=True)
CHATS: list[tuple[list[int], Script, dict[str, Any], dict[str, Any]]] = [
    ([200], GOOD, {"stream": False}, {}),
    ([200], GOOD, {"stream": True}, {}),
    ([200], Script(error_before_token=1), {"stream": True}, {}),
    ([400], GOOD, {"messages": []}, {}),
    ([413], GOOD, {"ignored": "x" * (256 << 10)}, {}),
    ([200, 429], GOOD, {}, {"RATE_LIMIT": "1/day"}),
    ([502], BAD, {}, {}),
    ([502], LIMITED, {}, {}),
    ([502, 503], BAD, {}, {"GROQ_CIRCUIT_FAILURES": 1}),
    ([504], SILENT, {}, {"GROQ_TIMEOUT": 0.5}),
]


@pytest.mark.parametrize(("statuses", "script", "fields", "settings"), CHATS)
def test_each_outcome_of_a_chat_is_as_described(
    groq: FakeGroq,
    start_service: StartService,
    statuses: list[int],
    script: Script,
    fields: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    groq.on("scripted", script)
    one = start_service(**settings)
    asked = schema["/chat"]["POST"].Case(body={**body("scripted"), **fields})
    for status in statuses:
        answer = asked.call_and_validate(base_url=one.url, excluded_checks=[not_a_server_error])
        assert answer.status_code == status


def test_a_page_of_another_origin_is_answered_as_described(service: Service) -> None:
    asked = schema["/chat"]["POST"].Case(body=body("hello"))
    headers = {"origin": "https://elsewhere.example"}
    assert asked.call_and_validate(base_url=service.url, headers=headers).status_code == 403


def test_each_described_outcome_of_a_chat_is_tried() -> None:
    described = set(DESCRIPTION["paths"]["/chat"]["post"]["responses"])
    tried = {str(status) for statuses, _, _, _ in CHATS for status in statuses}
    assert described - tried == {"403", "408", "500"}, "those three are not for a list"


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("DELETE", 204), ("GET", 404)])
def test_each_outcome_of_a_conversation_is_as_described(
    service: Service, conversation: str, method: str, status: int
) -> None:
    if status != 404:
        service.reply("hello", conversation)
    asked = schema["/conversations/{id}"][method].Case(path_parameters={"id": conversation})
    assert asked.call_and_validate(base_url=service.url).status_code == status


def let_the_user_speak_last(case: schemathesis.Case[Any]) -> None:
    """Keep the one rule that a schema cannot tell, where the request is to be a good one."""
    asked: Any = case.body
    if case.meta and case.meta.generation.mode.is_positive and case.operation.path == "/chat":
        asked["messages"][-1]["role"] = "user"
