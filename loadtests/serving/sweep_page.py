"""The sweep's page and picture, made from its JSON file alone.

python loadtests/serving/sweep_page.py docs/results/load-sweep.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from load_plots import knee, legend

COLUMNS = {
    "throughput_rps": "requests/s",
    "output_tok_s": "tokens/s",
    "ttft_p50_s": "TTFT p50, s",
    "ttft_p99_s": "p99, s",
    "tpot_p50_s": "TPOT p50, s",
    "attainment_6s": "TTFT < 6 s",
    "attainment_1s": "< 1 s",
    "goodput_rps": "goodput, 1/s",
    "incomplete": "incomplete",
    "errors": "errors",
}
BY_ADAPTERS = ("pool", "http", "peft", "vllm")
SYSTEMS = ("shared", "split", "padded", "loramux serve", "PEFT", "vLLM CPU")


def spread(values: Sequence[float | None]) -> Any:
    """The median of the rounds, with the lowest and highest when there are several."""
    counted = [value for value in values if value is not None]
    if not counted:
        return None
    if len(counted) == 1 or min(counted) == max(counted):
        return counted[0]
    return (statistics.median(counted), min(counted), max(counted))


def rows(found: dict[str, Any], parts: Sequence[str], by: str) -> list[dict[str, Any]]:
    """A row for each system and value of ``by``, in the order in which systems are listed."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for case in found["cases"]:
        if case["part"] in parts:
            groups.setdefault((case[by], case["system"]), []).append(case["figures"])
    ordered = sorted(groups, key=lambda key: (key[0], SYSTEMS.index(key[1])))
    return [
        {by: key[0], "system": key[1]}
        | {name: spread([one[name] for one in groups[key]]) for name in COLUMNS}
        for key in ordered
    ]


def page(found: dict[str, Any]) -> str:
    """The whole page."""
    machine, one = found["machine"], found["traffic"]
    lines = [
        "# Load: measured",
        "",
        f"Written by the run itself; commit {found['commit']}; {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['read_gb_s']} GB/s, {machine['gemm_gflops']} GFLOP/s.",
        "",
        f"    {found['command']}",
        "",
        f"Open loop, Poisson at {one['rate']:g} requests/s for {one['duration_s']:g} s where "
        "nothing else is said, adapters drawn uniformly, ranks "
        f"{', '.join(map(str, one['ranks']))} in turn; prompts of {one['prompt'][0]} to "
        f"{one['prompt'][1] - 1} tokens, answers of {one['output'][0]} to {one['output'][1] - 1}. "
        f"Rounds: {found['rounds']}; medians (lowest to highest). The docstring of "
        "`loadtests/serving/sweep.py` says what the systems are.",
        "",
    ]
    if found["late"]:
        lines += ["**The client was late, so these cells are not to be trusted:**", ""]
        lines += [f"* {told}" for told in found["late"]] + [""]
    lines += ["![throughput, TTFT, rate and CDF](plots/load-sweep.png)", ""]
    for title, parts, by in (
        ("By the number of adapters", BY_ADAPTERS, "adapters"),
        ("By rate", ("rate",), "rate"),
    ):
        table = rows(found, parts, by)
        if table:
            heads = {by: by, "system": "system"} | COLUMNS
            lines += [f"## {title}", "", report.markdown(table, heads), ""]
    rated = _rated(found)
    if rated and (at := knee(rated)) is not None:
        lines += [f"The knee, the last rate at which nine tenths were good: {at:g}/s.", ""]
    lines += ["## What the columns are", ""]
    lines += [f"* {head}: {found['formulas'][name][1]}" for name, head in COLUMNS.items()]
    return "\n".join(lines) + "\n"


def _rated(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**case, "value": case["rate"]} for case in found["cases"] if case["part"] == "rate"]


def draw(found: dict[str, Any], where: Path) -> None:
    """``plots/load-sweep.png``."""
    table = rows(found, BY_ADAPTERS, "adapters")
    with report.plot(where, "load-sweep", panels=4, title="Open loop") as axes:
        for axis, name in ((axes[0], "throughput_rps"), (axes[1], "ttft_p99_s")):
            for system in SYSTEMS:
                mine = [r for r in table if r["system"] == system and r[name] is not None]
                values = [r[name][0] if isinstance(r[name], tuple) else r[name] for r in mine]
                if mine:
                    axis.plot([r["adapters"] for r in mine], values, marker="o", label=system)
            axis.set(xscale="log", xlabel="adapters")
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("requests/s")
        legend(axes[0])
        axes[1].set_yscale("log")
        axes[1].set_ylabel("TTFT p99, s")
        _draw_rates(axes[2], _rated(found))
        _draw_cdf(axes[3], found)


def _draw_rates(axis: Any, rated: list[dict[str, Any]]) -> None:
    for name, label in (("offered_rps", "offered"), ("throughput_rps", "answered")):
        points = [(case["rate"], case["figures"][name]) for case in rated]
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=label)
    good = [(case["rate"], case["figures"]["goodput_rps"]) for case in rated]
    axis.plot(*zip(*good, strict=True) if good else ([], []), marker="o", label="goodput")
    if rated and (at := knee(rated)) is not None:
        axis.axvline(at, color="#999999", linestyle="--", linewidth=1)
        axis.annotate(f"knee: {at:g}/s", (at, 0), xytext=(4, 4), textcoords="offset points")
    axis.set(xlabel="rate, 1/s", ylabel="requests/s")
    legend(axis)


def _draw_cdf(axis: Any, found: dict[str, Any]) -> None:
    counted = [case for case in found["cases"] if case["part"] != "rate"]
    most = max((case["adapters"] for case in counted), default=0)
    for system in SYSTEMS:
        mine = [c for c in counted if c["system"] == system and c["adapters"] == most]
        if mine and mine[0]["ttft_s_percentiles"][0] is not None:
            axis.plot(mine[0]["ttft_s_percentiles"], [p / 100 for p in range(101)], label=system)
    axis.set(xlabel=f"TTFT, s ({most} adapters)", ylabel="share of answered requests")
    legend(axis)


def write_page(found: dict[str, Any], where: Path) -> None:
    """``where/load.md`` and its picture."""
    draw(found, where)
    path = where / "load.md"
    path.write_text(page(found))
    print(f"written: {path}")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_page(json.loads(source.read_text()), source.parent)
