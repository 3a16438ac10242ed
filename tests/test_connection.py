"""Callers who are slow: in sending, in reading, in saying anything. Each holds up only itself."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.frames import Close, Frame, Opcode

from chat.protocols import HTTPProtocol, WebSocketProtocol
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import Service, UvicornService, body, error_and_code, running, wait_until

LARGE = Script(["x" * 1000] * 12_000)
"""More than the kernel's buffers hold."""


@contextmanager
def connected(service: Service) -> Iterator[socket.socket]:
    """A connection whose receive buffer is small."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", service.port))
        yield connection


def post(content: bytes, *, length: int | None = None) -> bytes:
    length = len(content) if length is None else length
    return b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (length, content)


def asking(content: str, **fields: Any) -> bytes:
    return post(json.dumps(body(content, **fields)).encode())


def open_sockets(service: Service) -> int:
    """Return how many connections of callers the service has."""
    connections = psutil.Process(service.process.pid).net_connections("tcp")
    return sum(x.status != "LISTEN" and x.laddr.port == service.port for x in connections)


def test_a_body_that_does_not_arrive_is_a_408(start_service: StartService) -> None:
    service = start_service(BODY_TIMEOUT=0.3)
    with connected(service) as connection:
        connection.sendall(post(b'{"messages":', length=1000))
        answer = b""
        while received := connection.recv(4096):
            answer += received
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert answer.endswith(b'{"error":"the body must arrive within 0.3 s"}')
    assert service.log_line(status=408)["error"] == "too_slow"


def test_a_body_that_trickles_in_is_a_408_too(start_service: StartService) -> None:
    service = start_service(BODY_TIMEOUT=0.3)
    with connected(service) as connection:
        connection.sendall(post(b"", length=100_000))
        connection.settimeout(0.02)
        answer = b""
        while b"\r\n" not in answer:
            connection.sendall(b" ")
            try:
                answer += connection.recv(4096)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_an_idle_websocket_is_closed(start_service: StartService) -> None:
    service = start_service(IDLE_TIMEOUT=0.3)
    with service.socket() as websocket:
        error, code = error_and_code(websocket)
    assert error == "no message came for 0.3 seconds; connect again to go on"
    assert code == 1001


def test_a_websocket_is_not_idle_while_a_reply_runs(
    start_service: StartService, groq: FakeGroq
) -> None:
    service = start_service(IDLE_TIMEOUT=0.2)
    groq.on("slow", Script(["a", "b", "c"], interval=0.5))
    with service.socket() as websocket:
        websocket.send(json.dumps(body("slow")))
        assert [json.loads(websocket.recv(5)) for _ in range(4)][-1] == {"done": "true"}
        assert error_and_code(websocket)[1] == 1001


def everything_from(connection: socket.socket) -> bytes:
    """Return what was sent until the connection ended."""
    received = b""
    with suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            received += piece
    return received


Ask = Callable[[socket.socket, Service], None]


def ask_for_events(connection: socket.socket, service: Service) -> None:
    connection.sendall(asking("large", stream=True))


def ask_for_json(connection: socket.socket, service: Service) -> None:
    connection.sendall(asking("large", stream=False))


def handshake(*headers: bytes) -> bytes:
    return b"\r\n".join(
        (
            b"GET /chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade",
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            *headers,
            b"\r\n",
        )
    )


def upgrade(connection: socket.socket) -> None:
    connection.sendall(handshake())
    while not connection.recv(4096).endswith(b"\r\n\r\n"):
        pass


def ask_over_websocket(connection: socket.socket, service: Service) -> None:
    upgrade(connection)
    connection.sendall(frame_of(json.dumps(body("large")).encode()))


def frame_of(text: bytes) -> bytes:
    return Frame(Opcode.TEXT, text).serialize(mask=True)


CLOSE = Frame(Opcode.CLOSE, Close(1000, "").serialize()).serialize(mask=True)


ASKS = {"sse": ask_for_events, "json": ask_for_json, "websocket": ask_over_websocket}


@pytest.mark.parametrize("command", [Service, UvicornService])
@pytest.mark.parametrize("transport", ASKS)
def test_a_caller_who_reads_nothing_is_cut(
    groq: FakeGroq, transport: str, command: type[Service]
) -> None:
    groq.on("large", LARGE)
    with command(GROQ_BASE_URL=groq.url, SEND_TIMEOUT=0.5) as service:
        idle = open_sockets(service)
        with connected(service) as connection:
            ASKS[transport](connection, service)
            request = groq.wait_for_request("large")
            wait_until(lambda: service.metric("chat_replies_total", stream_type=transport) == 1)
            wait_until(lambda: open_sockets(service) <= idle)
            received = everything_from(connection)
        assert len(received) < 12_000_000, "what the kernel had taken by then"
        if transport != "json":
            assert service.metric("chat_replies_total", outcome="cancelled") == 1
            assert request.is_closed_soon()
        assert service.reply("another") == "You said: another"


@pytest.mark.parametrize("transport", ["sse", "websocket"])
def test_a_caller_who_reads_slowly_holds_back_groq_and_nobody_else(
    start_service: StartService, groq: FakeGroq, transport: str
) -> None:
    service = start_service()
    groq.on("large", LARGE)
    process = psutil.Process(service.process.pid)
    service.reply("warm")
    with connected(service) as connection:
        before = process.memory_info().rss
        ASKS[transport](connection, service)
        groq.wait_for_request("large")
        for number in range(50):
            assert service.reply(f"n{number}") == f"You said: n{number}"
        assert process.memory_info().rss - before < 8 << 20, "the reply is of 12 MB"
        assert service.metric("chat_replies_active", stream_type=transport) == 1


def test_who_reads_a_conversation_takes_the_room_of_a_reply(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(
        MAX_CONCURRENT_PER_CLIENT=1, MAX_BODY_BYTES=20 << 20, CONTEXT_TOKENS=100_000_000
    )
    service.reply("x" * (12 << 20), conversation)
    with connected(service) as connection:
        path = f"/conversations/{conversation}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert service.http.get(path).status_code == 429
        assert service.chat("hello").status_code == 429
    wait_until(lambda: service.chat("hello").status_code == 200)


def test_a_large_conversation_that_nobody_reads_is_cut_too(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(SEND_TIMEOUT=0.5, MAX_BODY_BYTES=20 << 20, CONTEXT_TOKENS=100_000_000)
    service.reply("x" * (12 << 20), conversation)
    idle = open_sockets(service)
    with connected(service) as connection:
        path = f"/conversations/{conversation}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        service.log_line(endpoint="/conversations/{id}", status=200)
        wait_until(lambda: open_sockets(service) <= idle)


class ImpatientProtocol(HTTPProtocol):
    head_timeout = 0.2


class ImpatientWebSocketProtocol(WebSocketProtocol):
    message_timeout = 0.2


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


@pytest.mark.parametrize(
    "unfinished",
    [b"\x81", b"\x81\xff\0\0\0\0\0\0\1\0\0\0\0\0abc", b"\x01\x82\0\0\0\0ab"],
    ids=["a frame's head", "a frame", "a piece"],
)
def test_a_message_that_does_not_come_whole_closes_a_websocket(unfinished: bytes) -> None:
    app = Starlette(routes=[WebSocketRoute("/chat", echo)])
    with (
        running(app, ws=ImpatientWebSocketProtocol) as (_, port),
        socket.create_connection(("127.0.0.1", port), 5) as connection,
    ):
        upgrade(connection)
        connection.sendall(b"\x81\x82\0\0\0\0ab" + unfinished)
        assert everything_from(connection) == b"\x81\x02ab"


def test_unfinished_messages_take_no_more_than_the_largest_request(service: Service) -> None:
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    with ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(connected(service))
            upgrade(connection)
            connection.sendall(b"\x81\xff" + (1 << 20).to_bytes(8) + b"\0\0\0\0")
            with suppress(ConnectionError):
                connection.sendall(b"x" * ((1 << 20) - 1))
        assert service.reply("another") == "You said: another"
        assert process.memory_info().rss - before < WARM_UP_BYTES


UNFINISHED = [
    b"",
    b"\r\n",
    b"GET / HT",
    b"GET / HTTP/1.1\r\nHost: x\r\n",
]
ANSWERED = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("beginning", UNFINISHED)
def test_a_connection_on_which_no_request_comes_is_closed(beginning: bytes) -> None:
    with (
        running(Starlette(), http=ImpatientProtocol) as (_, port),
        socket.create_connection(("127.0.0.1", port), 5) as connection,
    ):
        connection.sendall(beginning)
        assert everything_from(connection) == b""


@pytest.mark.parametrize(
    "sent",
    [
        ANSWERED + b"GET / HT",
        ANSWERED + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na: b\r\n",
    ],
)
def test_what_does_not_come_whole_behind_an_answer_closes_the_connection_too(sent: bytes) -> None:
    with (
        running(Starlette(), http=ImpatientProtocol, timeout_keep_alive=1) as (_, port),
        socket.create_connection(("127.0.0.1", port), 5) as connection,
    ):
        connection.sendall(sent)
        assert everything_from(connection).startswith(b"HTTP/1.1 404 ")


WARM_UP_BYTES = 30 << 20
"""What a young process may take for itself, whatever is sent to it; far less than that."""
HEAD = b"POST /chat HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "beginning",
    [HEAD, HEAD + b"a: ", HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"],
    ids=["headers", "one header", "trailers"],
)
def test_a_head_without_an_end_is_cut(service: Service, beginning: bytes) -> None:
    before = psutil.Process(service.process.pid).memory_info().rss
    with connected(service) as connection, suppress(ConnectionError):
        connection.sendall(beginning)
        for _ in range(20_000):
            connection.sendall(b"a: b\r\n" * 1000 if beginning[-1:] == b"\n" else b"b" * 6000)
        pytest.fail("120 MB of a head were taken")
    assert psutil.Process(service.process.pid).memory_info().rss - before < WARM_UP_BYTES


def test_requests_without_an_end_behind_one_that_is_answered_are_cut(
    service: Service, groq: FakeGroq
) -> None:
    groq.on("held", Script(hold_before_token=0))
    with connected(service) as connection, suppress(ConnectionError):
        connection.sendall(asking("held", stream=True))
        groq.wait_for_request("held")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        while connection.recv(4096):
            pass
    assert groq.wait_for_request("held").is_closed_soon()


@pytest.mark.parametrize(
    "frame",
    [b"\x89\x80\0\0\0\0", b"\x8a\x80\0\0\0\0", b"\x00\x80\0\0\0\0"],
    ids=["pings", "pongs", "pieces"],
)
def test_frames_without_a_message_are_cut(service: Service, frame: bytes) -> None:
    with connected(service) as connection, suppress(ConnectionError):
        upgrade(connection)
        if frame[0] == 0:
            connection.sendall(b"\x01\x80\0\0\0\0")
        connection.sendall(frame * 10_000)
        everything_from(connection)


def test_a_bad_message_before_a_close_is_no_fault_of_ours(start_service: StartService) -> None:
    service = start_service()
    with connected(service) as connection, suppress(ConnectionError):
        upgrade(connection)
        connection.sendall(frame_of(b"\xff") + CLOSE)
        everything_from(connection)
    service.log_line(endpoint="/chat", method="GET", status=101)
    assert "ERROR" not in service.process.output


@pytest.mark.parametrize("command", [Service, UvicornService])
def test_a_cancel_before_a_close_keeps_what_was_sent(
    groq: FakeGroq, conversation: str, command: type[Service]
) -> None:
    groq.on("held", Script(["a", "b"], hold_before_token=1))
    with command(GROQ_BASE_URL=groq.url) as service, connected(service) as connection:
        upgrade(connection)
        asked = json.dumps(body("held", conversation)).encode()
        connection.sendall(frame_of(asked))
        connection.recv(4096)
        connection.sendall(frame_of(b'{"cancel":true}') + CLOSE)
        everything_from(connection)
        wait_until(lambda: service.contents(conversation) == ["held", "a"])


@pytest.mark.parametrize("count", [100, 950])
@pytest.mark.parametrize("words", [b"{}", b'{"cancel":true}'])
def test_pings_of_a_caller_who_reads_nothing_take_no_memory(
    service: Service, words: bytes, count: int
) -> None:
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    ping = b"\x89\xfd\0\0\0\0" + b"x" * 125
    message = b"\x81" + bytes([0x80 | len(words)]) + b"\0\0\0\0" + words
    with connected(service) as connection, suppress(ConnectionError, TimeoutError):
        upgrade(connection)
        connection.settimeout(1)
        for _ in range(10_000):
            connection.sendall(ping * count + message)
        pytest.fail("131 MB of pings were taken")
    assert process.memory_info().rss - before < WARM_UP_BYTES
