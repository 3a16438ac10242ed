"""What a client sees of a bug, over real sockets."""

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from chat.api.middleware import RequestMiddleware
from chat.api.websocket import ChatSocket
from chat.config import load_settings
from chat.messages import Exchange
from chat.replies import Replies
from chat.service import ChatService
from chat.storage.handover import Handover
from chat.storage.history import MemoryHistory
from chat.tokens import TokenCounts
from server import create_app
from tests.fake_groq import FakeGroq
from tests.servers import PATIENCE, Caller, body, error_and_code, running, wait_until

ERROR = "an internal error occurred"


async def fail(request: Request) -> Response:
    raise RuntimeError("the client's words")


async def fail_late(request: Request) -> Response:
    def pieces() -> Iterator[bytes]:
        yield b"begun"
        raise RuntimeError("the client's words")

    return StreamingResponse(pieces())


class BrokenHistory(MemoryHistory):
    """A history with bugs: in reading some conversations, and in storing all."""

    async def read(self, conversation: str) -> Sequence[Exchange]:
        assert not conversation.startswith("unreadable"), "the client's words"
        return ()

    async def store(self, conversation: str, exchanges: Sequence[Exchange], anew: bool) -> None:
        raise RuntimeError("the client's words")


@pytest.fixture(scope="module")
def faulty() -> Iterator[Caller]:
    socket = WebSocketRoute("/chat", lambda opened: ChatSocket(opened).serve())
    routes = [Route("/fail", fail), Route("/fail-late", fail_late), socket]
    app = Starlette(routes=routes, middleware=[Middleware(RequestMiddleware)])
    app.state.service = SimpleNamespace(is_draining=False)
    app.state.settings = SimpleNamespace(idle_timeout=PATIENCE)  # others fail
    with running(app) as (_, port):
        yield from one_caller(port)


@pytest.fixture(scope="module")
def broken(module_groq: FakeGroq) -> Iterator[Caller]:
    variables = {"GROQ_API_KEY": "k", "REDIS_ADDR": "", "GROQ_BASE_URL": module_groq.url}
    settings = load_settings(variables, "/nowhere/.env")
    app = create_app(settings)
    with running(app) as (_, port):
        history, counts = BrokenHistory(settings), TokenCounts(settings.model, None)
        app.state.service = ChatService(
            settings, history=history, counts=counts, groq=app.state.groq
        )
        app.state.replies = Replies(app.state.service, settings, Handover(None, settings))
        yield from one_caller(port)


def one_caller(port: int) -> Iterator[Caller]:
    caller = Caller(port)
    with caller.http:
        yield caller


def bugs() -> float:
    value = REGISTRY.get_sample_value("chat_errors_total", {"reason": "internal"})
    assert value is not None
    return value


def test_a_bug_is_a_500_that_says_nothing_or_cuts_a_response_that_has_begun(
    faulty: Caller,
) -> None:
    before = bugs()
    answer = faulty.http.get("/fail", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()) == (500, {"error": ERROR})
    assert answer.headers["x-request-id"] == "mine"
    with pytest.raises(httpx.RemoteProtocolError):
        faulty.http.get("/fail-late")
    wait_until(lambda: bugs() == before + 2)


def test_a_bug_before_a_reply_is_a_500_over_http(broken: Caller) -> None:
    before = bugs()
    for stream in (False, True):
        answer = broken.chat("hello", "unreadable-conversation", stream=stream)
        assert (answer.status_code, answer.json()) == (500, {"error": ERROR})
    wait_until(lambda: bugs() == before + 2)


def test_a_bug_in_a_stream_is_its_last_event(broken: Caller) -> None:
    with broken.stream("hello", "storable-conversation") as (_, stream):
        *tokens, last = stream
    assert "".join(token.data for token in tokens) == "You said: hello"
    assert last == ("error", json.dumps({"error": ERROR}, separators=(",", ":")))


def test_a_bug_on_a_websocket_is_told_before_it_closes_with_1011(broken: Caller) -> None:
    before = bugs()
    with broken.socket() as socket:
        socket.send(json.dumps(body("hello", "storable-conversation")))
        assert error_and_code(socket) == (ERROR, 1011)
    wait_until(lambda: bugs() == before + 1)


def test_a_bug_before_a_reply_is_told_on_a_websocket_too(faulty: Caller) -> None:
    before = bugs()
    with faulty.socket() as socket:
        socket.send(json.dumps(body("hello")))
        assert error_and_code(socket) == (ERROR, 1011)
    wait_until(lambda: bugs() == before + 1)
