from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from tests import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of ``tiny.write_model`` with these arguments, written once: leave it alone."""
    written: dict[str, Path] = {}

    def get(arch: tiny.Arch = "llama", **options: Any) -> Path:
        key = f"{arch}{sorted(options.items())}"
        if key not in written:
            written[key] = tiny.write_model(tmp_path_factory.mktemp(arch), arch, **options)
        return written[key]

    return get


@pytest.fixture(autouse=True)
def _one_kernel_thread() -> None:
    """Tiny shapes gain nothing from threads; a test about threads sets its own number."""
    numba.set_num_threads(1)
