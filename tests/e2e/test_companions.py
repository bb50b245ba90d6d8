"""A server with a draft model, an adapter with a companion for it, and guesses one can count."""

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
    # Off: no planner decides whether guesses pay, so what a request names is asked in every step.
    drafting = ("--draft-model", str(draft), "--speculation", "off")
    server = Server(model, tmp_path / "data", *drafting)
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
            assert with_it.usage.details.speculation == "off"
            ask = {"drafters": ["draft"], "max_draft_tokens": 2}
            guessed = 0
            while not guessed:  # until the companion has been loaded
                drafted = client.complete(
                    [5, 6, 7], model="cat", max_tokens=5, temperature=0, speculation=ask
                )
                assert drafted.text == with_it.text
                guessed = drafted.usage.details.speculation.drafted
            copied = client.complete(
                [40] * 8,
                model="cat",
                max_tokens=13,
                temperature=0,
                logit_bias={"40": 100},
                speculation={"drafters": ["lookup"], "max_draft_tokens": 4},
                return_token_ids=True,
            )
            assert copied.choices[0].token_ids == [40] * 13
            told = copied.usage.details.speculation
            assert (told.accepted, told.steps) == (9, 3)
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
