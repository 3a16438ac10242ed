"""The table and the plot of a run."""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

Figures = dict[str, dict[str, dict[str, float]]]
Limit = Callable[[float], bool]


def table(figures: Figures) -> str:
    """Return every figure of every target, its ratio to naive, and the target of the issue."""
    rows = [("workload", "figure", "target", "value", "x naive", "aim", "")]
    for workload, targets in figures.items():
        for name, values in targets.items():
            for figure, value in values.items():
                ratio = ratio_to_naive(figures, workload, figure, value)
                aim, verdict = judged(workload, name, figure, value, ratio)
                shown = f"{ratio:.2f}" if ratio is not None else ""
                rows.append((workload, figure, name, f"{value:,.1f}", shown, aim, verdict))
    rows += [("derived", *row) for row in derived(figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


BASELINE = {"ws-flood": "flood", "ws-paced": "paced"}
AIMS = {
    ("flood", "tokens_per_second"): (8.0, ">="),
    ("paced", "cpu_us_per_token"): (0.45, "<="),
    ("json", "requests_per_second"): (4.0, ">="),
    ("ws-flood", "tokens_per_second"): (5.0, ">="),
    ("ws-paced", "cpu_us_per_token"): (0.6, "<="),
}


def ratio_to_naive(figures: Figures, workload: str, figure: str, value: float) -> float | None:
    naive = figures.get(BASELINE.get(workload, workload), {}).get("naive", {}).get(figure)
    return value / naive if naive else None


def judged(
    workload: str, name: str, figure: str, value: float, ratio: float | None
) -> tuple[str, str]:
    """Return what is aimed at and whether it is reached; only the service has aims."""
    if name != "service":
        return "", ""
    if (workload, figure) in AIMS and ratio is not None:
        aim, sense = AIMS[workload, figure]
        return f"{sense} {aim} x naive", verdict(ratio >= aim if sense == ">=" else ratio <= aim)
    if (workload, figure) == ("idle", "kb_per_stream"):
        return "<= 60", verdict(value <= 60)
    if (workload, figure) == ("flood", "first_p99_to_median"):
        return "<= 3", verdict(value <= 3)
    return "", ""


def verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


def derived(figures: Figures) -> list[tuple[str, str, str, str, str, str]]:
    """Return the figures that are derived from two others."""
    rows = []
    if "direct" in figures.get("first token", {}):
        direct = figures["first token"]["direct"]
        for name, values in figures["first token"].items():
            if name != "direct":
                added = values["median_ms"] - direct["median_ms"]
                aim = ("<= 2", verdict(added <= 2)) if name == "service" else ("", "")
                rows.append(
                    ("first token, added at the median, ms", name, f"{added:.2f}", "", *aim)
                )
                added = values["same_moment_median_ms"] - direct["same_moment_median_ms"]
                rows.append(("the same, asked at one moment, ms", name, f"{added:.2f}", "", "", ""))
    costs = list(figures.get("growth", {}).get("service", {}).values())
    if len(costs) > 1 and costs[-2]:
        ratio = costs[-1] / costs[-2]
        rows.append(
            ("most streams / next", "service", f"{ratio:.2f}", "", "<= 1.3", verdict(ratio <= 1.3))
        )
    lookups = figures.get("lookups", {}).get("service", {})
    few, many = (
        sum(value for name, value in lookups.items() if name.endswith(f"_at_{size}"))
        for size in (10, 10_000)
    )
    if few:
        aim = ("about 1", verdict(many / few <= 1.2))
        rows.append(("lookups of a turn, 10,000 / 10", "service", f"{many / few:.2f}", "", *aim))
    return rows


def draw(figures: Figures, path: Path) -> None:
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
            for target, values in figures.get(workload, {}).items()
            if name in values and target != "direct"
        }
        colours = ["tab:gray" if "naive" in label else "tab:blue" for label in bars]
        axis.barh(list(bars), list(bars.values()), color=colours)
        axis.set_title(title, fontsize=10)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
