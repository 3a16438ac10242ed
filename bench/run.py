"""
The benchmark: `make bench`.

Measures the service, the naive relay and any others in turns, on one core, with the load and the
stand-in for Groq on another. Prints a table of medians and ratios; a complete run also writes
bench/results.json and bench/results.svg. bench/README.md explains how to read them.
"""

import argparse
import asyncio
import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil

from bench import workloads
from bench.report import Results, draw, ratios, table
from bench.targets import CORES, Target, Targets
from bench.workloads import IN_TURNS, TINY, Figures, Sizes
from tests.servers import ROOT

WORKLOADS = (*IN_TURNS, *workloads.ALONE)


def measure(
    sizes: Sizes, only: Collection[str], peers: list[Target], against: str | None
) -> Results:
    """Run the workloads; return the median of each figure."""
    noted: dict[str, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    services = ["service", against] if against else ["service"]
    for number in range(sizes.rounds):
        show(f"round {number + 1} of {sizes.rounds}")
        with ExitStack() as stack:  # new processes, since no two run at the same speed
            start = Targets(stack)
            relays = [start.service(name) for name in services]
            kept = start.keeping_service()
            for relay in (*relays, kept):
                workloads.first_token(relay, TINY)  # connects to Redis and fills the pool
            targets = [start.direct(), start.naive(), *relays, kept, *peers]
            if "flood" in only:
                targets.append(start.tls_service())
            for workload, target in turns(targets, sizes, only, is_odd=number % 2 == 1):
                noted[workload][target.name].append(IN_TURNS[workload](target, sizes))
            if "growth" in only:
                noted["growth"]["service"].append(workloads.growth(relays[0], sizes))
    if "idle" in only:
        show("idle")
        with ExitStack() as stack:
            for target in [*map(Targets(stack).service, services), *peers]:
                noted["idle"][target.name].append(workloads.idle(target, sizes))
    if "lookups" in only:
        noted["lookups"]["service"] = [asyncio.run(workloads.lookups())]
    return {
        workload: {
            target: {name: median(each[name] for each in rounds) for name in rounds[0]}
            for target, rounds in targets.items()
        }
        for workload, targets in noted.items()
    }


def turns(
    targets: list[Target], sizes: Sizes, only: Collection[str], *, is_odd: bool
) -> Iterator[tuple[str, Target]]:
    """Yield each turn of a round; the order alternates, so that it favours no target."""
    for workload in filter(only.__contains__, IN_TURNS):
        for turn in range(1 if workload in workloads.LONG else sizes.turns):
            order = targets[::-1] if turn % 2 != is_odd else targets
            yield from ((workload, target) for target in order if workload in target.workloads)


def show(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def peer(text: str) -> Target:
    """Parse `NAME=http://HOST:PORT,PID`."""
    name, _, rest = text.partition("=")
    url, _, pid = rest.rpartition(",")
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    return Target(name, int(port), psutil.Process(int(pid)), host)


def chosen(text: str) -> set[str]:
    """Parse a list of workloads with commas between them."""
    names = {name.strip() for name in text.split(",")}
    if unknown := names - set(WORKLOADS):
        raise argparse.ArgumentTypeError(f"{unknown} must be among {', '.join(WORKLOADS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--against", metavar="REV", help="measure this git revision too, and compare with it")
    add("--peer", type=peer, action="append", default=[], metavar="NAME=URL,PID")
    add("--only", type=chosen, default=set(WORKLOADS), help=", ".join(WORKLOADS))
    add("--rounds", type=int, help="the default is 3")
    add("--tiny", action="store_true", help="only check that everything runs")
    add("--output", type=Path, help="write results.json and results.svg to this directory")
    options = parser.parse_args()
    sizes = TINY if options.tiny else Sizes()
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds)
    started_at, against = time.monotonic(), options.against
    figures = measure(sizes, options.only, options.peer, against)
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(CORES),
        "seconds": round(time.monotonic() - started_at),
    }
    results: dict[str, object] = {"machine": machine, "figures": figures}
    if against:
        results["against"] = {"revision": against, "ratios": ratios(figures, against)}
    is_complete = not options.tiny and options.only == set(WORKLOADS)
    if directory := options.output or (ROOT / "bench" if is_complete else None):
        (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        draw(figures, directory / "results.svg")
    print(table(figures, against))


if __name__ == "__main__":
    main()
