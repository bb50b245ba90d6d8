"""Rows run on an adapter whose layers are still arriving: the same tokens, a step sooner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.adapters.fake_device import FakeDevice, FakeMark
from tests.harness import Harness

from loramux.adapters import staging
from loramux.adapters.packed_files import PackedFiles
from loramux.adapters.staging import TieredStore
from loramux.memory.arena import Arena
from loramux_kernels import dispatch


class InlineDevice(FakeDevice):
    """The queue that computes is the test's own thread: holding it works the device off."""

    def hold(self, mark: FakeMark) -> None:
        self.holds.append(mark)
        self.work_until(lambda: mark.passed)

    def given(self) -> Any:
        return None


def tiered(harness: Harness) -> InlineDevice:
    """Give the engine of ``harness`` a host tier and a ring."""
    engine = harness.engine
    decoder = engine._loop._runner._decoder
    frame = engine.residency._layout.frame
    arena = Arena(1, frame, torch.device("cpu"))
    arena.data = decoder.arena
    device = InlineDevice()
    files = PackedFiles(harness.data_dir, harness.ready.base.fingerprint)
    store = TieredStore(files, arena, device, 64 << 20)
    engine.residency._store = engine.residency._loader._store = store
    return device


def test_tokens_are_the_same_and_the_row_does_not_wait_for_the_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "BLOCK_BYTES", 1 << 13)
    model = tiny.write_model(tmp_path / "base")
    folder = tiny.write_adapter(tmp_path / "a", model)
    with dispatch.using("reference"):
        plain = Harness(model)
        expected = plain.generate([5, 6, 7], folder)
        plain.close()
        harness = Harness(model)
        device = tiered(harness)
        assert harness.generate([5, 6, 7], folder) == expected
        assert not device.holds, "the first load comes from disk, as a whole"
        residency = harness.engine.residency
        (digest,) = harness.digests.values()
        for _ in range(3):  # the prefix cache would hide wrong weights: another salt each time
            assert residency.evict(digest)
            device.gate.clear()
            residency.pace._lead_s = 1e6
            name = harness.submit([5, 6, 7], folder, cache_salt=str(device.holds))
            harness.step()
            assert len(harness.outputs[name]) == 1, "its first step runs at once"
            assert residency.num_loading == 1
            device.gate.set()
            harness.run()
            assert harness.outputs[name] == expected
        assert len(device.holds) > 3
        harness.close()
