"""The soak at its full length, in a file of its own so that other tests run beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak


@pytest.mark.slow  # twenty minutes of traffic, a fault a minute: that is what it is
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_minutes_with_a_fault_a_minute_leave_nothing_behind(tmp_path: Path) -> None:
    folders = ["--folder", str(tmp_path), "--out", str(tmp_path)]
    assert soak.main(["--minutes", "20", *folders]) == 0
