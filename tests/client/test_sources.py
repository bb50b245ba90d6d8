"""Adapters to push that are no folder: a model in memory, a hub, a compressed one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import tiny
from tests.adapters.peft_files import base_description, make_config, make_tensors, write_adapter
from tests.client.conftest import Connect
from tests.client.doubles import write_adapter_files
from tests.client.test_push import WEIGHTS, Blobs, sha

from loramux.cli import main
from loramux_client import Adapter, AdapterFilesError, Compressed, _sources, compress
from loramux_client._files import BESIDE

CONFIG = "adapter_config.json"


class Model:
    """Saves like PEFT: the adapter "default" in the folder itself, others below it."""

    def __init__(self, *names: str) -> None:
        self.names, self.folders = names, []  # type: ignore[var-annotated]

    def save_pretrained(self, save_directory: str, *, safe_serialization: bool) -> None:
        assert safe_serialization
        self.folders.append(Path(save_directory))
        for name in self.names:
            folder = Path(save_directory) / ("" if name == "default" else name)
            folder.mkdir(exist_ok=True)
            (folder / CONFIG).write_text(json.dumps({"r": 4}))
            (folder / "adapter_model.safetensors").write_bytes(WEIGHTS + name.encode())


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_model_in_memory_is_sent_and_nothing_of_it_left(connect: Connect, name: str) -> None:
    server, model = Blobs(), Model(name)
    connect(server).call("adapters.push", model, "styled")
    assert sha(WEIGHTS + name.encode()) in server.blobs
    assert server.registered[0]["name"] == "styled"
    assert not model.folders[0].exists()


def test_a_model_is_gone_when_sending_fails_too(connect: Connect) -> None:
    model = Model("default")

    def broken(request: Any) -> Any:
        return RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        connect(Blobs(broken)).call("adapters.push", model, "styled")
    assert not model.folders[0].exists()


def test_a_model_has_no_name_of_its_own(connect: Connect) -> None:
    server = Blobs()
    with pytest.raises(TypeError, match="needs a name"):
        connect(server).call("adapters.push", Model("default"))
    assert server.log == []


@pytest.mark.parametrize("names", [(), ("one", "two"), ("default", "two")])
def test_a_model_of_several_adapters_is_refused(connect: Connect, names: tuple[str, ...]) -> None:
    with pytest.raises(AdapterFilesError, match=f"holds {len(names)} adapters, not one"):
        connect(Blobs()).call("adapters.push", Model(*names), "styled")


def test_something_else_is_refused(connect: Connect) -> None:
    with pytest.raises(TypeError, match="cannot be pushed from a int"):
        connect(Blobs()).call("adapters.push", 5, "styled")


def test_a_real_peft_model(connect: Connect, tmp_path: Path) -> None:
    import peft

    model = tiny.write_model(tmp_path / "base", "llama")
    folder = tiny.write_adapter(tmp_path / "a", model)
    with tiny._peft_on_transformers():
        adapted = peft.PeftModel.from_pretrained(tiny._load(model), str(folder), adapter_name="x")
    server = Blobs()
    connect(server).call("adapters.push", adapted, "styled")
    # PEFT writes the same tensors in the same order.
    assert sha((folder / "adapter_model.safetensors").read_bytes()) in server.blobs


class Hub:
    """A double of huggingface_hub."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []  # type: ignore[var-annotated]

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked.append((repo_id, options))
        return str(self.folder)


@pytest.mark.parametrize("revision", [None, "v1.2"])
def test_a_repository_of_a_hub(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    hub, server = Hub(write_adapter_files(tmp_path / "snapshot", WEIGHTS)), Blobs()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    source = "hf:someone/their-adapter" + (f"@{revision}" if revision else "")
    connect(server).call("adapters.push", source)
    files = [CONFIG, "adapter_model.safetensors", "medusa_heads.safetensors", *BESIDE]
    options = {"revision": revision, "allow_patterns": files}
    assert hub.asked == [("someone/their-adapter", options)]
    assert sha(WEIGHTS) in server.blobs and server.registered[0]["name"] == "their-adapter"


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:/name", "hf:a/b/c", "hf:a/@v1"])
def test_what_is_no_repository_is_never_asked_for(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    with pytest.raises(AdapterFilesError, match="ORGANISATION/REPOSITORY"):
        connect(Blobs()).call("adapters.push", source)
    assert hub.asked == []


def test_without_the_library_it_says_what_to_install(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install loramux-client\[hub\]"):
        connect(Blobs()).call("adapters.push", "hf:a/b")


def lora(folder: Path) -> Path:
    write_adapter(folder, make_config(), make_tensors(base_description()))
    return folder


def content(done: Compressed) -> list[bytes]:
    read = []
    for file in (done.files.config, done.files.weights):
        with file.open() as data:
            read.append(data.read())
    return read


def test_compress_while_pushing_is_compress_then_push(connect: Connect, tmp_path: Path) -> None:
    folder, servers = lora(tmp_path / "a"), [Blobs(), Blobs()]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    done = compress(folder, 0.25, 2.0)
    connect(servers[0]).call("adapters.push", folder, compress={"density": 0.25, "alpha": 2.0})
    connect(servers[1]).call("adapters.push", done)
    assert servers[0].blobs == servers[1].blobs and len(servers[0].blobs) == 2
    assert servers[0].registered == servers[1].registered
    assert servers[0].registered[0]["name"] == "a"
    assert servers[0].registered[0]["profile"] == {"chat_template": "{{ messages }}"}
    plain = (folder / "adapter_model.safetensors").read_bytes()
    assert sha(plain) not in servers[0].blobs


def test_a_compressed_adapter_can_be_had_of_a_model_in_memory(tmp_path: Path) -> None:
    folder = lora(tmp_path / "a")

    class Saved(Model):
        def save_pretrained(self, save_directory: str, *, safe_serialization: bool) -> None:
            for path in folder.iterdir():
                (Path(save_directory) / path.name).write_bytes(path.read_bytes())

    assert content(compress(Saved(), 0.1)) == content(compress(folder, 0.1))
    with _sources.open_adapter(compress(folder, 0.1)) as files:
        assert files.name == "a"


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What the command's client was asked to push."""
    import loramux_client

    seen: list[tuple[Any, Any]] = []

    def push(source: Any, name: str | None, **_: Any) -> Any:
        seen.append((source, name))
        return Adapter(name=name or "a", status="ready")

    class Double:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.adapters = SimpleNamespace(push=push)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(loramux_client, "Client", Double)
    return seen


def test_the_command_compresses_and_says_what_that_did(
    tmp_path: Path, pushed: list[tuple[Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lora(tmp_path / "a")
    options = ["--compress", "density=0.25,alpha=2", "--name", "small"]
    assert main(["adapters", "push", str(folder), *options]) == 0
    ((sent, name),) = pushed
    assert isinstance(sent, Compressed) and (sent.density, sent.alpha, name) == (0.25, 2, "small")
    out = " ".join(capsys.readouterr().out.split())
    assert f"compressed to {sent.bytes_after} of {sent.bytes_before} bytes" in out
    assert sent.relative_change is not None
    for figure in (f"{sent.ratio:.1f} times smaller", f"{100 * sent.relative_change:.1f} %"):
        assert figure in out
    assert f"{100 * sent.kept:.1f} % of the values kept" in out


def test_the_command_takes_a_repository_as_it_is(pushed: list[tuple[Any, Any]]) -> None:
    assert main(["adapters", "push", "hf:someone/thing"]) == 0
    assert pushed == [("hf:someone/thing", None)]


@pytest.mark.parametrize(
    "text",
    ["", "0.1", "density=", "density=0", "density=2", "density=nan", "alpha=1", "density=.1,x=1"]
    + ["density=.1,density=.2", "density=.1,alpha=0", "density=.1,alpha=inf", "density=.1,"],
)
def test_the_command_names_what_is_wrong_with_compress(
    text: str, pushed: list[tuple[Any, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["adapters", "push", str(tmp_path), "--compress", text]) == 2
    assert "--compress" in capsys.readouterr().err and not pushed


def test_the_command_says_why_it_cannot_compress(
    tmp_path: Path, pushed: list[tuple[Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", make_config(peft_type="IA3"), make_tensors(base_description()))
    assert main(["adapters", "push", str(tmp_path / "a"), "--compress", "density=.1"]) == 1
    assert "peft_type 'IA3' cannot be compressed" in capsys.readouterr().err and not pushed
