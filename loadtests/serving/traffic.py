"""``loramux.bench.traffic``, where ``sweep.py`` looks for it."""

from loramux.bench.traffic import Arrival, Traffic, draw, prompt_ids

__all__ = ["Arrival", "Traffic", "draw", "prompt_ids"]
