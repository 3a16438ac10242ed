"""What surrounds every request, when what it surrounds fails; over real sockets."""

import json
from collections.abc import Iterator
from typing import cast

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from chat.config import load_settings
from chat.drain import Drain
from chat.errors import TooManyConnections
from chat.messages import SocketRequest
from chat.middleware import RequestMiddleware
from chat.places import Places
from chat.reply import Reply
from chat.service import ChatService
from chat.websocket import ChatSocket
from tests.servers import body, error_and_code, running, wait_until

SETTINGS = load_settings({"GROQ_API_KEY": "k"}, "/nowhere/.env")


async def fail(request: Request) -> Response:
    raise RuntimeError("the caller's words")


async def fail_late(request: Request) -> Response:
    def pieces() -> Iterator[bytes]:
        yield b"begun"
        raise RuntimeError("the caller's words")

    return StreamingResponse(pieces())


def fail_to_reply(request: SocketRequest) -> Reply:
    raise RuntimeError("the caller's words")


async def fail_on_socket(websocket: WebSocket) -> None:
    drain = Drain(cast(ChatService, None), delay=0, timeout=0)
    await ChatSocket(websocket, fail_to_reply, None, drain, SETTINGS).serve(
        Places(0, TooManyConnections)
    )


@pytest.fixture
def address() -> Iterator[str]:
    routes = [
        Route("/fail", fail),
        Route("/fail-late", fail_late),
        WebSocketRoute("/fail", fail_on_socket),
    ]
    layers = [Middleware(RequestMiddleware, settings=SETTINGS)]
    with running(Starlette(routes=routes, middleware=layers)) as (host, port):
        yield f"{host}:{port}"


def faults() -> float:
    value = REGISTRY.get_sample_value("chat_errors_total", {"reason": "internal"})
    assert value is not None
    return value


def test_a_fault_of_ours_is_a_500_that_says_nothing(address: str) -> None:
    before = faults()
    answer = httpx.get(f"http://{address}/fail", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "an internal error occurred"}
    assert answer.headers["x-request-id"] == "mine"
    assert faults() == before + 1


def test_a_fault_after_the_beginning_cuts_the_connection(address: str) -> None:
    before = faults()
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"http://{address}/fail-late")
    wait_until(lambda: faults() == before + 1)


def test_a_fault_on_a_websocket_is_told_before_it_closes_with_1011(address: str) -> None:
    before = faults()
    with connect(f"ws://{address}/fail") as socket:
        socket.send(json.dumps(body("hello")))
        assert error_and_code(socket) == ("an internal error occurred", 1011)
    assert faults() == before + 1
