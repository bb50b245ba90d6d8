"""What the commands show a person: tables and progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.json import JSON
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table


def adapter_table(views: Iterable[Any], *, full: bool = False) -> None:
    """Adapters, a line each; ``full`` adds the validator's report."""
    table = Table(box=None, header_style="bold")
    for column in ("name", "generation", "status", "where", "rank", "MiB", "digest"):
        table.add_column(column, justify="right" if column in ("rank", "MiB") else "left")
    rows = list(views)
    for view in rows:
        table.add_row(
            view.name + (" (pinned)" if view.pinned else ""),
            str(view.generation),
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
        if full and view.report:
            console.print(JSON.from_data(view.report))


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


@contextmanager
def upload_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar for one upload; the callback takes (bytes sent, bytes in all)."""
    with Progress("uploading", BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("uploading")

        def update(sent: int, total: int) -> None:
            progress.update(task, completed=sent, total=total)

        yield update
