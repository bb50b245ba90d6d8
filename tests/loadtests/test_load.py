"""A scenario from its file to its verdict, without a model."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import load
import load_plots
import pytest
import report
import scenario as scenarios
import timeline

from loramux.bench import figures
from loramux.bench.open_loop import Record, Run
from loramux.bench.traffic import Arrival, Traffic

FOLDER = report.ROOT / "loadtests" / "serving" / "scenarios"
LEAST: dict[str, Any] = {"name": "x", "about": "y", "traffic": {"adapters": 3}}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda p: p.stem)
def test_every_scenario_can_be_read_whole_and_quick(path: Path) -> None:
    whole, quick = scenarios.read(path), scenarios.read(path, quick=True)
    assert whole.name == quick.name == path.stem and whole.thresholds
    assert quick.server.model == "tiny", "a quick run starts in seconds"
    seconds = [sum(p.duration_s for p in each.points) for each in (quick, whole)]
    assert seconds[0] <= 10 < seconds[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trafic": {}}, "no table"),
        ({"traffic": {"rat": 1}}, "no \\['rat'\\]"),
        ({"vary": {"rate": [1], "cv": [1]}}, "one field"),
        ({"vary": {"rate": 3}}, "a list"),
        ({"vary": {"rate": [1, 0]}}, "rate"),
        ({"server": {"gpu": 1}}, "server"),
        ({"client": {"patience": 1}}, "client"),
        ({"thresholds": {"speed": {"min": 1}}}, "no figure 'speed'"),
        ({"quick": {"rat": 1}}, "no \\['rat'\\]"),
    ],
)
def test_a_scenario_with_a_mistake_is_refused(change: dict[str, Any], told: str) -> None:
    assert scenarios.parse(LEAST).traffic.adapters == 3
    with pytest.raises(ValueError, match=told):
        scenarios.parse(LEAST | change)


def test_quick_replaces_fields_of_traffic_and_whole_tables() -> None:
    table = LEAST | {"vary": {"rate": [1, 2]}, "quick": {"cv": 2.0, "vary": {"rate": [5]}}}
    assert [p.rate for p in scenarios.parse(table).points] == [1, 2]
    [quick] = scenarios.parse(table, quick=True).points
    assert (quick.rate, quick.cv, quick.adapters) == (5, 2.0, 3)


VALUES = {"ttft_p50_s": 0.9, "attainment_6s": 4 / 9, "tpot_p99_s": 0.1, "ok": 5}


def test_thresholds_name_what_they_found() -> None:
    bounds = scenarios.Threshold.read(
        {"ttft_p50_s": {"max": 0.5}, "attainment_6s": {"min": 0.4}, "tpot_p99_s": {"max": 1.0}}
    )
    told = [bound.broken(VALUES) for bound in bounds]
    assert told == ["ttft_p50_s is 0.9, has to be <= 0.5", None, None]
    both = scenarios.Threshold("ok", 5, 5)
    assert both.broken(VALUES) is None and both.broken({"ok": 4}) is not None
    assert scenarios.Threshold("ttft_p50_s", high=1).broken({"ttft_p50_s": None}) == (
        "ttft_p50_s is nothing to count, has to be <= 1"
    )
    assert scenarios.Threshold("ok", high=1).broken({"ok": math.nan}) is not None


@pytest.mark.parametrize("table", [{"ttft": {"max": 1}}, {"ok": {}}, {"ok": {"most": 3}}])
def test_a_threshold_that_would_never_fail_is_refused(table: dict[str, dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        scenarios.Threshold.read(table)


def made(rate: float, ttft_s: float, num: int = 10) -> load.Point:
    records = []
    for index in range(num):
        record = Record(Arrival(index / rate, index % 3, 8, 0, 4, 2, False))
        record.sent_s = record.arrival.at_s
        record.chunks_s = [record.arrival.at_s + ttft_s, record.arrival.at_s + ttft_s + 0.01]
        record.finish(record.chunks_s[-1], 4, 2)
        records.append(record)
    return load.Point(Traffic(adapters=3, rate=rate), Run(records, 9.0, [0.0], 0.1), "00")


def reported(scenario: scenarios.Scenario, *points: load.Point) -> dict[str, Any]:
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "vary": scenario.vary,
        "formulas": figures.formulas(),
        "cases": [point.told(scenario) for point in points],
    }


RISING = scenarios.parse(
    LEAST | {"vary": {"rate": [1, 2, 4]}, "thresholds": {"ttft_p50_s": {"max": 1.0}}}
)


def test_the_run_that_broke_a_threshold_is_named() -> None:
    found = reported(RISING, made(1, 0.2), made(2, 0.3), made(4, 5.0))
    assert load.verdict(found) == ["rate 4: ttft_p50_s is 5, has to be <= 1"]
    assert load.verdict(reported(RISING, made(1, 0.2))) == []


def test_a_client_that_was_late_breaks_a_run_whatever_it_found() -> None:
    point = made(1, 0.2)
    point.run.records[3].sent_s += 2.0
    assert "the client was the bottleneck" in load.verdict(reported(RISING, point))[0]


def test_the_knee_is_the_last_rate_before_the_first_bad_one() -> None:
    good, bad = (lambda rate: made(rate, 0.2)), (lambda rate: made(rate, 3.0))
    for points, at in (
        ([good(1), good(2), bad(4)], 2),
        ([good(1), bad(2), good(4)], 1),
        ([bad(1)], None),
        ([good(4), good(1)], 4),
    ):
        assert load_plots.knee(reported(RISING, *points)["cases"]) == at


def test_a_report_is_json_a_table_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = reported(RISING, made(1, 0.2), made(2, 0.3), made(4, 5.0))
    frames = {"running": 2.0, "pool_kv": 3.0, "pool_free": 5.0}
    found["cases"][-1]["timeline"] = [{"at_s": at, **frames} for at in (0.0, 1.0, 2.0)]
    again = json.loads(json.dumps(found))
    assert again["cases"][2]["figures"] == found["cases"][2]["figures"]
    lines = load.table(found).splitlines()
    assert lines[0] == "| rate | 1 | 2 | 4 | formula |"
    assert "| ttft_p50_s | 0.20 | 0.30 | 5.00 | p50 over ok of" in "\n".join(lines)
    load_plots.draw_plots(found, tmp_path)
    assert (tmp_path / "plots" / "load-x.png").read_bytes().startswith(b"\x89PNG")


def test_cold_adapters_are_counted_before_anything_starts() -> None:
    scenario = scenarios.parse(
        LEAST | {"traffic": {"adapters": 3, "cold_share": 1.0, "rate": 2.0, "duration_s": 5.0}}
    )
    assert load.adapters_of(scenario.points) == 13
    target = load.Target("http://x", "base", ["a0"] * 12, lambda index, num: "")
    with pytest.raises(ValueError, match="names 13 adapters"):
        load.fits(scenario, target)


def test_tenants_are_not_made_up_for_a_server_that_is_given() -> None:
    scenario = scenarios.read(FOLDER / "tenants.toml")
    with pytest.raises(ValueError, match="several tenants"):
        load.given_server(argparse.Namespace(url="http://127.0.0.1:9", key=None), scenario)


def test_a_timeline_reads_both_families_of_names() -> None:
    text = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# TYPE loramux_pool_frames gauge
loramux_pool_frames{owner="kv"} 7.0
loramux_pool_frames{owner="free"} 2.0
# TYPE loramux_other gauge
loramux_other 1.0
"""
    assert timeline.sample(text) == {"running": 3.0, "pool_kv": 7.0, "pool_free": 2.0}
    assert timeline.sample("") == {}


@pytest.mark.slow  # two servers are started
def test_a_scenario_is_held_or_broken_on_a_real_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--folder", str(tmp_path / "models"), "--out", str(tmp_path)]
    for name in ("skewed", "tenants"):
        assert load.main([str(FOLDER / f"{name}.toml"), "--quick", *where]) == 0
        found = json.loads((tmp_path / f"load-{name}.json").read_text())
        [case] = found["cases"]
        assert case["figures"]["ok"] == case["figures"]["requests"] > 20
        assert case["timeline"], "the tenants' operator may read metrics"
        plan = (tmp_path / "plans" / f"{name}-0.jsonl").read_bytes()
        assert hashlib.sha256(plan).hexdigest() == case["plan_sha256"]
    text = (FOLDER / "skewed.toml").read_text().replace("{ min = 0.99 }", "{ min = 1.01 }")
    (tmp_path / "impossible.toml").write_text(text)
    capsys.readouterr()
    assert load.main([str(tmp_path / "impossible.toml"), "--quick", *where]) == 1
    assert "BROKEN: attainment_6s is 1, has to be >= 1.01" in capsys.readouterr().out
