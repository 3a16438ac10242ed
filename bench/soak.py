"""
The soak: `make soak`.

For ten minutes many callers ask over all transports, while Groq fails, callers vanish, and Redis
hangs and is killed. In the end nothing may be left over, and all figures must add up.
bench/README.md says how to read the result; the callers and the checks have modules of their own.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import chain
from math import inf
from statistics import mode

import httpx
import psutil

from bench import soak_checks as checks
from bench.soak_callers import FAULTS, TRANSPORTS, Caller, Seen
from tests.fake_groq import FakeGroq, Request, Script
from tests.servers import SECRETS, RedisServer, Service, wait_until

SETTINGS = {
    "GROQ_TIMEOUT": 3,
    "GROQ_FIRST_EVENT_TIMEOUT": 3,
    "GROQ_MAX_RETRIES": 0,  # so that there is one request to Groq for each reply
    "GROQ_CIRCUIT_FAILURES": 3,  # few, so that the circuit breaker opens from time to time
    "MAX_EXCHANGES": 20,
    "RESUME_TIMEOUT": 10,
}
TOKEN_INTERVAL = 0.02
# Seconds: less than uvicorn's, which might close a connection while a request is on its way.
KEEP_ALIVE_EXPIRY = 2.0
LONG_RUN = 300.0  # seconds from which memory is judged: before, histories and counts still fill
IDLE_LIMIT = 30.0  # seconds until all must have ended and idle connections to Groq be closed
REDIS_CONNECTIONS = 50  # what a replica's pool may hold
OUTAGE = "circuit breaker opened"  # the one error that may be logged, since it is true
SHOWN = 20  # problems shown for each check


class Soak:
    """One run: its processes, and what is observed."""

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
        uncounted = Script(interval=TOKEN_INTERVAL, prompt_tokens=None)
        self._groq = stack.enter_context(FakeGroq(uncounted))
        self._groq.on("[shared]", Script(interval=TOKEN_INTERVAL))
        for name, fault in FAULTS.items():
            self._groq.on(f"[{name}]", fault.script)
        self._redis = stack.enter_context(RedisServer())
        addresses = {"GROQ_BASE_URL": self._groq.url, "REDIS_ADDR": self._redis.address}
        # All replies begin at the first; the second knows them through Redis.
        self.service, self.other = self._replicas = [
            stack.enter_context(Service(**addresses, **SETTINGS)) for _ in range(2)
        ]
        self._processes = [psutil.Process(each.process.pid) for each in self._replicas]

    async def warm_up(self) -> None:
        """Make the service allocate what it allocates only once."""
        async with self._client() as http:
            await self._caller(0, http).ask_over_each_transport()

    async def run(self, callers: int, seconds: float) -> None:
        """Let the callers ask, while Redis fails."""
        until = time.monotonic() + seconds
        async with self._client() as http, asyncio.TaskGroup() as tasks:
            self.callers = [self._caller(number, http) for number in range(1, callers + 1)]
            runs = [caller.run(until) for caller in self.callers]
            for run in (*runs, self._disturb_redis(until), self._watch(until)):
                tasks.create_task(run)

    def _caller(self, number: int, http: httpx.AsyncClient) -> Caller:
        return Caller(number, self.seed, http, self.seen, self.other.url)

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_EXPIRY)
        return httpx.AsyncClient(base_url=self.service.url, limits=limits, timeout=None)

    async def _disturb_redis(self, until: float) -> None:
        chance = random.Random(f"{self.seed} Redis")
        redis = self._redis
        while time.monotonic() < until:
            for fail, recover in ((redis.pause, redis.resume), (redis.kill, redis.start)):
                await asyncio.sleep(chance.uniform(0.5, 5))  # often, resuming must succeed
                self.seen.redis_down_until = inf
                fail()
                await asyncio.sleep(chance.uniform(0.1, 1.5))
                await asyncio.to_thread(recover)
                self.seen.redis_down_until = time.monotonic()
            self.restarts += 1

    async def _watch(self, until: float) -> None:
        while time.monotonic() < until:
            self.memory.append(sum(each.memory_info().rss for each in self._processes))
            self.read_requests()
            self.read_log()
            await asyncio.sleep(1)

    def read_requests(self) -> None:
        """Count the requests that have reached Groq; keep only those that have not ended."""
        arrived = len(self._groq.requests)
        requests = [*self._unfinished, *self._groq.requests[:arrived]]
        del self._groq.requests[:arrived]
        self.arrived += arrived
        self._unfinished = [x for x in requests if not (x.answered or x.closed.is_set())]

    def read_log(self) -> None:
        """Check the replicas' new log lines, and drop them."""
        lines = []
        for replica in self._replicas:
            lines += (new := replica.process.lines[:])
            del replica.process.lines[: len(new)]
        text = "".join(lines)
        self.bad_lines += [f"a secret: {each}" for each in list(SECRETS) if each in text]
        for line in map(json.loads, lines):
            self.outages += line["message"] == OUTAGE
            if line["level"] == "ERROR" and line["message"] != OUTAGE:
                self.bad_lines.append(str(line))

    def holdings(self) -> Counter[str]:
        """Count the replicas' tasks, connections and other files."""
        # A probe of Redis or a request that is ending makes a brief difference.
        tasks = sum(
            mode(int(replica.metric("event_loop_tasks")) for _ in range(9))
            for replica in self._replicas
        )
        files = sum(each.num_fds() for each in self._processes)
        peers = {self._redis.port: "of Redis", self._groq.port: "of Groq"}
        found = [each.net_connections("tcp") for each in self._processes]
        connections = [x for x in chain(*found) if x.raddr]
        ends = Counter(peers.get(each.raddr.port, "of callers") for each in connections)
        # A connection that Redis has reset is in its pool still, and to the kernel only a file.
        files += ends["of Redis"] - len(connections)
        return Counter({"tasks": tasks, "files": files, **ends})

    def left_over(self, before: Counter[str]) -> list[str]:
        """Wait until everything has ended; return what has not."""

        def is_idle() -> bool:
            self.read_requests()
            return not self._unfinished and self.service.metric("chat_replies_active") == 0

        limits = before | Counter({"of Redis": 2 * REDIS_CONNECTIONS})
        limits["files"] += 2 * REDIS_CONNECTIONS
        limits["of Groq"] = 0
        if not comes(is_idle):
            return [f"replies are still running, {len(self._unfinished)} of them at Groq"]
        if not comes(lambda: self.holdings() <= limits):
            return [f"{self.holdings()}; the limits are {limits}"]
        with self._redis.client() as redis:
            return [f"{key} stays in Redis" for key in redis.scan_iter() if redis.ttl(key) == -1]

    def not_recovered(self) -> list[str]:
        """Return what is back and still not used."""
        service = self.service
        recoveries = {
            "Redis": lambda: all(each.metric("redis_up") == 1 for each in self._replicas),
            "Groq": lambda: (
                service.chat("hello").is_success and not service.metric("groq_circuit_state")
            ),
        }
        return [f"{name} is back but not used" for name, ok in recoveries.items() if not comes(ok)]


def comes(condition: Callable[[], bool]) -> bool:
    """Wait for the condition; return whether it came true."""
    with suppress(AssertionError):
        wait_until(condition, IDLE_LIMIT)
        return True
    return False


def soak(seconds: float, callers: int, seed: int) -> bool:
    """Run a soak and print what was seen; return whether all checks passed."""
    print(f"{callers} callers for {seconds:g} seconds, --seed {seed}", flush=True)
    is_long = seconds >= LONG_RUN
    with ExitStack() as stack:
        run = Soak(stack, seed)
        asyncio.run(run.warm_up())
        before = run.holdings()
        asyncio.run(run.run(callers, seconds))
        service, seen, most = run.service, run.seen, SETTINGS["MAX_EXCHANGES"]
        found = {
            "every reply ended in the right way": seen.wrong,
            "all has been tried": checks.untried(seen),
            "no task, connection, file or key is left over": run.left_over(before),
            "the metrics add up": checks.miscounted(service, run.other, seen, run.arrived),
            "conversations are whole": checks.broken_conversations(service, run.callers, most),
            "Redis and Groq are used again": run.not_recovered(),
        }
        if is_long:
            found["memory is level"] = checks.growing_memory(run.memory)
        print(table(run, before))
        run.read_log()
        found["the log has no fault and no secret"] = run.bad_lines
        for check, problems in found.items():
            print("\n    ".join([f"{'FAILED' if problems else 'ok':8}{check}", *problems[:SHOWN]]))
    if not is_long:
        print("        (a run this short shows memory but does not judge it)")
    return not any(found.values())


def table(run: Soak, before: Counter[str]) -> str:
    """Return what happened, and what the service held."""
    ends = ("completed", "cancelled", "failed", "refused", "vanished")
    rows = [["", *ends]]
    rows += [[x, *(str(run.seen.ends[x, end]) for end in ends)] for x in TRANSPORTS]
    memory = ", ".join(f"{each / 2**20:.1f}" for each in checks.memory_by_quarters(run.memory))
    resumed = {" ".join(key): count for key, count in run.seen.resumed.items()}
    faults = ", ".join(f"{name} {run.seen.faults[name]}" for name in FAULTS)
    return "\n".join(
        [
            *("".join(cell.rjust(11) for cell in row) for row in rows),
            f"came back: {resumed}",
            f"Groq's faults: {faults}; {run.outages} outages",
            f"Redis hung, was killed and was restarted: {run.restarts} times",
            f"median memory of each quarter: {memory} MiB",
            f"held before: {dict(before)}; at the end: {dict(run.holdings())}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="20 or more")
    parser.add_argument("--callers", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    sys.exit(0 if soak(**vars(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
