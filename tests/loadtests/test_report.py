"""Tables and numbers of the load tests' reports."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pairs
import pytest
import report


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, ""),
        (3, "3"),
        ("shared", "shared"),
        (0.0, "0.00"),
        (-1.234, "-1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        ((1.0, 0.5, 10.0), "1.00 (0.50 to 10.0)"),
    ],
)
def test_a_cell(value: object, cell: str) -> None:
    assert report.text(value) == cell


def test_words_stand_left_and_numbers_right_and_what_is_missing_is_empty() -> None:
    cases = [{"pool": "shared", "tok_s": 12.0}, {"pool": "split"}]
    assert report.markdown(cases, {"pool": "pool", "tok_s": "tokens/s"}).splitlines() == [
        "| pool | tokens/s |",
        "| --- | ---: |",
        "| shared | 12.0 |",
        "| split |  |",
    ]


def test_a_quick_run_does_not_overwrite_measured_results(tmp_path: Path) -> None:
    quick, full = (argparse.Namespace(quick=q, out=None) for q in (True, False))
    assert report.folder(quick) == report.QUICK
    assert report.folder(full) == report.FULL
    told = argparse.Namespace(quick=True, out=tmp_path)
    report.save({"cases": []}, report.folder(told), "x")
    assert json.loads((tmp_path / "x.json").read_text()) == {"cases": []}


def test_a_command_holds_no_path_of_a_machine() -> None:
    script = str(pairs.ROOT / "loadtests" / "serving" / "product.py")
    words = [
        script,
        "--quick",
        "--out",
        "/home/me/results",
        "--peers",
        "/opt/peers",
        "--pairs",
        "3",
    ]
    told = "python loadtests/serving/product.py --quick --peers DIR --pairs 3"
    assert pairs.command(words) == told
    results = pairs.ROOT / "docs" / "results"
    commands = [json.loads(path.read_text()).get("command", "") for path in results.glob("*.json")]
    assert commands and all(" /" not in text and "--out" not in text for text in commands)


def test_a_plot_is_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with report.plot(tmp_path, "x", panels=2) as axes:
        for axis in axes:
            axis.plot([1, 2], [3, 4])
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(b"\x89PNG")
