"""Collecting everything that is wrong with an upload before saying no."""

from __future__ import annotations

from loramux.errors import AdapterInvalid

MAX_LISTED = 50
"""An upload can have 20 000 offenders; the rest are counted."""


class Problems:
    """Offenders found so far, the first ``most`` of them ``listed``. The error's code is theirs if
    they agree, else adapter_invalid."""

    def __init__(self, most: int = MAX_LISTED) -> None:
        self.listed: list[str] = []
        self._most = most
        self._codes: set[str] = set()
        self._count = 0

    def add(self, text: str, code: str = AdapterInvalid.code) -> None:
        """Note one offender. ``text`` names it and says what is wrong with it."""
        self._count += 1
        self._codes.add(code)
        if self._count <= self._most:
            self.listed.append(text)

    def raise_any(self) -> None:
        """Raise AdapterInvalid with all of them, if there are any."""
        if not self._count:
            return
        listed = list(self.listed)
        if self._count > self._most:
            listed.append(f"... and {self._count - self._most} more")
        more = f"{self._count} problems; the first: " if self._count > 1 else ""
        code = self._codes.pop() if len(self._codes) == 1 else AdapterInvalid.code
        raise AdapterInvalid(more + self.listed[0], problems=listed, code=code)
