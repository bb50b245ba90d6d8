"""The pictures of a load test: rates and latencies over what was varied, the CDF, the timeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report

GOOD_SHARE = 0.9
OWNERS = ("kv", "prefix", "adapter_leased", "adapter_warm", "loading")
LOGARITHMIC = {"adapters"}


def knee(cases: Sequence[dict[str, Any]]) -> float | None:
    """The last value up to which at least 90 % of the requests were good, as goodput has it."""
    last = None
    for case in sorted(cases, key=lambda case: case["value"]):
        numbers = case["figures"]
        good = numbers["goodput_rps"] * numbers["elapsed_s"]
        if good < GOOD_SHARE * numbers["requests"]:
            break
        last = case["value"]
    return last


def legend(axis: Any, **how: Any) -> None:
    """Of what was drawn, if anything was."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, **how)


def draw_plots(found: dict[str, Any], where: Path) -> None:
    """One picture of a report, ``plots/load-<scenario>.png``."""
    cases = found["cases"]
    varied = bool(found["vary"]) and len(cases) > 1
    has_timeline = bool(cases[-1]["timeline"])
    panels = 1 + 2 * varied + 2 * has_timeline
    name = f"load-{found['scenario']}"
    with report.plot(where, name, panels=panels, title=found["scenario"]) as axes:
        left = iter(axes)
        if varied:
            _rates(next(left), found)
            _latencies(next(left), found)
        _cdf(next(left), found)
        if has_timeline:
            _pool(next(left), cases[-1]["timeline"])
            _queue(next(left), cases[-1]["timeline"])
        for axis in left:
            axis.set_visible(False)


def _over(axis: Any, found: dict[str, Any], names: dict[str, str]) -> None:
    cases = sorted(found["cases"], key=lambda case: case["value"])
    for name, label in names.items():
        points = [(c["value"], c["figures"][name]) for c in cases]
        points = [(x, y) for x, y in points if y is not None]
        axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", label=label)
    if found["vary"] in LOGARITHMIC:
        axis.set_xscale("log")
    axis.set_xlabel(found["vary"])
    axis.set_ylim(bottom=0)


def _rates(axis: Any, found: dict[str, Any]) -> None:
    _over(
        axis,
        found,
        {
            "offered_rps": "offered",
            "throughput_rps": "answered",
            "goodput_rps": "TTFT <= 1 s, TPOT <= 50 ms",
        },
    )
    if found["vary"] == "rate" and (at := knee(found["cases"])) is not None:
        axis.axvline(at, color="#999999", linestyle="--", linewidth=1)
        axis.annotate(f"knee: {at:g}/s", (at, 0), xytext=(4, 4), textcoords="offset points")
    axis.set_ylabel("requests/s")
    legend(axis)


def _latencies(axis: Any, found: dict[str, Any]) -> None:
    _over(axis, found, {f"ttft_p{p}_s": f"p{p}" for p in (50, 95, 99)})
    axis.set_ylabel("TTFT, s")
    legend(axis)


def _cdf(axis: Any, found: dict[str, Any]) -> None:
    for case in found["cases"]:
        values = case["ttft_s_percentiles"]
        if values[0] is None:
            continue
        label = f"{found['vary']} {case['value']:g}" if found["vary"] else None
        axis.plot(values, [p / 100 for p in range(101)], label=label)
    axis.set(xlabel="TTFT, s", ylabel="share of answered requests")
    axis.set_xlim(left=0)
    if found["vary"]:
        legend(axis)


def _pool(axis: Any, timeline: Sequence[dict[str, Any]]) -> None:
    at = [point["at_s"] for point in timeline]
    shares = [[point.get(f"pool_{owner}", 0) for point in timeline] for owner in OWNERS]
    axis.stackplot(at, shares, labels=OWNERS, colors=report.COLOURS)
    axis.set(xlabel="s", ylabel="frames of the pool", ylim=(0, timeline[-1].get("frames")))
    legend(axis, fontsize="small")


def _queue(axis: Any, timeline: Sequence[dict[str, Any]]) -> None:
    at = [point["at_s"] for point in timeline]
    for name in ("running", "waiting", "resident", "loading_adapters"):
        label = "resident adapters" if name == "resident" else name.replace("_", " ")
        axis.plot(at, [point.get(name, 0) for point in timeline], label=label)
    axis.set(xlabel="s", ylabel="requests, adapters")
    legend(axis, fontsize="small")
