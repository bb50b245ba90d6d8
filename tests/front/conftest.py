"""Child processes import loramux from the source tree, as the tests do."""

from __future__ import annotations

import pytest
from tests.front.house import SERVER


@pytest.fixture(autouse=True)
def _source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SERVER))
