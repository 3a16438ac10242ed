"""
A fast stand-in for Groq: pre-rendered bytes, sent at once or at a pace.

The last message says what to send: `bench TOKENS INTERVAL`; an interval of 0 is a flood, and of
-1 one token and then nothing.
"""

import argparse
import asyncio
import re
import ssl
from functools import lru_cache
from typing import cast

import uvloop

ORDER = re.compile(rb"bench (\d+) ([-\d.]+)")
CHUNK = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":1795000000,'
    b'"model":"openai/gpt-oss-20b","system_fingerprint":"fp_0","choices":[{"index":0,'
    b'"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]}\n\n'
)
USAGE = b'"usage":{"prompt_tokens":20,"completion_tokens":%d,"total_tokens":%d}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = http_chunk(CHUNK)


@lru_cache
def ending(tokens: int) -> bytes:
    usage = USAGE % (tokens, tokens + 20)
    finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],%b}\n\n' % usage
    return http_chunk(finish) + http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@lru_cache
def flood(tokens: int) -> bytes:
    return HEAD + TOKEN * tokens + ending(tokens)


@lru_cache
def whole(tokens: int) -> bytes:
    message = b'{"role":"assistant","content":"%b"}' % (b" token" * tokens)
    body = b'{"choices":[{"index":0,"message":%b,"finish_reason":"stop"}],%b}' % (
        message,
        USAGE % (tokens, tokens + 20),
    )
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class StandIn(asyncio.Protocol):
    """One connection from a relay."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if end and head.startswith(b"GET"):
            self.received = b""
            return self.transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if not end or not length or len(body) < int(length[1]):
            return None
        self.received = b""
        tokens, interval = ORDER.findall(body)[-1]
        self.answer(int(tokens), float(interval), is_stream=b'"stream":true' in body)

    def answer(self, tokens: int, interval: float, *, is_stream: bool) -> None:
        if not is_stream:
            self.transport.write(whole(tokens))
        elif interval == 0:
            self.transport.write(flood(tokens))
        elif interval < 0:
            self.transport.write(HEAD + TOKEN)
        else:
            self.transport.write(HEAD)
            loop = asyncio.get_running_loop()
            self.pace(loop, loop.time(), tokens, tokens, interval)

    def pace(
        self,
        loop: asyncio.AbstractEventLoop,
        due: float,
        left: int,
        tokens: int,
        interval: float,
    ) -> None:
        if self.transport.is_closing():
            return
        if left == 0:
            self.transport.write(ending(tokens))
            return
        self.transport.write(TOKEN)
        due += interval
        loop.call_at(due, self.pace, loop, due, left - 1, tokens, interval)


async def serve(port: int, certificate: str | None) -> None:
    context = None
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        StandIn, "127.0.0.1", port, ssl=context, backlog=4096, reuse_address=True
    )
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--certificate")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.certificate))
