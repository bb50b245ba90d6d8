"""``loramux``, but its engines are those of ``poisoned_engine``."""

from __future__ import annotations

import sys
from functools import partial

from loramux.cli import main
from loramux.front.front import Front
from loramux.http import serve

if __name__ == "__main__":
    engine = (sys.executable, "-m", "tests.e2e.poisoned_engine")
    serve.Front = partial(Front, engine=engine)  # type: ignore[misc,assignment]
    sys.exit(main())
