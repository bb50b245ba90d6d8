"""A comparison as tables in markdown, one for each mix.

python loadtests/peers/comparison.py docs/results/peers.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """Tokens per second; behind a peer's, how many times as fast loramux is (95 % interval)."""
    machine = report["machine"]
    lines = [
        f"    {report['command']}",
        "",
        f"Commit {report['commit']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['read_gb_s']} GB/s, {machine['gemm_gflops']} GFLOP/s.",
        "",
    ]
    for mix in dict.fromkeys(case["mix"] for case in report["cases"]):
        cases = [case for case in report["cases"] if case["mix"] == mix]
        lines += [f"**{mix}**", "", *_table(cases), ""]
    lines += [f"{gone['mix']}: {gone['peer']} failed." for gone in report["failed"]]
    return "\n".join(lines) + "\n"


def _table(cases: list[dict[str, Any]]) -> list[str]:
    ours = list(dict.fromkeys(case["ours"] for case in cases))
    peers = list(dict.fromkeys(case["peer"] for case in cases))
    heads = ["in flight x adapters", "floor", *(f"{name} (A/A)" for name in ours), *peers]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for cell in dict.fromkeys((case["concurrency"], case["adapters"]) for case in cases):
        here = [case for case in cases if (case["concurrency"], case["adapters"]) == cell]
        columns = ["{} x {}".format(*cell), f"{here[0]['floor_tok_s']}"]
        columns += [_ours([case for case in here if case["ours"] == name]) for name in ours]
        by_peer = {case["peer"]: case for case in here}
        columns += [_peer(by_peer[name]) if name in by_peer else "" for name in peers]
        lines.append("| " + " | ".join(columns) + " |")
    return lines


def _ours(cases: list[dict[str, Any]]) -> str:
    """The median over all runs of the cell, its share of the floor, and the widest A/A."""
    if not cases:
        return ""
    speed = statistics.median(
        case["tokens"] / seconds for case in cases for seconds in case["seconds"]["ours"]
    )
    same = [case["ours_over_ours"] for case in cases if case["ours_over_ours"]]
    text = f"{speed:.1f}, {100 * speed / cases[0]['floor_tok_s']:.0f} %"
    if same:
        text += f" ({min(low for _, low, _ in same):.2f}-{max(high for _, _, high in same):.2f})"
    return text


def _peer(case: dict[str, Any]) -> str:
    return f"{case['peer_tok_s']:.1f}, " + "{:.2f} ({:.2f}-{:.2f})".format(*case["ratio"])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
