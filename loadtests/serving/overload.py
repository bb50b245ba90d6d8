"""Ten times what the server can do, and then as little as before.

    python loadtests/serving/overload.py [--quick]

The server is the command on the demo model with SEATS seats and ROOM places to wait; requests wear
one of twenty adapter lists, streamed, TOKENS tokens each. *Peak* is a closed loop of as many
requests as seats. Then arrivals are Poisson: half the peak (calm), ten times the peak (overload),
half the peak again (after). Goodput counts tokens of answers that came whole in time. The client
shares the machine with the server, and its times count from the planned ones, so a refusal's time
includes both; ``server_refusal`` is what the server's access log says: from a request's head, read,
to its answer, sent.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import report
import throughput
import uvloop
from tests.e2e.server import Server

from loramux.bench import traffic
from loramux.bench.figures import errors, percentile
from loramux.bench.open_loop import Bounds, Record, Run, send
from loramux.bench.openai import OpenAi
from loramux.bench.traffic import Arrival, Traffic
from loramux.config import DEMO_DIR

SEATS, ROOM, TOKENS, KEYS = 8, 8, 64, 20
PROMPT = "One sunny morning Mira the baker left Oldport with seven apples."
DRAIN_S = 120.0


class Client(OpenAi):
    """Asks for the demo's ``pirate``, at a scale that makes an adapter list of every adapter."""

    def __init__(self, url: str) -> None:
        serial = itertools.count()  # nothing may come from the prefix cache
        super().__init__(
            url,
            "demo",
            ["demo"] * KEYS,
            lambda index, num: f"{next(serial)} {PROMPT}",
            extra={"ignore_eos": True, "temperature": 1},
        )

    def body(self, index: int, record: Record) -> dict[str, Any]:
        wears = [{"id": "pirate", "scale": 1 + record.arrival.adapter / 1000}]
        return super().body(index, record) | {"adapters": wears}

    async def closed_loop(self, seconds: float) -> float:
        """Tokens a second with as many requests in flight, all the time, as there are seats."""
        began = time.monotonic()

        def now() -> float:
            return time.monotonic() - began

        async def one(key: int) -> int:
            tokens = 0
            while now() < seconds:
                record = Record(Arrival(now(), key, 0, 0, 1, TOKENS, False))
                await self.ask(0, record, now)
                tokens += record.completion_tokens
            return tokens

        made = await asyncio.gather(*map(one, range(SEATS)))
        return sum(made) / now()

    async def load(self, plan: Sequence[Arrival]) -> Run:
        """Everything in ``plan``. Raises RuntimeError for failures other than refusals."""
        run = await send(plan, self.ask, drain_s=DRAIN_S)
        if other := {kind for kind in errors(run.records) if not kind.startswith("503 ")}:
            raise RuntimeError(f"neither answered nor refused: {sorted(other)}")
        return run


def plan(per_second: float, seconds: float, seed: int, keys: int = KEYS) -> list[Arrival]:
    """Poisson arrivals, as many of each adapter list."""
    return traffic.draw(
        Traffic(
            adapters=keys,
            rate=per_second,
            duration_s=seconds,
            prompt=(1, 2),
            output=(TOKENS, TOKENS + 1),
            seed=seed,
        )
    )


def first_tokens(records: Iterable[Record]) -> list[float]:
    """Seconds to the first token, of those that were let in."""
    return [record.ttft_s for record in records if record.status == "ok"]


def in_ms(name: str, seconds: Sequence[float], *percents: int) -> dict[str, float | None]:
    """``name_p50_ms`` and so on."""
    found = {}
    for percent in percents:
        value = percentile(seconds, percent)
        found[f"{name}_p{percent}_ms"] = None if value is None else 1e3 * value
    return found


def summary(run: Run) -> dict[str, Any]:
    """Of one load: what was let in, what was refused, and how long both took."""
    finished = first_tokens(run.records)
    refused = [record.e2e_s for record in run.records if record.status == "error"]
    return {
        "requests": len(run.records),
        "refused": len(refused),
        "let_in": len(run.records) - len(refused),
        "finished": len(finished),
        **in_ms("first", finished, 50, 95),
        **in_ms("refusal", refused, 50, 99),
        "client_lag_p99_ms": 1e3 * run.lag_p99_s,
        "client": run.bottleneck(Bounds()),
    }


def refusals(log: str, begin: datetime, end: datetime) -> list[float]:
    """Seconds that the refusals took which began between two moments, by an access log."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [
        line["duration_s"]
        for line in lines
        if line["status"] == 503 and begin <= datetime.fromisoformat(line["time"]) < end
    ]


def recovery_s(after: Sequence[Record], normal_s: float) -> float:
    """When the last first token came that took longer than twice the calm 95th percentile, if one
    in twenty or more of those after it did not."""
    slow = [r.arrival.at_s for r in after if r.status != "ok" or r.ttft_s > 2 * normal_s]
    for moment in [0.0, *slow]:
        rest = [record for record in after if record.arrival.at_s > moment]
        if sum(at > moment for at in slow) <= 0.05 * len(rest):
            return moment
    return float("inf")


async def measure(server: Server, seconds: float) -> dict[str, Any]:
    """The four phases."""
    client = Client(server.url)
    await client.closed_loop(seconds / 4)  # compiled, warm
    peaks = [await client.closed_loop(seconds / 3) for _ in range(3)]
    peak = sorted(peaks)[1]
    found: dict[str, Any] = {"peak_tok_s": peak, "peaks_tok_s": peaks}
    half = 0.5 * peak / TOKENS
    calm = await client.load(plan(half, seconds, seed=1))
    found["calm"] = summary(calm)
    began, began_at = time.monotonic(), datetime.now(UTC)
    overload = asyncio.create_task(client.load(plan(10 * peak / TOKENS, seconds, seed=2)))
    await asyncio.sleep(seconds)
    over_at = datetime.now(UTC)
    after = asyncio.create_task(client.load(plan(half, seconds, seed=3)))
    run = await overload
    in_time = [r for r in run.records if r.status == "ok" and r.finished_s <= seconds]
    found["overload"] = summary(run) | {
        "goodput_share": sum(r.completion_tokens for r in in_time) / seconds / peak,
        "drained_after_s": time.monotonic() - began - seconds,
    }
    found["after"] = summary(await after) | {
        "back_to_normal_s": recovery_s(
            after.result().records, percentile(first_tokens(calm.records), 95) or 0.0
        )
    }
    await client.close()
    logged = refusals(Path(server.log.name).read_text(), began_at, over_at)
    found["overload"] |= in_ms("server_refusal", logged, 50, 99)
    found["overload"]["server_refusal_max_ms"] = 1e3 * max(logged, default=float("nan"))
    found["let_in_and_failed"] = server.metric("loramux_request_failed_total")
    return found


def serve(folder: str, room: int) -> Server:
    """The command on the demo model. One core is the engine's and the other is the front's and this
    client's: a thread of two that waits for its turn there holds up the other at every barrier."""
    flags = ["--pool-memory", "auto", "--threads", "1"]
    flags += ["--max-num-seqs", str(SEATS), "--max-waiting", str(room)]
    return Server(DEMO_DIR / "base", Path(folder) / "data", *flags)


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    found = throughput.header()
    with tempfile.TemporaryDirectory() as folder, closing(serve(folder, ROOM)) as server:
        case = uvloop.run(measure(server, 6 if args.quick else 20))
    found["cases"].append(case)
    phases = [{"phase": name, **case[name]} for name in ("calm", "overload", "after")]
    columns = {key: key for phase in phases for key in phase}
    print(f"peak {case['peaks_tok_s']} tokens/s; let in and failed: {case['let_in_and_failed']}")
    print(report.markdown(phases, columns))
    report.save(found, report.folder(args), "overload")


if __name__ == "__main__":
    main()
