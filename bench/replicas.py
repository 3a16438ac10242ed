"""
Several replicas behind a load balancer, while one is killed and another is restarted gracefully.

    python -m bench.replicas [--seconds 30] [--callers 60]

Three replicas share their histories through Redis. haproxy (a Debian package) is configured as in
docs/proxy.md, and names the replica in a response header. The run fails unless every chat succeeded
that the kill did not cut off, and every conversation is intact.
"""

import argparse
import asyncio
import random
import re
import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from websockets.exceptions import InvalidStatus

from bench import soak_callers
from bench.soak_callers import Chat, Received, Seen
from bench.soak_checks import broken_conversations
from tests.fake_groq import FakeGroq, Script
from tests.servers import Caller, Process, RedisServer, Service, free_port, wait_until
from tests.test_proxy import configuration

REPLICAS = 3
REPLICA = "x-replica"  # the header in which haproxy names the replica, in its own errors too
MAX_EXCHANGES = 1000


class Kill:
    """The replica that was killed, and when."""

    replica: str | None = None
    began_at = ended_at = float("inf")


class HoppingCaller(soak_callers.Caller):
    """A caller with one conversation, who opens a connection for each chat."""

    fault_share = vanishing_share = cancelling_share = 0.0
    conversation_share = 1.0
    longest_thought = 0.05
    cut = 0  # chats that the kill has cut off

    def __init__(self, number: int, http: httpx.AsyncClient, seen: Seen, kill: Kill) -> None:
        super().__init__(number, random.randrange(1_000_000), http, seen)
        self._kill = kill

    async def ask(self, chat: Chat) -> None:
        await super().ask(chat)
        await self.leave()

    def note_failure(self, chat: Chat, received: Received, error: Exception) -> None:
        self.possible.append((chat.content, chat.echo))
        if isinstance(error, InvalidStatus):
            received.headers = error.response.headers
        kill, replica = self._kill, received.headers.get(REPLICA)
        elapsed = time.monotonic() - kill.began_at
        if replica == kill.replica and received.began_at < kill.ended_at and elapsed > 0:
            self.cut += 1
        else:
            where = f"{elapsed:+.1f} s from the kill, on {replica}"
            self._seen.wrong.append(f"{where}: {error!r}: {chat}, {received}")


class Simulation:
    """The processes, and what their callers see."""

    def __init__(self, stack: ExitStack) -> None:
        groq = stack.enter_context(FakeGroq(Script(interval=0.01)))
        self.redis = stack.enter_context(RedisServer("--appendonly", "yes"))
        settings: dict[str, object] = {
            "GROQ_BASE_URL": groq.url,
            "HISTORY_STORE": "redis",
            "REDIS_ADDR": self.redis.address,
            "MAX_EXCHANGES": MAX_EXCHANGES,
            "DRAIN_DELAY": 2,
        }
        self.replicas = [stack.enter_context(Service(**settings)) for _ in range(REPLICAS)]
        self.front = Caller(free_port())
        stack.enter_context(self.front.http)
        self._balance(stack)
        self.seen = Seen()
        self.kill = Kill()
        self.callers: list[HoppingCaller] = []

    def _balance(self, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        servers = "\n".join(f"    server {name_of(r)} 127.0.0.1:{r.port}" for r in self.replicas)
        bind = f"127.0.0.1:{self.front.port}\n    http-after-response set-header {REPLICA} %s\n"
        text = re.sub(r":80 .*\n", bind, configuration("haproxy").replace("gt 100 ", "gt 10000 "))
        text = re.sub(r"\n    server (?s:.*)", f"\n{servers}\n", text)
        (directory / "haproxy.cfg").write_text(text)
        haproxy = shutil.which("haproxy") or "/usr/sbin/haproxy"
        command = [haproxy, "-db", "-f", "haproxy.cfg"]
        stack.callback(Process(command, directory=directory).end)
        wait_until(self.front.is_up)

    async def run(self, callers: int, seconds: float) -> None:
        """Let the callers ask; meanwhile kill one replica and restart another gracefully."""
        until = time.monotonic() + seconds
        # A failed request on a reused connection has no response, so no header either.
        headers, url = {"connection": "close"}, self.front.url
        http = httpx.AsyncClient(base_url=url, headers=headers, limits=httpx.Limits(), timeout=None)
        async with http, asyncio.TaskGroup() as tasks:
            self.callers = [HoppingCaller(n, http, self.seen, self.kill) for n in range(callers)]
            for caller in self.callers:
                tasks.create_task(caller.run(until))
            for replica, end in zip(self.replicas, (self._kill, self._stop), strict=False):
                await asyncio.sleep(seconds / 4)
                await asyncio.to_thread(end, replica)
                await asyncio.to_thread(replica.start)

    def _kill(self, replica: Service) -> None:
        self.kill.replica, self.kill.began_at = name_of(replica), time.monotonic()
        replica.process.kill()
        self.kill.ended_at = time.monotonic()
        replica.process.end()

    def _stop(self, replica: Service) -> None:
        assert replica.process.end(60) == 0, "a graceful exit has status 0"

    def failures(self) -> list[str]:
        """Return the chats that failed without a reason, and the conversations that are broken."""
        refused = ["refused by the circuit breaker"] * self.seen.total("refused")
        broken = broken_conversations(self.front, self.callers, MAX_EXCHANGES)
        return [*self.seen.wrong, *refused, *(f"{name} is broken" for name in broken)]


def name_of(replica: Service) -> str:
    return f"r{replica.port}"


def report(simulation: Simulation) -> None:
    """Print what was done, and what it cost Redis."""
    chats = simulation.seen.total("completed")
    cut = sum(caller.cut for caller in simulation.callers)
    print(f"{len(simulation.callers)} callers, {chats} chats, {cut} cut off by the kill")
    with simulation.redis.client() as client:
        for name, calls in client.info("commandstats").items():
            per_chat = calls["calls"] / chats
            if per_chat >= 0.01:
                command = name.removeprefix("cmdstat_")
                print(f"redis {command}: {per_chat:.2f} a chat, {calls['usec_per_call']} us each")
        sizes = [int(client.memory_usage(key) or 0) for key in client.keys("chat:history:*")]
    print(f"redis memory: {sum(sizes) / chats:.0f} bytes an exchange")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--callers", type=int, default=60)
    options = parser.parse_args()
    with ExitStack() as stack:
        simulation = Simulation(stack)
        asyncio.run(simulation.run(options.callers, options.seconds))
        failures = simulation.failures()
        report(simulation)
    sys.exit("\n".join(failures) if failures else 0)


if __name__ == "__main__":
    main()
