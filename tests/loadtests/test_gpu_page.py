"""The page of ``make gpu-check``, written with made-up numbers, and the parts that need no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "loadtests/gpu"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("document", "timing", "kernels", "serving", "check", "tune"):
        sys.modules.pop(name, None)


def make(path: Path, deadline_s: float = 60) -> tuple[Any, list[str]]:
    said: list[str] = []
    document = import_module("document").Document(
        path, "On a GPU: X", "make gpu-check", [("commit", "abc")],
        deadline_s=deadline_s, say=said.append,
    )  # fmt: skip
    return document, said


def test_a_failing_part_is_on_the_page_and_the_rest_goes_on(tmp_path: Path) -> None:
    page, said = make(tmp_path / "results" / "gpu-x.md")

    def fails() -> str:
        raise RuntimeError("an illegal memory access was encountered")

    table = import_module("document").table
    page.section("First", lambda: table(["rows", "us"], [[1, 2.3456], [512, None]]))
    page.section("Second", fails)
    page.section("Third", lambda: "fine")
    text = (tmp_path / "results" / "gpu-x.md").read_text()
    assert "| rows | us |\n| ---: | ---: |\n| 1 | 2.35 |\n| 512 | - |" in text
    assert "* Second: RuntimeError: an illegal memory access" in text
    assert text.index("**Failed.**") < text.index("## Third\n\nfine")
    assert "    make gpu-check" in text and "* commit: abc" in text
    assert page.failures == ["Second: RuntimeError: an illegal memory access was encountered"]
    assert [line.split("] ")[-1] for line in said] == ["First", "Second", said[2], "Third"]


def test_nothing_begins_after_the_deadline(tmp_path: Path) -> None:
    page, _ = make(tmp_path / "gpu-x.md", deadline_s=0)
    page.section("Late", lambda: pytest.fail("must not run"))
    assert page.failures == ["Late: not run"]
    assert "Not run: the time was up." in (tmp_path / "gpu-x.md").read_text()


def test_every_part_can_be_imported_without_a_gpu() -> None:
    for name in ("kernels", "serving", "check", "tune"):
        import_module(name)


def test_a_tuned_table_reads_back_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramux_kernels import tuning

    tune = import_module("tune")
    table = tuning.table_named("sm_90")
    table = tune.with_launch(table, "attention", tuning.Launch(8, 3, 2, 64, 200))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tune.write(table, "a device")
    assert tuning.parse("sm_90", (tmp_path / "sm_90.json").read_text()) == table


def test_made_up_adapters_are_bfloat16_of_the_right_size() -> None:
    from loramux.adapters.canonical import widen

    values = widen(import_module("serving")._Numbers(1, 3, 500).read(), "bfloat16")
    assert values.shape == (3, 500)
    assert 0.015 < float(np.std(values)) < 0.025
