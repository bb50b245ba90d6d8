"""Shared by every test; kept to what truly is."""

from __future__ import annotations

import sys
import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", help="I/N: run only the I-th of N parts of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which part a test is in depends on its name alone, so that N commits in a row see it all."""
    if part := config.getoption("--slice"):
        index, count = map(int, part.split("/"))
        kept = [i for i in items if zlib.crc32(i.nodeid.encode()) % count == index]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A part may hold no test at all, which is no failure."""
    if session.config.getoption("--slice") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Tiny shapes gain nothing from threads, and tests that run side by side lose by them.

    Tests that never import torch do not pay for it; a test about threads sets its own number.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
