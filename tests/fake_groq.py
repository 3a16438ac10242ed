"""
A stand-in for Groq: a real HTTP server that speaks its protocol and misbehaves on request.

    with FakeGroq() as groq:
        groq.on("weather", Script(["Sun", "ny"], interval=0.1))   # for messages with this word
        ... point GROQ_BASE_URL at groq.url ...
        groq.requests[0].is_closed_soon()                         # the service hung up

It runs in a thread with its own event loop, so that tests may block.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from tests.servers import PATIENCE, keep_secret


@dataclass(frozen=True)
class Script:
    """How to answer a request; by default, with a reply that echoes the question."""

    tokens: Sequence[str] | None = None
    reasoning: Sequence[str] = ()
    prompt_tokens: int | None = 10
    completion_tokens: int | None = None  # without the reasoning, whose deltas are a token each
    finish_reason: str | None = "stop"
    done: bool = True

    status: int = 200
    reason: str = "Whatever"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None  # the whole body, instead of one with the tokens

    newline: str = "\n"
    piece: int | None = None  # bytes that are sent at once
    interval: float = 0.0  # seconds between tokens
    comments: float | None = None  # seconds between comments, sent forever instead of tokens
    hold_before_status: bool = False  # to hold is to send nothing more until `release`
    hold_before_token: int | None = None
    hold_at_end: bool = False
    cut_before_status: bool = False
    cut_before_token: int | None = None
    cut_at_end: bool = False  # omit the end of the body
    error_before_token: int | None = None
    error: str = 'data: {"error":{"message":"org_secret is over capacity","type":"server_error"}}'

    def __str__(self) -> str:
        """Return what differs from the default, for the name of a test."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        shown = {name: value for name, value in values.items() if value != getattr(Script, name)}
        return ", ".join(f"{name}={value!r:.60}" for name, value in shown.items())


@dataclass
class Request:
    """A request as received, and how it ended."""

    path: str
    headers: dict[str, str]
    body: Any
    received_at: float
    connection: int
    sent_at: list[float] = field(default_factory=list)  # when each token was
    answered: bool = False
    closed: threading.Event = field(default_factory=threading.Event)  # by either side

    @property
    def contents(self) -> list[str]:
        return [message["content"] for message in self.body["messages"]]

    def is_closed_soon(self) -> bool:
        """Wait for the end of the connection; return whether it came."""
        return self.closed.wait(PATIENCE)


class FakeGroq:
    """The server; `requests` is what it received, in order."""

    def __init__(self, default: Script | None = None) -> None:
        self.default = self._first_default = default or Script()
        self.requests: list[Request] = []
        self.models: list[str] | None = None  # None for a server without `GET /models`
        self.models_status = 200
        self._scripts: list[tuple[str, list[Script]]] = []
        self._changed = threading.Condition()
        self.released = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._connections: set[_Connection] = set()
        self._opened = 0

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        self.port = starting.result(PATIENCE)
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/openai/v1"

    def on(self, text: str, *scripts: Script) -> None:
        """Answer requests whose last message contains the text by these scripts in turn."""
        self._scripts.insert(0, (text, list(scripts)))

    def reset(self) -> None:
        """Forget the scripts and the requests."""
        self.default = self._first_default
        self._scripts.clear()
        self.requests.clear()
        self.models, self.models_status = None, 200
        self._loop.call_soon_threadsafe(self.released.clear)

    def release(self) -> None:
        """Continue with every held request."""
        self._loop.call_soon_threadsafe(self.released.set)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the requests holds."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE), "Groq waited in vain"

    def wait_for_request(self, text: str) -> Request:
        """Wait for a request whose last message contains the text; return the latest."""
        self.wait_for(lambda: bool(self.asked(text)))
        return self.asked(text)[-1]

    def asked(self, text: str) -> list[Request]:
        """Return the requests whose last message contains the text."""
        return [request for request in list(self.requests) if text in request.contents[-1]]

    def script_for(self, request: Request) -> Script:
        last = request.contents[-1]
        scripts = next((scripts for text, scripts in self._scripts if text in last), [self.default])
        script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        if script.tokens is None:
            words = last.split(" ")
            echo = ["You", " said", ":", *(f" {word}" for word in words)]
            script = replace(script, tokens=echo)
        return script

    def note(self, change: Callable[[], object]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    async def _start(self) -> int:
        def connect() -> _Connection:
            self._opened += 1
            return _Connection(self, self._opened, self._connections)

        self._server = await self._loop.create_server(connect, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _stop(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)


class _Connection(asyncio.Protocol):
    def __init__(self, groq: FakeGroq, number: int, open_connections: set["_Connection"]) -> None:
        self._groq = groq
        self._number = number
        self._open = open_connections
        self._received = b""
        self._request: Request | None = None
        self._answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._open.discard(self)
        if self._answering:
            self._answering.cancel()
        if request := self._request:
            self._groq.note(request.closed.set)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return None
        self._received = rest[length:]
        path = first.split(" ")[1]
        if path.endswith("/models"):
            return self._list_models()
        body = json.loads(rest[:length]) if length else None
        request = Request(path, headers, body, time.monotonic(), self._number)
        keep_secret(*request.contents)
        self._request = request
        self._groq.note(lambda: self._groq.requests.append(request))
        self._answering = asyncio.get_running_loop().create_task(self._answer(request))

    def abort(self) -> None:
        self._transport.abort()

    def _list_models(self) -> None:
        models = self._groq.models
        status = 404 if models is None else self._groq.models_status
        body = json.dumps({"object": "list", "data": [{"id": model} for model in models or ()]})
        self._write_whole(Script(status=status), body.encode())

    async def _answer(self, request: Request) -> None:
        script = self._groq.script_for(request)
        if script.hold_before_status:
            await self._groq.released.wait()
        if script.cut_before_status:
            return self._transport.close()
        if script.status != 200:
            self._write_whole(script, script.body or b'{"error":{"message":"org_secret: no"}}')
        elif request.body.get("stream"):
            await self._stream(script, request)
        else:
            await self._whole(script, request)
        request.answered = True

    async def _whole(self, script: Script, request: Request) -> None:
        tokens = script.tokens or ()
        if script.hold_before_token is not None or script.comments is not None:
            await self._groq.released.wait()
        await asyncio.sleep(script.interval * len(tokens))
        choice = {"message": {"role": "assistant", "content": "".join(tokens) or None}}
        body: dict[str, Any] = {
            "choices": [{**choice, "finish_reason": script.finish_reason}],
            "x_groq": {"id": "req_fake"},
        }
        if usage := _usage(script):
            body["usage"] = usage
        if script.error_before_token is not None:
            body = json.loads(script.error.partition("data: ")[2])
        self._write_whole(script, json.dumps(body).encode() if script.body is None else script.body)

    def _write_whole(self, script: Script, body: bytes) -> None:
        head = [f"HTTP/1.1 {script.status} {script.reason}", f"content-length: {len(body)}"]
        head += _headers(script, "application/json")
        response = "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body
        is_cut = script.cut_before_token is not None
        self._transport.write(response[:-1] if is_cut else response)
        if is_cut:
            self._transport.close()

    async def _stream(self, script: Script, request: Request) -> None:
        head = ["HTTP/1.1 200 OK", "transfer-encoding: chunked"]
        head += _headers(script, "text/event-stream")
        self._transport.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n")
        async for event in self._events(script, request):
            for piece in _pieces(event.replace(b"\n", script.newline.encode()), script.piece):
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                if script.piece:
                    await asyncio.sleep(0)
        if script.hold_at_end:
            await self._groq.released.wait()
        if script.cut_at_end:
            self._transport.close()
        if not self._transport.is_closing():
            self._transport.write(b"0\r\n\r\n")

    async def _events(self, script: Script, request: Request) -> AsyncIterator[bytes]:
        if script.body is not None:
            yield script.body
            return
        thoughts = [_chunk({"reasoning": thought}) for thought in script.reasoning]
        yield b"".join([_chunk({"role": "assistant"}, x_groq={"id": "req_fake"}), *thoughts])
        while script.comments is not None:
            yield b": still thinking\n\n"
            await asyncio.sleep(script.comments)
        for number, token in enumerate((*(script.tokens or ()), None)):
            if number == script.hold_before_token:
                await self._groq.released.wait()
            if number == script.cut_before_token:
                self._transport.close()
                return
            if number == script.error_before_token:
                yield script.error.encode() + b"\n\n"
                return
            if token is not None:
                if script.interval:
                    await asyncio.sleep(script.interval)
                request.sent_at.append(time.monotonic())
                yield _chunk({"content": token})
        for event in _ending(script):
            yield event


def _headers(script: Script, content_type: str) -> list[str]:
    """The script's headers, which may replace the content type, or remove it by an empty one."""
    headers = {"content-type": content_type, **dict(script.headers)}
    return [f"{name}: {value}" for name, value in headers.items() if value]


def _chunk(delta: dict[str, Any], finish_reason: str | None = None, **members: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "chatcmpl-fake", "choices": [choice], **members}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def _ending(script: Script) -> Iterator[bytes]:
    """The last chunks, with the usage in the three places where Groq puts it."""
    usage = _usage(script)
    if script.finish_reason:
        members = {"usage": usage, "x_groq": {"id": "req_fake", "usage": usage}} if usage else {}
        yield _chunk({}, script.finish_reason, **members)
    if usage:
        yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    if script.done:
        yield b"data: [DONE]\n\n"


def _usage(script: Script) -> dict[str, Any] | None:
    if script.prompt_tokens is None:
        return None
    thoughts = len(script.reasoning)
    completion = script.completion_tokens
    completion = len(script.tokens or ()) if completion is None else completion
    return {
        "prompt_tokens": script.prompt_tokens,
        "completion_tokens": completion + thoughts,
        "total_tokens": script.prompt_tokens + completion + thoughts,
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }


def _pieces(data: bytes, size: int | None) -> Iterator[bytes]:
    size = size or len(data) or 1
    return (data[start : start + size] for start in range(0, len(data), size))
