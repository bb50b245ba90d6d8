"""The engine as an object: refusals, aborts, deadlines and broken rows end one request only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.harness import Harness

from loramux.memory.frames import Owner
from loramux.wire import Command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("engine") / "base")


def test_what_can_never_run_is_refused_and_nobody_else_notices(model: Path) -> None:
    harness = Harness(model, num_frames=6)
    good = harness.submit([5, 6, 7])
    large = harness.submit([5] * 60, max_tokens=60)
    biased = harness.submit([5], logit_bias={tiny.VOCAB_SIZE: 1.0})
    harness.run()
    assert harness.failed[large].code == "request_too_large"
    assert harness.failed[biased].code == "invalid_request"
    assert len(harness.outputs[good]) == 8
    harness.close()


def test_a_missing_adapter_fails_its_request_alone(model: Path, tmp_path: Path) -> None:
    harness = Harness(model)
    adapter = tiny.write_adapter(tmp_path / "a", model)
    digest = harness.install(adapter)
    (path,) = harness.data_dir.glob(f"packed/{digest}*")
    path.unlink()
    lost = harness.submit([5, 6], adapter)
    base = harness.submit([5, 6])
    harness.run()
    assert harness.failed[lost].code == "adapter_load_failed"
    assert len(harness.outputs[base]) == 8
    harness.close()


def test_a_damaged_adapter_is_not_served(model: Path, tmp_path: Path) -> None:
    harness = Harness(model)
    adapter = tiny.write_adapter(tmp_path / "a", model)
    digest = harness.install(adapter)
    (path,) = harness.data_dir.glob(f"packed/{digest}*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    name = harness.submit([5, 6], adapter)
    harness.run()
    assert harness.failed[name].code == "adapter_load_failed"
    assert "checksum" in harness.failed[name].message
    assert harness.engine.pool.frames.count(Owner.ADAPTER) == 0
    harness.close()


def test_abort_frees_everything_at_once(model: Path, tmp_path: Path) -> None:
    harness = Harness(model, prefix_caching=False)
    adapter = tiny.write_adapter(tmp_path / "a", model)
    harness.submit([5] * 40, adapter, max_tokens=50, name="running")
    while not harness.outputs["running"]:
        harness.step()
    harness.engine.abort(["running", "never heard of"])
    assert not harness.engine.has_work
    assert harness.engine.pool.frames.count(Owner.KV) == 0
    harness.engine.check()
    assert "running" not in harness.finished
    harness.close()


def test_a_row_without_finite_logits_fails_alone_and_is_not_cached(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(model)
    good = harness.submit([9] * 20, max_tokens=4)
    bad = harness.submit([8] * 20, max_tokens=4, tenant="bad")
    forward = harness.engine._loop._runner._decoder.forward

    def poisoned(inputs: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(inputs)
        if inputs.token_ids[-1] == 8:
            logits[-1] = torch.nan
        return logits

    monkeypatch.setattr(harness.engine._loop._runner._decoder, "forward", poisoned)
    harness.run()
    assert harness.failed[bad].code == "numerical_error"
    assert len(harness.outputs[good]) == 4
    monkeypatch.undo()
    again = harness.submit([8] * 20, max_tokens=4, tenant="bad")
    harness.run()
    assert harness.finished[again].cached_tokens == 0
    harness.close()


def test_with_no_tokens_asked_for_only_the_prompt_is_computed(model: Path) -> None:
    harness = Harness(model)
    name = harness.submit([5, 6, 7], max_tokens=0, prompt_logprobs=1)
    harness.run()
    assert harness.outputs[name] == [] and harness.finished[name].reason == "length"
    (output,) = harness.details[name]
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 3
    harness.close()


def test_a_deadline_ends_a_request(model: Path) -> None:
    harness = Harness(model)
    name = harness.submit([5, 6], max_tokens=100, deadline_s=0.0)
    harness.run()
    assert harness.failed[name].code == "deadline_exceeded"
    harness.close()


def test_stop_tokens_minimum_and_length(model: Path) -> None:
    harness = Harness(model)
    free = harness.generate([5, 6, 7], max_tokens=12)
    stop = free[4]
    first = free.index(stop)
    name = harness.submit([5, 6, 7], max_tokens=12, stop_token_ids=(stop,))
    harness.run()
    assert harness.outputs[name] == free[: first + 1]
    assert harness.finished[name].reason == "stop"
    assert harness.finished[name].stop_token_id == stop
    name = harness.submit([5, 6, 7], max_tokens=12, stop_token_ids=(stop,), min_tokens=first + 2)
    harness.run()
    assert len(harness.outputs[name]) >= first + 2
    assert stop not in harness.outputs[name][: first + 2]
    harness.close()


def test_pins_keep_and_evictions_drop(model: Path, tmp_path: Path) -> None:
    harness = Harness(model)
    digest = harness.install(tiny.write_adapter(tmp_path / "a", model))

    def command(kind: Any) -> dict[str, Any]:
        return dict(harness.engine.command(Command(command_id=1, kind=kind, digest=digest)))

    assert command("pin")["pinned"] == [digest]
    while harness.engine.residency.num_loading:
        harness.step()
    [there] = command("state")["picture"]["residents"]
    assert (there["digest"], there["pinned"]) == (digest, True)
    command("unpin")
    assert command("evict")["resident"] == []
    harness.close()


def test_it_is_told_how_long_the_oldest_waits(model: Path) -> None:
    harness = Harness(model, max_num_seqs=1)
    harness.submit([5, 6, 7], max_tokens=4)
    harness.submit([8, 9], max_tokens=4)
    harness.step()
    waited = [step.stats.get("oldest_waiting_s") for step in harness.steps if step.stats]
    assert waited[0] is not None and waited[0] >= 0.0
    harness.run()
    told = harness.steps[-1].stats
    assert told.get("num_waiting", 0) == 0 and told.get("oldest_waiting_s") is None
    harness.close()
