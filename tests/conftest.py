"""Shared by every test; kept to what truly is."""

from __future__ import annotations

import sys
import zlib

import pytest
from hypothesis import settings

settings.register_profile("loramux", deadline=None)  # no clock decides a test
settings.load_profile("loramux")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", help="I/N: run only the I-th of N parts of the tests")


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests are dealt out in an order drawn from their names: no part is empty while there are
    as many tests as parts, and N parts together are all of them."""
    if part := config.getoption("--slice"):
        index, count = map(int, part.split("/"))
        dealt = sorted(items, key=lambda item: (zlib.crc32(item.nodeid.encode()), item.nodeid))
        mine = set(dealt[index::count])
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = [item for item in items if item in mine]


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Tiny shapes gain nothing from threads, and tests that run side by side lose by them.

    Tests that never import torch do not pay for it; a test about threads sets its own number.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
