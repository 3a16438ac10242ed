"""One turn of a chat, where Groq does what no server over a socket can be made to do."""

import asyncio
import logging
from collections.abc import Sequence
from typing import cast

import pytest

from chat.config import load_settings
from chat.errors import GroqFailed, InternalError
from chat.history import SHARED, MemoryHistory
from chat.messages import ChatRequest, Message
from chat.reply import Reply
from chat.service import ChatService
from chat.tokens import TokenCounts
from chat.upstream import Upstream


class BrokenGroq:
    """Fails by a fault of ours."""

    async def ask(self, messages: Sequence[Message], reply: Reply) -> None:
        reply.accept()
        reply.add(["half"])
        raise ZeroDivisionError


class EndlessGroq:
    """Never ends."""

    async def ask(self, messages: Sequence[Message], reply: Reply) -> None:
        reply.accept()
        await asyncio.Event().wait()


class FailingGroq:
    """Fails while its caller cancels."""

    async def ask(self, messages: Sequence[Message], reply: Reply) -> None:
        reply.accept()
        reply.add(["half"])
        await asyncio.sleep(0)
        reply.stop()
        raise GroqFailed


def service_with(upstream: object) -> tuple[ChatService, MemoryHistory]:
    settings = load_settings({"GROQ_API_KEY": "k"}, "/nowhere/.env")
    history = MemoryHistory(max_exchanges=2, max_conversations=2, max_bytes=1000, ttl=60)
    counts = TokenCounts("a-model", None)
    upstream = cast(Upstream, upstream)
    return ChatService(settings, history=history, counts=counts, upstream=upstream), history


async def ignore(tokens: list[str]) -> None:
    """A transport whose caller does not care."""


def question() -> ChatRequest:
    return ChatRequest(messages=[Message("user", "question")])


def test_a_fault_of_ours_fails_the_reply_and_stores_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> tuple[Reply, object]:
        service, history = service_with(BrokenGroq())
        reply = service.reply_to(question(), "sse", "127.0.0.1")
        await reply.relay(ignore)
        return reply, await history.read(SHARED)

    with caplog.at_level(logging.ERROR):
        reply, stored = asyncio.run(scenario())
    assert isinstance(reply.error, InternalError)
    assert (reply.outcome, stored) == ("failed", ())
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_cancel_that_crosses_an_error_keeps_nothing() -> None:
    async def scenario() -> tuple[Reply, object]:
        service, history = service_with(FailingGroq())
        reply = service.reply_to(question(), "websocket", "127.0.0.1")
        await reply.relay(ignore)
        return reply, await history.read(SHARED)

    reply, stored = asyncio.run(scenario())
    assert (reply.outcome, stored) == ("failed", ())


def test_the_end_of_the_service_ends_its_replies() -> None:
    async def scenario() -> Reply:
        service, _ = service_with(EndlessGroq())
        reply = service.reply_to(question(), "sse", "127.0.0.1")
        assert await reply.wait_accepted(5)
        await service.aclose()
        return reply

    assert asyncio.run(scenario()).outcome == "cancelled"
