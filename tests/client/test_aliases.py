"""What both clients and the command send and make of aliases, generations and times to live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.client.conftest import Connect
from tests.client.doubles import write_adapter_files
from tests.client.test_client import Script, adapter, completion, failure

import loramux_client
from loramux.cli import main
from loramux_client import AdapterAliasedError, ConflictError, RevisionConflictError

TARGET = {"model": "cat@3", "weight": 90, "follows": False, "digest": "d", "status": "ready"}
ALIAS = {"id": "prod", "object": "alias", "revision": 4, "targets": [TARGET], "changed": 7}


def ok(value: Any) -> httpx.Response:
    return httpx.Response(200, json=value)


def test_set_list_show_delete(connect: Connect) -> None:
    script = Script(
        ok(ALIAS), ok(ALIAS), ok({"object": "list", "data": [ALIAS]}), ok(ALIAS), ok(ALIAS)
    )
    client = connect(script)
    got = client.call("aliases.set", "prod", "cat@3", expected_revision=3)
    assert (got.id, got.revision, got.changed) == ("prod", 4, 7)
    assert (got.targets[0].model, got.targets[0].weight, got.targets[0].digest) == (
        "cat@3",
        90,
        "d",
    )
    client.call("aliases.set", "prod", {"cat@3": 90, "base": 10})
    assert [each.id for each in client.call("aliases.list")] == ["prod"]
    assert client.call("aliases.show", "a/b").targets[0].follows is False
    assert client.call("aliases.delete", "prod") is None
    assert script.body(0) == {"target": "cat@3", "expected_revision": 3}
    shares = [{"model": "cat@3", "weight": 90}, {"model": "base", "weight": 10}]
    assert script.body(1) == {"targets": shares}
    asked = [(r.method, r.url.raw_path.decode()) for r in script.requests]
    path = "/v1/aliases/prod"
    assert asked[:2] == [("PUT", path)] * 2
    assert asked[2:] == [("GET", "/v1/aliases"), ("GET", "/v1/aliases/a%2Fb"), ("DELETE", path)]


def test_versions_and_times_to_live(connect: Connect) -> None:
    view = adapter(expires_at=99)
    script = Script(ok({"data": [view, view]}), ok(view), ok(view), ok(view))
    client = connect(script)
    assert len(client.call("adapters.versions", "a")) == 2
    assert client.call("adapters.set_ttl", "a@1", 60).expires_at == 99
    client.call("adapters.set_ttl", "a", None)
    client.call("adapters.delete", "a@1")
    assert (script.body(1), script.body(2)) == ({"ttl_s": 60}, {"ttl_s": None})
    paths = [request.url.raw_path.decode() for request in script.requests]
    assert paths[0] == "/v1/adapters/a/versions"
    assert paths[1:] == ["/v1/adapters/a%401/ttl", "/v1/adapters/a/ttl", "/v1/adapters/a%401"]


def test_push_with_a_time_to_live(connect: Connect, tmp_path: Path) -> None:
    there = httpx.Response(200)
    script = Script(there, there, ok(adapter()))
    folder = write_adapter_files(tmp_path / "a")
    connect(script).call("adapters.push", folder, ttl_s=60)
    assert script.body(2)["ttl_s"] == 60


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("revision_conflict", RevisionConflictError),
        ("adapter_aliased", AdapterAliasedError),
        ("name_reserved", ConflictError),
    ],
)
def test_refusals(connect: Connect, code: str, expected: type[Exception]) -> None:
    script = Script(failure(409, code, x_should_retry="false"))
    with pytest.raises(expected) as caught:
        connect(script).call("aliases.set", "prod", "cat")
    assert type(caught.value) is expected and isinstance(caught.value, ConflictError)


def test_which_version_answered(connect: Connect) -> None:
    headers = {"x-loramux-adapter": "ab", "x-loramux-model": "cat@3"}
    base = {"x-loramux-adapter": "base", "x-loramux-model": "base"}
    script = Script(
        *(httpx.Response(200, json=completion("a"), headers=h) for h in (headers, base))
    )
    client = connect(script)
    assert client.call("complete", "x", model="prod", user="me").adapter_version == "cat@3"
    assert script.body()["user"] == "me"
    assert client.call("complete", "x", model="prod").adapter_version is None


class Talks:
    """A ``Client`` whose server is a script."""

    def __init__(self, patch: pytest.MonkeyPatch, *replies: httpx.Response) -> None:
        self.script = Script(*replies)
        real = loramux_client.Client
        patch.setattr(
            loramux_client,
            "Client",
            lambda *args, **kwargs: real(
                *args, **kwargs, transport=httpx.MockTransport(self.script)
            ),
        )

    def asked(self, index: int = 0) -> tuple[str, str]:
        request = self.script.requests[index]
        return request.method, request.url.raw_path.decode()


def test_the_aliases_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {
        **ALIAS,
        "targets": [TARGET, {**TARGET, "model": "cat", "weight": 30, "follows": True}],
    }
    talks = Talks(monkeypatch, ok(shares), ok(ALIAS), ok({"data": [shares]}), ok(ALIAS))
    assert main(["aliases", "set", "prod", "cat@3=90", "cat=30", "--expected-revision", "3"]) == 0
    out = capsys.readouterr().out
    assert "75 %" in out and "25 %" in out and "cat (newest)" in out
    assert main(["aliases", "set", "prod", "cat@3"]) == 0
    assert main(["aliases", "list"]) == 0 and main(["aliases", "remove", "prod"]) == 0
    assert talks.script.body(0) == {
        "targets": [{"model": "cat@3", "weight": 90}, {"model": "cat", "weight": 30}],
        "expected_revision": 3,
    }
    assert talks.script.body(1) == {"targets": [{"model": "cat@3", "weight": 1}]}
    assert talks.asked(2) == ("GET", "/v1/aliases")
    assert talks.asked(3) == ("DELETE", "/v1/aliases/prod")


@pytest.mark.parametrize("target", ["cat=", "=5", "cat=x", "cat=-1", "cat=1.5", "cat=1=2"])
def test_a_share_that_is_none(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["aliases", "set", "prod", target])
    assert caught.value.code == 2 and "TARGET=WEIGHT" in capsys.readouterr().err


def test_a_target_given_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = Talks(monkeypatch)
    assert main(["aliases", "set", "prod", "cat=1", "cat=2"]) == 2
    assert talks.script.requests == [] and "twice" in capsys.readouterr().err


def test_the_adapters_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there = httpx.Response(200)
    views = ok({"data": [adapter(generation=2), adapter()]})
    talks = Talks(monkeypatch, there, there, ok(adapter()), views, ok(adapter()), failure(409, "x"))
    folder = write_adapter_files(tmp_path / "a")
    assert main(["adapters", "push", str(folder), "--ttl", "60"]) == 0
    assert talks.script.body(2)["ttl_s"] == 60
    assert main(["adapters", "versions", "a"]) == 0
    assert talks.asked(3) == ("GET", "/v1/adapters/a/versions")
    assert main(["adapters", "remove", "a@1"]) == 0
    assert talks.asked(4) == ("DELETE", "/v1/adapters/a%401")
    talks.script.replies[0].headers["x-should-retry"] = "false"  # type: ignore[union-attr]
    assert main(["adapters", "remove", "a"]) == 1
    assert "409" in capsys.readouterr().err
