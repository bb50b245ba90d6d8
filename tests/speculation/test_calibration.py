"""``loramux calibrate-entropy`` on a tiny pair: what it writes adds up."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from random import Random

import pytest
from tests import tiny

from loramux.calibration import Coin
from loramux.cli import main
from loramux.entropy_cli import read_prompts, read_thresholds
from loramux.errors import ConfigError
from loramux.request import BASE_MODEL_ID, EntropyAdaptive


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("calibration")
    large = tiny.write_model(folder / "large")
    small = tiny.write_model(folder / "small", seed=1, num_hidden_layers=2, head_dim=8)
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": sentence}) for sentence in tiny.SENTENCES[:4]]
    prompts.write_text("\n".join(lines) + "\n\n")
    return {
        "model": large,
        "small-model": small,
        "adapter": tiny.write_adapter(folder / "on-large", large, seed=3),
        "small-adapter": tiny.write_adapter(folder / "on-small", small, seed=4),
        "prompts": prompts,
    }


def calibrate(flags: dict[str, Path], out: Path, *more: str) -> int:
    given = [part for name, path in flags.items() for part in (f"--{name}", str(path))]
    return main(["calibrate-entropy", *given, "--out", str(out), "--max-tokens", "24", *more])


def test_the_frontier_of_a_tiny_pair(flags: dict[str, Path], tmp_path: Path) -> None:
    # Over 10 s: nine runs over the prompts, beside the loading of two models.
    pytest.importorskip("matplotlib")
    assert calibrate(flags, tmp_path, "--thresholds", "9,3.5") == 0
    report = json.loads((tmp_path / "entropy.json").read_text())
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")
    large, small = report["large"], report["small"]
    assert (large["tokens"], large["cost"], large["quality_share"]) == (1.0, 1.0, 1.0)
    assert small["tokens"] == 0.0 and 0 < small["cost"] < 1
    assert small["quality_share"] < 1 and small["agreement"] < large["agreement"]
    low, high = report["tried"]
    assert (low["threshold"], high["threshold"]) == (3.5, 9.0)
    assert high["entropy"] == high["coin"] == small, "above all that a tiny model can show"
    assert 0 < low["entropy"]["tokens"] < 1
    assert abs(low["coin"]["tokens"] - low["entropy"]["tokens"]) < 0.35
    for point in (low["entropy"], low["coin"]):
        assert point["cost"] > point["tokens"], "catching up and the small model cost, too"
    assert report["prompts"] == 4 and report["published"]["quality_share"] == 0.929
    assert {"commit", "version", "command", "machine"} <= report.keys()


def test_a_coin_keeps_its_share_and_its_dwell() -> None:
    how = EntropyAdaptive(threshold=0.0, min_dwell=4, window=2)
    coin = Coin(how, 0.3, Random(1))
    drawn = []
    for _ in range(8000):
        drawn.append(coin.model_id)
        coin.observe(0.0)
    assert coin.ledger[0] / 8000 == pytest.approx(0.3, abs=0.04)
    assert coin.ledger[0] == drawn.count(BASE_MODEL_ID)
    changes = [at for at in range(1, 8000) if drawn[at] != drawn[at - 1]]
    assert all(at % 4 == 0 for at in changes) and len(changes) > 500


@pytest.mark.parametrize(
    ("text", "suffix", "said"),
    [
        ("", "txt", "no prompt"),
        ("\n \n", "txt", "no prompt"),
        ('{"prompt": "a"}\n{"text": "b"}', "jsonl", "line 2"),
        ('{"prompt": 5}', "jsonl", "line 1"),
        ('{"prompt": ""}', "jsonl", "line 1"),
        ("[1]", "jsonl", "line 1"),
    ],
)
def test_files_without_prompts_are_refused(
    tmp_path: Path, text: str, suffix: str, said: str
) -> None:
    path = tmp_path / f"prompts.{suffix}"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_prompts(path)


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("One two.\n\n{three}\n")
    assert read_prompts(path) == ["One two.", "{three}"]
    assert read_thresholds(None) == [] and read_thresholds("2, 0.5") == [0.5, 2.0]
    for text in ("", "a", "nan", "1,inf"):
        with pytest.raises(ConfigError, match="--thresholds"):
            read_thresholds(text)
    with pytest.raises(ConfigError, match="--prompts"):
        read_prompts(tmp_path / "missing")


def test_a_missing_matplotlib_is_named_before_anything_is_computed(
    flags: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert calibrate(flags, tmp_path) == 2
    assert "pip install loramux[bench]" in capsys.readouterr().err


def test_what_no_engine_can_do_is_said_in_a_line(
    flags: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert calibrate(flags, tmp_path, "--max-tokens", "4000") == 2
    assert "--max-tokens" in capsys.readouterr().err
    swapped = {**flags, "small-adapter": flags["adapter"]}
    assert calibrate(swapped, tmp_path) == 2
    assert calibrate(flags, tmp_path, "--max-tokens", "0") == 2
    assert not (tmp_path / "entropy.json").exists()
