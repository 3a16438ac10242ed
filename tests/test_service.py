"""One turn of a chat, over a real connection to the stand-in for Groq."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest

from chat.config import Settings
from chat.errors import ChatError, Draining, GroqTimeout, InternalError, ReplyCancelled
from chat.llm.client import GroqClient
from chat.llm.groq import open_groq
from chat.messages import ChatRequest, Exchange, Message
from chat.reply import Reply
from chat.service import ChatService
from chat.storage.history import SHARED, MemoryHistory
from chat.tokens import TokenCounts
from tests.fake_groq import FakeGroq, Script

pytestmark = pytest.mark.anyio

HELD = Script(["a", "b"], hold_before_token=1)


def new_reply() -> Reply:
    return Reply("websocket", "127.0.0.1")


async def ignore(reply: Reply) -> None:
    """Do what a transport does whose client just reads."""


async def fail(reply: Reply) -> None:
    raise ZeroDivisionError


async def hang(reply: Reply) -> None:
    await asyncio.Event().wait()


@dataclass
class Chat:
    """A service with its history, and a reply to ask it for."""

    service: ChatService
    history: MemoryHistory
    reply: Reply

    async def ask(
        self,
        content: str = "question",
        reply: Reply | None = None,
        on_token: Callable[[Reply], Awaitable[None]] = ignore,
    ) -> Reply:
        request = ChatRequest(messages=[Message("user", content)])
        reply = reply or new_reply()
        async with self.service.answer(request, reply) as tokens:
            async for _ in tokens:
                await on_token(reply)
        return reply

    async def stored(self) -> Sequence[Exchange]:
        return await self.history.read(SHARED)


@pytest.fixture
async def chat(groq: FakeGroq, request: pytest.FixtureRequest) -> AsyncIterator[Chat]:
    settings = Settings(
        groq_api_key="k",
        groq_base_url=groq.url,
        fallback_model="other",
        reply_timeout=getattr(request, "param", 300.0),
    )
    async with open_groq(settings) as models:
        client, counts = GroqClient(models, settings), TokenCounts(settings.model, None)
        history = MemoryHistory(settings)
        service = ChatService(settings, history=history, counts=counts, groq=client)
        yield Chat(service, history, new_reply())


async def is_groq_stopped(groq: FakeGroq) -> bool:
    return await asyncio.to_thread(groq.requests[0].is_closed_soon)


async def test_a_reply_is_stored_before_its_tokens_have_ended(chat: Chat) -> None:
    request, reply = ChatRequest(messages=[Message("user", "question")]), chat.reply
    async with chat.service.answer(request, reply) as tokens:
        assert [token async for some in tokens for token in some] == reply.sent
        (exchange,) = await chat.stored()
    assert (reply.outcome, reply.text) == ("completed", "You said: question")
    messages = Message("user", "question"), Message("assistant", reply.text)
    assert exchange == Exchange(messages, 10 + 4, 0, is_exact=True)


async def test_each_exchange_has_its_number_and_concurrent_ones_share_it(chat: Chat) -> None:
    await chat.ask()
    await chat.ask()
    await asyncio.gather(chat.ask(), chat.ask())
    await chat.ask()
    assert [exchange.number for exchange in await chat.stored()] == [0, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("chat", "on_token", "error"),
    [(300.0, fail, InternalError), (0.3, hang, GroqTimeout)],
    indirect=["chat"],
    ids=["a transport that fails", "a client that takes nothing until the deadline"],
)
async def test_a_failure_stops_groq_and_nothing_is_stored(
    chat: Chat,
    groq: FakeGroq,
    caplog: pytest.LogCaptureFixture,
    on_token: Callable[[Reply], Awaitable[None]],
    error: type[ChatError],
) -> None:
    groq.on("question", HELD)
    with pytest.raises(error):
        await chat.ask(reply=chat.reply, on_token=on_token)
    assert isinstance(chat.reply.error, error)
    assert (chat.reply.outcome, await chat.stored()) == ("failed", ())
    assert await is_groq_stopped(groq)
    logged = [record.levelname for record in caplog.records if record.name == "chat.service"]
    assert logged == ["ERROR"] * (error is InternalError)


async def test_a_cancelled_reply_stops_groq_and_what_was_sent_is_stored(
    chat: Chat, groq: FakeGroq
) -> None:
    async def cancel_later(reply: Reply) -> None:
        asyncio.get_running_loop().call_soon(reply.cancel)

    groq.on("question", HELD)
    with pytest.raises(ReplyCancelled):
        await chat.ask(reply=chat.reply, on_token=cancel_later)
    (exchange,) = await chat.stored()
    assert (chat.reply.outcome, exchange.messages[-1].content) == ("cancelled", "a")
    assert not exchange.is_exact
    assert await is_groq_stopped(groq)


async def test_a_reply_that_is_cancelled_before_it_begins_is_never_asked_for(
    chat: Chat, groq: FakeGroq
) -> None:
    chat.reply.cancel()
    with pytest.raises(ReplyCancelled):
        await chat.ask(reply=chat.reply)
    assert (chat.reply.outcome, groq.requests) == ("cancelled", [])


async def test_a_drain_ends_replies_and_admits_no_more(chat: Chat, groq: FakeGroq) -> None:
    groq.on("question", HELD)
    with pytest.raises(Draining):
        await chat.ask(reply=chat.reply, on_token=lambda _: chat.service.drain(0))
    with pytest.raises(Draining):
        await chat.ask()
    assert (chat.reply.outcome, await chat.stored()) == ("failed", ())


async def test_the_counts_of_the_fallback_model_are_not_taken_for_the_models(
    chat: Chat, groq: FakeGroq
) -> None:
    groq.on("question", Script(status=404), Script(["ok"], prompt_tokens=71))
    reply = await chat.ask()
    (exchange,) = await chat.stored()
    assert (reply.model, reply.prompt_tokens, exchange.is_exact) == ("other", 71, False)


async def test_of_a_prompt_that_groq_finds_too_long_the_newer_half_of_the_history_is_sent(
    chat: Chat, groq: FakeGroq
) -> None:
    for number in range(4):
        await chat.ask(f"n{number}")
    too_large = b'{"error": {"message": "too large", "code": "rate_limit_exceeded"}}'
    groq.on("question", Script(status=413, body=too_large), Script(["ok"]))
    await chat.ask()
    assert groq.requests[-1].contents[::2] == ["n2", "n3", "question"]
    assert [exchange.number for exchange in await chat.stored()] == list(range(5))
