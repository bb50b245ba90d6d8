"""A config being read: typed access by name that collects what is wrong instead of raising."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Fields:
    """One JSON object of a config.

    A reader returns a harmless stand-in after a problem, so that one pass finds every problem.
    A nested object shares the ``problems`` of its parent and puts ``prefix`` before its names.
    """

    def __init__(
        self, values: Mapping[str, Any], *, prefix: str = "", problems: list[str] | None = None
    ) -> None:
        self.values = values
        self.prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def refuse(self, name: str, why: str) -> None:
        self.problems.append(f"{self.prefix}{name}: {why}")

    def nested(self, name: str) -> Fields:
        """The object at ``name``; an empty one when missing or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, f"must be an object, is {value!r}")
            value = None
        return Fields(value or {}, prefix=f"{self.prefix}{name}.", problems=self.problems)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; ``default`` when missing or null."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            self.refuse(name, f"must be a positive integer, is {self._shown(name)}")
            return 1
        return value

    def number(self, name: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A positive finite number of at least ``least``; ``default`` when missing or null."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            if least <= value < math.inf and value != 0:
                return float(value)
        bound = f"a number of at least {least:g}" if least else "a positive number"
        self.refuse(name, f"must be {bound}, is {self._shown(name)}")
        return least or 1.0

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean; ``default`` when missing or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            self.refuse(name, f"must be true or false, is {value!r}")
            return default
        return value

    def _shown(self, name: str) -> str:
        return repr(self.values[name]) if name in self.values else "missing"
