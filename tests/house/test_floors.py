"""Releases with known holes are not installed, and what docs/SECURITY.md calls tested is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FLOORS = {
    "starlette": "1.0.1",  # CVE-2026-48710: Host poisoned the path that authorization looked at
    "python-multipart": "0.0.27",  # CVE-2026-42561, -40347, -24486, 2024-53981
    "httptools": "0.6.4",
}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [
        Requirement(text) for text in (*project["dependencies"], *(r for e in extras for r in e))
    ]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    named = (line.partition("==") for line in lines if not line.startswith("#"))
    return {re.sub(r"[._-]+", "-", name).lower(): Version(version) for name, _, version in named}


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name: str) -> None:
    [found] = [r for r in requirements() if r.name == name]
    below = Version(FLOORS[name])
    assert any(spec.operator == ">=" and Version(spec.version) >= below for spec in found.specifier)
    assert pins()[name] >= below


def test_what_ci_runs_is_what_a_user_may_have() -> None:
    for requirement in requirements():
        name = re.sub(r"[._-]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(pins()[name], prereleases=True), name


def test_the_security_page_names_tests_that_exist() -> None:
    text = (ROOT / "docs/SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/.]+)`", text)
    assert len(named) > 15 and [path for path in named if not (ROOT / path).exists()] == []
