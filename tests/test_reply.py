"""A reply in progress: who waits for whom, when its caller is slow."""

import asyncio
from collections.abc import Awaitable, Callable

from chat.reply import Reply
from tests.servers import PATIENCE

TOKENS = ["a", "b", "c"]


class SlowCaller:
    """Takes what is written once it is told to."""

    def __init__(self) -> None:
        self.is_written_to = asyncio.Event()
        self.may_take = asyncio.Event()
        self.taken: list[list[str]] = []
        self.writers = 0

    async def write(self, tokens: list[str]) -> None:
        assert self.writers == 0, "one writer at a time"
        self.writers += 1
        self.is_written_to.set()
        await self.may_take.wait()
        self.taken.append(tokens)
        self.writers -= 1


async def pass_on(reply: Reply) -> None:
    """Do what the task does that reads Groq, a token a read."""
    for token in TOKENS:
        reply.add([token])
        await reply.deliver()
    reply.end("completed")


Begin = Callable[[Reply, SlowCaller], list[Awaitable[None]]]


def read_first(reply: Reply, caller: SlowCaller) -> list[Awaitable[None]]:
    return [pass_on(reply), reply.relay(caller.write)]


def relay_first(reply: Reply, caller: SlowCaller) -> list[Awaitable[None]]:
    return [reply.relay(caller.write), pass_on(reply)]


def taken_from(begin: Begin) -> tuple[str, list[list[str]]]:
    """Return what has been read by the first write, and what is written in the end."""

    async def scenario() -> tuple[str, list[list[str]]]:
        reply, caller = Reply("sse", "a-model", PATIENCE), SlowCaller()
        async with asyncio.timeout(PATIENCE):
            running = asyncio.gather(*begin(reply, caller))
            await caller.is_written_to.wait()
            read = reply.text
            caller.may_take.set()
            await running
        return read, caller.taken

    return asyncio.run(scenario())


def test_groq_is_read_no_further_while_the_first_write_waits() -> None:
    for begin in (read_first, relay_first):
        assert taken_from(begin) == ("a", [["a"], ["b"], ["c"]])


def test_a_reply_ends_while_it_waits_for_a_transport() -> None:
    async def scenario() -> Reply:
        reply = Reply("sse", "a-model", PATIENCE)
        reading = asyncio.create_task(pass_on(reply))
        reply.begin(reading.cancel)
        asyncio.get_running_loop().call_soon(reply.abandon)
        async with asyncio.timeout(PATIENCE):
            await asyncio.wait([reading])
        assert reading.cancelled()
        return reply

    assert asyncio.run(scenario()).text == "a"


def test_where_tokens_are_taken_one_by_one_it_is_known_which_were_sent_before_a_cancel() -> None:
    async def scenario() -> tuple[str, list[list[str]]]:
        reply, is_stuck = Reply("websocket", "a-model", PATIENCE), asyncio.Event()
        taken: list[list[str]] = []

        async def write(tokens: list[str]) -> None:
            if taken and not is_stuck.is_set():
                is_stuck.set()
                await asyncio.Event().wait()
            taken.append(tokens)

        reply.add(TOKENS)
        relaying = asyncio.create_task(reply.relay(write, at_once=1))
        delivering = asyncio.create_task(reply.deliver())
        async with asyncio.timeout(PATIENCE):
            await is_stuck.wait()
            delivering.cancel()
            await asyncio.wait([delivering])
            reply.keep_what_was_sent()
            reply.end("cancelled")
            await relaying
        return reply.text, taken

    assert asyncio.run(scenario()) == ("a", [["a"]])


def test_what_came_before_a_transport_is_written_at_the_end() -> None:
    async def scenario() -> list[list[str]]:
        reply, caller = Reply("sse", "a-model", PATIENCE), SlowCaller()
        reply.add(["whole"])
        reply.end("completed")
        caller.may_take.set()
        await reply.relay(caller.write)
        return caller.taken

    assert asyncio.run(scenario()) == [["whole"]]
