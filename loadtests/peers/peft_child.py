"""transformers and PEFT as a child process; run by ``Worker``.

``generate()`` takes a batch and returns when its last row is done, so at most ``concurrency`` at a
time means batches of that size, one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1] / "serving"))

from cases import Job
from child import Serve, main
from throughput import Peft


def build(setup: dict[str, Any]) -> Serve:
    peft = Peft(Path(setup["base"]), [Path(path) for path in setup["adapters"]])

    def serve(jobs: list[dict[str, Any]], concurrency: int) -> list[list[int]]:
        work = [Job(**job) for job in jobs]
        batches = (work[i : i + concurrency] for i in range(0, len(work), concurrency))
        return [ids for batch in batches for ids in peft.run(batch)]

    return serve


if __name__ == "__main__":
    main(build)
