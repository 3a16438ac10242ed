"""The description of the API: compared with the routes, and tried on a running service."""

from collections.abc import Sequence
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from starlette.routing import Route

import server
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import ROOT, Service, body

FILE = ROOT / "openapi.yaml"
DESCRIPTION: dict[str, Any] = yaml.safe_load(FILE.read_text())
# A body that breaks the rules may be too large as well.
REJECTED = {"expected-statuses": ["400", "404", "405", "413"]}
CONFIG = SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": REJECTED}})
schema = schemathesis.openapi.from_dict(DESCRIPTION, config=CONFIG)

bounded = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),  # a busy machine is no failure
)


def test_the_description_is_valid_and_has_every_route_and_no_other() -> None:
    schema.validate()
    described = {
        path: {method.upper() for method in operations} - {"PARAMETERS"}
        for path, operations in DESCRIPTION["paths"].items()
    }
    routes = [route for route in server.ROUTES if isinstance(route, Route)]
    assert described == {route.path_format: set(route.methods or ()) - {"HEAD"} for route in routes}


def test_it_is_served_unchanged(service: Service) -> None:
    answer = service.http.get("/openapi.yaml")
    assert answer.headers["content-type"] == "application/yaml"
    assert answer.content == FILE.read_bytes()


@pytest.mark.timeout(120)
@schema.parametrize()
@bounded
def test_the_service_answers_as_described(case: schemathesis.Case[Any], service: Service) -> None:
    sent: Any = case.body
    if case.meta and case.meta.generation.mode.is_positive and case.operation.path == "/chat":
        sent["messages"][-1]["role"] = "user"  # a rule that the schema cannot express
    for position in (case.headers, case.query) if case.operation.path == "/chat" else ():
        for name in ("Last-Event-ID", "after"):  # another: they matter with a reply id only
            position.pop(name, None)
    case.call_and_validate(base_url=service.url)


GOOD, FAILING, SILENT = Script(), Script(status=500), Script(hold_before_status=True)
LIMITED = Script(status=429, headers=(("retry-after", "7"),))
# The statuses of consecutive chats, what Groq does, the fields of the request, and the settings of
# a service of its own, where it needs one.
OUTCOMES: list[tuple[Sequence[int], Script, dict[str, Any], dict[str, Any] | None]] = [
    ([200], GOOD, {"stream": False}, None),
    ([200], GOOD, {"stream": True}, None),
    ([200], Script(error_before_token=1), {"stream": True}, None),
    ([200], Script(["a"], finish_reason="length"), {"stream": False}, None),
    ([200], Script(["a"], finish_reason="length"), {"stream": True}, None),
    ([400], GOOD, {"messages": []}, None),
    ([413], GOOD, {"ignored": "x" * (256 << 10)}, None),
    ([502], FAILING, {}, None),
    ([502], FAILING, {"stream": True}, None),
    ([502], LIMITED, {}, {}),
    ([200, 429], GOOD, {}, {"RATE_LIMIT": "1/day"}),
    ([502, 503], FAILING, {}, {"GROQ_CIRCUIT_FAILURES": 1}),
    ([504], SILENT, {}, {"GROQ_TIMEOUT": 0.5}),
]


def test_every_outcome_of_a_chat_is_as_described(
    groq: FakeGroq, service: Service, start_service: StartService
) -> None:
    for statuses, script, fields, own_settings in OUTCOMES:
        groq.on("question", script)
        asked = service if own_settings is None else start_service(**own_settings)
        case = schema["/chat"]["POST"].Case(body={**body("question"), **fields})
        for status in statuses:
            answer = case.call_and_validate(asked.url, excluded_checks=[not_a_server_error])
            assert answer.status_code == status, (script, fields, own_settings)
    described = set(DESCRIPTION["paths"]["/chat"]["post"]["responses"])
    tried = {str(status) for statuses, _, _, _ in OUTCOMES for status in statuses}
    elsewhere = {"403", "408", "500", *(str(status) for *_, status in READINGS)}
    assert described - tried <= elsewhere, "those are not for a list"
    headers = {"origin": "https://elsewhere.example"}
    assert case.call_and_validate(service.url, headers=headers).status_code == 403


def test_every_outcome_of_a_conversation_is_as_described(
    service: Service, conversation: str
) -> None:
    service.reply("hello", conversation)
    for method, status in (("GET", 200), ("DELETE", 204), ("GET", 404)):
        case = schema["/conversations/{id}"][method].Case(path_parameters={"id": conversation})
        assert case.call_and_validate(base_url=service.url).status_code == status, method


# Of a reply whose text ends at 18: the method, the fields, the position, the status.
READINGS: list[tuple[str, dict[str, Any], str, int]] = [
    ("POST", {"stream": False}, "0", 200),
    ("POST", {}, "8", 200),
    ("GET", {}, "8", 200),
    ("POST", {}, "19", 204),
    ("GET", {}, "19", 204),
    ("GET", {}, "99", 400),
    ("POST", {"reply": "a-reply-of-nobody"}, "8", 404),
    ("POST", {"conversation": "of-somebody-else"}, "8", 409),
    ("DELETE", {}, "", 204),
]


def test_every_outcome_of_a_kept_reply_is_as_described(groq: FakeGroq, service: Service) -> None:
    asked: dict[str, Any] = {**body("question"), "reply": "a-reply-that-is-kept", "stream": True}
    for method, fields, position, status in READINGS:
        if method == "POST":
            case = schema["/chat"][method].Case(body=asked | fields)
        else:
            case = schema["/replies/{id}"][method].Case(path_parameters={"id": asked["reply"]})
        case.headers["Last-Event-ID"] = position
        assert case.call_and_validate(service.url).status_code == status, (method, fields, position)
