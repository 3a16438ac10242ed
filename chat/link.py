"""
Redis, asked for answers that come soon or not at all.

When a question fails, Redis is left out until a probe in the background has found that it answers.
Commands that come while others run are sent together: under load, one round trip serves many chats.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from chat import metrics

logger = logging.getLogger(__name__)

BUDGET = 0.05
"""Seconds that a question may take: no chat waits longer for what it can do without."""
PROBE_BUDGET = 1.0
"""Seconds that a probe may take; nobody waits for it, and a busy event loop must not fail it."""
PROBE_INTERVAL = 0.5
"""Seconds between two probes."""
SCAN_COUNT = 1000
"""Keys that Redis looks at in one step of a scan: it serves nobody else meanwhile."""
COUNT_BUDGET = 5.0
"""Seconds that a look at all keys may take."""
FAULTS = (RedisError, RedisClusterException, OSError, TimeoutError)

Command = tuple[str | int | bytes, ...]
Answers = list[Any] | None


class Executor(Protocol):
    """How commands reach Redis, or the nodes of a cluster."""

    async def ping(self) -> None:
        """Raise one of `FAULTS` where Redis does not answer."""

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answer to each command, or the error in its place; or raise a fault."""

    async def scan(self, pattern: str) -> int:
        """Return how many keys match."""

    async def aclose(self) -> None:
        """Close all connections."""


class Link:
    """
    Commands to Redis, under a limit of time.

    Attributes:
        is_up: what the last probe found; None before the first.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._usable = False
        self._suspect = asyncio.Event()
        self._waiting: list[_Question] = []
        self._has_waiting = asyncio.Event()
        self.is_up: bool | None = None

    async def ask(self, commands: Sequence[Command], *, budget: float = BUDGET) -> Answers:
        """Return the answer to each command; None where Redis is not there, or refuses one."""
        if not self._usable:
            return None
        question = _Question(commands, budget)
        timer = asyncio.get_running_loop().call_later(budget, question.resolve, None)
        self._enqueue(question)
        try:
            return await question.answered
        finally:
            timer.cancel()

    def tell(self, commands: Sequence[Command]) -> None:
        """Send the commands soon, if Redis is there."""
        if self._usable:
            self._enqueue(_Question(commands, BUDGET))

    async def count(self, pattern: str) -> int:
        """
        Count the keys that match, which takes Redis a while.

        Raises:
            TimeoutError: Redis is not there.
        """
        if not self._usable:
            raise TimeoutError
        try:
            async with asyncio.timeout(COUNT_BUDGET):
                return await self._executor.scan(pattern)
        except FAULTS as error:
            raise TimeoutError from error

    async def probe(self, budget: float = PROBE_BUDGET) -> None:
        """Find out whether Redis answers."""
        try:
            async with asyncio.timeout(budget):
                await self._executor.ping()
        except FAULTS as error:
            self._usable = False
            self._note(False, f"Redis is not there ({type(error).__name__}): going on without it")
        else:
            self._usable = True
            self._note(True, "Redis is there")

    async def run(self) -> None:
        """Serve `ask` and `tell`, and keep probing, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._probe_forever())
            tasks.create_task(self._exchange_forever())

    def _enqueue(self, question: "_Question") -> None:
        self._waiting.append(question)
        self._has_waiting.set()

    async def _probe_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._suspect.wait(), PROBE_INTERVAL)
            self._suspect.clear()
            await self.probe()

    async def _exchange_forever(self) -> None:
        while await self._has_waiting.wait():
            self._has_waiting.clear()
            waiting, self._waiting = self._waiting, []
            answers: list[Any] = []
            try:
                async with asyncio.timeout(max(question.budget for question in waiting)):
                    commands = [each for question in waiting for each in question.commands]
                    answers = await self._executor.execute(commands)
            except FAULTS:
                self._usable = False
                self._suspect.set()
            for question in waiting:
                count = len(question.commands)
                own, answers = answers[:count], answers[count:]
                is_refused = any(isinstance(answer, Exception) for answer in own)
                question.resolve(own if own and not is_refused else None)

    def _note(self, is_up: bool, message: str) -> None:
        if is_up is self.is_up:
            return
        self.is_up = is_up
        metrics.REDIS_UP.set(is_up)
        logger.log(logging.INFO if is_up else logging.WARNING, message)


class _Question:
    """Some commands that belong together, and where their answers go."""

    def __init__(self, commands: Sequence[Command], budget: float) -> None:
        self.commands = commands
        self.budget = budget
        self.answered: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()

    def resolve(self, answers: Answers) -> None:
        if not self.answered.done():
            self.answered.set_result(answers)


class SingleRedis:
    """One Redis server: a pipeline for all commands of a batch."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def ping(self) -> None:
        await self._redis.ping()

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers

    async def scan(self, pattern: str) -> int:
        return sum([1 async for _ in self._redis.scan_iter(pattern, count=SCAN_COUNT)])

    async def aclose(self) -> None:
        await self._redis.aclose()


class ClusterRedis:
    """A Redis Cluster: each command goes to its node by itself, so that one that fails is alone."""

    def __init__(self, redis: RedisCluster) -> None:
        self._redis = redis

    async def ping(self) -> None:
        await self._redis.ping(target_nodes=RedisCluster.RANDOM)

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        running = (self._redis.execute_command(*command) for command in commands)
        return await asyncio.gather(*running, return_exceptions=True)

    async def scan(self, pattern: str) -> int:
        return sum([1 async for _ in self._redis.scan_iter(pattern, count=SCAN_COUNT)])

    async def aclose(self) -> None:
        await self._redis.aclose()


def connect(address: str, password: str) -> Executor:
    """
    Make a client for `host:port`, or for a URL of the scheme redis, rediss, redis+cluster or
    rediss+cluster, as `chat.config` has checked it. It connects when it is first used.
    """
    url = urlsplit(address if "://" in address else f"redis://{address}")
    nodes = [_host_and_port(node) for node in url.netloc.rpartition("@")[2].split(",")]
    options: dict[str, Any] = {
        "username": unquote(url.username) if url.username else None,
        "password": unquote(url.password) if url.password else password or None,
        "ssl": url.scheme.startswith("rediss"),
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if url.scheme.endswith("+cluster"):
        startup = [ClusterNode(host, port) for host, port in nodes]
        return ClusterRedis(RedisCluster(startup_nodes=startup, **options))
    host, port = nodes[0]
    return SingleRedis(Redis(host=host, port=port, db=int(url.path.strip("/") or 0), **options))


def _host_and_port(node: str) -> tuple[str, int]:
    parts = urlsplit(f"//{node}")
    return parts.hostname or "localhost", parts.port or 6379


@asynccontextmanager
async def open_link(address: str, password: str) -> AsyncIterator[Link]:
    """Open the link to Redis, waiting for it no longer than the budget."""
    executor = connect(address, password)
    link = Link(executor)
    await link.probe(BUDGET)
    running = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        running.cancel()
        await executor.aclose()
