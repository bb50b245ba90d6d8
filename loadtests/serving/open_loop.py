"""``loramux.bench.open_loop``, where ``sweep.py`` looks for it."""

from loramux.bench.open_loop import Ask, Bounds, Record, Run, send

__all__ = ["Ask", "Bounds", "Record", "Run", "send"]
