"""The callers of the soak: what they ask, how they behave, and how each reply must end."""

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any
from uuid import uuid4

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from tests.fake_groq import Script
from tests.servers import body, events

TRANSPORTS = ("json", "sse", "websocket")
LONGEST_PATIENCE = 0.5  # seconds until a caller vanishes, at most: about as long as a good reply
REPLY_LIMIT = 60.0  # seconds after which a reply is taken to hang
MOST_WORDS = 10
# Groq reports token counts only for these few, so that the service's cache soon levels off.
SHARED_QUESTIONS = 100
# Longer than what `keep_secret` keeps of a text, so that one secret covers all questions.
QUESTION = "a question that no line of the log may show:"
BEGINNING = "You said:"
# Ids of replies begin with it, so that for them, too, one secret is enough.
REPLY = "the-reply-that-no-line-of-a-log-may-show"
POSITION = re.compile(rb"^id: (\d+)\n\n", re.MULTILINE)
ENDED = re.compile(rb"(data: \[DONE\]|event: error\ndata: .*)\nid: \d+\n\n$")
LOST = re.compile(rb"event: error\ndata: .*\n\n$")  # without an id, it does not end the reply
RECOVERY = 2.0  # seconds until the service notices that Redis is back, at most
DOWN = r"is down; try again in \d+ s"  # the service's error while its circuit breaker is open


@dataclass(frozen=True)
class Fault:
    """How Groq misbehaves when a question names the fault, and what the caller should get."""

    script: Script
    status: int
    error: str  # a pattern
    text: str = ""  # what a stream brings before the error; without it, the stream never begins


FAULTS = {
    "refused": Fault(Script(status=500), 502, "answered with status 500"),
    "hung up": Fault(Script(cut_before_status=True), 502, "is unreachable"),
    "failed": Fault(Script(error_before_token=3), 502, "failed during the reply", BEGINNING),
    "cut": Fault(Script(cut_before_token=3), 502, "cut the reply|is unreachable", BEGINNING),
    "silent": Fault(Script(hold_before_token=3), 504, "did not respond in time", BEGINNING),
    "nonsense": Fault(Script(body=b"data: nonsense\n\n"), 502, "sent an invalid response"),
    "empty": Fault(Script([]), 502, "sent an empty reply"),
}


@dataclass(frozen=True)
class Chat:
    """One question, and what its caller plans to do."""

    transport: str
    content: str
    conversation: str | None = None
    fault: str | None = None
    patience: float | None = None  # seconds until the caller vanishes
    cancel_at: int | None = None  # tokens until the caller cancels
    is_kept: bool = False  # the caller breaks off and comes back

    @property
    def echo(self) -> str:
        """The complete reply to a question without a fault."""
        return f"{BEGINNING} {self.content}"


@dataclass
class Received:
    """What a caller has received of a reply; over a WebSocket there is no status."""

    status: int | None = None
    text: str = ""
    error: str | None = None
    is_cancelled: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    began_at: float = field(default_factory=time.monotonic)


@dataclass
class Seen:
    """What all callers have seen."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)  # by transport and end
    begun: Counter[str] = field(default_factory=Counter)  # the vanished whose reply had begun
    vanished_from_fault: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)  # faults whose error a caller received
    wrong: list[str] = field(default_factory=list)
    resumed: Counter[tuple[str, str]] = field(default_factory=Counter)  # by result and replica
    redis_down_until: float = -inf

    def total(self, end: str) -> int:
        return sum(self.ends[transport, end] for transport in TRANSPORTS)


class WrongEnd(Exception):
    """A reply did not end as it should."""


def end_of(chat: Chat, received: Received) -> str:
    """Return how a reply has ended; raise WrongEnd if it should not have ended like that."""
    if received.is_cancelled:
        if received.error or chat.cancel_at is None or not chat.echo.startswith(received.text):
            raise WrongEnd
        return "cancelled"
    error = received.error or ""
    if received.status in (503, None) and not received.text and re.search(DOWN, error):
        return "refused"
    end, status, text, pattern = "completed", 200, chat.echo, "^$"
    if chat.fault:
        fault = FAULTS[chat.fault]
        end, pattern = "failed", fault.error
        status = 200 if chat.transport == "sse" and fault.text else fault.status
        text = "" if chat.transport == "json" else fault.text
    is_expected = received.status in (status, None) and received.text == text
    if not is_expected or not re.search(pattern, error):
        raise WrongEnd
    return end


def take_stream(stream: bytes, received: Received) -> None:
    """Read an event stream; raise WrongEnd unless its last event, and no other, is an end."""
    *tokens, last = events(iter([stream]))
    received.text = "".join(token.data for token in tokens)
    if last.name == "error":
        received.error = json.loads(last.data)["error"]
    elif last.data != "[DONE]":
        raise WrongEnd
    if any(token.name == "error" for token in tokens):
        raise WrongEnd


class Caller:
    """One caller, who sends one chat after another."""

    fault_share = 0.1
    vanishing_share = 0.2
    cancelling_share = 0.2
    conversation_share = 0.5
    kept_share = 0.5  # of the event streams
    longest_thought = 2.0  # seconds between two questions, at most

    def __init__(
        self, number: int, seed: int, http: httpx.AsyncClient, seen: Seen, other: str = ""
    ) -> None:
        self.conversation = f"the-conversation-of-caller-{number}"
        self.acknowledged: list[tuple[str, str]] = []  # exchanges that must be stored
        self.possible: list[tuple[str, str]] = []  # those whose end the caller does not know
        self._number = number
        self._chance = random.Random(f"{seed} {number}")
        self._http = http
        self._urls = {"here": "", "elsewhere": other}
        self._seen = seen
        self._asked = 0
        self._socket: ClientConnection | None = None

    async def run(self, until: float) -> None:
        """Ask until that moment, then leave."""
        while time.monotonic() < until:
            await asyncio.sleep(self._chance.uniform(0, self.longest_thought))
            await self.ask(self._next_chat())
        await self.leave()

    async def ask_over_each_transport(self) -> None:
        for transport in TRANSPORTS:
            await self.ask(Chat(transport, self._content(None, None)))
        await self.leave()

    async def ask(self, chat: Chat) -> None:
        """Ask, behave as planned, and note how it ended."""
        exchange = self._over_websocket if chat.transport == "websocket" else self._over_http
        received = Received()
        try:
            async with asyncio.timeout(chat.patience or REPLY_LIMIT):
                await exchange(chat, received)
            self._note(chat, received.text, end_of(chat, received))
        except TimeoutError:
            if chat.patience is None:
                self._seen.wrong.append(f"no end: {chat}, {received}")
            await self._vanish(chat, received)
        except (WrongEnd, httpx.HTTPError, WebSocketException, OSError, ValueError) as error:
            self.note_failure(chat, received, error)
            await self.leave()

    def note_failure(self, chat: Chat, received: Received, error: Exception) -> None:
        self._seen.wrong.append(f"{error!r}: {chat}, {received}")

    async def leave(self) -> None:
        """Close the WebSocket, if there is one, with the closing handshake."""
        if self._socket:
            await self._socket.close()
        self._socket = None

    def _next_chat(self) -> Chat:
        chance = self._chance
        transport = chance.choice(TRANSPORTS)
        fault = chance.choice(list(FAULTS)) if chance.random() < self.fault_share else None
        vanishes = chance.random() < self.vanishing_share
        cancels = transport == "websocket" and chance.random() < self.cancelling_share
        conversation = self.conversation if chance.random() < self.conversation_share else None
        return Chat(
            transport,
            self._content(conversation, fault),
            conversation,
            fault,
            patience=chance.uniform(0.001, LONGEST_PATIENCE) if vanishes else None,
            cancel_at=chance.randrange(MOST_WORDS) if cancels and not vanishes else None,
            is_kept=transport == "sse" and chance.random() < self.kept_share,
        )

    def _content(self, conversation: str | None, fault: str | None) -> str:
        """Return a question, unique within a conversation, with a newline in one of its tokens."""
        self._asked += 1
        subject = f"{self._asked} of caller {self._number}"
        if conversation is None:
            subject = str(self._chance.randrange(SHARED_QUESTIONS))
        words = "word " * self._chance.randint(1, MOST_WORDS)
        return f"{QUESTION} {subject}\n{words}[{fault or ('own' if conversation else 'shared')}]"

    async def _over_http(self, chat: Chat, received: Received) -> None:
        asked = body(chat.content, chat.conversation, stream=chat.transport == "sse")
        if chat.is_kept:
            asked["reply"] = f"{REPLY}{uuid4().hex[:24]}"
            whole = await self._in_parts(asked, received)
        else:
            async with self._http.stream("POST", "/chat", json=asked) as answer:
                received.status, received.headers = answer.status_code, answer.headers
                whole = await answer.aread()
        if received.status == 503 and "retry-after" not in received.headers:
            raise WrongEnd
        if chat.transport == "sse" and received.status == 200:
            return take_stream(whole, received)
        message = json.loads(whole)
        received.text, received.error = message.get("response", ""), message.get("error")

    async def _in_parts(self, asked: dict[str, Any], received: Received) -> bytes:
        """Break off again and again, and read on at either replica, up to the end of the reply."""
        stream, place = b"", "here"
        while not ENDED.search(stream):
            self._seen.resumed["asked", place] += stream != b""
            position = [b"0", *POSITION.findall(stream)][-1].decode()
            part = await self._part(place, position, asked, received)
            if not stream and received.status != 200:
                return part  # it has never begun
            self._seen.resumed["answered", place] += stream != b"" and received.status == 200
            is_lost = received.status != 200 or LOST.search(part)
            redis_up_for = received.began_at - self._seen.redis_down_until
            if is_lost and redis_up_for > RECOVERY:
                raise WrongEnd(f"{place}, Redis up for {redis_up_for:.1f} s: {part.decode()}")
            stream += LOST.sub(b"", part) if received.status == 200 else b""
            place = "here" if is_lost else self._chance.choice(tuple(self._urls))
        return stream

    async def _part(
        self, place: str, position: str, asked: dict[str, Any], received: Received
    ) -> bytes:
        """Return whole events, up to a random one, or the body of an error."""
        part, most = b"", self._chance.randint(1, MOST_WORDS)
        url, after = f"{self._urls[place]}/chat", {"last-event-id": position}
        async with self._http.stream("POST", url, json=asked, headers=after) as answer:
            received.status, received.headers = answer.status_code, answer.headers
            async for piece in answer.aiter_bytes():
                part += piece
                if part.count(b"\n\n") >= most:
                    return part[: part.rfind(b"\n\n") + 2]
        if received.status == 200 and not (ENDED.search(part) or LOST.search(part)):
            raise WrongEnd(f"{place}, from {position}: {part.decode()}")
        return part

    async def _over_websocket(self, chat: Chat, received: Received) -> None:
        if self._socket is None:
            address = f"ws://{self._http.base_url.netloc.decode()}/chat"
            self._socket = await connect(address, compression=None)
        if self._socket.response:
            received.headers = self._socket.response.headers
        await self._socket.send(json.dumps(body(chat.content, chat.conversation)))
        tokens, message = 0, {"token": ""}
        while "token" in message:
            if tokens == chat.cancel_at:
                await self._socket.send('{"cancel": true}')
            received.text += message["token"]
            message = json.loads(await self._socket.recv())
            tokens += 1
        received.error = message.get("error")
        received.is_cancelled = "cancelled" in message
        if received.error is None and message.get("done") != "true":
            raise WrongEnd

    def _note(self, chat: Chat, text: str, end: str) -> None:
        self._seen.ends[chat.transport, end] += 1
        if end == "failed" and chat.fault:
            self._seen.faults[chat.fault] += 1
        if chat.conversation and (end == "completed" or (end == "cancelled" and text)):
            self.acknowledged.append((chat.content, text))

    async def _vanish(self, chat: Chat, received: Received) -> None:
        self._seen.ends[chat.transport, "vanished"] += 1
        self._seen.begun[chat.transport] += received.status is not None or received.text != ""
        self._seen.vanished_from_fault[chat.transport] += chat.fault is not None
        if chat.conversation and chat.fault is None:
            self.possible.append((chat.content, chat.echo))
        # Over HTTP, leaving the request has closed the connection.
        if chat.transport == "websocket" and self._socket:
            if self._chance.random() < 0.5:
                self._socket.transport.abort()
            await self.leave()
