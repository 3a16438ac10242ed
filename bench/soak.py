"""
The soak: `make soak`.

Many callers ask for ten minutes, over all transports, while Groq fails, callers vanish, and Redis
hangs and dies. At the end nothing may be left over, and all figures have to add up.
bench/README.md says how to read it; soak_callers.py has the callers, soak_checks.py the figures.
"""

import argparse
import asyncio
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from statistics import mode

import httpx
import psutil

from bench.soak_callers import FAULTS, TRANSPORTS, Caller, Seen
from bench.soak_checks import (
    Problems,
    broken_conversations,
    growing_memory,
    memory_by_quarters,
    miscounted,
    untried,
)
from tests.fake_groq import FakeGroq, Request, Script
from tests.servers import SECRETS, RedisServer, Service, wait_until

SETTINGS = {
    "GROQ_TIMEOUT": 3,
    "GROQ_FIRST_EVENT_TIMEOUT": 3,
    "GROQ_MAX_RETRIES": 0,  # so that requests at Groq can be compared with replies
    "GROQ_CIRCUIT_FAILURES": 3,  # few, so that the circuit breaker opens now and then
    "MAX_EXCHANGES": 20,
}
TOKEN_INTERVAL = 0.02
KEEP_ALIVE_EXPIRY = 2.0
"""Seconds that callers keep an idle connection: less than uvicorn, which would close it just when
the next request is on its way."""
STEADY_PORTS = range(20_000, 30_000)
"""Below those that the system gives to outgoing connections, one of which would take Redis' port
while it is away."""
LONG_RUN = 300.0
"""Seconds from which on memory is judged, and the pool of connections to Groq waited for. In a
shorter run memory grows as it must, since histories and token counts fill."""
IDLE_LIMIT = 30.0
"""Seconds until all that was going on has ended."""
POOL_LIMIT = 90.0
"""The same for idle connections to Groq, which are kept for 30 seconds and looked at every 30."""
REDIS_CONNECTIONS = 2
"""One for commands, and one for a probe meanwhile."""
OUTAGE = "Groq is down: it is left alone but for probes"
"""The one error that may be logged, since it is true."""
SHOWN = 20
"""Problems shown of each kind."""


class Soak:
    """One run: its processes, and what is seen of them meanwhile."""

    def __init__(self, stack: ExitStack, seed: int) -> None:
        self.seed = seed
        self.seen = Seen()
        self.callers: list[Caller] = []
        self.restarts = 0
        self.outages = 0
        self.memory: list[int] = []
        self.arrived = 0
        self.bad_lines: list[str] = []
        self._unfinished: list[Request] = []
        silent_on_tokens = Script(interval=TOKEN_INTERVAL, prompt_tokens=None)
        self._groq = stack.enter_context(FakeGroq(silent_on_tokens))
        self._groq.on("[shared]", Script(interval=TOKEN_INTERVAL))
        for name, fault in FAULTS.items():
            self._groq.on(f"[{name}]", fault.script)
        self._redis = RedisServer()
        self._redis.port = next(filter(is_free, STEADY_PORTS))
        stack.enter_context(self._redis)
        addresses = {"GROQ_BASE_URL": self._groq.url, "REDIS_ADDR": self._redis.address}
        self.service = stack.enter_context(Service(**addresses, **SETTINGS))
        self._process = psutil.Process(self.service.process.pid)

    async def warm_up(self) -> None:
        """Have all that is made once made."""
        async with self._client() as http:
            await Caller(0, self.seed, http, self.seen).ask_over_each_transport()

    async def run(self, callers: int, seconds: float) -> None:
        """Let the callers ask, and disturb them, for so long."""
        until = time.monotonic() + seconds
        async with self._client() as http, asyncio.TaskGroup() as tasks:
            self.callers = [Caller(n, self.seed, http, self.seen) for n in range(1, callers + 1)]
            for caller in self.callers:
                tasks.create_task(caller.run(until))
            tasks.create_task(self._disturb_redis(until))
            tasks.create_task(self._watch(until))

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_EXPIRY)
        return httpx.AsyncClient(base_url=self.service.url, limits=limits, timeout=None)

    async def _disturb_redis(self, until: float) -> None:
        chance = random.Random(f"{self.seed} Redis")
        while time.monotonic() < until:
            await asyncio.sleep(chance.uniform(0.5, 2))
            self._redis.pause()
            await asyncio.sleep(chance.uniform(0.1, 1.5))
            self._redis.resume()
            await asyncio.sleep(chance.uniform(0.5, 2))
            self._redis.kill()
            await asyncio.sleep(chance.uniform(0.1, 1.5))
            await asyncio.to_thread(self._redis.start)
            self.restarts += 1

    async def _watch(self, until: float) -> None:
        while time.monotonic() < until:
            self.memory.append(self._process.memory_info().rss)
            self.read_requests()
            self.read_log()
            await asyncio.sleep(1)

    def read_requests(self) -> None:
        """Count what has arrived at Groq, and keep only what has not ended."""
        arrived = len(self._groq.requests)
        requests = [*self._unfinished, *self._groq.requests[:arrived]]
        del self._groq.requests[:arrived]
        self.arrived += arrived
        self._unfinished = [x for x in requests if not (x.answered or x.closed.is_set())]

    def read_log(self) -> None:
        """Read what the service has logged, and keep only what must not be there."""
        lines = self.service.process.lines[:]
        del self.service.process.lines[: len(lines)]
        text = "".join(lines)
        self.bad_lines += [f"a secret: {each}" for each in list(SECRETS) if each in text]
        for line in map(json.loads, lines):
            self.outages += line["message"] == OUTAGE
            if line["level"] == "ERROR" and line["message"] != OUTAGE:
                self.bad_lines.append(str(line))

    def holdings(self) -> Counter[str]:
        """Count what the service holds: tasks, connections, and other files."""
        # A probe of Redis, or an answer just given, makes it one less or more for a moment.
        tasks = mode(int(self.service.metric("event_loop_tasks")) for _ in range(9))
        files = self._process.num_fds()
        peers = {self._redis.port: "of Redis", self._groq.port: "of Groq"}
        connections = [x for x in self._process.net_connections("tcp") if x.raddr]
        ends = Counter(peers.get(each.raddr.port, "of callers") for each in connections)
        return Counter({"tasks": tasks, "files": files - len(connections), **ends})

    def left_over(self, before: Counter[str], *, is_long: bool) -> Problems:
        """Wait until all has ended; tell what has not."""

        def is_idle() -> bool:
            self.read_requests()
            return not self._unfinished and self.service.metric("chat_replies_active") == 0

        pooled = 0 if is_long else len(self.callers)
        limits = Counter({**before, "of Redis": REDIS_CONNECTIONS, "of Groq": pooled})
        if not comes(is_idle, IDLE_LIMIT):
            return [f"replies still run, {len(self._unfinished)} of them at Groq"]
        if not comes(lambda: self.holdings() <= limits, POOL_LIMIT if is_long else IDLE_LIMIT):
            return [f"{self.holdings()}; the limits are {limits}"]
        return []

    def not_recovered(self) -> Problems:
        """Tell whether Redis stays unused, or Groq left alone."""

        def is_answering() -> bool:
            is_open = self.service.metric("groq_circuit_state") > 0
            return self.service.chat("hello").status_code == 200 and not is_open

        found = []
        if not comes(lambda: self.service.metric("redis_up") == 1, IDLE_LIMIT):
            found.append("Redis is back, and not used")
        if not comes(is_answering, IDLE_LIMIT):
            found.append("Groq is back, and not asked")
        return found


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def comes(condition: Callable[[], bool], limit: float) -> bool:
    """Wait for it; tell whether it came."""
    with suppress(AssertionError):
        wait_until(condition, limit)
        return True
    return False


def soak(seconds: float, callers: int, seed: int) -> bool:
    """Run a soak, print what was seen, and tell whether it was all right."""
    print(f"{callers} callers for {seconds:g} seconds, --seed {seed}", flush=True)
    is_long = seconds >= LONG_RUN
    with ExitStack() as stack:
        run = Soak(stack, seed)
        asyncio.run(run.warm_up())
        before = run.holdings()
        asyncio.run(run.run(callers, seconds))
        service, seen, most = run.service, run.seen, SETTINGS["MAX_EXCHANGES"]
        checks = {
            "every reply ended in the right way": seen.wrong,
            "all has been tried": untried(seen),
            "no task, connection or file is left over": run.left_over(before, is_long=is_long),
            "the metrics add up": miscounted(service, seen, run.arrived),
            "conversations are whole": broken_conversations(service, run.callers, most),
            "Redis and Groq are used again": run.not_recovered(),
        }
        if is_long:
            checks["memory is level"] = growing_memory(run.memory)
        print(table(run, before))
        run.read_log()
        checks["the log has no fault and no secret"] = run.bad_lines
        for check, problems in checks.items():
            print("\n    ".join([f"{'FAILED' if problems else 'ok':8}{check}", *problems[:SHOWN]]))
    if not is_long:
        print("        (memory is only shown, and not judged, in a run as short as this)")
    return not any(checks.values())


def table(run: Soak, before: Counter[str]) -> str:
    """Return what went on, and what the service held."""
    ends = ("completed", "cancelled", "failed", "refused", "vanished")
    rows = [["", *ends]]
    rows += [[x, *(str(run.seen.ends[x, end]) for end in ends)] for x in TRANSPORTS]
    memory = ", ".join(f"{each / 2**20:.1f}" for each in memory_by_quarters(run.memory))
    faults = ", ".join(f"{name} {run.seen.faults[name]}" for name in FAULTS)
    return "\n".join(
        [
            *("".join(cell.rjust(11) for cell in row) for row in rows),
            f"faults of Groq's: {faults}; {run.outages} outages",
            f"Redis hung, and was killed and started: {run.restarts} times",
            f"median memory of each quarter: {memory} MiB",
            f"held before: {dict(before)}; in the end: {dict(run.holdings())}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="20 or more")
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    options = parser.parse_args()
    is_right = soak(options.seconds, options.callers, options.seed)
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
