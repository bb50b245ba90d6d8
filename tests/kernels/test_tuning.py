"""The shipped launch tables."""

from __future__ import annotations

import json

import pytest
import torch

from loramux_kernels import tuning


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_every_table_has_every_kernel_for_every_width(path) -> None:  # type: ignore[no-untyped-def]
    table = tuning.table_named(path.stem)
    assert set(table.kernels) == set(tuning.table_named("default").kernels)
    for kernel, classes in table.kernels.items():
        limits = [most for most, _ in classes]
        assert limits[-1] is None and None not in limits[:-1], kernel
        assert limits[:-1] == sorted(limits[:-1]), kernel
        assert table.launch(kernel, 1 << 20) == classes[-1][1]
    assert "measured" in json.loads(path.read_text())["about"].lower()


def test_the_first_class_that_is_wide_enough_is_taken() -> None:
    text = json.dumps(
        {
            "lone_rows": 1,
            "lone_ranks": 2,
            "kernels": {
                "norm": [
                    {"max_width": 256, "warps": 1, "stages": 1},
                    {"max_width": None, "warps": 8, "stages": 1, "block": 3},
                ]
            },
        }
    )
    table = tuning.parse("made up", text)
    assert table.launch("norm", 256).warps == 1
    assert table.launch("norm", 257) == tuning.Launch(8, 1, 1, 3)
    with pytest.raises(TypeError, match="wraps"):
        tuning.parse("made up", text.replace('"warps"', '"wraps"'))


def test_a_device_without_a_table_gets_the_default() -> None:
    device = torch.device("cpu")
    assert tuning.table_of(device).name == "default"
    assert tuning.num_programs(tuning.Launch(4, 1, 6), device) == 6
