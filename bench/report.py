"""The table and the plot of a run."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from bench.targets import KEPT

Results = dict[str, dict[str, dict[str, float]]]  # figures by workload, target and name
HEADER = ["workload", "figure", "target", "value", "x naive", "aim", ""]
BASELINE = {"ws-flood": "flood", "ws-paced": "paced"}  # where naive, without WebSocket, is taken
AIMS = {("flood", "first_p99_to_median"): "<= 3", ("idle", "kb_per_stream"): "<= 55"}
AIMS_OVER_NAIVE = {
    ("flood", "tokens_per_second"): ">= 8 x naive",
    ("paced", "cpu_us_per_token"): "<= 0.45 x naive",
    ("json", "requests_per_second"): ">= 8 x naive",
    ("ws-flood", "tokens_per_second"): ">= 5 x naive",
    ("ws-paced", "cpu_us_per_token"): "<= 0.55 x naive",
}
AIMS_AGAINST = {
    ("flood", "tokens_per_second"): ">= 0.95",
    ("paced", "cpu_us_per_token"): "<= 1.05",
    ("json", "requests_per_second"): ">= 1.1",
    ("json-history", "cpu_us_per_request"): "<= 0.75",
    ("ws-flood", "tokens_per_second"): ">= 0.95",
    ("ws-paced", "cpu_us_per_token"): "<= 1.05",
}
KEPT_AIMS = [("flood", "tokens_per_second", ">= 0.87"), ("paced", "cpu_us_per_token", "<= 1.05")]


def table(results: Results, against: str | None = None) -> str:
    """Return every figure of every target with its ratios, and what the service should reach."""
    rows = [HEADER + ([f"x {against}", "aim", ""] if against else [])]
    compared = ratios(results, against)
    for workload, targets in results.items():
        for target, figures in targets.items():
            for name, value in figures.items():
                figure = (workload, name) if target == "service" else ("", "")
                naive = results.get(BASELINE.get(workload, workload), {}).get("naive", {}).get(name)
                row = [workload, name, target, f"{value:,.1f}"]
                row += judged(value / naive if naive else None, AIMS_OVER_NAIVE.get(figure))
                if figure in AIMS:
                    row[-2:] = judged(value, AIMS[figure])[1:]
                if against:
                    ratio = compared.get(figure[0], {}).get(figure[1])
                    row += judged(ratio, AIMS_AGAINST.get(figure))
                rows.append(row)
    for name, target, value, aim in derived(results, against):
        shown, *verdict = judged(value, aim)
        rows.append(["derived", name, target, shown, "", *verdict, *([""] * 3 if against else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def judged(value: float | None, aim: str | None) -> list[str]:
    """Return a value, its aim and whether it is reached, as cells."""
    if value is None:
        return ["", "", ""]
    if not aim:
        return [f"{value:.2f}", "", ""]
    sense, limit, *_ = aim.split()
    is_reached = value >= float(limit) if sense == ">=" else value <= float(limit)
    return [f"{value:.2f}", aim, "reached" if is_reached else "MISSED"]


def ratios(results: Results, against: str | None) -> dict[str, dict[str, float]]:
    """Return the service's figures as multiples of a revision's."""
    return {
        workload: {n: targets["service"][n] / value for n, value in theirs.items() if value}
        for workload, targets in results.items()
        if (theirs := targets.get(against or ""))
    }


def derived(results: Results, against: str | None) -> Iterator[tuple[str, str, float, str]]:
    """Yield what is computed from two figures: its name, the target, the value and the aim."""
    first = results.get("first token", {})
    direct = first.get("direct", {})
    for target, figures in first.items():
        if target != "direct":
            added = figures["median_ms"] - direct["median_ms"]
            aim = "<= 2" if target == "service" else ""
            yield "first token, added at the median, ms", target, added, aim
            added = figures["same_moment_median_ms"] - direct["same_moment_median_ms"]
            yield "the same, asked at one moment, ms", target, added, ""
    if against in first:
        added = first["service"]["median_ms"] - first[against]["median_ms"]
        yield f"first token, more than {against} at the median, ms", "service", added, "<= 0.3"
    for workload, name, aim in KEPT_AIMS:
        if kept := results.get(workload, {}).get(KEPT):
            ratio = kept[name] / results[workload]["service"][name]
            yield f"{workload}, kept / not kept", KEPT, ratio, aim
    if costs := list(results.get("growth", {}).get("service", {}).values()):
        yield "most streams / next", "service", costs[-1] / (costs[-2] or 1), "<= 1.3"
    if lookups := list(results.get("lookups", {}).get("service", {}).values()):
        few, many = sum(lookups[:3]), sum(lookups[3:])
        yield "lookups of a turn, 10,000 / 10", "service", many / few, "<= 1.2"


def draw(results: Results, path: Path) -> None:
    """Draw the throughputs and the costs beside each other."""
    panels = [
        ("tokens_per_second", ["flood", "ws-flood"], "tokens a second, more is better"),
        ("cpu_us_per_token", ["paced", "ws-paced"], "CPU us a token, less is better"),
        ("requests_per_second", ["json"], "JSON requests a second, more is better"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.2), layout="constrained")
    for axis, (name, workloads, title) in zip(axes, panels, strict=True):
        bars = {
            f"{workload}\n{target}": values[name]
            for workload in workloads
            for target, values in results.get(workload, {}).items()
            if name in values and target != "direct"
        }
        colours = ["tab:gray" if "naive" in label else "tab:blue" for label in bars]
        axis.barh(list(bars), list(bars.values()), color=colours)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
