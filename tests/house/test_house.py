"""The rules of the house, as tests: sizes, layers, words that do not belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [
    ROOT / "server/loramux",
    ROOT / "kernels/loramux_kernels",
    ROOT / "clients/python/loramux_client",
]
SOURCES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
ALL = SOURCES + sorted(
    path for top in ("tests", "loadtests") for path in (ROOT / top).rglob("*.py")
)

NO_TORCH = [
    "loramux.front.front",
    "loramux.http.app",
    "loramux.wire",
    "loramux.batch",
    "loramux.engine.scheduler",
    "loramux.engine.policy",
    "loramux.speculation.drafting",
    "loramux.adapters.formats",
    "loramux.adapters.registry",
    "loramux.adapters.blobs",
    "loramux.ingest.main",
    "loramux.cli",
    "loramux.bench.server",
    "loramux_client",
]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL, ids=name)
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", [p for p in SOURCES if "kernels" not in name(p)], ids=name)
def test_no_function_is_longer_than_80_lines(path: Path) -> None:
    assert [found for found in _functions(path) if found[1] > 80] == []


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    bad = {"utils", "util", "helpers", "misc", "common"}
    assert [name(p) for p in SOURCES if bad & {part.removesuffix(".py") for part in p.parts}] == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_exported_names_are_sorted(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            assert list(names) == sorted(names)


@pytest.mark.parametrize("module", NO_TORCH)
def test_torch_stays_out_of(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    paths = ":".join(str(ROOT / top) for top in ("server", "kernels", "clients/python"))
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": paths}, check=False)
    assert done.returncode == 0


def test_every_error_code_has_a_client_class() -> None:
    from loramux import errors
    from loramux_client import ERRORS

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    codes = {c.code for c in classes if issubclass(c, errors.LoramuxError)}
    codes -= {"config_error"}  # never leaves the machine it happens on
    assert codes <= set(ERRORS)


def test_the_client_depends_on_httpx_alone() -> None:
    text = (ROOT / "clients/python/pyproject.toml").read_text()
    found = re.search(r"^dependencies = \[(.*?)\]", text, re.M | re.S)
    assert found is not None
    assert [re.match(r"[\w-]+", d)[0] for d in re.findall(r'"([^"]+)"', found[1])] == ["httpx"]  # type: ignore[index]


def test_nothing_unpickles() -> None:
    banned = re.compile(
        r"\bpickle\b(?!\s*(is|anywhere|:))|torch\.load\(|allow_pickle=True|marshal\.load"
    )
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                if any(banned.fullmatch(n) for n in names):
                    found.append(name(path))
        if re.search(r"torch\.load\(|allow_pickle=True", path.read_text()):
            found.append(name(path))
    assert found == []
