"""A load test as a file: what is sent, to what, and what has to come of it.

name = "skewed"
about = "what it is for, in a sentence or two"

[traffic]            # traffic.Traffic, field by field
adapters = 100
alpha = 0.8

[vary]               # at most one field of traffic, run once for each value
rate = [1, 2, 4]

[server]             # the server that is started without --url
model = "135M"       # or "tiny"
targets = "all"      # or "attention"
flags = ["--pool-memory", "200M"]

[client]             # bounds on the client itself, and its patience
lag_s = 0.05
drain_s = 60

[thresholds]         # figures.figures, each with min or max or both; for every value
ttft_p99_s = { max = 6.0 }

[quick]              # what --quick puts in place of fields of traffic, and of tables
duration_s = 5
vary = { rate = [2] }
server = { model = "tiny" }
thresholds = { error_share = { max = 0 } }
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from population import Model

from loramux.bench import figures
from loramux.bench.open_loop import Bounds
from loramux.bench.traffic import Traffic


@dataclass(frozen=True)
class Threshold:
    """A bound that a run has to keep: ``low <= figure <= high``."""

    figure: str
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def read(cls, table: Mapping[str, Mapping[str, float]]) -> list[Threshold]:
        """From a scenario's table: ``ttft_p99_s = { max = 6 }``. Raises ValueError for a figure
        that does not exist and for a bound that is neither min nor max."""
        known = set(figures.formulas())
        found = []
        for name, bounds in table.items():
            if name not in known:
                raise ValueError(f"thresholds: no figure {name!r}; there are {sorted(known)}")
            if not bounds or set(bounds) - {"min", "max"}:
                raise ValueError(f"thresholds: {name} needs min or max, not {sorted(bounds)}")
            found.append(cls(name, bounds.get("min", -math.inf), bounds.get("max", math.inf)))
        return found

    def broken(self, values: Mapping[str, float | None]) -> str | None:
        """How it was broken, or None. A figure that could not be counted breaks it."""
        value = values[self.figure]
        if value is not None and self.low <= value <= self.high:
            return None
        bounds = [f">= {self.low:g}"] if self.low > -math.inf else []
        bounds += [f"<= {self.high:g}"] if self.high < math.inf else []
        told = "nothing to count" if value is None else f"{value:.4g}"
        return f"{self.figure} is {told}, has to be {' and '.join(bounds)}"


@dataclass(frozen=True)
class ServerSettings:
    """The server of our own."""

    model: Model = "135M"
    targets: Literal["attention", "all"] = "attention"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClientSettings:
    """``drain_s``: how long to wait after the last request left. ``ignore_eos`` makes every answer
    as long as planned, where the server knows that field."""

    lag_s: float = 0.05
    stall_s: float = 0.05
    drain_s: float = 60.0
    ignore_eos: bool = True

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.lag_s, self.stall_s)


@dataclass(frozen=True)
class Scenario:
    """One file. ``points`` are its runs."""

    name: str
    about: str
    traffic: Traffic
    vary: str = ""
    values: tuple[float, ...] = ()
    server: ServerSettings = field(default_factory=ServerSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    thresholds: tuple[Threshold, ...] = ()

    @property
    def points(self) -> list[Traffic]:
        """The traffic of each run."""
        if not self.vary:
            return [self.traffic]
        return [replace(self.traffic, **{self.vary: value}) for value in self.values]


TABLES = {"name", "about", "traffic", "vary", "server", "client", "thresholds", "quick"}


def read(path: Path, *, quick: bool = False) -> Scenario:
    """A scenario file. Raises ValueError, naming the file, for anything it does not know."""
    try:
        return parse(tomllib.loads(path.read_text()), quick=quick)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse(table: dict[str, Any], *, quick: bool = False) -> Scenario:
    """What a file holds. Raises ValueError and TypeError."""
    if unknown := set(table) - TABLES:
        raise ValueError(f"no table {sorted(unknown)}; there are {sorted(TABLES)}")
    if missing := {"name", "about", "traffic"} - set(table):
        raise ValueError(f"needs {sorted(missing)}")
    if quick:
        table = _quick(table)
    else:
        parse(table, quick=True)  # it is not left for later to be found wrong
    vary, traffic = table.get("vary", {}), table["traffic"]
    if len(vary) > 1:
        raise ValueError("vary: one field at a time")
    name, values = next(iter(vary.items()), ("", []))
    if vary and (not isinstance(values, list) or not values):
        raise ValueError(f"vary: {name} needs a list of values")
    scenario = Scenario(
        name=table["name"],
        about=table["about"],
        traffic=Traffic.read(traffic),
        vary=name,
        values=tuple(values),
        server=_settings(ServerSettings, "server", table),
        client=_settings(ClientSettings, "client", table),
        thresholds=tuple(Threshold.read(table.get("thresholds", {}))),
    )
    for value in values:
        Traffic.read(traffic | {name: value})
    return scenario


def _quick(table: dict[str, Any]) -> dict[str, Any]:
    """A scenario's short form."""
    changes = dict(table.get("quick", {}))
    whole = {name: changes.pop(name) for name in set(changes) & TABLES}
    return {**table, **whole, "traffic": table["traffic"] | changes}


def _settings(kind: Any, name: str, table: dict[str, Any]) -> Any:
    given = table.get(name, {})
    known = {each.name for each in fields(kind)}
    if unknown := set(given) - known:
        raise ValueError(f"{name}: no {sorted(unknown)}; there are {sorted(known)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
