"""Redis with a time limit: one server or a cluster. The only place that names redis-py."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
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
NODE_TIMEOUT = 0.8  # after which redis-py looks for a node elsewhere; shorter than a command's 1 s
# The last two: raised by redis-py when a node dies while it connects to it.
FAULTS = (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError, AttributeError)
Server = Redis | RedisCluster
Command = Sequence[str | int | bytes]
# The service's commands, also in scripts: a full Redis, or a replica, responds to PING.
PROBE = ["SET KEY 1 PX 1000", "GET KEY", "DEL KEY", "RPUSH KEY 1", "PEXPIRE KEY 1000", "LPOS KEY 1"]
PROBE += ["LRANGE KEY 0 -1", "LTRIM KEY 0 0", "EXPIRE KEY 1", "LPOP KEY 1"]
PROBE += ["EVAL redis.call('TIME') 1 KEY"]
PLAIN_WORDS: Any = {TimeoutError: "no response, or no TLS", InvalidResponse: "it is not Redis"}


class RedisClient:
    """Commands to Redis, without retries; `is_up` is what the last check found."""

    def __init__(self, redis: Server, optional_timeout: float = OPTIONAL_TIMEOUT) -> None:
        self._redis, self._optional_timeout = redis, optional_timeout
        self.is_up, self._fault = False, "unknown"
        self._suspect = asyncio.Event()  # set by a fault; nothing optional is sent until a check
        self._waiting: list[Command] = []

    async def execute(self, *command: str | int | bytes) -> Any:
        """Return the response; raise `HistoryUnavailable` if it is a refusal or takes a second."""
        try:
            return await self._within(1.0, self._redis.execute_command(*command))
        except FAULTS as error:
            self._suspect.set()
            raise HistoryUnavailable(cause=_reason(error, command)) from error

    async def try_all(self, commands: Sequence[Command]) -> list[Any]:
        """Return the response to each command, or None if it was refused or there is none soon."""
        if not self.is_up or self._suspect.is_set():
            return [None] * len(commands)
        if not self._waiting:  # what comes in one turn of the event loop costs a third if together
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
            responses: list[Any] = await self._within(self._optional_timeout, sending)
        except FAULTS as error:
            responses = [error] * len(commands)
        if any(isinstance(response, FAULTS) for response in responses):
            self._suspect.set()
        return [None if isinstance(response, FAULTS) else response for response in responses]

    async def check_forever(self) -> None:
        """Check now and then, and at once after a fault, whether Redis accepts commands."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(5 if self.is_up else 1):
                    await self._suspect.wait()
            await self.check()

    async def check(self, timeout: float = 2.0) -> None:  # a hung node takes NODE_TIMEOUT twice
        """Find out whether Redis accepts commands."""
        try:
            fault = await self._within(timeout, self._probe())
        except Exception as error:  # a bug must not end the checks either
            fault = _reason(error)
            if not isinstance(error, FAULTS):
                logger.exception("unexpected error in the check of Redis")
        if fault != self._fault:
            logger.log(logging.WARNING if fault else logging.INFO, "Redis %s", fault or "is up")
        self.is_up, self._fault = not fault, fault
        self._suspect.clear()
        metrics.REDIS_UP.set(self.is_up)
        metrics.EVENT_LOOP_TASKS.set(len(asyncio.all_tasks()))  # a function does not serve workers

    async def _within(self, timeout: float, response: Awaitable[Any]) -> Any:
        if isinstance(self._redis, RedisCluster):  # a cancelled look-up of nodes would close all
            running = asyncio.ensure_future(response)
            running.add_done_callback(lambda done: done.cancelled() or done.exception())
            response = asyncio.shield(running)
        async with asyncio.timeout(timeout):
            return await response

    async def _probe(self) -> str:
        """Return what is wrong with the nodes, or nothing if one of them accepts all commands."""
        redis, keys = self._redis, [f"chat:probe:{uuid4().hex}" for _ in range(100)]
        nodes: dict[Any, str] = {None: keys[0]}
        if isinstance(redis, RedisCluster):
            await redis.initialize()
            nodes = {redis.get_node_from_key(key): key for key in keys}
        return min(await asyncio.gather(*map(self._probe_node, nodes.values())))

    async def _probe_node(self, key: str) -> str:
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


def _connect(address: str, password: str) -> Server:
    """Make a client for an address as `chat.config` accepts it; it connects when first used."""
    scheme, _, rest = (address if "://" in address else f"redis://{address}").partition("://")
    first, *others = rest.split(",")
    url = f"{scheme.removesuffix('+cluster')}://{first}"
    options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "protocol": 2}
    options["password"] = password or None  # a URL's own goes first
    if scheme.endswith("+cluster"):
        options |= {"socket_timeout": NODE_TIMEOUT, "socket_connect_timeout": NODE_TIMEOUT}
        options |= {"max_connections": 1000, "reinitialize_steps": 0}  # it fails beyond them
        parts = [urlsplit(f"//{node}") for node in others]
        nodes = [ClusterNode(part.hostname or "", part.port or 6379) for part in parts]
        return RedisCluster.from_url(url, startup_nodes=nodes, **options)
    # The limits of time are ours: on Python 3.11, redis-py's can swallow a cancellation.
    options |= {"socket_timeout": None, "socket_connect_timeout": None, "timeout": None}
    return Redis.from_pool(BlockingConnectionPool.from_url(url, max_connections=50, **options))


def hashed(secret: str) -> str:
    """Return what stands for a conversation, a text or an address: no dump of Redis shows them."""
    return sha256(secret.encode()).hexdigest()


def hashed_key(kind: str, secret: str) -> str:
    return f"chat:{kind}:{hashed(secret)}"


@asynccontextmanager
async def open_redis(address: str, password: str, **limits: float) -> AsyncIterator[RedisClient]:
    """Open a client to a Redis that need not be there yet, and keep checking it."""
    redis = _connect(address, password)
    client = RedisClient(redis, **limits)
    await client.check(timeout=0.5)
    checking = asyncio.create_task(client.check_forever())
    try:
        yield client
    finally:
        checking.cancel()
        with suppress(*FAULTS):
            await redis.aclose()
