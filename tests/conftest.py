"""Shared by every test; kept to what truly is."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Tiny shapes gain nothing from threads, and tests that run side by side lose by them.

    Tests that never import torch do not pay for it; a test about threads sets its own number.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
