"""The far end of ``Worker``: requests as lines of JSON on stdin, answers on what was stdout.

Imported by the ``*_child.py`` scripts, which run in other environments: standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Serve = Callable[[list[dict[str, Any]], int], list[list[int]]]


def main(build: Callable[[dict[str, Any]], Serve]) -> None:
    """``build(setup)`` gives ``serve(jobs, concurrency)``, which gives each job's new tokens."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    serve = build(json.loads(sys.stdin.readline()))
    say({"ready": True})
    for line in sys.stdin:
        ask = json.loads(line)
        start = time.perf_counter()
        outputs = serve(ask["jobs"], ask["concurrency"])
        say({"seconds": time.perf_counter() - start, "outputs": outputs})
