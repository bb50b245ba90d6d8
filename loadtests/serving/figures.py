"""``loramux.bench.figures``, where ``sweep.py`` looks for it."""

from loramux.bench.figures import by_name, errors, figures, percentile

__all__ = ["by_name", "errors", "figures", "percentile"]
