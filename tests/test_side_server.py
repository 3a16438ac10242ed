"""What runs beside the server, and that it ends with its context."""

import asyncio
import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from chat.side_server import listen, serving


async def answer(request: Request) -> Response:
    return PlainTextResponse("here")


def test_a_port_is_served_in_the_context_and_free_after_it() -> None:
    async def scenario(listener: socket.socket) -> int:
        port: int = listener.getsockname()[1]
        async with (
            serving(Starlette(routes=[Route("/", answer)]), listener),
            httpx.AsyncClient() as client,
        ):
            assert (await client.get(f"http://127.0.0.1:{port}/")).text == "here"
        return port

    port = asyncio.run(scenario(listen(("127.0.0.1", 0), is_shared=False)))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
