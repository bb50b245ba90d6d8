"""loramux's engine as a child process; run by ``Worker``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1] / "serving"))

from cases import Job
from child import Serve, main
from throughput import Ours


def build(setup: dict[str, Any]) -> Serve:
    adapters = [Path(path) for path in setup["adapters"]]
    ours = Ours(Path(setup["base"]), adapters, Path(setup["folder"]) / "data-engine")

    def serve(jobs: list[dict[str, Any]], concurrency: int) -> list[list[int]]:
        return ours.run([Job(**job) for job in jobs], concurrency=concurrency)

    return serve


if __name__ == "__main__":
    main(build)
