"""Versions of one name in a real pool: who answers, and what comes back when one goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.e2e.server import Server

from loramux_client import AdapterAliasedError, Client, GenerationGoneError, NotFoundError


@pytest.fixture(scope="module")
def shouters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("e2e")
    model = tiny.write_model(folder / "tiny", "llama", shoutable=True)
    return model, [tiny.shouting_adapter(folder / f"a{t}", model, t) for t in (40, 41)]


@pytest.fixture(scope="module")
def server(
    shouters: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    # Starting a process that loads torch and compiles kernels takes seconds; one serves them all.
    server = Server(shouters[0], tmp_path_factory.mktemp("data") / "d", "--sweep-s", "0.1")
    yield server
    assert server.close() == 0


def eventually(condition: Callable[[], bool], within_s: float = 30) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def resident(server: Server) -> set[str]:
    """Digests in the engine's pool."""
    rows = server.http.get("/admin/state").json()["adapters"]["rows"]
    return {row["digest"] for row in rows if row["state"] in ("leased", "warm")}


def adapter_frames(server: Server) -> int:
    frames = server.http.get("/v1/capacity").json()["frames"]
    return int(frames["adapter_warm"] + frames["adapter_leased"])


def test_a_generation_that_goes_gives_its_frames_back(
    server: Server, shouters: tuple[Path, list[Path]]
) -> None:
    with Client(server.url) as client:
        one = client.adapters.push(shouters[1][0], "say")
        two = client.adapters.push(shouters[1][1], "say", expected_generation=1)
        client.aliases.set("prod", {"say@1": 1, "say@2": 1})
        users = [str(number) for number in range(16)]
        fields: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "return_token_ids": True}
        tokens = {user: client.complete([5], model="prod", user=user, **fields) for user in users}
        said = {"say@1": [40] * 3, "say@2": [41] * 3}
        for answer in tokens.values():
            assert answer.choices[0].token_ids == said[str(answer.adapter_version)]
            assert answer.model == "prod"
        assert {answer.adapter_version for answer in tokens.values()} == set(said)
        assert resident(server) == {one.digest, two.digest}
        held = adapter_frames(server)
        with pytest.raises(AdapterAliasedError):
            client.adapters.delete("say@1")
        client.adapters.pin("say")
        client.aliases.set("prod", "say@2")
        client.adapters.delete("say@1")
        eventually(lambda: resident(server) == {two.digest})
        eventually(lambda: adapter_frames(server) == held // 2)
        with pytest.raises(GenerationGoneError):
            client.complete([5], model="say@1")
        # A pin moves on to the next generation, and lets go of the one before.
        again = client.adapters.push(shouters[1][0], "say", expected_generation=2)
        eventually(lambda: resident(server) == {one.digest, two.digest})
        assert again.generation == 3 and again.digest == one.digest
        client.aliases.delete("prod")
        client.adapters.delete("say@2")
        eventually(lambda: resident(server) == {one.digest})
        # It is pinned; the end of its time takes it away all the same.
        assert client.adapters.set_ttl("say", 1).pinned
        eventually(lambda: resident(server) == set())
        assert adapter_frames(server) == 0
        with pytest.raises(NotFoundError):
            client.complete([5], model="say")
        assert client.adapters.list() == []
