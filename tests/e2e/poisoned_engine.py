"""The engine's command with a fault of its own: computing POISON ends the process, as a kernel that
reads past its end would."""

from __future__ import annotations

import os
import sys
from typing import Any

from loramux.engine.main import main
from loramux.model.runner import ModelRunner

POISON = [7, 77, 7, 77, 7]

_forward = ModelRunner.forward


def _forward_or_die(self: ModelRunner, plan: Any) -> Any:
    for row in plan.batch.rows:
        if row.request.ids[: len(POISON)].tolist() == POISON:
            os.abort()
    return _forward(self, plan)


if __name__ == "__main__":
    ModelRunner.forward = _forward_or_die  # type: ignore[method-assign]
    sys.exit(main())
