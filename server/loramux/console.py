"""What the commands show a person: tables and progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.json import JSON
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def adapter_table(views: Iterable[Any], *, full: bool = False) -> None:
    """Adapters, a line each; ``full`` adds the validator's report."""
    table = Table(box=None, header_style="bold")
    for column in ("name", "generation", "base", "status", "where", "rank", "MiB", "digest"):
        table.add_column(column, justify="right" if column in ("rank", "MiB") else "left")
    rows = list(views)
    for view in rows:
        table.add_row(
            view.name + (" (pinned)" if view.pinned else ""),
            str(view.generation),
            view.base,
            view.status,
            view.residency,
            "" if view.rank is None else str(view.rank),
            "" if view.num_bytes is None else f"{view.num_bytes / 2**20:.1f}",
            view.digest[:12],
        )
    console = Console()
    console.print(table if rows else "no adapters yet: loramux adapters push FOLDER")
    for view in rows:
        if view.error:
            console.print(f"{view.name}: {view.error}", style="red")
        if view.flagged:
            told = ", ".join(f"{num} requests with it: {code}" for code, num in view.faults.items())
            console.print(f"{view.name}: flagged: {told}", style="red")
        for base, companion in view.companions.items():
            if companion["status"] != "ready":
                told = f"{companion['name']!r} for the {base} model: {companion['status']}"
                console.print(f"{view.name}: does without its companion {told}", style="yellow")
        if full and view.report:
            console.print(JSON.from_data(view.report))
        if full and view.profile:
            console.print(JSON.from_data(view.profile))


def alias_table(views: Iterable[Any]) -> None:
    """Aliases, a line each share."""
    table = Table(box=None, header_style="bold")
    for column in ("alias", "revision", "stands for", "share", "status", "digest"):
        table.add_column(column, justify="right" if column == "share" else "left")
    rows = list(views)
    for view in rows:
        total = sum(target.weight for target in view.targets)
        for target in view.targets:
            table.add_row(
                view.id,
                str(view.revision),
                target.model + (" (newest)" if target.follows else ""),
                f"{100 * target.weight / total:.4g} %",
                target.status,
                (target.digest or "")[:12],
            )
    Console().print(table if rows else "no aliases yet: loramux aliases set NAME TARGET")


def compression_facts(compressed: Any) -> None:
    """What compressing did to an adapter that is about to be sent."""
    change = compressed.relative_change
    moved = "they add nothing" if change is None else f"moved by {100 * change:.1f} %"
    Console().print(
        f"compressed to {compressed.bytes_after} of {compressed.bytes_before} bytes"
        f" ({compressed.ratio:.1f} times smaller; {compressed.ratio_16bit:.1f} times against 16-bit"
        f" values): {100 * compressed.kept:.1f} % of the values kept; what its modules add: {moved}"
        " in the mean (|B'A' - BA| / |BA|)",
        highlight=False,
    )


def inspection(found: dict[str, Any]) -> None:
    """What ``loramux.inspection.inspect`` found."""
    console = Console()
    tensors = found["tensors"]
    width = max((len(tensor["name"]) for tensor in tensors), default=0)
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"]))
        line = Text(f"{tensor['name']:{width}}  {tensor['dtype']:8}  {shape:12}  ")
        console.print(line + _place(tensor), soft_wrap=True)
    for problem in found["problems"]:
        console.print(Text(f"refused: {problem}", "red"), soft_wrap=True)
    if found["report"] is not None:
        _report(console, found["report"])


def _place(tensor: dict[str, Any]) -> Text:
    if tensor["problem"] is not None:
        return Text("refused: " + tensor["problem"], "red")
    if tensor["part"] is None:
        return Text("nothing", "red")
    if tensor["module"] is None:
        return Text("all modules")
    layer = "" if tensor["layer"] is None else f"layer {tensor['layer']} "
    return Text(f"{layer}{tensor['module']}: {tensor['part']}")


def _report(console: Console, report: dict[str, Any]) -> None:
    modules = Table(box=None, header_style="bold")
    for column in ("module", "tensors", "rank", "scale", "|s B A|", "largest value"):
        modules.add_column(column, justify="left" if column == "module" else "right")
    for module, line in report["by_module"].items():
        spreads = [_spread(line.get(key)) for key in ("rank", "scale", "norm")]
        largest = f"{line['largest']:.3g}" if "largest" in line else ""
        if not line.get("fits_float16", True):
            largest += " (beyond float16)"
        modules.add_row(module, str(line["tensors"]), *spreads, largest)
    console.print(modules)
    cost = report["cost"]
    lines = [
        f"{report['num_bytes']} bytes of {report['dtype']}, {report['num_frames']} frames of the"
        f" pool; a row reads {cost['row_bytes']} bytes a token",
    ]
    if percent := cost.get("percent_of_base"):
        rows = ", ".join(f"{share} % with {n}" for n, share in percent.items())
        lines.append(
            f"that is, of what the base's matrices take in a step: {rows} rows (each with such an"
            " adapter to itself)"
        )
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _spread(values: list[float] | None) -> str:
    if values is None:
        return ""
    low, middle, high = (f"{value:.4g}" for value in values)
    return low if low == high else f"{low} .. {middle} .. {high}"


def parity_table(compared: Iterable[Any]) -> None:
    """What ``loramux.parity.verify`` found."""
    table = Table(box=None, header_style="bold")
    for column in ("prompt", "tokens as PEFT's", "first near tie", "verdict"):
        table.add_column(column)
    for line in compared:
        near = "" if line.near_tie is None else f"token {line.near_tie}"
        verdict = "equal" if line.equal == line.tokens else "equal up to a near tie"
        if not line.agrees:
            verdict = f"differs (PEFT's logits are {line.gap:.2g} apart)"
        table.add_row(Text(line.prompt), f"{line.equal} of {line.tokens}", near, verdict)
    Console().print(table)


def bench_figures(found: dict[str, Any]) -> None:
    """What ``loramux.bench`` found: every figure that there is with its formula, and failures."""
    table = Table(box=None, header_style="bold")
    for column in ("figure", "value", "", "formula"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value in found["figures"].items():
        if value is not None:
            unit, formula = found["formulas"][name]
            table.add_row(name, f"{value:.4g}", unit, Text(formula))
    console = Console()
    console.print(table)
    for kind, times in found["errors"].items():
        console.print(Text(f"{times} times: {kind}", "red"))


@contextmanager
def upload_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar for one upload; the callback takes (bytes sent, bytes in all)."""
    with Progress("uploading", BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("uploading")

        def update(sent: int, total: int) -> None:
            progress.update(task, completed=sent, total=total)

        yield update
