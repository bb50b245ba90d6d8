"""Child processes import loramux from the source tree, as the tests do; a front without any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.front.house import SERVER, configure
from tests.front.scripted import Scripted

from loramux.config import ServerConfig


@pytest.fixture(autouse=True)
def _source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SERVER))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    return configure(tmp_path_factory.mktemp("front"), max_num_seqs=8)


@pytest.fixture
def scripted(config: ServerConfig, tmp_path: Path) -> Callable[[], Scripted]:
    return lambda: Scripted(config, tmp_path)
