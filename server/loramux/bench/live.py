"""A run while it goes on, in the terminal: one line, rewritten."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loramux.bench.figures import percentile
from loramux.bench.open_loop import Live


def line(live: Live) -> str:
    """What is worth seeing: sent, under way, failed, and how it feels so far."""
    sent = [record for record in live.records if record.status != "incomplete" or record.chunks_s]
    failed = sum(record.status == "error" for record in sent)
    ok = [record for record in sent if record.status == "ok"]
    tokens = sum(record.completion_tokens for record in ok)
    ttft = percentile([record.ttft_s for record in sent if record.chunks_s], 50)
    rate = tokens / live.now_s if live.now_s else 0.0
    parts = [
        f"{live.sent - live.done} in flight",
        f"{len(ok)} ok",
        f"[red]{failed} failed[/]" if failed else "0 failed",
        f"{rate:.1f} tok/s",
    ]
    if ttft is not None:
        parts.append(f"TTFT p50 {ttft:.2f} s")
    return ", ".join(parts)


@contextmanager
def shown(what: str, total: int) -> Iterator[Callable[[Live], None]]:
    """``show`` for ``open_loop.send``. Where there is no terminal, nothing is drawn until the end,
    and then one line."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} sent"),
        TextColumn("{task.fields[line]}"),
        TimeElapsedColumn(),
    )
    last: list[Live] = []
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total, line="")

        def show(live: Live) -> None:
            last[:] = [live]
            progress.update(task, completed=live.sent, line=line(live))

        yield show
    if last and not sys.stderr.isatty():
        console.print(f"{what}: {last[0].sent}/{total} sent, {line(last[0])}", soft_wrap=True)
