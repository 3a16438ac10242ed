"""
The benchmark: `make bench`.

Runs the service, the naive relay and any peers beside each other, in turns, on one core, with the
load and the stand-in for Groq on another; prints a table of medians and ratios, and writes
bench/results.json and bench/results.svg. bench/README.md says how to read them.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

from bench.growth import lookup_microseconds
from tests.servers import RedisServer, free_port, wait_until

ROOT = Path(__file__).parent.parent
CORES = sorted(psutil.Process().cpu_affinity() or [0])
RELAY_CORE, LOAD_CORE = CORES[0], CORES[-1]


@dataclass
class Sizes:
    """How much is measured; `--tiny` is for a check that everything runs."""

    rounds: int = 3
    seconds: float = 2.0
    callers: int = 50
    flood_tokens: int = 500
    paced_tokens: int = 200
    paced_turns: int = 3
    """How often the paced workloads take turns in a round: their cost swings with the machine."""
    pace: float = 0.01
    json_tokens: int = 100
    first_callers: int = 10
    first_tokens: int = 10
    first_seconds: float = 2.0
    idle_streams: int = 2000
    growth_streams: tuple[int, ...] = (10, 100, 1000)
    growth_tokens_per_second: int = 5000
    growth_seconds: float = 4.0


TINY = Sizes(
    rounds=1,
    seconds=0.1,
    callers=4,
    flood_tokens=20,
    paced_tokens=10,
    paced_turns=1,
    first_callers=2,
    first_seconds=0.1,
    idle_streams=10,
    growth_streams=(2, 4),
    growth_tokens_per_second=100,
    growth_seconds=0.3,
)


@dataclass
class Target:
    """A relay under test, or the stand-in itself."""

    name: str
    port: int
    process: psutil.Process
    host: str = "127.0.0.1"
    is_direct: bool = False
    has_websocket: bool = True

    def mode(self, mode: str) -> str:
        if not self.is_direct:
            return mode
        return "direct" if mode == "sse" else "direct-json"

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


def start(command: list[str], core: int, **environ: object) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in environ.items()}},
        stdout=subprocess.DEVNULL,
    )
    with contextlib.suppress(AttributeError):  # where the system cannot pin
        psutil.Process(process.pid).cpu_affinity([core])
    return process


def is_listening(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Bench:
    """The processes of one run."""

    def __init__(self, stack: contextlib.ExitStack, sizes: Sizes) -> None:
        self.stack = stack
        self.sizes = sizes
        self.redis = stack.enter_context(RedisServer())
        self.standin_port = self._serve("-m", "bench.standin", "{port}")[0]

    def _serve(self, *command: str, core: int = LOAD_CORE, **environ: object) -> tuple[int, int]:
        port = free_port()
        arguments = [part.replace("{port}", str(port)) for part in command]
        process = start(arguments, core, PORT=port, **environ)
        self.stack.callback(process.wait)
        self.stack.callback(process.terminate)
        wait_until(lambda: is_listening(port))
        return port, process.pid

    def direct(self) -> Target:
        return Target("direct", self.standin_port, psutil.Process(), is_direct=True)

    def service(self, **environ: object) -> Target:
        settings = {
            "GROQ_API_KEY": "bench",
            "GROQ_BASE_URL": f"http://127.0.0.1:{self.standin_port}/openai/v1",
            "REDIS_ADDR": self.redis.address,
            "MAX_CONCURRENT": 10_000,
            **environ,
        }
        port, pid = self._serve("server.py", core=RELAY_CORE, **settings)
        return Target("service", port, psutil.Process(pid))

    def naive(self) -> Target:
        port, pid = self._serve(
            *("-m", "uvicorn", "bench.naive:app", "--port", "{port}", "--no-access-log"),
            core=RELAY_CORE,
            GROQ_BASE_URL=f"http://127.0.0.1:{self.standin_port}/openai/v1",
        )
        return Target("naive", port, psutil.Process(pid), has_websocket=False)

    def tls_service(self) -> Target:
        """The service in front of a stand-in that speaks TLS."""
        import trustme

        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(directory / "ca.pem")
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(
            directory / "server.pem"
        )
        port, _ = self._serve(
            *("-m", "bench.standin", "{port}"), "--certificate", str(directory / "server.pem")
        )
        target = self.service(
            GROQ_BASE_URL=f"https://localhost:{port}/openai/v1",
            SSL_CERT_FILE=directory / "ca.pem",
        )
        target.name = "service over TLS"
        return target

    def load(self, target: Target, mode: str, **order: Any) -> dict[str, Any]:
        """Run one load to its end; return its results."""
        process = self._start_load(target, mode, order)
        printed, _ = process.communicate(timeout=120)
        results: dict[str, Any] = json.loads(printed)
        assert results["wrong"] == 0, f"{target.name} sent {results['wrong']} wrong replies"
        return results

    @contextlib.contextmanager
    def held(self, target: Target, streams: int, interval: float = -1.0) -> Iterator[None]:
        """Hold streams open that have had their first token; by default it is their only one."""
        order = {"callers": streams, "tokens": 1_000_000, "interval": interval, "seconds": 0.0}
        process = self._start_load(target, "sse", order, "--hold")
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()
        process.wait(60)
        process.stdout.close()

    def _start_load(
        self, target: Target, mode: str, order: dict[str, Any], *options: str
    ) -> subprocess.Popen[bytes]:
        full = {"mode": target.mode(mode), "host": target.host, "port": target.port, **order}
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.load", json.dumps(full), *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with contextlib.suppress(AttributeError):
            psutil.Process(process.pid).cpu_affinity([LOAD_CORE])
        return process

    # The workloads; each returns figures of one round.

    def flood(self, target: Target, mode: str = "sse") -> dict[str, float]:
        sizes = self.sizes
        results = self.load(
            target,
            mode,
            callers=sizes.callers,
            tokens=sizes.flood_tokens,
            interval=0.0,
            seconds=sizes.seconds,
        )
        first = sorted(results["first"])
        return {
            "tokens_per_second": results["replies"] * sizes.flood_tokens / results["elapsed"],
            "first_p99_to_median": percentile(first, 99) / median(first),
        }

    def paced(self, target: Target, mode: str = "sse") -> dict[str, float]:
        sizes = self.sizes
        return {
            "cpu_us_per_token": self._cpu_per_token(
                target, mode, sizes.callers, sizes.paced_tokens, sizes.pace
            )
        }

    def json(self, target: Target) -> dict[str, float]:
        sizes = self.sizes
        results = self.load(
            target,
            "json",
            callers=sizes.callers,
            tokens=sizes.json_tokens,
            interval=0.0,
            seconds=sizes.seconds,
        )
        return {"requests_per_second": results["replies"] / results["elapsed"]}

    def first_token(self, target: Target) -> dict[str, float]:
        """Of callers who are there at once, each with its own beat; and who also ask at once."""
        sizes = self.sizes
        apart = self._first_tokens(target, sizes.first_tokens * sizes.pace / sizes.first_callers)
        at_once = self._first_tokens(target, 0.0)
        return {
            "median_ms": median(apart),
            "p99_ms": percentile(apart, 99),
            "same_moment_median_ms": median(at_once),
            "same_moment_p99_ms": percentile(at_once, 99),
        }

    def _first_tokens(self, target: Target, stagger: float) -> list[float]:
        """Return the milliseconds to each first token."""
        sizes = self.sizes
        results = self.load(
            target,
            "sse",
            callers=sizes.first_callers,
            tokens=sizes.first_tokens,
            interval=sizes.pace,
            seconds=sizes.first_seconds,
            stagger=stagger,
        )
        return [seconds * 1000 for seconds in results["first"]]

    def idle(self, target: Target) -> dict[str, float]:
        streams = self.sizes.idle_streams
        with self.held(target, min(streams, 100)):
            pass  # what the first streams bring with them is not the streams' own
        before = target.process.memory_info().rss
        with self.held(target, streams):
            after = target.process.memory_info().rss
        return {"kb_per_stream": (after - before) / streams / 1024}

    def growth(self, target: Target) -> dict[str, float]:
        """As many tokens a second over more and more streams, once all of them run."""
        sizes, figures = self.sizes, {}
        for streams in sizes.growth_streams:
            with self.held(target, streams, streams / sizes.growth_tokens_per_second):
                before, started_at = target.cpu_seconds(), time.perf_counter()
                time.sleep(sizes.growth_seconds)
                cpu = target.cpu_seconds() - before
                tokens = (time.perf_counter() - started_at) * sizes.growth_tokens_per_second
            figures[f"cpu_us_per_token_at_{streams}"] = cpu / tokens * 1e6
        return figures

    def _cpu_per_token(
        self, target: Target, mode: str, callers: int, tokens: int, interval: float
    ) -> float:
        before = target.cpu_seconds()
        self.load(target, mode, callers=callers, tokens=tokens, interval=interval, seconds=0.0)
        return (target.cpu_seconds() - before) / (callers * tokens) * 1e6


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1] if len(values) > 1 else values[0]


def peer(text: str) -> Target:
    """Parse `NAME=http://HOST:PORT,PID`."""
    name, _, rest = text.partition("=")
    url, _, pid = rest.rpartition(",")
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    return Target(name, int(port), psutil.Process(int(pid)), host=host)


def measure(sizes: Sizes, peers: list[Target]) -> dict[str, Any]:
    """Run all workloads; return the median of each figure, by workload and target."""
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {}

    def note(workload: str, target: Target, figures: dict[str, float]) -> None:
        rounds.setdefault(workload, {}).setdefault(target.name, []).append(figures)

    with contextlib.ExitStack() as stack:
        bench = Bench(stack, sizes)
        direct, naive, service = bench.direct(), bench.naive(), bench.service()
        relays = [naive, service, *peers]
        bench.first_token(service)  # a connection to Redis, a warm pool
        for number in range(sizes.rounds):
            print(f"round {number + 1} of {sizes.rounds}", file=sys.stderr, flush=True)
            measure_round(bench, direct, relays, note)
        print("idle, growth, TLS", file=sys.stderr, flush=True)
        fresh = bench.service()
        for target in [fresh, *peers]:
            note("idle", target, bench.idle(target))
        for _ in range(sizes.rounds):
            note("growth", service, bench.growth(service))
        tls = bench.tls_service()
        bench.first_token(tls)
        for _ in range(sizes.rounds):
            note("flood", tls, bench.flood(tls))
    note("lookups", service, asyncio.run(lookup_microseconds()))
    return {
        workload: {
            name: {figure: median(each[figure] for each in figures) for figure in figures[0]}
            for name, figures in targets.items()
        }
        for workload, targets in rounds.items()
    }


def measure_round(
    bench: Bench,
    direct: Target,
    relays: list[Target],
    note: Callable[[str, Target, dict[str, float]], None],
) -> None:
    """Run the workloads in which the relays take turns, once; the paced ones more often."""
    sockets = [target for target in relays if target.has_websocket]
    for target in [direct, *relays]:
        note("flood", target, bench.flood(target))
        note("json", target, bench.json(target))
        note("first token", target, bench.first_token(target))
    for target in sockets:
        note("ws-flood", target, bench.flood(target, "ws"))
    for _ in range(bench.sizes.paced_turns):
        for target in relays:
            note("paced", target, bench.paced(target))
        for target in sockets:
            note("ws-paced", target, bench.paced(target, "ws"))


def main() -> None:
    from bench.report import draw, table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=URL,PID")
    parser.add_argument("--tiny", action="store_true", help="only check that everything runs")
    parser.add_argument("--output", type=Path, default=ROOT / "bench")
    options = parser.parse_args()
    started_at = time.monotonic()
    figures = measure(TINY if options.tiny else Sizes(), options.peer)
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(CORES),
        "seconds": round(time.monotonic() - started_at),
    }
    results = {"machine": machine, "figures": figures}
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(figures, options.output / "results.svg")
    print(table(figures))


if __name__ == "__main__":
    main()
