"""``loramux.bench.live``, where ``sweep.py`` looks for it."""

from loramux.bench.live import shown

__all__ = ["shown"]
