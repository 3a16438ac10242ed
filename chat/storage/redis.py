"""
Redis with a time limit: one server or a cluster. The only place that names redis-py.

What a chat can do without is given up soon, and not asked for while Redis is in trouble.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import InvalidResponse, RedisClusterException, RedisError, ResponseError

from chat import metrics
from chat.errors import HistoryUnavailable

logger = logging.getLogger(__name__)

OPTIONAL_TIMEOUT = 0.025  # seconds; a chat asks twice at most for what it can do without
REQUIRED_TIMEOUT = 1.0
NODE_TIMEOUT = 0.8  # after which redis-py looks for a cluster's node elsewhere; less than the above
CHECK_TIMEOUT = 2.0  # a hung node takes NODE_TIMEOUT twice: in the look-up and in the probe
CHECK_INTERVALS = {True: 5.0, False: 1.0}  # seconds while Redis is up, and while it is down
START_TIMEOUT = 0.5
MAX_CONNECTIONS = 50
NODE_CONNECTIONS = 1000  # beyond them, redis-py fails in a cluster
# The last two: raised by redis-py when a node dies while it connects to it.
FAULTS = (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError, AttributeError)
Command = Sequence[str | int | bytes]
# The service's commands, also in scripts: a full Redis, or a replica, responds to PING.
PROBE = ["SET KEY 1 PX 1000", "GET KEY", "DEL KEY", "RPUSH KEY 1", "PEXPIRE KEY 1000", "LPOS KEY 1"]
PROBE += ["LRANGE KEY 0 -1", "LTRIM KEY 0 0", "EVAL redis.call('TIME') 1 KEY"]
PLAIN_WORDS: Any = {TimeoutError: "no response, or no TLS", InvalidResponse: "it is not Redis"}


class RedisClient:
    """Commands to Redis, without retries; `is_up` is what the last check found."""

    def __init__(self, redis: Redis | RedisCluster, optional_timeout: float) -> None:
        self.is_up = False
        self._redis, self._optional_timeout = redis, optional_timeout
        self._is_usable = False  # nothing optional is asked for before a check succeeds
        self._suspect = asyncio.Event()
        self._waiting: list[Command] = []
        self._fault = ""

    async def execute(self, *command: str | int | bytes) -> Any:
        """Return the response; raise `HistoryUnavailable` if there is none, or it is a refusal."""
        return await self._limited(self._redis.execute_command(*command), REQUIRED_TIMEOUT, command)

    async def try_all(self, commands: Sequence[Command]) -> list[Any]:
        """
        Return the response to each command, or None if it was refused, or if Redis does not respond
        soon. What comes in one turn of the event loop is sent together, at a third of the cost.
        """
        if not self._is_usable:
            return [None] * len(commands)
        if not self._waiting:
            self._sending = asyncio.create_task(self._send_waiting())
        begin, end = len(self._waiting), len(self._waiting) + len(commands)
        self._waiting += commands
        return (await asyncio.shield(self._sending))[begin:end]

    async def _send_waiting(self) -> list[Any]:
        commands, self._waiting = self._waiting, []
        pipeline: Any = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        try:
            sending = pipeline.execute(raise_on_error=False)
            responses = await self._limited(sending, self._optional_timeout, commands[0])
        except HistoryUnavailable:
            return [None] * len(commands)
        for response, command in zip(responses, commands, strict=True):
            if isinstance(response, FAULTS):
                self._note_fault(response, command)
        return [None if isinstance(each, FAULTS) else each for each in responses]

    async def check_forever(self) -> None:
        """Check now and then, and at once after a fault, whether Redis accepts commands."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVALS[self.is_up]):
                    await self._suspect.wait()
            self._suspect.clear()
            await self.check(CHECK_TIMEOUT)

    async def check(self, timeout: float) -> None:
        """Find out whether Redis accepts commands."""
        try:
            async with asyncio.timeout(timeout):
                fault = await self._uninterrupted(self._probe())
        except Exception as error:  # a bug must not end the checks either
            fault = _reason(error)
            if not isinstance(error, FAULTS):
                logger.exception("unexpected error in the check of Redis")
        if fault and fault != self._fault:
            logger.warning("Redis %s", fault)
        elif not (fault or self.is_up):
            logger.info("Redis is up")
        self._fault = fault or (self._fault if self.is_up else "")
        self.is_up = self._is_usable = not fault
        metrics.REDIS_UP.set(self.is_up)
        metrics.EVENT_LOOP_TASKS.set(len(asyncio.all_tasks()))  # a function does not serve workers

    async def _limited(self, response: Awaitable[Any], timeout: float, command: Command) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self._uninterrupted(response)
        except FAULTS as error:
            self._note_fault(error, command)
            raise HistoryUnavailable from error

    def _note_fault(self, fault: Exception, command: Command) -> None:
        self._is_usable = False
        self._suspect.set()
        reason = _reason(fault, command)
        if isinstance(fault, ResponseError) and self.is_up and reason != self._fault:
            self._fault = reason
            logger.warning("Redis %s", reason)

    def _uninterrupted(self, response: Awaitable[Any]) -> Awaitable[Any]:
        """Keep time limits from cancelling a cluster's look-up of its nodes: it would close all."""
        if isinstance(self._redis, Redis):
            return response
        running = asyncio.ensure_future(response)
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        return asyncio.shield(running)

    async def _probe(self) -> str:
        redis, keys = self._redis, [f"chat:probe:{uuid4().hex}" for _ in range(100)]
        nodes = {"": keys[0]}
        if isinstance(redis, RedisCluster):
            await redis.initialize()
            nodes = {str(redis.get_node_from_key(key)): key for key in keys}
        faults = await asyncio.gather(*map(self._probe_node, nodes.values()))
        return "" if "" in faults else faults[0]

    async def _probe_node(self, key: str) -> str:
        """Return what is wrong with a node, or nothing."""
        for command in [each.replace("KEY", key).split() for each in PROBE]:
            try:
                await self._redis.execute_command(*command)
            except FAULTS as error:
                return _reason(error, command)
        return ""


def _reason(error: BaseException, command: Command = ("a connection",)) -> str:
    """Say what went wrong, in the words of redis-py if they cannot repeat a key or a value."""
    while error.__cause__ and not isinstance(error, TimeoutError):
        error = error.__cause__
    if isinstance(error, ResponseError):
        return f"refused {command[0]!s}: {error.status_code or str(error).split()[0]}"
    return f"is down ({PLAIN_WORDS.get(type(error)) or str(error) or type(error).__name__})"


def _connect(address: str, password: str) -> Redis | RedisCluster:
    """Make a client for an address as `chat.config` accepts it; it connects when first used."""
    scheme, _, rest = (address if "://" in address else f"redis://{address}").partition("://")
    first, *others = rest.split(",")
    url = f"{scheme.removesuffix('+cluster')}://{first}"
    options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "protocol": 2}
    options["password"] = password or None  # a URL's own goes first
    if scheme.endswith("+cluster"):
        options |= {"socket_timeout": NODE_TIMEOUT, "socket_connect_timeout": NODE_TIMEOUT}
        options |= {"max_connections": NODE_CONNECTIONS, "reinitialize_steps": 0}
        parts = [urlsplit(f"//{node}") for node in others]
        nodes = [ClusterNode(part.hostname or "", part.port or 6379) for part in parts]
        return RedisCluster.from_url(url, startup_nodes=nodes, **options)
    # The limits of time are ours: on Python 3.11, redis-py's can swallow a cancellation.
    options |= {"socket_timeout": None, "socket_connect_timeout": None, "timeout": None}
    pool = BlockingConnectionPool.from_url(url, max_connections=MAX_CONNECTIONS, **options)
    return Redis.from_pool(pool)


@asynccontextmanager
async def open_redis(
    address: str, password: str, optional_timeout: float = OPTIONAL_TIMEOUT
) -> AsyncIterator[RedisClient]:
    """Open a client to a Redis that need not be there yet, and keep checking it."""
    redis = _connect(address, password)
    client = RedisClient(redis, optional_timeout)
    await client.check(START_TIMEOUT)
    checking = asyncio.create_task(client.check_forever())
    try:
        yield client
    finally:
        checking.cancel()
        with suppress(*FAULTS):
            await redis.aclose()
