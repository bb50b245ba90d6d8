"""A server under mixed traffic for a while, with a fault a minute: nothing may grow, leak or fail.

    python loadtests/serving/soak.py [--minutes 20] [--model tiny] [--rate 3] [--fault-every 60]

Traffic goes on open loop over a dozen adapters (``traffic.py``); beside it one actor asks for what
streams do not have (chat, several choices, log-probabilities, stop strings, two adapters at once),
and one uploads an adapter, uses it and deletes it, over and over. The faults come in turn
(``soak_faults.py``): the engine is killed (kill -9), a client leaves in the middle of its stream, a
reader does not read, an upload is broken.

It fails (exit 1, naming what) when

* a request failed that no injected fault explains: one that was under way between an engine's
  death and its successor's readiness is explained, nothing else is;
* a fault was not answered as it has to be;
* the memory of a process grew faster than the bound (least squares over its later samples, where
  every process has an intercept of its own and its first ``SETTLE_S`` seconds are left out);
* in the end, idle, the books do not balance: free frames and those of every owner are the total,
  nobody holds KV, leases or loads, no request is unfinished, uploads left no adapter behind.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import report
import soak_faults
from population import CONFIG, WEIGHTS, Population
from soak_memory import Sample, growth_mb_per_minute, watch
from tests.e2e.server import Server

from loramux.bench import traffic
from loramux.bench.figures import by_name, figures
from loramux.bench.live import shown
from loramux.bench.open_loop import Record, Run, send
from loramux.bench.openai import OpenAi
from loramux.bench.traffic import Traffic

MODELS = report.QUICK / "models"
SETTLE_S = 60.0
ADAPTERS = 12
POOL = {"tiny": "2M", "135M": "100M"}
"""So small that adapters come and go, and that every frame has been touched after ``SETTLE_S``:
until then the pool becomes memory frame by frame, and the engine grows."""


@dataclass
class Log:
    """What happened, in seconds since the start. ``down``: when no engine was up, by our doing."""

    start: float = field(default_factory=time.monotonic)
    down: list[tuple[float, float]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.start

    def is_explained(self, begin_s: float, end_s: float) -> bool:
        """Whether an injected death lies within."""
        return any(begin_s <= end and end_s >= begin for begin, end in self.down)


@dataclass(frozen=True)
class Soak:
    """What every actor has."""

    server: Server
    home: Population
    http: httpx.AsyncClient
    log: Log
    random: random.Random

    async def ask(self, what: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """One whole answer; None when it failed and may have. Others are written down as wrong."""
        return await self.sent(what, lambda: self.http.post(path, json=body))

    async def sent(
        self, what: str, send: Callable[[], Awaitable[httpx.Response]]
    ) -> dict[str, Any] | None:
        """``send()``, held to a good answer unless the engine was dead meanwhile."""
        begin = self.log.now()
        try:
            answer = await send()
            if answer.is_success:
                self.log.done[what] += 1
                found: dict[str, Any] = answer.json() if answer.content else {}
                return found
            told = f"{answer.status_code} {answer.text[:200]}"
        except httpx.HTTPError as error:
            told = repr(error)
        if self.log.is_explained(begin, self.log.now()):
            self.log.faults[f"{what}, explained"] += 1
        else:
            self.log.wrong.append(f"{self.log.now():.0f} s, {what}: {told}")
        return None


async def mixed(soak: Soak) -> None:
    """What plain streams do not ask for, one after the other."""
    prompt = "The lighthouse keeper counted seven boats"
    chat = [{"role": "user", "content": "Who counted the boats?"}]
    while True:
        name, other = (f"a{soak.random.randrange(ADAPTERS)}" for _ in range(2))
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", {"model": name, "messages": chat, "n": 2}),
            ("/v1/completions", {"model": name, "prompt": prompt, "logprobs": 2}),
            ("/v1/completions", {"model": name, "prompt": [prompt] * 3, "stop": ["e", "o"]}),
            ("/v1/completions", {"model": "base", "prompt": prompt, "temperature": 1.2}),
        ]
        if name != other:
            pair = [{"id": name, "scale": 0.5}, {"id": other}]
            both: dict[str, Any] = {"model": "base", "prompt": prompt, "adapters": pair}
            bodies.append(("/v1/completions", both))
        path, body = soak.random.choice(bodies)
        await soak.ask("mixed", path, {"max_tokens": 24, **body})
        await asyncio.sleep(0.2)


async def uploads(soak: Soak) -> None:
    """Upload an adapter under a new name, use it, delete it."""
    folder = soak.home.adapter(0)
    files = {"config": (folder / CONFIG).read_bytes(), "weights": (folder / WEIGHTS).read_bytes()}
    for serial in range(10**9):
        name = f"u{serial}"

        def push(name: str = name) -> Awaitable[httpx.Response]:
            data, query = {"name": name}, {"wait": 30}
            return soak.http.post("/v1/adapters", data=data, files=files, params=query)

        if await soak.sent("upload", push) is not None:
            body = {"model": name, "prompt": "One", "max_tokens": 8}
            await soak.ask("use of an upload", "/v1/completions", body)
            await forget(soak, name)
        await asyncio.sleep(0.5)


async def forget(soak: Soak, name: str) -> None:
    """Delete an adapter, again if an engine died meanwhile."""
    for _ in range(60):
        gone = await soak.sent("delete", lambda: soak.http.delete(f"/v1/adapters/{name}"))
        if gone is not None:
            return
        await asyncio.sleep(1)


async def faults(soak: Soak, every_s: float) -> None:
    """One fault after the other, ``every_s`` apart."""
    while True:
        for name, fault in soak_faults.FAULTS.items():
            await asyncio.sleep(every_s)
            if told := await fault(soak.server, soak.log):
                soak.log.wrong.append(f"{soak.log.now():.0f} s, {name}: {told}")
            soak.log.faults[name] += 1


def unexplained(run: Run, log: Log, offset_s: float) -> list[str]:
    """Requests of the open loop that failed though no fault of ours was under way."""
    told = []
    for record in run.records:
        begin, end = offset_s + record.sent_s, offset_s + (record.finished_s or run.seconds)
        if record.status != "ok" and not log.is_explained(begin, end):
            told.append(f"{begin:.0f} s, stream of {_name(record)}: {record.error or 'no end'}")
    return told


def _name(record: Record) -> str:
    return "base" if record.arrival.adapter < 0 else f"a{record.arrival.adapter}"


def books(frames: dict[str, int], unfinished: float, names: Sequence[str]) -> list[str]:
    """What does not balance, of an idle server."""
    owners = ("free", "kv", "prefix", "adapter_leased", "adapter_warm", "loading")
    told = []
    if sum(frames[owner] for owner in owners) != frames["total"]:
        told.append(f"free and used frames are not the total: {frames}")
    told += [
        f"{frames[owner]} frames are {owner} while nothing runs"
        for owner in ("kv", "adapter_leased", "loading")
        if frames[owner]
    ]
    if unfinished:
        told.append(f"{unfinished:g} requests are unfinished")
    told += [f"adapter {name} was left behind" for name in names if name.startswith("u")]
    return told


async def idle_books(soak: Soak) -> list[str]:
    """``books`` once nothing runs any more; what is wrong after half a minute stays wrong."""
    told = ["the server did not answer"]
    for _ in range(30):
        frames = (await soak.http.get("/v1/capacity")).json()["frames"]
        rows = (await soak.http.get("/v1/adapters")).json()["data"]
        unfinished = await asyncio.to_thread(soak.server.metric, "loramux_unfinished_requests")
        told = books(frames, unfinished, [row["name"] for row in rows])
        if not told:
            return []
        await asyncio.sleep(1)
    return told


@dataclass
class Result:
    """What a soak found."""

    run: Run
    log: Log
    samples: list[Sample]
    wrong: list[str]


async def soak_for(server: Server, home: Population, args: argparse.Namespace) -> Result:
    """All actors for the time asked for, then the books."""
    one = Traffic(
        adapters=ADAPTERS,
        alpha=0.5,
        rate=args.rate,
        cv=2.0,
        duration_s=60.0 * args.minutes,
        prompt=(8, 64),
        output=(4, 48),
        ranks=home.ranks,
        seed=args.seed,
    )
    plan = [
        replace(a, adapter=-1) if i % 8 == 7 else a for i, a in enumerate(traffic.draw(one))
    ]  # an eighth asks for the base
    vocabulary = home.vocabulary
    openai = OpenAi(
        server.url,
        "base",
        [f"a{index}" for index in range(ADAPTERS)],
        lambda index, num: traffic.prompt_ids(one.seed, index, num, vocabulary),
    )
    samples: list[Sample] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        soak = Soak(server, home, http, Log(), random.Random(args.seed))
        actors = [
            asyncio.create_task(actor)
            for actor in (
                mixed(soak),
                uploads(soak),
                faults(soak, args.fault_every),
                watch(server.process.pid, samples, soak.log.now),
            )
        ]
        offset_s = soak.log.now()
        with shown(f"soak, {args.minutes:g} minutes", len(plan)) as show:
            run = await send(plan, openai.ask, drain_s=120, show=show)
        await openai.close()
        wrong = await _stop(soak, actors)
        wrong += unexplained(run, soak.log, offset_s) + await idle_books(soak)
    for process, slope in growth_mb_per_minute(samples, args.settle).items():
        if slope > args.most_mb_a_minute:
            told = f"the {process} grew by {slope:.2f} MB a minute"
            wrong.append(f"{told} (at most {args.most_mb_a_minute:g})")
    return Result(run, soak.log, samples, wrong)


async def _stop(soak: Soak, actors: Sequence[asyncio.Task[None]]) -> list[str]:
    """End the actors, clean up after the one that uploads; what any of them found wrong."""
    for actor in actors:
        actor.cancel()
    ends = await asyncio.gather(*actors, return_exceptions=True)
    broken = [f"an actor broke: {end!r}" for end in ends if isinstance(end, Exception)]
    await asyncio.to_thread(soak.server.await_ready)
    for row in (await soak.http.get("/v1/adapters")).json()["data"]:
        if row["name"].startswith("u"):  # cut off between upload and delete
            await forget(soak, row["name"])
    return soak.log.wrong + broken


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--fault-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--model", choices=("tiny", "135M"), default="tiny")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--speculation",
        choices=("off", "auto"),
        default="off",
        help="auto: drafters learn from the traffic, up to 384 MB, so an engine grows for long",
    )
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="seconds left out")
    parser.add_argument("--most-mb-a-minute", type=float, default=2.0, help="growth of a process")
    parser.add_argument("--folder", type=Path, default=MODELS, help="where models are kept")
    parser.add_argument("--out", type=Path, default=report.QUICK, help="folder of the JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    home = Population(args.folder, args.model, (8, 16, 32, 64))
    flags = ["--pool-memory", POOL[args.model], "--speculation", args.speculation]
    server = home.serve(ADAPTERS, flags)
    try:
        result = asyncio.run(soak_for(server, home, args))
    finally:
        code = server.close()
    if code:
        result.wrong.append(f"the server ended with {code}")
    log = result.log
    found = {
        "command": "python loadtests/serving/soak.py " + f"--minutes {args.minutes:g}",
        "figures": by_name(figures(result.run.records)),
        "faults": dict(log.faults),
        "beside": dict(log.done),
        "engine_down_s": [[round(t, 1) for t in pair] for pair in log.down],
        "growth_mb_a_minute": growth_mb_per_minute(result.samples, args.settle),
        "memory": [asdict(sample) for sample in result.samples],
        "wrong": result.wrong,
    }
    report.save(found, args.out, "soak")
    for key in ("faults", "beside", "growth_mb_a_minute"):
        print(f"{key}: {found[key]}")
    for told in result.wrong:
        print(f"WRONG: {told}")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
