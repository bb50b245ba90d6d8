"""What stops the start with a message and exit code 2: a registry that cannot be used, which stays
as it is, a port that is taken, and no place for sockets."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from loramux.adapters.registry import Registry

CHILD = """
import functools, sqlite3, sys
from loramux.adapters import database
from loramux.cli import main

database.sqlite3.connect = functools.partial(sqlite3.connect, timeout=0.05)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("state", "message"),
    [("corrupt", "cannot be used"), ("newer", "use the newer server"), ("locked", "locked")],
)
def test_a_registry_that_cannot_be_used(
    state: str, message: str, model_dir: Path, tmp_path: Path
) -> None:
    Registry(tmp_path).close()
    path = tmp_path / "registry.sqlite"
    holder = sqlite3.connect(path, isolation_level=None)
    if state == "newer":
        holder.execute("PRAGMA user_version = 1000")
    if state != "locked":
        holder.close()
    if state == "corrupt":
        path.write_bytes(b"x" * 8192)
    before = path.read_bytes()
    if state == "locked":  # last: a process that closes a file loses its locks on it
        holder.execute("BEGIN IMMEDIATE")
    told = refused(model_dir, tmp_path, "--port", "0")
    assert message in told and "registry" in told
    assert path.read_bytes() == before
    holder.close()


@pytest.mark.parametrize("flag", ["--port", "--admin-port"])
def test_a_port_that_is_taken(flag: str, model_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = refused(model_dir, tmp_path / "data", "--port", "0", flag, port)
    assert f"{flag} {port}" in told and "in use" in told


@pytest.mark.parametrize("admin", [(), ("--admin-port", "0")])
def test_temporary_files_are_too_deep_down(
    admin: tuple[str, ...], model_dir: Path, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    told = refused(model_dir, tmp_path / "data", "--port", "0", *admin, TMPDIR=str(deep))
    assert "TMPDIR" in told and list(deep.iterdir()) == []


def refused(model_dir: Path, data_dir: Path, *flags: str, **environment: str) -> str:
    """What a server says that does not start."""
    command = ["serve", "--model", str(model_dir), "--data-dir", str(data_dir), *flags]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command],
        env={"PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr
