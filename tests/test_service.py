"""One turn of a chat, where Groq does what no server over a socket can be made to do."""

import asyncio
import logging
from collections.abc import Sequence
from typing import cast

import pytest
from prometheus_client import REGISTRY

from chat.config import load_settings
from chat.errors import GroqFailed, GroqRefused, InternalError
from chat.history import SHARED, Exchange, History, MemoryHistory
from chat.link import open_link
from chat.messages import ChatRequest, Message
from chat.reply import Reply
from chat.service import ChatService
from chat.shared_history import SharedHistory
from chat.tokens import TokenCounts
from chat.upstream import Upstream
from tests.servers import PATIENCE, RedisServer


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


class QuickGroq:
    """Has said everything with its first token."""

    async def ask(self, messages: Sequence[Message], reply: Reply) -> None:
        reply.accept()
        reply.add(["whole"])
        await reply.deliver()


class StrictGroq:
    """Takes no more than three messages, and never ends."""

    async def ask(self, messages: Sequence[Message], reply: Reply) -> None:
        if len(messages) > 3:
            raise GroqRefused(413, None, is_too_large=True)
        reply.accept()
        reply.add(["half"])
        await reply.deliver()
        await asyncio.Event().wait()


class FailingGroq:
    """Fails while its caller cancels."""

    async def ask(self, messages: Sequence[Message], reply: Reply) -> None:
        reply.accept()
        reply.add(["half"])
        await asyncio.sleep(0)
        reply.stop()
        raise GroqFailed


def service_with(upstream: object, history: History | None = None) -> tuple[ChatService, History]:
    settings = load_settings({"GROQ_API_KEY": "k"}, "/nowhere/.env")
    history = history or MemoryHistory(
        max_exchanges=3, max_conversations=2, max_bytes=10_000, ttl=60
    )
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


def test_a_cancel_that_crosses_the_end_is_stored_and_counted(redis_server: RedisServer) -> None:
    def counted(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0

    def replies() -> float:
        return counted("chat_replies_total", stream_type="websocket", outcome="completed")

    def tokens() -> float:
        return counted("chat_tokens_total", direction="completion")

    async def scenario() -> tuple[Reply, Sequence[Exchange]]:
        async with open_link(redis_server.address, "") as link:
            await link.probe()
            history = SharedHistory(link, max_exchanges=2, ttl=60)
            service, _ = service_with(QuickGroq(), history)
            reply = service.reply_to(question(), "websocket", "127.0.0.1")

            async def leave(tokens: list[str]) -> None:
                reply.abandon()

            await reply.relay(leave)
            assert await service.wait_idle(PATIENCE)
            return reply, await history.read(SHARED)

    before = replies(), tokens()
    reply, stored = asyncio.run(scenario())
    assert (reply.outcome, reply.error, len(stored)) == ("completed", None, 1)
    assert (replies(), tokens()) == (before[0] + 1, before[1] + (reply.completion_tokens or 0))


def test_of_a_stopped_reply_to_half_of_the_history_that_half_is_remembered() -> None:
    async def scenario() -> Sequence[Exchange]:
        service, history = service_with(StrictGroq())
        messages = (Message("user", "u"), Message("assistant", "a"))
        await history.append(SHARED, *[Exchange(messages, preceding=n) for n in range(2)])
        reply = service.reply_to(question(), "websocket", "127.0.0.1")

        async def stop(tokens: list[str]) -> None:
            asyncio.get_running_loop().call_soon(reply.stop)

        await reply.relay(stop)
        return await history.read(SHARED)

    assert asyncio.run(scenario())[-1].preceding == 1


def test_the_end_of_the_service_ends_its_replies() -> None:
    async def scenario() -> Reply:
        service, _ = service_with(EndlessGroq())
        reply = service.reply_to(question(), "sse", "127.0.0.1")
        assert await reply.wait_accepted(5)
        await service.aclose()
        return reply

    assert asyncio.run(scenario()).outcome == "cancelled"
