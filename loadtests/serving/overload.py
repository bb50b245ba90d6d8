"""Ten times what the server can do, and then as little as before.

    python loadtests/serving/overload.py [--quick]

The server is the command on the demo model with SEATS seats and ROOM places to wait; requests wear
one of twenty adapter lists, streamed, TOKENS tokens each. *Peak* is a closed loop of as many
requests as seats. Then arrivals are Poisson: half the peak (calm), ten times the peak (overload),
half the peak again (after). Goodput counts tokens of answers that came whole. The client shares the
machine with the server, so a refusal's time includes both.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import streams
import throughput

SEATS, ROOM, TOKENS, KEYS = 8, 8, 64, 20


def rates(per_second: float) -> dict[int, float]:
    """The same for every adapter list."""
    return dict.fromkeys(range(KEYS), per_second / KEYS)


def recovery_s(after: list[streams.Answer], normal_s: float) -> float:
    """When the last first token came that took longer than twice the calm 95th percentile, if one
    in twenty or more of those after it did not."""
    late = [answer.sent for answer in after if answer.first_s > 2 * normal_s or not answer.whole]
    for moment in [0.0, *late]:
        rest = [answer for answer in after if answer.sent > moment]
        if sum(answer.sent in late for answer in rest) <= 0.05 * len(rest):
            return moment
    return float("inf")


async def measure(server: streams.Server, seconds: float) -> dict[str, Any]:
    """The four phases."""
    await streams.closed_loop(server, SEATS, seconds / 4, TOKENS)  # compiled, warm
    peaks = [await streams.closed_loop(server, SEATS, seconds / 3, TOKENS) for _ in range(3)]
    peak = sorted(peaks)[1]
    found: dict[str, Any] = {"peak_tok_s": peak, "peaks_tok_s": peaks}
    half = rates(0.5 * peak / TOKENS)
    calm = await streams.Load(half, seconds, TOKENS, seed=1).run(server)
    found["calm"] = streams.summary(calm)
    began = time.monotonic()
    overload = asyncio.create_task(
        streams.Load(rates(10 * peak / TOKENS), seconds, TOKENS, seed=2).run(server)
    )
    await asyncio.sleep(seconds)
    after = asyncio.create_task(streams.Load(half, seconds, TOKENS, seed=3).run(server))
    answers = await overload
    in_time = [a for a in answers if a.whole and a.sent + a.end_s <= seconds]
    found["overload"] = streams.summary(answers) | {
        "goodput_share": sum(a.tokens for a in in_time) / seconds / peak,
        "drained_after_s": time.monotonic() - began - seconds,
    }
    calm_p95_s = streams.percentile(streams.first_tokens(calm), 95)
    found["after"] = streams.summary(await after)
    found["after"]["back_to_normal_s"] = recovery_s(after.result(), calm_p95_s)
    found["let_in_and_failed"] = server.metric("loramux_request_failed_total")
    return found


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    found = throughput.header()
    # The other core is the front's and this client's: a thread of two that waits for its turn there
    # holds up the other at every barrier.
    flags = ["--threads", "1", "--max-num-seqs", str(SEATS), "--max-waiting", str(ROOM)]
    with tempfile.TemporaryDirectory() as folder:
        server = streams.Server(Path(folder) / "data", *flags)
        try:
            case = asyncio.run(measure(server, 6 if args.quick else 20))
        finally:
            server.close()
    found["cases"].append(case)
    phases = [{"phase": name, **case[name]} for name in ("calm", "overload", "after")]
    columns = {key: key for phase in phases for key in phase}
    print(f"peak {case['peaks_tok_s']} tokens/s; let in and failed: {case['let_in_and_failed']}")
    print(report.markdown(phases, columns))
    report.save(found, report.folder(args), "overload")


if __name__ == "__main__":
    main()
