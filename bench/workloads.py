"""The workloads: each takes a target once and returns its figures."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from uuid import uuid4

from bench.targets import Target
from chat.config import Settings
from chat.messages import Exchange, Message
from chat.storage.history import MemoryHistory
from chat.tokens import TokenCounts

Figures = dict[str, float]


@dataclass
class Sizes:
    """How much is measured."""

    rounds: int = 3
    turns: int = 3  # turns in each round; many short ones, since the machine's speed varies
    seconds: float = 1.0
    callers: int = 50
    paced_tokens: int = 200
    idle_streams: int = 2000
    growth_streams: tuple[int, ...] = (10, 100, 1000)


# Only checks that everything runs.
TINY = Sizes(1, 1, 0.1, callers=4, paced_tokens=20, idle_streams=10, growth_streams=(2, 4))
FLOOD_TOKENS = 500
PACE = 0.01  # seconds between the tokens of a paced stream
JSON_TOKENS = 100
HISTORY = 20  # exchanges in each conversation of json-history, as the service keeps by default
FIRST_CALLERS = FIRST_TOKENS = 10
LOOKUPS = 2_000
GROWTH_RATE = 5000  # tokens a second, over all streams together


def flood(target: Target, sizes: Sizes, mode: str = "sse") -> Figures:
    results = target.load(mode, callers=sizes.callers, tokens=FLOOD_TOKENS, seconds=sizes.seconds)
    return {
        "tokens_per_second": len(results["first"]) * FLOOD_TOKENS / results["elapsed"],
        "first_p99_to_median": percentile(results["first"], 99) / median(results["first"]),
    }


def paced(target: Target, sizes: Sizes, mode: str = "sse") -> Figures:
    before = target.cpu_seconds()
    target.load(mode, callers=sizes.callers, tokens=sizes.paced_tokens, interval=PACE)
    tokens = sizes.callers * sizes.paced_tokens
    return {"cpu_us_per_token": (target.cpu_seconds() - before) / tokens * 1e6}


def json(target: Target, sizes: Sizes) -> Figures:
    results = target.load("json", callers=sizes.callers, tokens=JSON_TOKENS, seconds=sizes.seconds)
    return {"requests_per_second": len(results["first"]) / results["elapsed"]}


def json_history(target: Target, sizes: Sizes) -> Figures:
    """Fill a new conversation for each caller, then measure further chats in it."""
    order = {"callers": sizes.callers, "tokens": JSON_TOKENS, "conversation": uuid4().hex}
    target.load("json", chats=HISTORY, **order)
    before = target.cpu_seconds()
    results = target.load("json", seconds=2 * sizes.seconds, **order)
    cpu = target.cpu_seconds() - before
    return {"cpu_us_per_request": cpu / len(results["first"]) * 1e6}


def first_token(target: Target, sizes: Sizes) -> Figures:
    """Measure concurrent callers, first staggered evenly, then asking at the same moment."""
    figures = {}
    for prefix, stagger in (("", FIRST_TOKENS * PACE / FIRST_CALLERS), ("same_moment_", 0.0)):
        order = {"callers": FIRST_CALLERS, "tokens": FIRST_TOKENS, "interval": PACE}
        first = target.load("sse", seconds=2 * sizes.seconds, stagger=stagger, **order)["first"]
        figures[f"{prefix}median_ms"] = median(first) * 1000
        figures[f"{prefix}p99_ms"] = percentile(first, 99) * 1000
    return figures


def idle(target: Target, sizes: Sizes) -> Figures:
    with target.held(min(sizes.idle_streams, 100)):
        pass  # so that what is allocated only once is not counted
    before = target.process.memory_info().rss
    with target.held(sizes.idle_streams):
        after = target.process.memory_info().rss
    return {"kb_per_stream": (after - before) / sizes.idle_streams / 1024}


def growth(target: Target, sizes: Sizes) -> Figures:
    """Spread the same rate of tokens over more and more streams; measure while all of them run."""
    figures = {}
    for streams in sizes.growth_streams:
        with target.held(streams, streams / GROWTH_RATE):
            before, started_at = target.cpu_seconds(), time.perf_counter()
            time.sleep(3 * sizes.seconds)
            cpu = target.cpu_seconds() - before
            tokens = (time.perf_counter() - started_at) * GROWTH_RATE
        figures[f"cpu_us_per_token_at_{streams}"] = cpu / tokens * 1e6
    return figures


async def lookups() -> Figures:
    """Measure history and token counts by themselves, with few conversations and many."""
    figures: Figures = defaultdict(float)
    for conversations in (10, 10_000):
        history, counts = MemoryHistory(Settings(groq_api_key="k")), TokenCounts("a-model", None)
        for conversation in range(conversations):
            for number in range(10):
                added = [exchange(conversation, number)]
                await history.store(str(conversation), added, anew=False)
            counts.learn(exchange(conversation, 0).messages[1], 5)
        for number in range(LOOKUPS):
            conversation = number * 7919 % conversations
            reading = history.read(str(conversation))
            counting = counts.count(exchange(conversation, 0).messages[1:])
            added = [exchange(conversation, number)]
            appending = history.store(str(conversation), added, anew=False)
            for name, call in (("read", reading), ("count", counting), ("append", appending)):
                started_at = time.perf_counter()
                await call
                elapsed = time.perf_counter() - started_at
                figures[f"{name}_us_at_{conversations}"] += elapsed / LOOKUPS * 1e6
    return figures


def exchange(conversation: int, number: int) -> Exchange:
    text = f"conversation {conversation}, message {number}"
    return Exchange((Message("user", text), Message("assistant", text + " replied")), 10, number)


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1] if len(values) > 1 else values[0]


# The workloads in which the targets take turns.
IN_TURNS: dict[str, Callable[[Target, Sizes], Figures]] = {
    "flood": flood,
    "json": json,
    "json-history": json_history,
    "first token": first_token,
    "ws-flood": partial(flood, mode="ws"),
    "paced": paced,
    "ws-paced": partial(paced, mode="ws"),
}
LONG = ("first token", "json-history")  # those with one turn in each round
ALONE = ("idle", "growth", "lookups")
