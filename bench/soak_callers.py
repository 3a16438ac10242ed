"""The callers of the soak: what they ask, how they behave, and how each reply has to end."""

import asyncio
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from tests.fake_groq import Script
from tests.servers import body, events

TRANSPORTS = ("json", "sse", "websocket")
FAULT_SHARE = 0.1
VANISHING_SHARE = 0.2
CANCELLING_SHARE = 0.2
CONVERSATION_SHARE = 0.5
LONGEST_THOUGHT = 2.0
"""Seconds between two questions of a caller, at most."""
LONGEST_PATIENCE = 0.5
"""Seconds until a caller vanishes who means to, at most: about as long as a good reply takes."""
REPLY_LIMIT = 60.0
"""Seconds after which a reply that has not ended never will."""
MOST_WORDS = 10
SHARED_QUESTIONS = 100
"""Few, and Groq tells the tokens of these alone: so that the service soon remembers all that it is
told, and its memory can be level."""
QUESTION = "a question that no line of the log may show:"
"""Longer than what `keep_secret` keeps of a text, so that one secret stands for all questions."""
BEGINNING = "You said:"
DOWN = r"is down; try again in \d+ s"
"""What the service says while its circuit breaker keeps it from asking Groq."""


@dataclass(frozen=True)
class Fault:
    """What Groq does when a question names the fault, and what comes of it."""

    script: Script
    status: int
    error: str
    """A pattern."""
    text: str = ""
    """What comes before it, where the reply streams."""
    is_early: bool = False
    """Whether it comes before Groq's status, so that no event stream has begun."""


FAULTS = {
    "refused": Fault(Script(status=500), 502, "answered with status 500", is_early=True),
    "hung up": Fault(Script(cut_before_status=True), 502, "cannot be reached", is_early=True),
    "failed": Fault(Script(error_before_token=3), 502, "failed while it was replying", BEGINNING),
    "cut": Fault(Script(cut_before_token=3), 502, "cut its|cannot be reached", BEGINNING),
    "silent": Fault(Script(hold_before_token=3), 504, "did not answer in time", BEGINNING),
    "nonsense": Fault(Script(body=b"data: nonsense\n\n"), 502, "sent something that is not"),
    "empty": Fault(Script([]), 502, "sent an empty reply"),
}


@dataclass(frozen=True)
class Chat:
    """One question, and what its caller means to do."""

    transport: str
    content: str
    conversation: str | None = None
    fault: str | None = None
    patience: float | None = None
    """Seconds until the caller vanishes."""
    cancel_at: int | None = None
    """Tokens until the caller cancels."""

    @property
    def echo(self) -> str:
        """The whole reply, where nothing goes wrong."""
        return f"{BEGINNING} {self.content}"


@dataclass
class Received:
    """What has come of a reply; over a WebSocket there is no status."""

    status: int | None = None
    text: str = ""
    error: str | None = None
    is_cancelled: bool = False


@dataclass
class Seen:
    """What all callers have seen."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By transport; the ends are completed, cancelled, failed, refused and vanished."""
    begun: Counter[str] = field(default_factory=Counter)
    """By transport, those who vanished from a reply that had begun."""
    vanished_from_fault: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Those that a caller stayed for."""
    wrong: list[str] = field(default_factory=list)

    def total(self, end: str) -> int:
        return sum(self.ends[transport, end] for transport in TRANSPORTS)


class WrongEnd(Exception):
    """A reply that has not ended as it had to."""


def end_of(chat: Chat, received: Received) -> str:
    """
    Return how a reply has ended.

    Raises:
        WrongEnd: it must not end like that.
    """
    if received.is_cancelled and not received.error and chat.cancel_at is not None:
        if chat.echo.startswith(received.text):
            return "cancelled"
    elif not received.is_cancelled:
        for end, status, text, error in _right_ends(chat):
            if _is_as_expected(received, status, text, error):
                return end
    raise WrongEnd


def _right_ends(chat: Chat) -> list[tuple[str, int, str, str]]:
    """Return the ends with their status, text and pattern of the error."""
    refused = ("refused", 503, "", DOWN)
    if chat.fault is None:
        return [("completed", 200, chat.echo, ""), refused]
    fault = FAULTS[chat.fault]
    status = 200 if chat.transport == "sse" and not fault.is_early else fault.status
    text = "" if chat.transport == "json" else fault.text
    return [("failed", status, text, fault.error), refused]


def _is_as_expected(received: Received, status: int, text: str, error: str) -> bool:
    if received.status not in (status, None) or received.text != text:
        return False
    if received.error is None:
        return not error
    return bool(error) and re.search(error, received.error) is not None


def take_stream(stream: bytes, received: Received) -> None:
    """
    Read an event stream, which ends with `[DONE]` or an error and nothing after it.

    Raises:
        WrongEnd: it does not.
    """
    *tokens, last = events(iter([stream]))
    received.text = "".join(each.data for each in tokens)
    if last.name == "error":
        received.error = json.loads(last.data)["error"]
    elif last.data != "[DONE]":
        raise WrongEnd
    if any(each.name == "error" for each in tokens):
        raise WrongEnd


class Caller:
    """
    One caller, who asks again and again.

    Attributes:
        acknowledged: the exchanges of its conversation that it knows to be stored.
        possible: those that it has vanished from: they are stored if they had ended by then.
    """

    def __init__(self, number: int, seed: int, http: httpx.AsyncClient, seen: Seen) -> None:
        self.conversation = f"the-conversation-of-caller-{number}"
        self.acknowledged: list[tuple[str, str]] = []
        self.possible: list[tuple[str, str]] = []
        self._number = number
        self._chance = random.Random(f"{seed} {number}")
        self._http = http
        self._seen = seen
        self._asked = 0
        self._socket: ClientConnection | None = None

    async def run(self, until: float) -> None:
        """Ask until that moment, then leave."""
        await self._think()
        while time.monotonic() < until:
            await self.ask(self._next_chat())
            await self._think()
        await self.leave()

    async def ask_over_each_transport(self) -> None:
        for transport in TRANSPORTS:
            await self.ask(Chat(transport, self._content(None, None)))
        await self.leave()

    async def ask(self, chat: Chat) -> None:
        """Ask, behave as planned, and note how it ended."""
        over = self._over_websocket if chat.transport == "websocket" else self._over_http
        received = Received()
        try:
            async with asyncio.timeout(chat.patience or REPLY_LIMIT):
                await over(chat, received)
            self._note(chat, received, end_of(chat, received))
        except TimeoutError:
            if chat.patience is None:
                self._seen.wrong.append(f"no end: {chat}, {received}")
            await self._vanish(chat, received)
        except (WrongEnd, httpx.HTTPError, WebSocketException, OSError, ValueError) as error:
            self._seen.wrong.append(f"{error!r}: {chat}, {received}")
            await self.leave()

    async def leave(self) -> None:
        """Close the WebSocket, if there is one, as the protocol asks."""
        if self._socket:
            await self._socket.close()
        self._socket = None

    async def _think(self) -> None:
        await asyncio.sleep(self._chance.uniform(0, LONGEST_THOUGHT))

    def _next_chat(self) -> Chat:
        chance = self._chance
        transport = chance.choice(TRANSPORTS)
        fault = chance.choice(list(FAULTS)) if chance.random() < FAULT_SHARE else None
        vanishes = chance.random() < VANISHING_SHARE
        cancels = transport == "websocket" and chance.random() < CANCELLING_SHARE
        conversation = self.conversation if chance.random() < CONVERSATION_SHARE else None
        return Chat(
            transport,
            self._content(conversation, fault),
            conversation,
            fault,
            patience=chance.uniform(0.001, LONGEST_PATIENCE) if vanishes else None,
            cancel_at=chance.randrange(MOST_WORDS) if cancels and not vanishes else None,
        )

    def _content(self, conversation: str | None, fault: str | None) -> str:
        """Return a question, with a newline in one of its tokens; a new one for a conversation."""
        self._asked += 1
        subject = f"{self._asked} of caller {self._number}"
        if conversation is None:
            subject = str(self._chance.randrange(SHARED_QUESTIONS))
        words = "word " * self._chance.randint(1, MOST_WORDS)
        return f"{QUESTION} {subject}\n{words}[{fault or ('own' if conversation else 'shared')}]"

    async def _over_http(self, chat: Chat, received: Received) -> None:
        asked = body(chat.content, chat.conversation, stream=chat.transport == "sse")
        async with self._http.stream("POST", "/chat", json=asked) as answer:
            received.status = answer.status_code
            whole = await answer.aread()
        if answer.status_code == 503 and "retry-after" not in answer.headers:
            raise WrongEnd
        if chat.transport == "sse" and answer.status_code == 200:
            return take_stream(whole, received)
        message = json.loads(whole)
        received.text, received.error = message.get("response", ""), message.get("error")

    async def _over_websocket(self, chat: Chat, received: Received) -> None:
        if self._socket is None:
            address = f"ws://{self._http.base_url.netloc.decode()}/chat"
            self._socket = await connect(address, compression=None)
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

    def _note(self, chat: Chat, received: Received, end: str) -> None:
        self._seen.ends[chat.transport, end] += 1
        if end == "failed" and chat.fault:
            self._seen.faults[chat.fault] += 1
        is_stored = end == "completed" or (end == "cancelled" and received.text)
        if chat.conversation and is_stored:
            self.acknowledged.append((chat.content, received.text))

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
