"""
How commands reach Redis: one server, or the nodes of a cluster. The only place that names redis-py.

None of this has a limit of time: who calls sets one with `asyncio.timeout`. redis-py's own is off,
since on Python 3.11 it can swallow the cancellation of ours.
"""

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

FAULTS = (RedisError, RedisClusterException, OSError, TimeoutError)
"""What a command may raise."""
LOST = (RedisConnectionError, RedisTimeoutError, OSError)
"""Of these, what says that a server is away, rather than that it refuses a command."""
DEFAULT_PORT = 6379
SAMPLE = 1000
"""Keys that are looked at to count them; Redis serves nobody else meanwhile."""
SLOTS = 16_384

Command = tuple[str | int | bytes, ...]


class SingleRedis:
    """One server, which is the one place that there is."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def place_of(self, command: Command) -> str:
        """Return the place that keeps the command's key; raise a fault where that is not known."""
        return ""

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """
        Have commands for one place done; return the answer to each, or in its place the error that
        it was refused with. Raise a fault where the place is away.
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
            return answers

    async def keys(self) -> dict[str, str]:
        """Return the places that there are, each with a key that it keeps."""
        return {"": "chat:probe"}

    async def look_around(self, lost: str) -> None:
        """Find out where what the lost place kept is now."""

    async def count(self, prefix: str) -> int:
        """Return how many keys begin so: exactly where there are few keys, else by a sample."""
        total = await self._redis.dbsize()
        return _estimate(total, await self._redis.scan(count=SAMPLE), prefix)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._redis.aclose()


class ClusterRedis:
    """The same for a Redis Cluster, whose places are the nodes that answer for its slots."""

    def __init__(self, redis: RedisCluster) -> None:
        self._redis = redis
        self._keys: dict[str, str] = {}

    def place_of(self, command: Command) -> str:
        place = self._place_of_key(str(command[3 if command[0] == "EVAL" else 1]))
        if place is None:
            raise RedisClusterException("no node is known for this key")
        return place

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._redis.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        answers = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, LOST):
                raise answer
        return answers

    async def keys(self) -> dict[str, str]:
        await self._redis.initialize()
        slots = self._redis.nodes_manager.slots_cache
        places = {nodes[0].name for nodes in {id(each): each for each in slots.values()}.values()}
        found = self._find_keys(places, self._keys.values())
        if found.keys() != places:
            found = self._find_keys(places, map("chat:probe:{}".format, range(8 * SLOTS)))
        self._keys = found
        return found

    def _find_keys(self, places: set[str], keys: Iterable[str]) -> dict[str, str]:
        """Find a key for each place; one with a single slot takes about as many tries as slots."""
        found = dict[str, str]()
        for key in keys:
            if place := self._place_of_key(key):
                found.setdefault(place, key)
            if found.keys() == places:
                break
        return found

    def _place_of_key(self, key: str) -> str | None:
        nodes = self._redis.nodes_manager.slots_cache.get(key_slot(key.encode()))
        return str(nodes[0].name) if nodes else None

    async def look_around(self, lost: str) -> None:
        await self._redis.nodes_manager.initialize(last_failed_node_name=lost)

    async def count(self, prefix: str) -> int:
        counts = [await self._count(node, prefix) for node in self._redis.get_primaries()]
        return sum(counts)

    async def _count(self, node: ClusterNode, prefix: str) -> int:
        total = await node.execute_command("DBSIZE")
        return _estimate(total, await node.execute_command("SCAN", 0, "COUNT", SAMPLE), prefix)

    async def aclose(self) -> None:
        await self._redis.aclose()


Client = SingleRedis | ClusterRedis


def _estimate(total: int, scanned: tuple[Any, Sequence[Any]], prefix: str) -> int:
    """A scan's first step shows the beginning of a hash table, which is a sample of all keys."""
    cursor, keys = scanned
    matching = len([key for key in keys if key.startswith(prefix.encode())])
    if int(cursor) == 0 or not keys:
        return matching
    return round(total * matching / len(keys))


def connect(address: str, password: str) -> Client:
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
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "protocol": 2,
    }
    if url.scheme.endswith("+cluster"):
        startup = [ClusterNode(host, port) for host, port in nodes]
        # Each move of a slot is taken note of; reading all anew would close connections in use.
        return ClusterRedis(RedisCluster(startup_nodes=startup, reinitialize_steps=0, **options))
    host, port = nodes[0]
    return SingleRedis(Redis(host=host, port=port, db=int(url.path.strip("/") or 0), **options))


def _host_and_port(node: str) -> tuple[str, int]:
    parts = urlsplit(f"//{node}")
    return parts.hostname or "localhost", parts.port or DEFAULT_PORT
