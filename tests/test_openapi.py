"""The description of the API is true: compared with the routes, and tried on a running service."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from starlette.routing import Route

import server
from tests.servers import Service

FILE = Path(__file__).parent.parent / "openapi.yaml"
DESCRIPTION: dict[str, Any] = yaml.safe_load(FILE.read_text())
schema = schemathesis.openapi.from_dict(DESCRIPTION)


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
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_the_service_answers_as_described(case: schemathesis.Case[Any], service: Service) -> None:
    # A last message that is the assistant's is the one rule that a schema cannot tell.
    excluded = [schemathesis.checks.positive_data_acceptance] if case.method == "POST" else []
    case.call_and_validate(base_url=service.url, excluded_checks=excluded)
