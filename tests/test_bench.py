"""The benchmark runs; at these sizes its figures mean nothing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import only_with_coverage
from tests.servers import ROOT, output_of

# Workloads that the naive relay cannot run.
SERVICE = {"json-history", "ws-flood", "ws-paced", "idle", "growth", "lookups"}
WORKLOADS = {"flood", "paced", "json", "first token", *SERVICE}
RELAYS = {"naive", "service", "service, kept"}


def run(directory: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Run a tiny benchmark; return what it printed and the results that it wrote."""
    command = [sys.executable, "-m", "bench.run", "--tiny", "--output", str(directory), *options]
    return output_of(command), json.loads((directory / "results.json").read_text())


@only_with_coverage
@pytest.mark.timeout(180)
def test_the_benchmark_measures_every_workload_and_draws_a_plot(tmp_path: Path) -> None:
    printed, results = run(tmp_path)
    figures = results["figures"]
    assert set(figures) == WORKLOADS
    assert {workload for workload in WORKLOADS if "naive" not in figures[workload]} == SERVICE
    assert {*RELAYS, "direct", "service over TLS"} == set(figures["flood"])
    assert set(figures["paced"]) == RELAYS
    assert "flood, kept / not kept" in printed
    assert "| ws-flood" in printed
    assert "<svg" in (tmp_path / "results.svg").read_text()


@only_with_coverage
@pytest.mark.timeout(180)
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_one_workload_is_compared_with_a_revision(tmp_path: Path) -> None:
    printed, results = run(tmp_path, "--only", "json-history", "--against", "HEAD")
    assert results["figures"].keys() == {"json-history"}
    assert results["figures"]["json-history"].keys() == {"service", "HEAD"}
    assert results["against"]["revision"] == "HEAD"
    assert "x HEAD" in printed
