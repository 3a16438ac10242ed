"""The benchmark runs; what it measures at these sizes says nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT

WORKLOADS = {"flood", "paced", "json", "ws-flood", "ws-paced", "first token", "idle", "growth"}


@pytest.mark.timeout(180)
def test_the_benchmark_measures_every_workload_and_draws_a_plot(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.run", "--tiny", "--output", str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=170, check=False
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "results.json").read_text())["figures"]
    assert set(figures) == {*WORKLOADS, "lookups"}
    assert {"direct", "naive", "service"} <= set(figures["flood"])
    assert "| ws-flood" in ended.stdout
    assert "<svg" in (tmp_path / "results.svg").read_text()
