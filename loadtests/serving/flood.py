"""One adapter asks for twenty times its share, nineteen for theirs: how long those wait.

    python loadtests/serving/flood.py [--quick]

As ``overload.py``: the demo model, twenty adapter lists, Poisson arrivals. A share is a twentieth
of LOAD of the peak. Without the flood all twenty ask for theirs, with it the first asks for twenty
times as much. Both are run in turns; what counts are the first tokens of the other nineteen.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import closing
from typing import Any

import report
import throughput
import uvloop
from overload import KEYS, ROOM, TOKENS, Client, first_tokens, in_ms, plan, serve
from tests.e2e.server import Server

LOAD = 0.6


async def measure(server: Server, seconds: float, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first token, by round."""
    client = Client(server.url)
    await client.closed_loop(seconds / 4)
    peak = await client.closed_loop(seconds / 2)
    rate = LOAD * peak / TOKENS
    found: dict[str, Any] = {"peak_tok_s": peak, "calm_p95_ms": [], "flood_p95_ms": []}
    refused = {"calm": 0, "flood": 0}
    late = []
    for round_ in range(rounds):
        calm = plan(rate, seconds, seed=2 * round_)
        more = plan((KEYS - 1) * rate / KEYS, seconds, seed=2 * round_ + 1, keys=1)
        flood = sorted(calm + more, key=lambda arrival: arrival.at_s)
        for name, arrivals in (("calm", calm), ("flood", flood)):
            run = await client.load(arrivals)
            others = [record for record in run.records if record.arrival.adapter]
            refused[name] += sum(record.status == "error" for record in others)
            p95 = in_ms("first", first_tokens(others), 95)["first_p95_ms"]
            found[f"{name}_p95_ms"].append(p95)
            late.append(round(1e3 * run.lag_p99_s, 1))
    await client.close()
    pairs = zip(found["flood_p95_ms"], found["calm_p95_ms"], strict=True)
    found["ratio"] = [round(flood / calm, 2) for flood, calm in pairs]
    found["median_ratio"] = statistics.median(found["ratio"])
    return found | {"refused_others": refused, "client_lag_p99_ms": late}


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    found = throughput.header()
    with tempfile.TemporaryDirectory() as folder, closing(serve(folder, 12 * ROOM)) as server:
        case = uvloop.run(measure(server, *((6, 1) if args.quick else (15, 4))))
    found["cases"].append(case)
    for key, value in case.items():
        print(f"{key}: {value}")
    report.save(found, report.folder(args), "flood")


if __name__ == "__main__":
    main()
