"""A server whose adapters bring Medusa heads of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.e2e.server import Server
from tests.heads import saying

from loramux.cli import main
from loramux_client import AdapterInvalidError, Client, Completion, SpeculationUsage

pytestmark = (
    pytest.mark.slow
)  # two servers, one after the other; tests/http and tests/engine have the rest

HIDDEN = 64
LENGTH = 25
MEDUSA: Any = {"drafters": ["medusa"], "max_draft_tokens": 4}
ALL = [(41, 41), (42, 42), (43, 40)]
"""What an adapter says, and what its heads do: the last one's are mistaken."""


def drafted(answer: Completion) -> SpeculationUsage:
    assert answer.usage is not None and answer.usage.details is not None
    usage = answer.usage.details.speculation
    assert isinstance(usage, SpeculationUsage)
    return usage


def foreseen(client: Client, model: str, said: int) -> tuple[str | None, int, int]:
    """Whose heads guess for an adapter, how many tokens, and how many of those are right. They are
    at hand a moment after the first question, and a busy machine has few steps to spare for them:
    answers add up."""
    end = time.monotonic() + 60
    heads, num_drafted, num_accepted = set(), 0, 0
    while num_drafted < 10:
        assert time.monotonic() < end, num_drafted
        options: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0, "return_token_ids": True}
        answer = client.complete([5, 6, 7], model=model, speculation=MEDUSA, **options)
        assert answer.choices[0].token_ids == [said] * LENGTH
        usage = drafted(answer)
        if usage.drafted:
            heads.add(usage.heads)
            num_drafted += usage.drafted
            num_accepted += usage.accepted
        else:
            time.sleep(0.05)
    (whose,) = heads
    return whose, num_drafted, num_accepted


def test_their_heads_guess_for_them_and_for_nobody_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A model and adapters are made, and a server starts twice: 40 s.
    model = tiny.write_model(tmp_path / "model", shoutable=True)
    (model / "medusa_heads.safetensors").write_bytes(saying(44, HIDDEN, tiny.VOCAB_SIZE, heads=2))
    folders = {t: tiny.shouting_adapter(tmp_path / f"say-{t}", model, t) for t in (*range(41, 45),)}
    files = {t: saying(guess, HIDDEN, tiny.VOCAB_SIZE, heads=4) for t, guess in ALL}
    server = Server(model, tmp_path / "data")
    push = ["adapters", "--url", server.url, "push"]
    try:
        with Client(server.url) as client:
            (folders[41] / "medusa_heads.safetensors").write_bytes(files[41])
            assert main([*push, str(folders[41])]) == 0, "from the folder, by itself"
            for token in (42, 43):
                (tmp_path / "heads").write_bytes(files[token])
                view = client.adapters.push(folders[token], heads=tmp_path / "heads")
                assert view.report["heads"] == {"heads": 4, "num_bytes": len(files[token])}
            client.adapters.push(folders[44])
            bad = saying(1, HIDDEN // 2, tiny.VOCAB_SIZE)
            (tmp_path / "heads").write_bytes(bad)
            with pytest.raises(AdapterInvalidError) as refused:
                client.adapters.push(folders[44], "bad", heads=tmp_path / "heads")
            assert len(refused.value.problems) == 9, "every tensor is of another width"
            assert main([*push, str(folders[41]), "--name", "bare", "--no-heads"]) == 0
            assert client.adapters.show("bare").heads_digest == ""
            asked(client)
            capsys.readouterr()
            assert main(["adapters", "--url", server.url, "show", "say-41"]) == 0
            assert '"heads": 4' in capsys.readouterr().out
            kept = client.adapters.show("say-41").heads_digest
        server.close()
        server = Server(model, tmp_path / "data")
        with Client(server.url) as client:
            assert client.adapters.show("say-41").heads_digest == kept
            asked(client)
    finally:
        assert server.close() == 0


def asked(client: Client) -> None:
    """Each adapter alone, two worn at once, and the base."""
    for token, guess in ALL:
        heads, num_drafted, num_accepted = foreseen(client, f"say-{token}", token)
        assert heads == client.adapters.show(f"say-{token}").heads_digest
        if guess == token:
            assert num_accepted == num_drafted, "they are right for this adapter alone"
        else:
            assert num_accepted == 0, "its own heads guessed, and they are wrong"
    heads, num_drafted, num_accepted = foreseen(client, "say-44", 44)
    assert heads == "base" and num_accepted == num_drafted
    plain = client.complete([5, 6, 7], model="model", max_tokens=5, temperature=0)
    guessed = client.complete(
        [5, 6, 7], model="model", max_tokens=5, temperature=0, speculation=MEDUSA
    )
    assert plain.text == guessed.text and drafted(guessed).heads == "base"
