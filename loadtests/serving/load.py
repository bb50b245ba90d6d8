"""Load a server as a scenario says, and fail when it does not hold what the scenario asks.

    python loadtests/serving/load.py loadtests/serving/scenarios/skewed.toml [--quick]
    python loadtests/serving/load.py SCENARIO --url http://127.0.0.1:8000 [--adapters a,b] [--key K]

Without ``--url`` a server of our own is started on a random model with as many adapters as the
traffic names; those are kept in ``--folder``. With it, any server with OpenAI's /v1/completions
will do: prompts are words then, and the adapters are those that /v1/models lists with a parent,
or ``--adapters``.

Leaves a JSON file, the plans that were sent, and plots; prints every figure with its formula.
Exits with 1 when a threshold was broken or the client could not keep up (nothing was measured
then), and says which.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pairs
import report
import scenario as scenarios
import uvloop
from load_plots import draw_plots
from population import Population
from scenario import Scenario
from timeline import Timeline

from loramux.bench import figures, traffic
from loramux.bench.live import shown
from loramux.bench.open_loop import Run, send
from loramux.bench.openai import OpenAi, Prompt
from loramux.bench.server import listed
from loramux.bench.traffic import Traffic

MODELS = report.QUICK / "models"


@dataclass(frozen=True)
class Target:
    """Where the requests go. ``names[k]``: what adapter ``k`` is called there."""

    url: str
    base: str
    names: Sequence[str]
    prompt: Callable[[int, int], Prompt]
    keys: Sequence[str] = ()
    admin_key: str = ""


@dataclass
class Point:
    """One run of a scenario and what is kept of it."""

    traffic: Traffic
    run: Run
    plan_sha256: str
    timeline: list[dict[str, Any]] = field(default_factory=list)

    def told(self, scenario: Scenario) -> dict[str, Any]:
        """As it stands in the report."""
        told = figures.told(self.run)
        broken = [how for b in scenario.thresholds if (how := b.broken(told["figures"]))]
        if late := self.run.bottleneck(scenario.client.bounds):
            broken.insert(0, late)
        return told | {
            "traffic": asdict(self.traffic),
            "value": getattr(self.traffic, scenario.vary) if scenario.vary else None,
            "broken": broken,
            "plan_sha256": self.plan_sha256,
            "timeline": self.timeline,
        }


def adapters_of(plan_of: Sequence[Traffic]) -> int:
    """How many adapters all the runs need together."""
    return max(traffic.num_adapters(one, traffic.draw(one)) for one in plan_of)


def fits(scenario: Scenario, target: Target) -> None:
    """Raises ValueError when the traffic names more adapters than there are."""
    needed = adapters_of(scenario.points)
    if needed > len(target.names):
        raise ValueError(
            f"the traffic names {needed} adapters (cold ones included), the server has"
            f" {len(target.names)}: give --adapters, or a scenario with fewer"
        )


async def run_point(one: Traffic, target: Target, scenario: Scenario, plan_path: Path) -> Point:
    """Draw, write down, send."""
    plan = traffic.draw(one)
    digest = traffic.write_plan(one, plan, plan_path)
    openai = OpenAi(
        target.url,
        target.base,
        target.names,
        target.prompt,
        keys=target.keys,
        extra={"ignore_eos": True} if scenario.client.ignore_eos else {},
    )
    what = scenario.name
    if scenario.vary:
        what += f", {scenario.vary} {getattr(one, scenario.vary):g}"
    try:
        with shown(what, len(plan)) as show:
            async with Timeline(target.url, target.admin_key) as timeline:
                run = await send(plan, openai.ask, drain_s=scenario.client.drain_s, show=show)
    finally:
        await openai.close()
    return Point(one, run, digest, timeline.points)


def run_all(
    header: dict[str, Any], scenario: Scenario, target: Target, where: Path
) -> dict[str, Any]:
    """Every point; the report that ``header`` begins."""
    fits(scenario, target)
    found = header | {
        "cases": [],
        "scenario": scenario.name,
        "about": scenario.about,
        "vary": scenario.vary,
        "formulas": figures.formulas(),
    }
    for index, one in enumerate(scenario.points):
        path = where / "plans" / f"{scenario.name}-{index}.jsonl"
        point = uvloop.run(run_point(one, target, scenario, path))
        found["cases"].append(point.told(scenario))
    return found


@contextmanager
def own_server(scenario: Scenario, folder: Path) -> Iterator[Target]:
    """A server started for the scenario, with its adapters and as many tenants as it has."""
    one, settings = scenario.traffic, scenario.server
    home = Population(folder, settings.model, one.ranks, settings.targets)
    count = adapters_of(scenario.points)
    flags = ["--threads", str(os.cpu_count() or 1), *settings.flags]
    keys: list[str] = []
    if one.tenants > 1:
        home.serve(count, flags).close()  # who registers adapters for all needs no key yet
        keys_file, keys = home.keys(one.tenants)
        flags += ["--api-keys", str(keys_file)]
    server = home.serve(count, flags)
    vocabulary = home.vocabulary

    def prompt(index: int, num: int) -> list[int]:
        return traffic.prompt_ids(one.seed, index, num, vocabulary)

    try:
        names = [f"a{index}" for index in range(count)]
        yield Target(server.url, "base", names, prompt, keys[:-1], keys[-1] if keys else "")
    finally:
        server.close(signal.SIGTERM)


def given_server(args: argparse.Namespace, scenario: Scenario) -> Target:
    """The server at ``--url`` and what it calls its models. Raises ValueError without a base, and
    for several tenants: each would need a key."""
    if scenario.traffic.tenants > 1:
        raise ValueError("several tenants have keys on a server of our own only: leave out --url")
    base, adapters = listed(args.url, args.key or "")
    seed = scenario.traffic.seed
    return Target(
        args.url,
        base,
        args.adapters.split(",") if args.adapters else adapters,
        lambda index, num: traffic.prompt_words(seed, index, num),
        [args.key] if args.key else [],
        args.key or "",
    )


def table(found: dict[str, Any]) -> str:
    """Every figure with its formula, a column for each value."""
    cases = found["cases"]
    heads = [str(case["value"]) if found["vary"] else "value" for case in cases]
    rows = []
    for name, (_, formula) in found["formulas"].items():
        values = [case["figures"][name] for case in cases]
        if any(value is not None for value in values):
            rows.append({"name": name, **dict(zip(heads, values, strict=True)), "is": formula})
    first = {"name": found["vary"] or "figure"}
    return report.markdown(rows, first | {head: head for head in heads} | {"is": "formula"})


def verdict(found: dict[str, Any]) -> list[str]:
    """What was not held, by run."""
    told = []
    for case in found["cases"]:
        at = f"{found['vary']} {case['value']:g}: " if found["vary"] else ""
        told += [at + broken for broken in case["broken"]]
    return told


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", type=Path, help="a TOML file; see scenario.py")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--adapters", help="names of that server's adapters, with commas")
    parser.add_argument("--key", help="an API key for that server")
    parser.add_argument("--folder", type=Path, default=MODELS, help="where models are kept")
    parser.add_argument("--quick", action="store_true", help="does it work? the figures say little")
    parser.add_argument("--out", type=Path, help="folder of the JSON file, of plans/ and plots/")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    where = report.folder(args)
    try:
        scenario = scenarios.read(args.scenario, quick=args.quick)
        header = pairs.header([__file__, *argv])  # while nothing runs: it measures the machine
        if args.url:
            found = run_all(header, scenario, given_server(args, scenario), where)
        else:
            with own_server(scenario, args.folder) as target:
                found = run_all(header, scenario, target, where)
    except (ValueError, httpx.HTTPError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    report.save(found, where, f"load-{scenario.name}")
    draw_plots(found, where)
    print(f"\n{scenario.about}\n\n{table(found)}")
    for case in found["cases"]:
        if case["errors"]:
            print("errors" + (f" at {case['value']:g}" if found["vary"] else ""), case["errors"])
    broken = verdict(found)
    for told in broken:
        print(f"BROKEN: {told}")
    if not broken:
        print(f"held: {json.dumps([bound.figure for bound in scenario.thresholds])}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
