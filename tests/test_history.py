"""The store of conversations, alone and from many threads, and as the service uses it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from uuid import uuid4

import pytest

from chat.history import Exchange, History, MemoryHistory, flatten
from chat.link import open_link
from chat.messages import Message
from chat.shared_history import SharedHistory
from tests.clock import Clock
from tests.conftest import StartService
from tests.fake_groq import FakeGroq
from tests.servers import RedisCluster, Service


def exchange(question: str, reply: str = "reply") -> Exchange:
    return Exchange((Message("user", question), Message("assistant", reply)))


def memory(
    *,
    max_exchanges: int = 20,
    max_conversations: int = 100,
    max_bytes: int = 1 << 30,
    ttl: float = 60.0,
    clock: Clock | None = None,
) -> MemoryHistory:
    return MemoryHistory(
        max_exchanges=max_exchanges,
        max_conversations=max_conversations,
        max_bytes=max_bytes,
        ttl=ttl,
        clock=clock or Clock(),
    )


def questions(history: MemoryHistory, conversation: str) -> list[str]:
    exchanges = asyncio.run(history.read(conversation))
    return [message.content for message in flatten(exchanges) if message.role == "user"]


def ask(history: MemoryHistory, conversation: str, *contents: str) -> None:
    for content in contents:
        asyncio.run(history.append(conversation, exchange(content)))


Scenario = Callable[[History], Awaitable[None]]
STORES = ["memory", "redis", "cluster"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as running:
        yield running


@pytest.fixture
def on_store(request: pytest.FixtureRequest) -> Callable[[str, Scenario], None]:
    """Runs a scenario on a store of that kind, with two exchanges a conversation."""

    def run(store: str, scenario: Scenario) -> None:
        if store == "memory":
            asyncio.run(as_coroutine(scenario(memory(max_exchanges=2))))
            return
        address = (
            request.getfixturevalue("redis_server").address
            if store == "redis"
            else request.getfixturevalue("cluster").url
        )
        asyncio.run(on_redis(address, scenario))

    return run


async def as_coroutine(running: Awaitable[None]) -> None:
    await running


async def on_redis(address: str, scenario: Scenario) -> None:
    async with open_link(address, "") as link:
        await link.probe()
        history = SharedHistory(link, max_exchanges=2, ttl=60)
        await scenario(history)
        await history.aclose()


OnStore = Callable[[str, Scenario], None]


def new_name() -> str:
    return uuid4().hex


async def said(history: History, conversation: str) -> list[str]:
    return [message.content for message in flatten(await history.read(conversation))][::2]


@pytest.mark.parametrize("store", STORES)
def test_only_the_last_exchanges_stay(on_store: OnStore, store: str) -> None:
    async def scenario(history: History) -> None:
        name = new_name()
        for content in ("one", "two", "three"):
            await history.append(name, exchange(content))
        assert await said(history, name) == ["two", "three"]

    on_store(store, scenario)


@pytest.mark.parametrize("store", STORES)
def test_several_exchanges_are_stored_in_one_step(on_store: OnStore, store: str) -> None:
    async def scenario(history: History) -> None:
        name = new_name()
        await history.append(name, exchange("one"))
        await history.append(name, exchange("two"), exchange("three"))
        assert await said(history, name) == ["two", "three"]
        await history.append(name, *map(exchange, ("four", "five", "six")))
        assert await said(history, name) == ["five", "six"]

    on_store(store, scenario)


@pytest.mark.parametrize("store", STORES)
def test_a_snapshot_is_as_it_was_stored_and_does_not_change(on_store: OnStore, store: str) -> None:
    async def scenario(history: History) -> None:
        name = new_name()
        messages = (Message("user", "\u2028 \x00 \U0001f600"), Message("assistant", "reply"))
        await history.append(name, Exchange(messages, preceding=7))
        snapshot = await history.read(name)
        await history.append(name, exchange("two"))
        assert snapshot == (Exchange(messages, preceding=7),)

    on_store(store, scenario)


@pytest.mark.parametrize("store", STORES)
def test_conversations_do_not_mix_and_are_forgotten_alone(on_store: OnStore, store: str) -> None:
    async def scenario(history: History) -> None:
        one, other = new_name(), new_name()
        before = await history.count()
        await history.append(one, exchange("one"))
        await history.append(other, exchange("two"))
        assert await history.count() == before + 2
        await history.forget(one)
        await history.forget(new_name())
        assert (await said(history, one), await said(history, other)) == ([], ["two"])
        assert await history.count() == before + 1

    on_store(store, scenario)


@pytest.mark.parametrize("store", STORES)
def test_what_is_the_same_twice_is_stored_twice(on_store: OnStore, store: str) -> None:
    async def scenario(history: History) -> None:
        name = new_name()
        await history.append(name, exchange("again"))
        await history.append(name, exchange("again"))
        assert await said(history, name) == ["again", "again"]

    on_store(store, scenario)


@pytest.mark.parametrize("store", STORES)
def test_exchanges_that_cross_are_each_stored_whole(on_store: OnStore, store: str) -> None:
    async def scenario(history: History) -> None:
        names = [new_name() for _ in range(20)]
        await asyncio.gather(*(history.append(n, exchange(c)) for n in names for c in "ab"))
        for name in names:
            assert sorted(await said(history, name)) == ["a", "b"]

    on_store(store, scenario)


@pytest.mark.parametrize("store", STORES)
def test_reading_what_is_not_there_stores_nothing(on_store: OnStore, store: str) -> None:
    async def scenario(history: History) -> None:
        before = await history.count()
        assert await history.read(new_name()) == ()
        assert await history.count() == before

    on_store(store, scenario)


def test_the_least_recently_used_conversation_goes_first() -> None:
    history = memory(max_conversations=2)
    ask(history, "a", "one")
    ask(history, "b", "two")
    questions(history, "a")
    ask(history, "c", "three")
    assert [questions(history, each) for each in "abc"] == [["one"], [], ["three"]]


def test_texts_take_no_more_than_their_share_of_memory() -> None:
    history = memory(max_bytes=100_000)
    for number in range(50):
        ask(history, f"c{number}", "x" * 10_000)
    kept = [number for number in range(50) if questions(history, f"c{number}")]
    assert kept == list(range(41, 50))


def test_many_small_messages_count_for_what_they_take() -> None:
    history = memory(max_bytes=100_000)
    for number in range(50):
        messages = tuple(Message("user", "ab") for _ in range(100))
        asyncio.run(history.append(f"c{number}", Exchange(messages)))
    assert asyncio.run(history.count()) < 7


def test_an_idle_conversation_goes_and_one_in_use_stays() -> None:
    clock = Clock()
    history = memory(ttl=60, clock=clock)
    ask(history, "idle", "one")
    ask(history, "used", "two")
    clock.now += 40
    questions(history, "used")
    clock.now += 40
    assert (questions(history, "idle"), questions(history, "used")) == ([], ["two"])
    assert asyncio.run(history.count()) == 1


def test_many_threads_lose_no_exchange_and_tear_none() -> None:
    threads, turns = 16, 200
    history = memory(max_exchanges=threads * turns)
    barrier = threading.Barrier(threads)
    torn: list[Exchange] = []

    async def hammer(name: str) -> None:
        for turn in range(turns):
            await history.append("shared", exchange(f"{name} {turn}", f"{name} {turn}"))
            await history.append(f"own {name} {turn % 7}", exchange("q"))
            snapshot = await history.read("shared")
            torn.extend(filter(is_torn, snapshot[-threads:]))
            await history.forget(f"own {name} {turn % 7}")

    def run(name: str) -> None:
        barrier.wait()
        asyncio.run(hammer(name))

    running = [threading.Thread(target=run, args=(f"thread {n}",)) for n in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    torn.extend(filter(is_torn, asyncio.run(history.read("shared"))))
    kept = questions(history, "shared")
    assert sorted(kept) == sorted(f"thread {n} {t}" for n in range(threads) for t in range(turns))
    in_order = [content for content in kept if content.startswith("thread 3 ")]
    assert in_order == [f"thread 3 {turn}" for turn in range(turns)]
    assert torn == []
    assert asyncio.run(history.count()) == 1


def is_torn(one: Exchange) -> bool:
    return len({message.content for message in one.messages}) != 1


def test_the_history_goes_along_to_groq(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    service.reply("one", conversation)
    service.tokens("two", conversation)
    service.reply("three", conversation)
    expected = ["one", "You said: one", "two", "You said: two", "three"]
    assert groq.requests[-1].contents == expected


def test_no_more_than_max_exchanges_go_along(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(MAX_EXCHANGES=2)
    for number in range(4):
        service.reply(f"n{number}", conversation)
    assert groq.requests[-1].contents[::2] == ["n1", "n2", "n3"]
    assert service.contents(conversation)[::2] == ["n2", "n3"]


def test_callers_without_a_conversation_share_one(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service()
    service.reply("one")
    service.reply("mine", conversation)
    service.reply("two")
    assert groq.requests[-1].contents == ["one", "You said: one", "two"]


def test_the_shared_conversation_can_be_turned_off(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(SHARED_CONVERSATION="false")
    service.reply("one")
    service.reply("two")
    assert groq.requests[-1].contents == ["two"]
    service.reply("mine", conversation)
    service.reply("mine too", conversation)
    assert groq.requests[-1].contents == ["mine", "You said: mine", "mine too"]


def test_a_transcript_that_is_sent_again_is_not_stored_twice(
    service: Service, groq: FakeGroq, conversation: str
) -> None:
    transcript: list[dict[str, str]] = []
    for number in range(3):
        transcript.append({"role": "user", "content": f"n{number}"})
        asked = {"messages": transcript, "conversation": conversation}
        reply = service.http.post("/chat", json=asked).json()["response"]
        transcript.append({"role": "assistant", "content": reply})
    assert groq.requests[-1].body["messages"] == transcript[:-1]
    assert service.messages(conversation) == transcript


@pytest.mark.parametrize(
    ("roles", "stored"),
    [
        (("user", "user"), ["m0", "m1", "You said: m1"]),
        (("user", "assistant", "user"), ["m2", "You said: m2"]),
    ],
)
def test_what_a_caller_tells_of_is_stored_as_the_exchanges_that_it_is(
    start_service: StartService, conversation: str, roles: tuple[str, ...], stored: list[str]
) -> None:
    service = start_service(MAX_EXCHANGES=1)
    sent = [{"role": role, "content": f"m{n}"} for n, role in enumerate(roles)]
    service.http.post("/chat", json={"messages": sent, "conversation": conversation})
    assert service.contents(conversation) == stored


def test_of_a_transcript_that_is_too_long_the_newest_exchanges_go_along_and_all_are_stored(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(CONTEXT_TOKENS=400, MAX_TOKENS=100)
    roles = ("user", "assistant") * 10 + ("user",)
    sent = [{"role": role, "content": f"{n} {'word ' * 20}"} for n, role in enumerate(roles)]
    answer = service.http.post("/chat", json={"messages": sent, "conversation": conversation})
    assert answer.status_code == 200
    asked = groq.requests[-1].body["messages"]
    assert 1 < len(asked) < len(sent)
    assert asked == sent[-len(asked) :]
    assert len(service.messages(conversation)) == len(sent) + 1


def test_an_exchange_that_a_caller_tells_of_pushes_no_stored_ones_out_of_the_prompt(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(CONTEXT_TOKENS=400, MAX_TOKENS=100)
    for number in range(15):
        service.reply(f"{number} {'word ' * 10}", conversation)
    before = len(groq.requests[-1].contents)
    assert before < 29, "the context is full"
    told = [{"role": "assistant", "content": "hm"}, {"role": "user", "content": "well?"}]
    service.http.post("/chat", json={"messages": told, "conversation": conversation})
    assert len(groq.requests[-1].contents) > before // 2


def test_of_a_transcript_no_more_exchanges_go_along_than_are_kept(
    start_service: StartService, groq: FakeGroq, conversation: str
) -> None:
    service = start_service(MAX_EXCHANGES=3)
    transcript = [
        {"role": role, "content": f"{role} {number}"}
        for number in range(8)
        for role in ("user", "assistant")
    ]
    for number in range(3):
        transcript.append({"role": "user", "content": f"question {number}"})
        asked = {"messages": transcript, "conversation": conversation}
        reply = service.http.post("/chat", json=asked).json()["response"]
        assert groq.requests[-1].body["messages"] == transcript[-7:]
        transcript.append({"role": "assistant", "content": reply})


def test_the_number_of_conversations_is_limited_and_counted(start_service: StartService) -> None:
    service = start_service(MAX_CONVERSATIONS=3)
    for number in range(5):
        service.reply("hello", f"conversation-{number:03}")
    assert service.metric("history_conversations") == 3
    assert service.contents("conversation-001") == []
    assert service.contents("conversation-004") != []


def test_an_idle_conversation_is_forgotten(start_service: StartService, conversation: str) -> None:
    from tests.servers import wait_until

    service = start_service(CONVERSATION_TTL=1)
    service.reply("hello", conversation)
    assert service.metric("history_conversations") == 1
    wait_until(lambda: service.metric("history_conversations") == 0)
    assert service.contents(conversation) == []


@pytest.mark.parametrize("crossing", [2, 20])
def test_requests_that_cross_each_store_a_whole_exchange(
    service: Service, groq: FakeGroq, conversation: str, crossing: int
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(crossing) as pool:
        list(pool.map(lambda n: service.reply(f"n{n}", conversation), range(crossing)))
    contents = service.contents(conversation)
    pairs = set(zip(contents[::2], contents[1::2], strict=True))
    assert pairs == {(f"n{n}", f"You said: n{n}") for n in range(crossing)}
    for request in groq.requests:
        before = request.contents[:-1]
        assert all(
            reply == f"You said: {asked}"
            for asked, reply in zip(before[::2], before[1::2], strict=True)
        )


def test_a_conversation_of_many_messages_goes_on(service: Service, conversation: str) -> None:
    many = [{"role": "user", "content": f"m{number}"} for number in range(1000)]
    for _ in range(2):
        asked = {"messages": many, "conversation": conversation}
        assert service.http.post("/chat", json=asked).status_code == 200
    assert service.reply("and now", conversation) == "You said: and now"
