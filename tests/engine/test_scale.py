"""A step costs what runs, not what is registered or resident."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.harness import Harness

from loramux.errors import ConfigError


class Counting(dict[str, Any]):
    """Counts how often somebody goes through all of it."""

    walks = 0

    def __iter__(self) -> Iterator[str]:
        Counting.walks += 1
        return super().__iter__()

    def items(self) -> Any:
        Counting.walks += 1
        return super().items()

    def values(self) -> Any:
        Counting.walks += 1
        return super().values()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("scale") / "base")


def test_no_step_goes_through_the_resident_adapters(model: Path, tmp_path: Path) -> None:
    """The lists for the front are the exception: at most one a second while rows run."""
    harness = Harness(model, check=False)
    folders = [tiny.write_adapter(tmp_path / str(i), model, seed=i) for i in range(4)]
    for folder in folders[:3]:
        harness.generate([5, 6, 7], folder)
    now = [1000.0]
    harness.engine._clock = lambda: now[0]
    harness.submit([5, 6], max_tokens=40)
    harness.step()
    Counting.walks = 0
    harness.engine.residency._adapters = Counting(harness.engine.residency._adapters)
    for index in range(3):
        harness.submit([7, index], folders[index], max_tokens=4)
    harness.submit([7, 8], folders[3], max_tokens=4)
    told = [done for _ in range(20) if "resident" in (done := harness.step()).stats]
    assert Counting.walks == 0 and not told
    while "resident" not in harness.steps[-1].stats:
        now[0] += 0.25
        harness.step()
    assert harness.steps[-1].stats["resident"] == harness.engine.residency.resident()
    assert len(harness.steps[-1].stats["resident"]) == 4
    harness.close()


def test_a_cpu_has_no_host_tier(model: Path) -> None:
    with pytest.raises(ConfigError, match="--host-memory is for a GPU"):
        Harness(model, host_memory="1G")


def test_what_requests_wait_for_is_told_and_taken_back(model: Path, tmp_path: Path) -> None:
    harness = Harness(model, max_num_seqs=1)
    folder = tiny.write_adapter(tmp_path / "a", model)
    digest = harness.install(folder)
    now = [1000.0]
    harness.engine._clock = lambda: now[0]
    harness.submit([5, 6], max_tokens=6)
    harness.submit([5, 6], folder, max_tokens=2)
    while harness.engine.has_work:
        harness.step()
        now[0] += 2.0
    harness.step()
    lists = [d.stats["waiting_adapters"] for d in harness.steps if "waiting_adapters" in d.stats]
    assert lists == [[digest], []]
    harness.close()
