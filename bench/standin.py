"""
A fast stand-in for Groq: pre-rendered bytes, sent at once or at a pace.

    python -m bench.standin PORT [CERTIFICATE]

The last message says what to send: `bench TOKENS INTERVAL [MARK]`. An interval of 0 is a flood; of
-1, one token and then silence. A whole reply starts with the mark, which makes it unique.
"""

import asyncio
import re
import ssl
import sys
from functools import lru_cache
from typing import Any, cast

import uvloop

ORDER = re.compile(rb"bench (\d+) ([-\d.]+)(?: (\w+))?")
CHUNK = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1795000000,'
    b'"model":"openai/gpt-oss-20b","system_fingerprint":"fp_0","choices":[{"index":0,'
    b'"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = http_chunk(CHUNK)


def usage(prompt: int, reply: int) -> bytes:
    counts = (prompt, reply, prompt + reply)
    return b'"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % counts


@lru_cache
def ending(tokens: int) -> bytes:
    finish = b'"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],' + usage(20, tokens)
    return http_chunk(b"data: {%b}\n\n" % finish) + http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@lru_cache
def flood(tokens: int) -> bytes:
    return HEAD + TOKEN * tokens + ending(tokens)


def whole(tokens: int, mark: bytes, prompt: int) -> bytes:
    message = b'{"role":"assistant","content":"%b"}' % (mark + b" token" * tokens)
    choice = b'{"index":0,"message":%b,"finish_reason":"stop"}' % message
    body = b'{"choices":[%b],%b}' % (choice, usage(prompt, tokens))
    return JSON_HEAD % len(body) + body


class StandIn(asyncio.Protocol):
    """One connection from a relay."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if not end or len(body) < int(length[1] if length else 0):
            return
        self.received = b""
        if head.startswith(b"GET"):
            self.transport.write(NOT_FOUND)
        else:
            self.reply(body)

    def reply(self, body: bytes) -> None:
        tokens, interval, mark = ORDER.findall(body)[-1]
        count, seconds = int(tokens), float(interval)
        if b'"stream":true' not in body:
            self.transport.write(whole(count, mark, prompt=20 + body.count(b" token")))
        elif seconds == 0:
            self.transport.write(flood(count))
        elif seconds < 0:
            self.transport.write(HEAD + TOKEN)
        else:
            self.transport.write(HEAD)
            self.pace(asyncio.get_running_loop().time(), count, count, seconds)

    def pace(self, due: float, left: int, tokens: int, interval: float) -> None:
        if self.transport.is_closing():
            return
        if left == 0:
            self.transport.write(ending(tokens))
            return
        self.transport.write(TOKEN)
        due += interval
        loop = asyncio.get_running_loop()
        loop.call_at(due, self.pace, due, left - 1, tokens, interval)


async def serve(port: int, certificate: str | None = None) -> None:
    options: dict[str, Any] = {"backlog": 4096, "reuse_address": True}
    if certificate:
        options["ssl"] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        options["ssl"].load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(StandIn, "127.0.0.1", port, **options)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), *sys.argv[2:]))
