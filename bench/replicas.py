"""
Several replicas behind one load balancer, while one is killed and one is rolled.

    python -m bench.replicas [--seconds 30] [--callers 60]

Three replicas share their histories through Redis; haproxy (from Debian's packages) asks `/ready`
and picks one of them at random for each chat, so that each conversation hops. Fails unless every
chat succeeded that was not on the killed replica, and every conversation is whole.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import httpx
from websockets.exceptions import WebSocketException

from tests.fake_groq import FakeGroq, Script
from tests.servers import Caller, RedisServer, Service, body, free_port, wait_until

REPLICAS = 3
KILL_WINDOW = 2.0
"""Seconds around the kill in which a chat may have been on the killed replica."""
PAUSE = 0.1
"""Seconds until a caller whose chat has failed asks again."""
CONFIGURATION = """
global
    maxconn 4096
defaults
    mode http
    retries 3
    option redispatch
    timeout connect 2s
    timeout client 60s
    timeout server 60s
frontend chat
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance random
    option httpchk GET /ready
    default-server check inter 200ms fall 1 rise 1
{servers}
"""


@dataclass
class Talk:
    """One caller's conversation, and what came of its chats."""

    name: str = field(default_factory=lambda: uuid4().hex)
    acknowledged: list[str] = field(default_factory=list)
    failed: list[tuple[float, str, str]] = field(default_factory=list)
    """When, what was asked, and how it failed."""


class Simulation:
    """The processes, and what their callers see."""

    def __init__(self, stack: ExitStack, callers: int) -> None:
        tokens = [f"t{number} " for number in range(20)]
        self.groq = stack.enter_context(FakeGroq(Script(tokens, interval=0.01)))
        self.redis = stack.enter_context(RedisServer("--appendonly", "yes"))
        self.replicas = [stack.enter_context(self._replica()) for _ in range(REPLICAS)]
        self.front = Caller(free_port())
        stack.enter_context(self.front.http)
        self._balance(stack)
        self.talks = [Talk() for _ in range(callers)]
        self.killed_at = float("inf")
        self._stop = threading.Event()

    def _replica(self) -> Service:
        return Service(
            GROQ_BASE_URL=self.groq.url,
            HISTORY_STORE="redis",
            REDIS_ADDR=self.redis.address,
            MAX_EXCHANGES=1000,
            DRAIN_DELAY=1,
        )

    def _balance(self, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [f"    server r{r.port} 127.0.0.1:{r.port}" for r in self.replicas]
        text = CONFIGURATION.format(port=self.front.port, servers="\n".join(servers))
        (directory / "haproxy.cfg").write_text(text)
        haproxy = shutil.which("haproxy") or "/usr/sbin/haproxy"
        command = [haproxy, "-db", "-q", "-f", str(directory / "haproxy.cfg")]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        wait_until(self._is_served)

    def _is_served(self) -> bool:
        try:
            return self.front.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def run(self, seconds: float) -> None:
        """Let all callers talk for so long, and meanwhile kill one replica and roll another."""
        threads = [threading.Thread(target=self._talk, args=(talk,)) for talk in self.talks]
        for thread in threads:
            thread.start()
        try:
            time.sleep(seconds / 4)
            self._kill(self.replicas[0])
            time.sleep(seconds / 4)
            self._roll(self.replicas[1])
            time.sleep(seconds / 2)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _kill(self, replica: Service) -> None:
        self.killed_at = time.monotonic()
        replica.process.kill()
        self._start_again(replica)

    def _roll(self, replica: Service) -> None:
        replica.process.send_signal(signal.SIGTERM)
        assert replica.process.wait(60) == 0, "a rolled replica exits with 0"
        self._start_again(replica)

    def _start_again(self, replica: Service) -> None:
        replica.process.end()
        replica.start()

    def _talk(self, talk: Talk) -> None:
        caller, number = Caller(self.front.port), 0
        while not self._stop.is_set():
            number += 1
            asked = f"question {number}"
            ask = random.choice((over_http, over_events, over_websocket))
            try:
                ask(caller, asked, talk.name)
                talk.acknowledged.append(asked)
            except (httpx.HTTPError, WebSocketException, OSError, Failed) as error:
                talk.failed.append((time.monotonic(), asked, f"{ask.__name__}: {error!r}"))
                time.sleep(PAUSE)
        caller.http.close()

    def failures(self) -> list[str]:
        """Return the chats that failed away from the kill, and the conversations that are torn."""
        found = [
            f"{at - self.killed_at:+.1f} s from the kill, {how}"
            for talk in self.talks
            for at, _, how in talk.failed
            if not 0 <= at - self.killed_at <= KILL_WINDOW
        ]
        return found + [f"{talk.name} is torn" for talk in self.talks if not self._is_whole(talk)]

    def _is_whole(self, talk: Talk) -> bool:
        contents = self.front.contents(talk.name)
        reply = "".join(self.groq.default.tokens or ())
        kept = contents[::2]
        known = {*talk.acknowledged, *(asked for _, asked, _ in talk.failed)}
        return (
            set(contents[1::2]) <= {reply}
            and [asked for asked in kept if asked in talk.acknowledged] == talk.acknowledged
            and set(kept) <= known
            and len(set(kept)) == len(kept)
        )


class Failed(Exception):
    """A chat ended otherwise than it should."""


def over_http(caller: Caller, asked: str, name: str) -> None:
    answer = caller.chat(asked, name, stream=False)
    if answer.status_code != 200:
        raise Failed(answer.status_code, answer.text)


def over_events(caller: Caller, asked: str, name: str) -> None:
    with caller.stream(asked, name) as (answer, events):
        if answer.status_code != 200:
            raise Failed(answer.status_code, answer.read())
        *_, last = events
    if last.data != "[DONE]":
        raise Failed(last.data)


def over_websocket(caller: Caller, asked: str, name: str) -> None:
    with caller.socket() as socket:
        socket.send(json.dumps(body(asked, name)))
        while "token" in (message := json.loads(socket.recv(30))):
            pass
    if message != {"done": "true"}:
        raise Failed(message)


def report(simulation: Simulation) -> None:
    """Print what was done, and what it cost Redis."""
    chats = sum(len(talk.acknowledged) for talk in simulation.talks)
    failed = sum(len(talk.failed) for talk in simulation.talks)
    print(f"{len(simulation.talks)} callers, {chats} chats, {failed} on the killed replica")
    with simulation.redis.client() as client:
        statistics: dict[str, dict[str, float]] = client.info("commandstats")
        for name in ("lrange", "pexpire", "eval", "get", "set"):
            calls = statistics.get(f"cmdstat_{name}", {"calls": 0, "usec": 0})
            per_chat = calls["calls"] / chats
            each = calls["usec"] / max(1, calls["calls"])
            print(f"redis {name}: {per_chat:.2f} a chat, {each:.1f} us each")
        keys = client.keys("chat:history:*")
        sizes = [int(client.memory_usage(key) or 0) for key in keys]
        exchanges = sum(client.llen(key) for key in keys)
    print(f"redis memory: {sum(sizes) / exchanges:.0f} bytes an exchange")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--callers", type=int, default=60)
    options = parser.parse_args()
    with ExitStack() as stack:
        simulation = Simulation(stack, options.callers)
        simulation.run(options.seconds)
        failures = simulation.failures()
        report(simulation)
    sys.exit("\n".join(failures) if failures else 0)


if __name__ == "__main__":
    main()
