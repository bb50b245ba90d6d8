"""The load tests are scripts that find each other beside themselves."""

from __future__ import annotations

import sys
from pathlib import Path

LOADTESTS = Path(__file__).parents[2] / "loadtests"
sys.path[:0] = [str(LOADTESTS / "serving"), str(LOADTESTS / "kernels")]
