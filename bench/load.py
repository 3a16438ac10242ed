"""
The load: callers over raw sockets, in a process of their own; its measurements as one line of JSON.

Every reply is checked: as many tokens as were ordered, and a proper end.
"""

import argparse
import asyncio
import json
import os
import re
import resource
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import cast

import uvloop

TOKENS = {"sse": b"data:  token", "direct": b'"content":" token"', "ws": b'"token":" token"'}
TOKENS["json"] = TOKENS["direct-json"] = b" token"
RAMP = 100
"""Connections that are opened at a time."""


@dataclass
class Order:
    """What the callers do."""

    mode: str
    host: str
    port: int
    callers: int
    tokens: int
    interval: float
    seconds: float
    """How long they ask again; 0 for once."""
    stagger: float = 0.0
    """Seconds between the first requests of two callers."""


@dataclass
class Results:
    callers: int = 0
    replies: int = 0
    wrong: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds from each request to its first token."""


def http_request(order: Order) -> bytes:
    path = "/openai/v1/chat/completions" if order.mode.startswith("direct") else "/chat"
    body = chat_body(order)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chat_body(order: Order) -> bytes:
    message = {"role": "user", "content": f"bench {order.tokens} {order.interval}"}
    asked = {"messages": [message], "conversation": uuid.uuid4().hex}
    if order.mode != "ws":
        asked["stream"] = "json" not in order.mode  # type: ignore[assignment]
    return json.dumps(asked, separators=(",", ":")).encode()


def socket_message(payload: bytes) -> bytes:
    """Return a masked text frame; its mask is zero, so that the payload stands as it is."""
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe"
    if len(payload) >= 126:
        size += len(payload).to_bytes(2, "big")
    return b"\x81" + size + b"\0\0\0\0" + payload


UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Caller(asyncio.Protocol):
    """One connection, which asks again and again."""

    def __init__(self, order: Order, results: Results, deadline: float, *, hold: bool) -> None:
        self.hold = hold
        self.delay = results.callers * order.stagger
        results.callers += 1
        self.order = order
        self.results = results
        self.deadline = deadline
        loop = asyncio.get_running_loop()
        self.first_token = loop.create_future()
        self.ended = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.is_upgrading = self.order.mode == "ws"
        if self.is_upgrading:
            self.transport.write(UPGRADE)
        else:
            asyncio.get_running_loop().call_later(self.delay, self.ask)

    def ask(self) -> None:
        self.received: list[bytes] = []
        is_socket = self.order.mode == "ws"
        self.asked_at = time.perf_counter()
        self.is_waiting = True
        request = socket_message(chat_body(self.order)) if is_socket else http_request(self.order)
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.is_upgrading:
            self.is_upgrading = False
            return self.ask()
        if self.hold and self.first_token.done():
            return None
        self.received.append(data)
        if self.is_waiting and TOKENS[self.order.mode] in data:
            self.is_waiting = False
            self.results.first.append(time.perf_counter() - self.asked_at)
            if not self.first_token.done():
                self.first_token.set_result(None)
        if self.is_end(data):
            self.take_reply()

    def is_end(self, data: bytes) -> bool:
        if self.order.mode == "ws":
            return b'"done"' in data[-40:]
        if "json" in self.order.mode:
            head, _, body = b"".join(self.received).partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            return bool(length) and len(body) == int(length[1])
        return data.endswith(b"0\r\n\r\n")

    def take_reply(self) -> None:
        self.results.replies += 1
        count = b"".join(self.received).count(TOKENS[self.order.mode])
        self.results.wrong += count != self.order.tokens
        if time.perf_counter() < self.deadline:
            self.ask()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def run(order: Order, *, hold: bool) -> None:
    results = Results()
    started_at = time.perf_counter()
    loop = asyncio.get_running_loop()
    callers = []
    for _ in range(0, order.callers, RAMP):
        count = min(RAMP, order.callers - len(callers))
        opening = [
            loop.create_connection(
                lambda: Caller(order, results, started_at + order.seconds, hold=hold),
                order.host,
                order.port,
            )
            for _ in range(count)
        ]
        callers += [caller for _, caller in await asyncio.gather(*opening)]
        if hold:
            await asyncio.gather(*(caller.first_token for caller in callers[-count:]))
    if hold:
        print("held", flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        os._exit(0)
    await asyncio.gather(*(caller.ended for caller in callers))
    elapsed = time.perf_counter() - started_at
    print(json.dumps({"elapsed": elapsed, **vars(results)}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("order", type=json.loads)
    parser.add_argument("--hold", action="store_true")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(run(Order(**options.order), hold=options.hold))
