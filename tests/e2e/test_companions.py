"""A server with a draft model, and an adapter with a companion for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests import tiny
from tests.e2e.server import Server

from loramux.cli import main
from loramux_client import Client

HALF = {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8}


def test_an_adapter_and_its_companion_on_the_draft_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two models and two adapters are made, and a server compiles the kernels of both: 40 s.
    model = tiny.write_model(tmp_path / "model")
    draft = tiny.write_model(tmp_path / "draft", seed=1, **HALF)
    on_base = tiny.write_adapter(tmp_path / "cat", model, r=4)
    on_draft = tiny.write_adapter(tmp_path / "swift", draft, r=2)
    (on_base / "loramux.json").write_text(json.dumps({"companions": {"draft": "swift"}}))
    server = Server(model, tmp_path / "data", "--draft-model", str(draft))
    push = ["adapters", "--url", server.url, "push"]
    try:
        for folder, base in ((on_draft, "target"), (on_base, "draft"), (on_draft, "small")):
            assert main([*push, str(folder), "--base", base]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert "q_proj" in told and "--small-model" in told
        assert main([*push, str(on_draft), "--base", "draft"]) == 0
        assert main([*push, str(on_base)]) == 0
        with Client(server.url) as client:
            swift, cat = client.adapters.show("swift"), client.adapters.show("cat")
            assert (swift.base, cat.base) == ("draft", "target") and swift.report["layers"] == [0]
            companion = {"name": "swift", "status": "ready", "digest": swift.digest}
            assert cat.companions == {"draft": companion}
            with_it = client.complete([5, 6, 7], model="cat", max_tokens=5, temperature=0)
            assert [card.id for card in client.models()] == ["model", "cat"]
            client.adapters.delete("swift")
            assert client.adapters.show("cat").companions["draft"]["status"] == "missing"
            without = client.complete([5, 6, 7], model="cat", max_tokens=5, temperature=0)
            assert with_it.text == without.text
    finally:
        assert server.close() == 0
    (draft / "config.json").write_text('{"vocab_size": 321}')
    flags = ["--model", str(model), "--draft-model", str(draft), "--data-dir", str(tmp_path / "d")]
    assert main(["serve", *flags]) == 2
    assert "--draft-model" in capsys.readouterr().err
