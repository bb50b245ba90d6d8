"""A registry that cannot be used stops the start with a message and exit code 2, untouched."""

from __future__ import annotations

import functools
import sqlite3
from pathlib import Path

import pytest

from loramux.adapters import database
from loramux.adapters.registry import Registry
from loramux.cli import main


# A process that ends closes its files by that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("state", "message"),
    [("corrupt", "cannot be used"), ("newer", "use the newer server"), ("locked", "locked")],
)
def test_a_registry_that_cannot_be_used(
    state: str,
    message: str,
    model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        database.sqlite3, "connect", functools.partial(sqlite3.connect, timeout=0.05)
    )
    Registry(tmp_path).close()
    path = tmp_path / "registry.sqlite"
    holder = sqlite3.connect(path, isolation_level=None)
    if state == "newer":
        holder.execute("PRAGMA user_version = 1000")
    elif state == "locked":
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN IMMEDIATE")
    if state != "locked":
        holder.close()
    if state == "corrupt":
        path.write_bytes(b"x" * 8192)
    before = path.read_bytes()
    assert main(["serve", "--model", str(model_dir), "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and "registry" in said and "Traceback" not in said
    assert path.read_bytes() == before
    holder.close()
