"""Which pages may use the service: as a browser asks for them."""

import json
from typing import Any

import pytest

from tests.conftest import StartService
from tests.fake_groq import FakeGroq
from tests.servers import Service, body, error_and_code

FOREIGN = "https://elsewhere.example"


def ask(service: Service, origin: str, **options: Any) -> Any:
    headers = {"origin": origin, "content-type": "text/plain"}  # which needs no preflight
    return service.http.post("/chat", json=body("hello"), headers=headers, **options)


@pytest.mark.parametrize("origin", [FOREIGN, "null", "http://127.0.0.1", "http://127.0.0.1:1"])
def test_a_page_of_another_origin_is_refused_before_groq_is_asked(
    service: Service, groq: FakeGroq, origin: str
) -> None:
    answer = ask(service, origin)
    assert answer.status_code == 403
    assert answer.json() == {"error": "pages of this origin may not use this service"}
    assert "access-control-allow-origin" not in answer.headers
    assert groq.requests == []
    assert service.log_line(status=403)["error"] == "origin"


def test_a_page_of_the_same_origin_and_what_is_no_page_may(service: Service) -> None:
    assert ask(service, service.url).status_code == 200
    assert service.chat("hello").status_code == 200


def test_a_websocket_of_another_origin_is_closed_with_1008(
    service: Service, groq: FakeGroq
) -> None:
    with service.socket(origin=FOREIGN) as socket:
        error, code = error_and_code(socket)
    assert "may not use this service" in error
    assert code == 1008
    assert groq.requests == []


def test_a_websocket_of_the_same_origin_is_served(service: Service) -> None:
    with service.socket(origin=service.url) as socket:
        socket.send(json.dumps(body("hello")))
        assert "token" in json.loads(socket.recv(5))


def test_an_allowed_origin_may_and_is_told_so(start_service: StartService) -> None:
    service = start_service(ALLOWED_ORIGINS=f"{FOREIGN}, http://localhost:3000")
    for origin in (FOREIGN, "http://localhost:3000"):
        answer = ask(service, origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    assert ask(service, "https://third.example").status_code == 403
    with service.socket(origin=FOREIGN) as socket:
        socket.send(json.dumps(body("hello")))
        assert "token" in json.loads(socket.recv(5))


@pytest.mark.parametrize(("origin", "status"), [(FOREIGN, 200), ("https://third.example", 403)])
def test_a_preflight_is_answered(start_service: StartService, origin: str, status: int) -> None:
    service = start_service(ALLOWED_ORIGINS=FOREIGN)
    headers = {
        "origin": origin,
        "access-control-request-method": "DELETE",
        "access-control-request-headers": "content-type, x-request-id",
    }
    answer = service.http.options("/conversations/0123456789abcdef", headers=headers)
    assert answer.status_code == status
    if status == 200:
        assert answer.headers["access-control-allow-origin"] == FOREIGN
        assert "DELETE" in answer.headers["access-control-allow-methods"]


def test_any_origin_may_where_that_is_set(start_service: StartService) -> None:
    service = start_service(ALLOWED_ORIGINS="*")
    answer = ask(service, FOREIGN)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


def test_an_event_stream_bears_the_headers_too(start_service: StartService) -> None:
    service = start_service(ALLOWED_ORIGINS=FOREIGN)
    asked = body("hello", stream=True)
    answer = service.http.post("/chat", json=asked, headers={"origin": FOREIGN})
    assert answer.headers["access-control-allow-origin"] == FOREIGN
    assert answer.text.endswith("data: [DONE]\n\n")
