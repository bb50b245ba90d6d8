"""Medusa heads that go along with an adapter that is pushed."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.client.conftest import Connect
from tests.client.doubles import write_adapter_files
from tests.client.test_push import Blobs, sha

from loramux_client import AdapterFilesError

NAME = "medusa_heads.safetensors"
HEADS = b"heads" * 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_adapter_files(tmp_path / "mine")
    (folder / NAME).write_bytes(HEADS)
    return folder


def pushed(connect: Connect, source: Any, **fields: Any) -> tuple[Blobs, dict[str, Any]]:
    server = Blobs()
    connect(server).call("adapters.push", source, "mine", **fields)
    return server, server.registered[0]


def test_those_in_the_folder_go_along(connect: Connect, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    server, fields = pushed(connect, folder, progress=lambda *sent: seen.append(sent))
    assert fields["heads"] == f"sha256:{sha(HEADS)}" and server.blobs[sha(HEADS)] == HEADS
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert seen[-1] == (total, total)
    assert fields.keys() == {"name", "config", "weights", "heads"}, "they are no profile"


def test_or_not(connect: Connect, folder: Path) -> None:
    for fields in ({"heads": False}, {"base": "draft"}):
        server, sent = pushed(connect, folder, **fields)
        assert "heads" not in sent and sha(HEADS) not in server.blobs
    (folder / NAME).unlink()
    assert "heads" not in pushed(connect, folder)[1]
    files = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
    assert "heads" not in pushed(connect, files)[1]


def test_from_elsewhere(connect: Connect, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"others")
    server, sent = pushed(connect, folder, heads=other)
    assert sent["heads"] == f"sha256:{sha(b'others')}" and sha(HEADS) not in server.blobs
    assert pushed(connect, folder, heads=str(other), base="draft")[1]["heads"] == sent["heads"], (
        "what was asked for is sent: the server says what it thinks of it"
    )
    with pytest.raises(AdapterFilesError, match=r"nowhere is missing$"):
        pushed(connect, folder, heads=tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_out_of_an_archive(connect: Connect, folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"mine.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(folder, "mine")
            archive.add(folder / NAME, f"elsewhere/{NAME}")
    else:
        with zipfile.ZipFile(path, "w") as packed:
            for file in folder.iterdir():
                packed.write(file, f"mine/{file.name}")
    assert pushed(connect, path)[1]["heads"] == f"sha256:{sha(HEADS)}"
    shutil.rmtree(folder)
