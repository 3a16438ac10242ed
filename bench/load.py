"""
The load: callers over raw connections, in a process of their own. Prints one line of JSON.

Every reply is checked for the number of tokens and a proper end.
"""

import asyncio
import json
import re
import resource
import sys
import time
import uuid
from dataclasses import dataclass

import uvloop

# What each token of a reply looks like; ` token` in JSON.
MARKERS = {"sse": b"data:  token", "ws": b'"token":" token"', "direct": b'"content":" token"'}
RAMP = 100  # connections that are opened at the same time
UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@dataclass
class Order:
    """What the callers do."""

    mode: str
    host: str
    port: int
    callers: int
    tokens: int  # tokens in each reply
    interval: float = 0.0  # seconds between tokens; bench/standin.py defines the special values
    seconds: float = 0.0  # how long callers keep asking; each finishes the chat that it has begun
    chats: int = 1  # each caller's minimum number of chats
    stagger: float = 0.0  # seconds between the first requests of consecutive callers
    is_kept: bool = False  # each reply has an id, so that it could be read again
    conversation: str = ""  # prefix of the callers' conversation ids; else, each chat has its own
    hold: bool = False  # print `held` once every caller has its first token; keep the streams open


class Caller:
    """One connection, which sends one chat after another."""

    def __init__(self, number: int, order: Order) -> None:
        self.number = number
        self.order = order
        self.marker = MARKERS.get(order.mode, b" token")
        self.first: list[float] = []  # seconds from each request to its first token
        self.wrong = 0
        self.has_begun = asyncio.Event()

    async def run(self, deadline: float) -> None:
        order = self.order
        self.reader, self.writer = await asyncio.open_connection(order.host, order.port)
        if order.mode == "ws":
            self.writer.write(UPGRADE)
            await self.reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(self.number * order.stagger)
        while len(self.first) < order.chats or time.perf_counter() < deadline:
            reply = await self.ask()
            self.wrong += reply.count(self.marker) != order.tokens
        self.writer.close()

    async def ask(self) -> bytes:
        """Send a chat; return the reply, up to where the connection was lost."""
        received: list[bytes] = []
        is_waiting, asked_at = True, time.perf_counter()
        self.writer.write(self.request())
        while data := await self.reader.read(1 << 20):
            received.append(data)
            if is_waiting and self.marker in data:
                is_waiting = False
                self.first.append(time.perf_counter() - asked_at)
                self.has_begun.set()
            if self.order.hold:
                received.clear()
            elif self.is_end(received):
                return b"".join(received)
        raise ConnectionError("closed in the middle of a reply")

    def is_end(self, received: list[bytes]) -> bool:
        if self.order.mode == "ws":
            return b'"done"' in received[-1][-40:]
        if "json" in self.order.mode:
            head, _, body = b"".join(received).partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            return length is not None and len(body) == int(length[1])
        return received[-1].endswith(b"0\r\n\r\n")

    def request(self) -> bytes:
        order = self.order
        content, conversation = f"bench {order.tokens} {order.interval}", uuid.uuid4().hex
        if order.conversation:  # a new question, about as long as its reply
            content += f" {conversation}" + " token" * order.tokens
            conversation = f"{order.conversation}-{self.number}"
        message = {"role": "user", "content": content}
        asked: dict[str, object] = {"messages": [message], "conversation": conversation}
        if order.is_kept:
            asked["reply"] = uuid.uuid4().hex
        if order.mode == "ws":
            return socket_frame(json.dumps(asked, separators=(",", ":")).encode())
        asked["stream"] = "json" not in order.mode
        body = json.dumps(asked, separators=(",", ":")).encode()
        path = "/openai/v1/chat/completions" if "direct" in order.mode else "/chat"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


def socket_frame(payload: bytes) -> bytes:
    """Return a masked text frame; the mask is zero, so the payload is unchanged."""
    length = len(payload)
    size = bytes([0x80 | length]) if length < 126 else b"\xfe" + length.to_bytes(2, "big")
    return b"\x81" + size + bytes(4) + payload


async def run(order: Order) -> None:
    started_at = time.perf_counter()
    callers = [Caller(number, order) for number in range(order.callers)]
    async with asyncio.TaskGroup() as tasks:
        for number, caller in enumerate(callers, 1):
            tasks.create_task(caller.run(started_at + order.seconds))
            if order.hold and (number % RAMP == 0 or number == order.callers):
                await asyncio.gather(*(opened.has_begun.wait() for opened in callers[:number]))
        if order.hold:
            print("held", flush=True)
    elapsed, wrong = time.perf_counter() - started_at, sum(caller.wrong for caller in callers)
    first = [seconds for caller in callers for seconds in caller.first]
    print(json.dumps({"elapsed": elapsed, "wrong": wrong, "first": first}), flush=True)


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(run(Order(**json.loads(sys.argv[1]))))
