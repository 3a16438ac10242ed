"""What the load runs against: the relays and the stand-in for Groq, each in its own process."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import trustme

from tests.servers import ROOT, Process, RedisServer, free_port, wait_until

CORES = sorted(psutil.Process().cpu_affinity() or [0])
RELAY_CORE, LOAD_CORE = CORES[0], CORES[-1]
LOAD_LIMIT = 120.0  # seconds after which a load is taken to be stuck
DIRECT = frozenset({"flood", "json", "first token"})
NAIVE = DIRECT | {"paced"}
KEPT = "service, kept"
ALL = NAIVE | {"json-history", "ws-flood", "ws-paced"}


@dataclass
class Target:
    """A relay under test, or the stand-in itself."""

    name: str
    port: int
    process: psutil.Process
    host: str = "127.0.0.1"
    workloads: frozenset[str] = ALL  # those in which it takes turns with the others
    is_kept: bool = False  # every reply could be resumed

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    @contextmanager
    def loaded(self, mode: str, **order: Any) -> Iterator[Process]:
        """Start a load; `order` has the other fields of `bench.load.Order`."""
        if self.name == "direct":
            mode = "direct" if mode == "sse" else "direct-json"
        where = {"host": self.host, "port": self.port, "is_kept": self.is_kept}
        full = json.dumps({"mode": mode, **where, **order})
        load = start(["-m", "bench.load", full], LOAD_CORE)
        try:
            yield load
        finally:
            load.end()

    def load(self, mode: str, **order: Any) -> dict[str, Any]:
        """Run a load to its end; return its results."""
        with self.loaded(mode, **order) as load:
            assert load.wait(LOAD_LIMIT) == 0, load.output
            results: dict[str, Any] = json.loads(load.lines[-1])
        assert results["wrong"] == 0, f"{self.name} sent {results['wrong']} wrong replies"
        return results

    @contextmanager
    def held(self, streams: int, interval: float = -1.0) -> Iterator[None]:
        """Hold streams open that have had their first token, which by default is the only one."""
        order = {"callers": streams, "tokens": 1_000_000, "interval": interval, "hold": True}
        with self.loaded("sse", **order) as load:
            load.wait_for_line("held\n".__eq__, LOAD_LIMIT)
            yield
            load.kill()


def start(
    command: list[str], core: int, directory: Path = ROOT, *, is_quiet: bool = False, **env: object
) -> Process:
    """Run Python on one core; a quiet process writes only to stderr."""
    shell = ["sh", "-c", 'exec "$@" > /dev/null', "sh"] if is_quiet else []
    process = Process([*shell, sys.executable, *command], env, directory)
    with suppress(AttributeError):  # macOS cannot pin
        psutil.Process(process.pid).cpu_affinity([core])
    return process


class Targets:
    """Starts targets, which the stack ends."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._standin = self._serve("direct", ["-m", "bench.standin", "{port}"], LOAD_CORE).port
        self._groq = f"http://127.0.0.1:{self._standin}/openai/v1"
        self._directories = {"service": ROOT}

    def direct(self) -> Target:
        return Target("direct", self._standin, psutil.Process(), workloads=DIRECT)

    def naive(self) -> Target:
        command = ["-m", "uvicorn", "bench.naive:app", "--port", "{port}", "--no-access-log"]
        target = self._serve("naive", command, RELAY_CORE, GROQ_BASE_URL=self._groq)
        target.workloads = NAIVE
        return target

    def service(self, name: str = "service", **settings: object) -> Target:
        """Start the service of this checkout, or that of a revision, with a Redis of its own."""
        settings = {
            "GROQ_API_KEY": "bench",
            "GROQ_BASE_URL": self._groq,
            "REDIS_ADDR": self._stack.enter_context(RedisServer()).address,
            "MAX_CONCURRENT": 10_000,
            **settings,
        }
        if name not in self._directories:
            self._directories[name] = self._checked_out(name)
        return self._serve(name, ["server.py"], RELAY_CORE, self._directories[name], **settings)

    def keeping_service(self) -> Target:
        """Start the service for replies that could be resumed; those that it holds cost it time."""
        target = self.service()
        target.name, target.workloads, target.is_kept = KEPT, frozenset({"flood", "paced"}), True
        return target

    def tls_service(self) -> Target:
        """Start the service in front of a stand-in that speaks TLS."""
        directory = self._temporary_directory()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(directory / "ca.pem")
        certificate = authority.issue_cert("localhost").private_key_and_cert_chain_pem
        certificate.write_to_path(directory / "server.pem")
        command = ["-m", "bench.standin", "{port}", str(directory / "server.pem")]
        url = f"https://localhost:{self._serve('TLS', command, LOAD_CORE).port}/openai/v1"
        target = self.service(GROQ_BASE_URL=url, SSL_CERT_FILE=directory / "ca.pem")
        target.name, target.workloads = "service over TLS", frozenset({"flood"})
        return target

    def _serve(
        self, name: str, command: list[str], core: int, directory: Path = ROOT, **env: object
    ) -> Target:
        port = free_port()
        arguments = [part.replace("{port}", str(port)) for part in command]
        process = start(arguments, core, directory, is_quiet=True, PORT=port, **env)
        self._stack.callback(process.end)

        def is_listening() -> bool:
            assert process.is_running, process.output
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(is_listening)
        return Target(name, port, psutil.Process(process.pid))

    def _checked_out(self, revision: str) -> Path:
        directory = self._temporary_directory()
        archive = directory / "checkout.tar"
        command = [shutil.which("git") or "git", "archive", "--output", str(archive)]
        subprocess.run([*command, "--end-of-options", revision], cwd=ROOT, check=True)
        shutil.unpack_archive(archive, directory, filter="data")
        return directory

    def _temporary_directory(self) -> Path:
        return Path(self._stack.enter_context(TemporaryDirectory()))
