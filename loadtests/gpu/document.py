"""The page a run on a GPU leaves behind: written after every section, so that a run that is cut
short still says what it saw, and a section that fails is a section that says so."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

Cell = str | int | float | None


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table; floats get three significant digits, None is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " ---: |" * len(columns)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


class Document:
    """Sections in the order they ran. ``facts`` are (what, value) of the machine and the run."""

    def __init__(
        self,
        path: Path,
        title: str,
        command: str,
        facts: Sequence[tuple[str, str]],
        *,
        deadline_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._path = path
        self._head = f"# {title}\n\n    {command}\n\n" + "".join(f"* {k}: {v}\n" for k, v in facts)
        self._sections: list[str] = []
        self._began = time.monotonic()
        self._deadline_s = deadline_s
        self._say = say
        self.failures: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds until no section may begin any more."""
        return self._deadline_s - (time.monotonic() - self._began)

    def section(self, title: str, measure: Callable[[], str]) -> None:
        """Run ``measure`` and keep the Markdown it returns, or what went wrong."""
        began = time.monotonic()
        self._say(f"[{began - self._began:5.0f} s] {title}")
        if self.left_s <= 0:
            text = "Not run: the time was up."
            self.failures.append(f"{title}: not run")
        else:
            try:
                text = measure()
            except Exception as error:
                last = traceback.format_exc().strip().splitlines()[-12:]
                text = "**Failed.**\n\n" + "\n".join(f"    {line}" for line in last)
                self.failures.append(f"{title}: {type(error).__name__}: {error}")
                self._say(f"failed: {error}")
        took = time.monotonic() - began
        self._sections.append(f"## {title}\n\n{text}\n\n({took:.0f} s)\n")
        self.write()

    def write(self) -> None:
        """The page as it stands."""
        failed = "".join(f"* {line}\n" for line in self.failures) or "* none\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        body = "\n".join(self._sections)
        self._path.write_text(f"{self._head}\nFailed or not run:\n\n{failed}\n{body}")
