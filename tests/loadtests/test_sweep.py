"""The sweep's page, and the population it is run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sweep_page
from population import CONFIG, DIFFERENT, WEIGHTS, Population

from loramux.bench import figures
from loramux.bench.open_loop import Record
from loramux.bench.traffic import Arrival
from loramux.front import keys

CONFIG_OF_A_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MACHINE = {"cpu": "x", "cores": 2, "read_gb_s": 10.0, "gemm_gflops": 100.0}


def case(part: str, system: str, adapters: int, rate: float, ttft_s: float) -> dict[str, Any]:
    record = Record(Arrival(1.0, 0, 8, 0, 4, 2, False), chunks_s=[1.0 + ttft_s])
    record.finish(1.01 + ttft_s, 4, 2)
    return {
        "part": part,
        "system": system,
        "adapters": adapters,
        "rate": rate,
        "figures": figures.by_name(figures.figures([record])),
        "ttft_s_percentiles": [ttft_s] * 101,
    }


def found(*cases: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python x",
        "commit": "abc",
        "machine": MACHINE,
        "rounds": 2,
        "traffic": {
            "rate": 3.0,
            "duration_s": 60.0,
            "ranks": [8, 16],
            "prompt": [8, 64],
            "output": [8, 40],
        },
        "formulas": {f.name: [f.unit, f.formula] for f in figures.figures([])},
        "cases": list(cases),
        "late": [],
    }


def test_rounds_become_a_median_with_its_ends_and_systems_stand_in_order(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = found(
        case("pool", "split", 10, 3.0, 2.0),
        case("pool", "shared", 10, 3.0, 0.5),
        case("pool", "shared", 10, 3.0, 0.7),
        case("pool", "shared", 1, 3.0, 0.25),
        case("rate", "loramux serve", 100, 1.0, 0.5),
        case("rate", "loramux serve", 100, 2.0, 7.0),
    )
    table = sweep_page.rows(told, ("pool", "peft"), "adapters")
    assert [(row["adapters"], row["system"]) for row in table] == [
        (1, "shared"),
        (10, "shared"),
        (10, "split"),
    ]
    assert table[1]["ttft_p50_s"] == pytest.approx((0.6, 0.5, 0.7))
    assert table[2]["ttft_p50_s"] == pytest.approx(2.0)
    sweep_page.write_page(json.loads(json.dumps(told)), tmp_path)
    text = (tmp_path / "load.md").read_text()
    assert "0.60 (0.50 to 0.70)" in text and "nine tenths were good: 1/s" in text
    assert "client was late" not in text
    assert (tmp_path / "plots" / "load-sweep.png").exists()


def test_a_page_says_when_its_client_was_late() -> None:
    told = found(case("pool", "shared", 1, 3.0, 0.25)) | {"late": ["shared, 1: too late"]}
    assert "* shared, 1: too late" in sweep_page.page(told)


def test_adapters_are_many_and_their_weights_few(tmp_path: Path) -> None:
    home = Population(tmp_path, "tiny", (8, 16))
    home.base.mkdir(parents=True)
    (home.base / "config.json").write_text(json.dumps(CONFIG_OF_A_BASE))
    home.write_adapters(20)
    configs = [json.loads((home.adapter(i) / CONFIG).read_text()) for i in range(20)]
    assert [config["r"] for config in configs] == [8, 16] * 10
    assert len({(config["r"], config["lora_alpha"]) for config in configs}) == 20
    inodes = [(home.adapter(i) / WEIGHTS).stat().st_ino for i in range(20)]
    assert len(set(inodes)) == 2 * DIFFERENT
    assert all(inodes[i] == inodes[i % (2 * DIFFERENT)] for i in range(20))
    home.write_adapters(25)
    assert (home.adapter(24) / CONFIG).exists()
    assert inodes[0] == (home.adapter(0) / WEIGHTS).stat().st_ino, "what is there stays"
    assert home.digests() == []


@pytest.mark.parametrize("wrong", [{"model": "8B"}, {"targets": "none"}])
def test_a_population_that_cannot_be_made_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Population(tmp_path, **wrong)


def test_a_key_is_read_whole(tmp_path: Path) -> None:
    home = Population(tmp_path, "tiny")
    home.home.mkdir(parents=True)
    path, found = home.keys(1)
    stored = {key.id: key for key in keys.read(path).keys}
    assert [stored[key.split("_")[1]].tenant for key in found] == ["t0", "operator"]
    assert [len(key.split("_", 2)[2]) for key in found] == [43, 43]
