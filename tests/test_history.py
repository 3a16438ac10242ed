"""The stores of conversations: one contract for all of them, and as the service uses them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from chat.config import Settings
from chat.messages import Exchange, Message, flatten
from chat.storage.history import History, MemoryHistory, RedisHistory
from chat.storage.redis import open_redis
from tests.clock import Clock
from tests.conftest import StartService
from tests.fake_groq import FakeGroq, Script
from tests.servers import RedisCluster, RedisServer, Service, keep_secret

pytestmark = pytest.mark.anyio


def exchange(question: str, reply: str = "reply") -> Exchange:
    return Exchange((Message("user", question), Message("assistant", reply)), 10)


def memory(clock: Clock | None = None, **limits: Any) -> MemoryHistory:
    settings = Settings(groq_api_key="k", **{"max_exchanges": 2, **limits})
    return MemoryHistory(settings, clock or Clock())


@pytest.fixture(scope="module", params=["memory", "redis", "cluster"])
async def history(request: pytest.FixtureRequest) -> AsyncIterator[History]:
    """Each kind of store, with two exchanges a conversation."""
    if request.param == "memory":
        yield memory()
        return
    with RedisServer() if request.param == "redis" else RedisCluster() as server:
        async with open_redis(server.address, "") as redis:
            yield RedisHistory(Settings(groq_api_key="k", max_exchanges=2), redis)


async def ask(history: History, conversation: str, *contents: str) -> None:
    for content in contents:
        await history.store(conversation, [exchange(content)], anew=False)


async def asked(history: History, conversation: str) -> list[str]:
    messages = flatten(await history.read(conversation))
    return [message.content for message in messages if message.role == "user"]


async def test_only_the_last_exchanges_stay(history: History, conversation: str) -> None:
    await ask(history, conversation, "one", "two", "three")
    assert await asked(history, conversation) == ["two", "three"]


async def test_a_transcript_replaces_what_was_stored(history: History, conversation: str) -> None:
    await ask(history, conversation, "old")
    await ask(history, f"not {conversation}", "old")
    transcript = [exchange(each) for each in ("one", "two", "three")]
    await history.store(conversation, transcript, anew=True)
    assert await asked(history, conversation) == ["two", "three"]
    await history.store(conversation, [exchange("one")], anew=True)
    await ask(history, conversation, "new")
    assert await asked(history, conversation) == ["one", "new"]
    assert await asked(history, f"not {conversation}") == ["old"]


async def test_a_snapshot_is_what_was_stored_and_stays(history: History, conversation: str) -> None:
    messages = (Message("user", "\u2028 \x00 \U0001f600"), Message("assistant", "reply"))
    stored = Exchange(messages, 12, 7, is_exact=True)
    await history.store(conversation, [stored], anew=False)
    snapshot = await history.read(conversation)
    await ask(history, conversation, "two")
    assert list(snapshot) == [stored]


async def test_a_conversation_is_forgotten_alone(history: History, conversation: str) -> None:
    for name in (conversation, f"not {conversation}"):
        await ask(history, name, "one")
    await history.forget(conversation)
    await history.forget(f"neither {conversation}")
    assert await asked(history, conversation) == []
    assert await asked(history, f"not {conversation}") == ["one"]


async def test_what_is_the_same_twice_is_stored_twice(history: History, conversation: str) -> None:
    await ask(history, conversation, "again", "again")
    assert await asked(history, conversation) == ["again", "again"]
    await history.store(conversation, [exchange("other"), exchange("other")], anew=True)
    assert await asked(history, conversation) == ["other", "other"]


async def test_concurrent_exchanges_are_stored_whole(history: History, conversation: str) -> None:
    names = [f"{conversation} {number}" for number in range(20)]
    await asyncio.gather(*(ask(history, name, content) for name in names for content in "ab"))
    for name in names:
        assert sorted(await asked(history, name)) == ["a", "b"]


async def test_a_cancelled_caller_does_not_stop_an_exchange_from_being_stored(
    history: History, conversation: str
) -> None:
    storing = asyncio.create_task(ask(history, conversation, "one"))
    await asyncio.sleep(0)
    storing.cancel()
    await asyncio.wait([storing])
    for _ in range(500):
        if stored := await asked(history, conversation):
            break
        await asyncio.sleep(0.01)
    assert stored == ["one"]


async def test_the_least_recently_used_conversation_goes_first() -> None:
    history = memory(max_conversations=2)
    await ask(history, "a", "one")
    await ask(history, "b", "two")
    await history.read("a")
    await ask(history, "c", "three")
    assert [await asked(history, name) for name in "abc"] == [["one"], [], ["three"]]


async def test_large_and_many_small_messages_take_no_more_than_their_share_of_memory() -> None:
    small = Exchange((Message("user", "ab"),) * 100, 10)  # a message takes 150 bytes and its text
    for stored, oldest in ((exchange("x" * 10_000), 41), (small, 46)):
        history = memory(max_history_bytes=100_000)
        for number in range(50):
            await history.store(f"{number}", [stored], anew=False)
        kept = [number for number in range(50) if await history.read(f"{number}")]
        assert kept == list(range(oldest, 50))


async def test_what_is_forgotten_or_replaced_makes_room() -> None:
    history = memory(max_history_bytes=100_000)
    await ask(history, "kept", "one")
    for _ in range(50):
        for content in ("x", "x" * 90_000):
            await history.store("large", [exchange(content)], anew=True)
        await history.forget("large")
    assert await asked(history, "kept") == ["one"]


async def test_an_idle_conversation_goes_and_one_in_use_stays() -> None:
    history = memory(clock := Clock(), conversation_ttl=60)
    await ask(history, "idle", "one")
    await ask(history, "used", "two")
    for _ in range(2):
        clock.now += 40
        assert await asked(history, "used") == ["two"]
    assert await asked(history, "idle") == []
    assert history.count() == 1


def test_many_threads_lose_no_exchange_and_tear_none() -> None:
    threads, turns = 16, 200
    history = memory(max_exchanges=threads * turns)
    barrier = threading.Barrier(threads)

    async def hammer(name: str) -> bool:
        barrier.wait()
        is_whole = True
        for turn in range(turns):
            one = exchange(f"{name} {turn}", f"{name} {turn}")
            await history.store("shared", [one], anew=False)
            await ask(history, f"own {name}", "q")
            is_whole &= not any(map(is_torn, (await history.read("shared"))[-threads:]))
            await history.forget(f"own {name}")
        return is_whole

    names = [f"thread {number}" for number in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(lambda name: asyncio.run(hammer(name)), names))
    kept = asyncio.run(history.read("shared"))
    assert not any(map(is_torn, kept))
    contents = [one.messages[0].content for one in kept]
    for name in names:
        own = [content for content in contents if content.startswith(f"{name} ")]
        assert own == [f"{name} {turn}" for turn in range(turns)]
    assert history.count() == 1


def is_torn(one: Exchange) -> bool:
    return len({message.content for message in one.messages}) != 1


@pytest.fixture(scope="module")
def small(module_groq: FakeGroq) -> Iterator[Service]:
    """A service that keeps little."""
    settings = {"MAX_EXCHANGES": 2, "MAX_CONVERSATIONS": 3}
    with Service(GROQ_BASE_URL=module_groq.url, **settings) as running:
        yield running


def test_no_more_than_max_exchanges_are_sent_and_kept(
    small: Service, groq: FakeGroq, conversation: str
) -> None:
    for number in range(4):
        small.reply(f"n{number}", conversation)
    assert groq.requests[-1].contents[::2] == ["n1", "n2", "n3"]
    assert small.contents(conversation)[::2] == ["n2", "n3"]


def test_of_a_transcript_all_is_sent_and_the_newest_exchanges_are_kept(
    small: Service, groq: FakeGroq, conversation: str
) -> None:
    assert send(small, "aAbBcCdDe", conversation) == groq.requests[-1].body["messages"]
    assert letters(small.contents(conversation)) == "dDe+e"


def test_the_number_of_conversations_is_limited_and_counted(small: Service) -> None:
    for number in range(5):
        small.reply("hello", f"conversation-{number:03}")
    assert small.metric("history_conversations") == 3
    assert small.contents("conversation-001") == []
    assert small.contents("conversation-004") != []


def test_clients_without_a_conversation_share_one_that_no_transcript_replaces(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service()
    send(service, "a")
    service.reply("mine", conversation)
    send(service, "xXc")
    assert letters(groq.requests[-1].contents) == "xXc"
    send(service, "d")
    assert letters(groq.requests[-1].contents) == "a+ac+cd"


def test_the_shared_conversation_can_be_turned_off(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(SHARED_CONVERSATION="false")
    for text in ("a", "b", "aAb"):
        assert send(service, text) == groq.requests[-1].body["messages"]
    assert service.metric("history_conversations") == 0
    send(service, "a", conversation)
    send(service, "b", conversation)
    assert letters(groq.requests[-1].contents) == "a+ab"


def send(service: Service, text: str, conversation: str | None = None) -> list[dict[str, str]]:
    """Send a message for each letter, of which capitals are the assistant's; return them."""
    messages = [
        {"role": "assistant" if letter.isupper() else "user", "content": letter} for letter in text
    ]
    asked = {"messages": messages, **({"conversation": conversation} if conversation else {})}
    keep_secret(conversation or "")
    assert service.http.post("/chat", json=asked).status_code == 200
    return messages


def letters(contents: Sequence[str]) -> str:
    return "".join(content.replace("You said: ", "+") for content in contents)


@pytest.mark.parametrize(
    ("sent", "prompt", "stored"),
    [
        ("d", "aAbBd", "aAbBd+d"),
        ("de", "aAbBde", "aAbBde+e"),
        ("aAbBc", "aAbBc", "aAbBc+c"),
        ("aAc", "aAc", "aAc+c"),
        ("aXbYc", "aXbYc", "aXbYc+c"),
        ("aABb", "aABb", "aABb+b"),
        ("Xc", "Xc", "c+c"),
    ],
)
def test_new_messages_are_added_and_a_transcript_replaces_the_history(
    service: Service, groq: FakeGroq, conversation: str, sent: str, prompt: str, stored: str
) -> None:
    groq.on("a", Script(["A"]))
    groq.on("b", Script(["B"]))
    send(service, "a", conversation)
    send(service, "b", conversation)
    groq.reset()
    send(service, sent, conversation)
    assert letters(groq.requests[-1].contents) == prompt
    assert letters(service.contents(conversation)) == stored


def test_concurrent_requests_see_and_store_whole_exchanges(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: service.reply(f"n{number}", conversation), range(20)))
    contents = service.contents(conversation)
    assert sorted(contents[::2]) == sorted(f"n{number}" for number in range(20))
    for seen in (contents, *(request.contents[:-1] for request in groq.requests)):
        assert seen[1::2] == [f"You said: {content}" for content in seen[::2]]


def test_a_conversation_of_many_messages_goes_on(service: Service, conversation: str) -> None:
    for _ in range(2):
        send(service, "m" * 1000, conversation)
    assert service.reply("and now", conversation) == "You said: and now"
