"""
Several replicas behind one load balancer, while one is killed and one is rolled.

    python -m bench.replicas [--seconds 30] [--callers 60]

Three replicas share their histories through Redis; haproxy (from Debian's packages) asks `/ready`
and picks one of them at random for each chat, so that each conversation hops; a header says which.
Fails unless every chat succeeded that the kill did not cut, and every conversation is whole.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import httpx
from websockets.exceptions import InvalidStatus, WebSocketException

from tests.fake_groq import FakeGroq, Script
from tests.servers import Caller, RedisServer, Service, body, free_port, wait_until

REPLICAS = 3
REPLICA = "x-replica"
"""The header in which haproxy says which replica it chose; in its own errors too."""
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
    http-after-response set-header {replica} %s
backend replicas
    balance random
    option httpchk GET /ready
    default-server check inter 200ms fall 1 rise 1
{servers}
"""


@dataclass
class Chat:
    """One question, and what came of it."""

    conversation: str
    asked: str
    began_at: float = field(default_factory=time.monotonic)
    ended_at: float = float("inf")
    replica: str | None = None
    """Who had it, as far as that is known."""
    error: str | None = None


@dataclass
class Talk:
    """One caller's conversation, and its chats."""

    name: str = field(default_factory=lambda: uuid4().hex)
    chats: list[Chat] = field(default_factory=list)

    @property
    def acknowledged(self) -> list[str]:
        return [chat.asked for chat in self.chats if not chat.error]


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
        self.killed = ""
        self.kill_began_at = self.kill_ended_at = float("inf")
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
        servers = [f"    server {name_of(r)} 127.0.0.1:{r.port}" for r in self.replicas]
        text = CONFIGURATION.format(
            port=self.front.port, replica=REPLICA, servers="\n".join(servers)
        )
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
        with ThreadPoolExecutor(len(self.talks)) as pool:
            callers = [pool.submit(self._talk, talk) for talk in self.talks]
            try:
                time.sleep(seconds / 4)
                self._kill(self.replicas[0])
                time.sleep(seconds / 4)
                self._roll(self.replicas[1])
                time.sleep(seconds / 2)
            finally:
                self._stop.set()
        for caller in callers:
            caller.result()  # raises what no caller should meet

    def _kill(self, replica: Service) -> None:
        self.killed, self.kill_began_at = name_of(replica), time.monotonic()
        replica.process.kill()
        self.kill_ended_at = time.monotonic()
        self._start_again(replica)

    def _roll(self, replica: Service) -> None:
        replica.process.send_signal(signal.SIGTERM)
        assert replica.process.wait(60) == 0, "a rolled replica exits with 0"
        self._start_again(replica)

    def _start_again(self, replica: Service) -> None:
        replica.process.end()
        replica.start()

    def _talk(self, talk: Talk) -> None:
        caller = Caller(self.front.port)
        # A later request on a connection fails without an answer of haproxy's that could say where.
        caller.http.headers["connection"] = "close"
        while not self._stop.is_set():
            chat = Chat(talk.name, f"question {len(talk.chats) + 1}")
            talk.chats.append(chat)
            ask = random.choice((over_http, over_events, over_websocket))
            try:
                ask(caller, chat)
            except (httpx.HTTPError, WebSocketException, OSError, Failed) as error:
                chat.error = f"{ask.__name__}: {error!r}"
            chat.ended_at = time.monotonic()
            if chat.error:
                time.sleep(PAUSE)
        caller.http.close()

    def failed(self) -> list[Chat]:
        return [chat for talk in self.talks for chat in talk.chats if chat.error]

    def was_killed(self, chat: Chat) -> bool:
        """Tell whether it was on the killed replica, and ran when that was killed."""
        ran = chat.began_at < self.kill_ended_at and chat.ended_at > self.kill_began_at
        return ran and chat.replica == self.killed

    def failures(self) -> list[str]:
        """Return the chats that failed for no reason, and the conversations that are torn."""
        found = [
            f"{chat.ended_at - self.kill_began_at:+.1f} s from the kill, on {chat.replica}, "
            f"{chat.error}"
            for chat in self.failed()
            if not self.was_killed(chat)
        ]
        return found + [f"{talk.name} is torn" for talk in self.talks if not self._is_whole(talk)]

    def _is_whole(self, talk: Talk) -> bool:
        contents = self.front.contents(talk.name)
        reply = "".join(self.groq.default.tokens or ())
        kept = contents[::2]
        known = {chat.asked for chat in talk.chats}
        return (
            set(contents[1::2]) <= {reply}
            and [asked for asked in kept if asked in talk.acknowledged] == talk.acknowledged
            and set(kept) <= known
            and len(set(kept)) == len(kept)
        )


class Failed(Exception):
    """A chat ended otherwise than it should."""


def name_of(replica: Service) -> str:
    return f"r{replica.port}"


def over_http(caller: Caller, chat: Chat) -> None:
    answer = caller.chat(chat.asked, chat.conversation, stream=False)
    chat.replica = answer.headers.get(REPLICA)
    if answer.status_code != 200:
        raise Failed(answer.status_code, answer.text)


def over_events(caller: Caller, chat: Chat) -> None:
    with caller.stream(chat.asked, chat.conversation) as (answer, events):
        chat.replica = answer.headers.get(REPLICA)
        if answer.status_code != 200:
            raise Failed(answer.status_code, answer.read())
        received = [event.data for event in events]
    if received[-1:] != ["[DONE]"]:
        raise Failed(received[-1:])


def over_websocket(caller: Caller, chat: Chat) -> None:
    try:
        socket = caller.socket()
    except InvalidStatus as error:
        chat.replica = error.response.headers.get(REPLICA)
        raise
    with socket:
        assert socket.response
        chat.replica = socket.response.headers.get(REPLICA)
        socket.send(json.dumps(body(chat.asked, chat.conversation)))
        while "token" in (message := json.loads(socket.recv(30))):
            pass
    if message != {"done": "true"}:
        raise Failed(message)


def report(simulation: Simulation) -> None:
    """Print what was done, and what it cost Redis."""
    chats = sum(len(talk.acknowledged) for talk in simulation.talks)
    failed = simulation.failed()
    killed = sum(map(simulation.was_killed, failed))
    print(f"{len(simulation.talks)} callers, {chats} chats", end=", ")
    print(f"{killed} cut by the kill, {len(failed) - killed} failed otherwise")
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
