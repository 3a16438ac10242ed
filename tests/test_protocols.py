"""uvicorn's protocols as `chat.api.protocols` completes them, over real sockets."""

import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.frames import Close, Frame, Opcode

from chat.api.protocols import TEXTS, HTTPProtocol, WebSocketProtocol
from tests.servers import PATIENCE, everything_from, running

MAX_MESSAGE = 100_000


class ImpatientProtocol(HTTPProtocol):
    head_timeout = 0.3


async def echo(request: Request) -> Response:
    body = await request.body()
    return PlainTextResponse(f"<{request.method} {request.url.path} {body.decode()}>")


async def early(request: Request) -> Response:
    return PlainTextResponse("<early>")


async def pieces(request: Request) -> Response:
    return StreamingResponse(iter(["<a", "", "b", "c>"]))


async def held(request: Request) -> Response:
    """Answer as soon as the client disconnects or the test says so."""
    app = request.app.state
    app.begun.release()
    while (await request.receive())["type"] != "http.disconnect":
        pass
    app.disconnected.release()
    return Response()


async def echo_socket(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


async def sink(websocket: WebSocket) -> None:
    await websocket.accept()
    async for _ in websocket.iter_text():
        pass


async def stream(websocket: WebSocket) -> None:
    await websocket.accept()
    with suppress(WebSocketDisconnect):
        while True:
            await websocket.send({"type": "websocket.send", "text": "x" * 1000})
            await websocket.send({"type": "websocket.send", "texts": [b"x" * 1000] * 10})


async def flood(websocket: WebSocket) -> None:
    """Write more than the kernel takes."""
    await websocket.accept()
    await websocket.send_text("x" * 20_000_000)
    await websocket.receive()
    websocket.app.state.disconnected.release()


async def texts(websocket: WebSocket) -> None:
    await websocket.accept()
    assert TEXTS in websocket.scope["extensions"]
    await websocket.send({"type": "websocket.send", "texts": [b"a", "é".encode(), b""]})
    await websocket.close()


SOCKETS = (flood, sink, stream, texts)


def make_app() -> Starlette:
    routes = [
        Route("/early", early, methods=["POST"]),
        Route("/held", held),
        Route("/pieces", pieces),
        *(WebSocketRoute(f"/{each.__name__}", each) for each in SOCKETS),
        WebSocketRoute("/chat", echo_socket),
        Route("/{path:path}", echo, methods=["GET", "POST"]),
    ]
    app = Starlette(routes=routes)
    app.state.begun = threading.Semaphore(0)
    app.state.disconnected = threading.Semaphore(0)
    return app


@contextmanager
def serving(http: type[HTTPProtocol] = HTTPProtocol, **options: Any) -> Iterator[Starlette]:
    app = make_app()
    options = {"ws_max_size": MAX_MESSAGE, "log_config": None, "timeout_keep_alive": 30, **options}
    with running(app, http=http, ws=WebSocketProtocol, **options) as app.state.address:
        yield app


@pytest.fixture(scope="module")
def server() -> Iterator[Starlette]:
    with serving() as app:
        yield app


def connected(app: Starlette) -> socket.socket:
    connection = socket.create_connection(app.state.address, PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@pytest.fixture
def connection(server: Starlette) -> Iterator[socket.socket]:
    with connected(server) as connection:
        yield connection


def bodies(answer: bytes) -> list[bytes]:
    """Return the bodies of `echo` in what was received."""
    return re.findall(rb"<[^>]*>", answer)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        piece = connection.recv(1)
        assert piece, f"ended after {received!r}"
        received += piece
    return received


def get(path: str = "/", *headers: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: x", *headers, "", "")).encode()


def handshake(path: str = "/chat", *headers: str) -> bytes:
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key)
    return get(path, *upgrade, *headers)


def frame(payload: bytes, opcode: Opcode = Opcode.TEXT) -> bytes:
    return Frame(opcode, payload).serialize(mask=True)


CLOSE = frame(Close(1000, "").serialize(), Opcode.CLOSE)
PING = frame(b"x" * 125, Opcode.PING)
INNER = get("/inner", "Connection: close")
LAST = get("/last", "Connection: close")


@contextmanager
def open_websocket(app: Starlette, path: str = "/chat") -> Iterator[socket.socket]:
    with connected(app) as connection:
        connection.sendall(handshake(path))
        read_until(connection, b"\r\n\r\n")
        yield connection


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("offer", ["h2c", "foo", "TLS/1.0", "websocket"])
def test_an_offered_upgrade_does_not_change_how_a_body_is_read(
    server: Starlette, offer: str, method: str, is_chunked: bool
) -> None:
    framing, body = f"Content-Length: {len(INNER)}", INNER
    if is_chunked:
        framing, body = "Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER)
    head = get("/", "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {offer}", framing)
    head, rest = head.replace(b"GET", method.encode(), 1), body + LAST
    for pieces in ([head + rest], [head, rest], [bytes([each]) for each in head + rest]):
        with connected(server) as connection:
            for piece in pieces:
                connection.sendall(piece)
            answer = everything_from(connection)
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 2
        assert f"<{method} / ".encode() + INNER + b">" in answer
        assert answer.endswith(b"<GET /last >")


def test_offers_in_one_packet_are_passed_over_up_to_one_that_closes(
    connection: socket.socket,
) -> None:
    connection.sendall(get("/", "Connection: Upgrade", "Upgrade: h2c") * 300)
    connection.sendall(get("/end", "Connection: close, Upgrade", "Upgrade: h2c") + LAST)
    assert bodies(everything_from(connection)) == [b"<GET / >"] * 300 + [b"<GET /end >"]


def test_a_body_to_an_old_client_has_no_chunk_sizes_and_ends_with_the_connection(
    server: Starlette,
) -> None:
    answers = (("/pieces", b"<abc>"), ("/", b"<GET / >"))
    for version, (path, body) in product((b"HTTP/1.0", b"HTTP/0.9"), answers):
        with connected(server) as connection:
            request = get(path, "Connection: keep-alive").replace(b"HTTP/1.1", version)
            connection.sendall(request)
            head, _, received = everything_from(connection).partition(b"\r\n\r\n")
        assert (received, b"transfer-encoding" in head.lower()) == (body, False)


OFFER = ("Connection: Upgrade", "Upgrade: foo")


def test_ambiguous_framing_is_refused_and_ends_the_connection(server: Starlette) -> None:
    for head in (
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        get("/", *OFFER, "Transfer-Encoding: x", "Host: x"),
        get("/", *OFFER, "Content-Length: 9", "Transfer-Encoding: chunked"),
    ):
        with connected(server) as connection:
            connection.sendall(head + INNER)
            answer = everything_from(connection)
        assert answer.startswith(b"HTTP/1.1 400 "), head
        assert answer.count(b"HTTP/1.1") == 1, head


def test_frames_right_behind_a_handshake_are_read_after_it(server: Starlette) -> None:
    for early_frames in (frame(b"hi"), PING + frame(b"hi")):
        with connected(server) as connection:
            connection.sendall(handshake() + early_frames)
            assert read_until(connection, b"hi").startswith(b"HTTP/1.1 101 ")
    for bad_frames in (b"\xff" * 9, CLOSE):
        with connected(server) as connection:
            connection.sendall(handshake() + bad_frames)
            assert everything_from(connection).startswith(b"HTTP/1.1 101 ")


def test_a_handshake_behind_an_answer_is_served(connection: socket.socket) -> None:
    connection.sendall(get())
    read_until(connection, b">")
    connection.sendall(handshake() + frame(b"hi"))
    read_until(connection, b"hi")


@pytest.mark.parametrize("is_same_packet", [True, False])
def test_a_handshake_behind_a_running_request_ends_both(
    server: Starlette, connection: socket.socket, is_same_packet: bool
) -> None:
    connection.sendall(get("/held") + handshake() * is_same_packet)
    if not is_same_packet:
        assert server.state.begun.acquire(timeout=PATIENCE)
        connection.sendall(handshake())
    assert everything_from(connection) == b""
    assert server.state.disconnected.acquire(timeout=PATIENCE)


def test_a_handshake_that_cannot_be_parsed_ends(server: Starlette) -> None:
    for headers in (["a: " + "b" * 9000], ["a: b"] * 200):
        with connected(server) as connection:
            connection.sendall(handshake("/chat", *headers))
            assert b"101" not in everything_from(connection)


def test_a_disconnect_reaches_the_request_in_front_of_queued_ones(server: Starlette) -> None:
    for in_first_packet in (1, 2):
        with connected(server) as connection:
            connection.sendall(get("/held") * in_first_packet)
            assert server.state.begun.acquire(timeout=PATIENCE)
            connection.sendall(get("/held") * (2 - in_first_packet))
        assert server.state.disconnected.acquire(timeout=PATIENCE)


@pytest.mark.parametrize("beginning", [b"\r\n", b"GET /", get()[:-2]], ids=repr)
@pytest.mark.parametrize("before", [b"", get()], ids=["first", "second"])
def test_a_head_has_to_arrive_in_time(before: bytes, beginning: bytes) -> None:
    with serving(ImpatientProtocol) as app, connected(app) as connection:
        if before:
            connection.sendall(before)
            read_until(connection, b">")
        connection.sendall(beginning)
        connection.settimeout(0.05)
        started = time.monotonic()
        while True:
            with suppress(TimeoutError):
                if not connection.recv(1):
                    break
            with suppress(ConnectionError):
                connection.sendall(b"\n" if beginning == b"\r\n" else b"a")
        assert 0.2 < time.monotonic() - started < PATIENCE / 2


@pytest.mark.parametrize("beginning", [b"", get()], ids=["new", "answered"])
def test_an_idle_connection_has_the_time_of_keep_alive(beginning: bytes) -> None:
    with serving(ImpatientProtocol, timeout_keep_alive=1) as app, connected(app) as connection:
        started = time.monotonic()
        connection.sendall(beginning)
        assert bodies(everything_from(connection)) == ([b"<GET / >"] if beginning else [])
        assert 0.9 < time.monotonic() - started < PATIENCE / 2


def test_the_rest_of_an_answered_request_does_not_count_as_a_head() -> None:
    with serving(ImpatientProtocol) as app, connected(app) as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        read_until(connection, b"<early>")
        connection.sendall(b"x" * 100_000)
        connection.settimeout(2 * ImpatientProtocol.head_timeout)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.sendall(LAST)
        assert bodies(everything_from(connection)) == [b"<GET /last >"]


def send_without_end(connection: socket.socket, piece: bytes) -> None:
    for _ in range(1000):
        connection.sendall(piece)


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


def test_heads_without_an_end_are_cut(server: Starlette) -> None:
    for beginning, more in (
        (HEAD, b"a: b\r\n"),
        (HEAD + b"a: ", b"b"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"a: b\r\n"),
        (get("/held"), get()),
    ):
        with connected(server) as connection:
            connection.sendall(beginning)
            with pytest.raises(ConnectionError):
                send_without_end(connection, more * (6000 // len(more)))


def test_texts_are_sent_one_by_one(server: Starlette) -> None:
    with open_websocket(server, "/texts") as connection:
        read_until(connection, b"\x81\x01a\x81\x02\xc3\xa9\x81\x00\x88\x02\x03\xe8")


def test_a_message_that_is_too_large_gets_an_error_before_the_close(server: Starlette) -> None:
    with open_websocket(server) as connection:
        connection.sendall(frame(b"x" * 50 * MAX_MESSAGE))
        answer = everything_from(connection)
    error = b'{"error":"the request must be at most %d bytes"}' % MAX_MESSAGE
    assert answer[2:].startswith(error + b"\x88")
    assert answer[2 + len(error) + 2 :].startswith((1009).to_bytes(2))


@pytest.mark.parametrize("path", ["/chat", "/stream"])
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(b"\xff"), 1007),
        (frame(b"\xff") + PING + frame(b"hi") + CLOSE, 1000),
        (b"\xff" * 100, 1002),
        (b"\x80\x80\0\0\0\0", 1002),
        (CLOSE + CLOSE, 1000),
        (frame(b"x" * 2 * MAX_MESSAGE), 1009),
    ],
    ids=["no UTF-8", "and a close", "nonsense", "a piece of nothing", "two closes", "too large"],
)
def test_bad_frames_end_a_websocket_and_log_no_error(
    server: Starlette, caplog: pytest.LogCaptureFixture, sent: bytes, code: int, path: str
) -> None:
    caplog.set_level(logging.WARNING, "uvicorn.error")
    with open_websocket(server, path) as connection:
        connection.sendall(sent)
        close = re.search(rb"\x88.(..)", everything_from(connection), re.DOTALL)
    assert close
    assert int.from_bytes(close[1]) == code
    said = {record.getMessage() for record in caplog.records}
    assert said <= {"Invalid UTF-8 sequence received from client."}  # which chat.logs leaves out


def test_nothing_is_read_from_a_caller_who_does_not_read_pongs(server: Starlette) -> None:
    for path, message in (("/chat", b""), ("/chat", frame(b"{}")), ("/sink", frame(b"{}"))):
        with open_websocket(server, path) as connection:
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                send_without_end(connection, PING * 950 + message)


def test_reading_goes_on_when_the_pongs_have_been_read(server: Starlette) -> None:
    with open_websocket(server) as connection:
        sending = threading.Thread(target=connection.sendall, args=(PING * 100_000 + frame(b"hi"),))
        sending.start()
        sending.join(0.5)
        assert sending.is_alive(), "the pongs are not read yet"
        received = 0
        while received < 100_000 * 127 + 4:
            received += len(connection.recv(1 << 20))
        sending.join()


def test_the_server_can_stop_while_a_caller_who_has_closed_reads_nothing() -> None:
    with serving() as app:  # an exception in its thread fails the test
        connection = connected(app)
        connection.sendall(handshake("/flood"))
        read_until(connection, b"x")
        connection.sendall(CLOSE)
        assert app.state.disconnected.acquire(timeout=PATIENCE)
        threading.Timer(0.5, connection.close).start()
