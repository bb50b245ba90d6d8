"""One adapter asks for twenty times its share, nineteen for theirs: how long those wait.

    python loadtests/serving/flood.py [--quick]

As ``overload.py``: the demo model, twenty adapter lists, Poisson arrivals. A share is a twentieth
of LOAD of the peak. Without the flood all twenty ask for theirs, with it the first asks for twenty
times as much. Both are run in turns; what counts are the first tokens of the other nineteen.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from pathlib import Path
from typing import Any

import report
import streams
import throughput
from overload import KEYS, ROOM, SEATS, TOKENS, rates

LOAD = 0.6


async def measure(server: streams.Server, seconds: float, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first token, by round."""
    await streams.closed_loop(server, SEATS, seconds / 4, TOKENS)
    peak = await streams.closed_loop(server, SEATS, seconds / 2, TOKENS)
    calm_rates = rates(LOAD * peak / TOKENS)
    found: dict[str, Any] = {"peak_tok_s": peak, "calm_p95_ms": [], "flood_p95_ms": []}
    refused = {"calm": 0, "flood": 0}
    for round_ in range(rounds):
        for name, factor in (("calm", 1), ("flood", KEYS)):
            load = {**calm_rates, 0: factor * calm_rates[0]}
            answers = await streams.Load(load, seconds, TOKENS, seed=round_).run(server)
            others = [answer for answer in answers if answer.key]
            refused[name] += sum(answer.status != 200 for answer in others)
            p95 = streams.percentile(streams.first_tokens(others), 95)
            found[f"{name}_p95_ms"].append(round(1e3 * p95, 1))
    pairs = zip(found["flood_p95_ms"], found["calm_p95_ms"], strict=True)
    found["ratio"] = [round(flood / calm, 2) for flood, calm in pairs]
    found["median_ratio"] = statistics.median(found["ratio"])
    return found | {"refused_others": refused}


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    found = throughput.header()
    # The other core is the front's and this client's: a thread of two that waits for its turn there
    # holds up the other at every barrier.
    flags = ["--threads", "1", "--max-num-seqs", str(SEATS), "--max-waiting", str(12 * ROOM)]
    with tempfile.TemporaryDirectory() as folder:
        server = streams.Server(Path(folder) / "data", *flags)
        try:
            case = asyncio.run(measure(server, *((6, 1) if args.quick else (15, 4))))
        finally:
            server.close()
    found["cases"].append(case)
    for key, value in case.items():
        print(f"{key}: {value}")
    report.save(found, report.folder(args), "flood")


if __name__ == "__main__":
    main()
