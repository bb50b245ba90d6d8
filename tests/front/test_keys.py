"""The keys file: what is stored, who is found, how edits and damage are met."""

from __future__ import annotations

import hmac
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from loramux.cli import main
from loramux.errors import ConfigError
from loramux.front import keys as module
from loramux.front.keys import CHECK_S, Keys, Limits, Scope, editing, new_key, read


def grant(path: Path, tenant: str = "acme", scopes: tuple[Scope, ...] = ("infer",)) -> str:
    """A new key in the file; its text."""
    with editing(path) as content:
        key, text = new_key(tenant, scopes)
        content.keys.append(key)
    return text


def revoke(path: Path, text: str) -> None:
    main(["keys", "revoke", text.split("_")[1], "--api-keys", str(path)])


class Clock:
    """Time that stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "keys.json"


def test_a_key_is_found_and_its_secret_is_nowhere(path: Path) -> None:
    text = grant(path, scopes=("infer", "upload"))
    key = Keys(path).find(text)
    assert key is not None and (key.tenant, key.scopes) == ("acme", ("infer", "upload"))
    assert key.id == text.split("_")[1] and len(key.hash) == 64
    assert text.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.json"]


def strangers(text: str) -> list[str]:
    """Everything that is no key, near and far from a real one."""
    lmx, key_id, secret = text.split("_", 2)
    other = "A" if secret[-1] != "A" else "B"
    return [
        "",
        "x",
        text[:-1],
        text + "A",
        text[:-1] + other,
        f"{lmx}_{'0' * 8}_{secret}",
        f"{lmx}_{key_id.upper() + 'x'}_{secret}",
        f"LMX_{key_id}_{secret}",
        f"{lmx}_{key_id}_",
        key_id,
        secret,
        text + "\n",
        "lmx_00000000_" + "é" * 43,
    ]


def test_strangers_are_refused_after_the_same_work(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, gone = grant(path), grant(path)
    revoke(path, gone)
    keys = Keys(path)
    compared: list[tuple[int, int]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(module, "hmac", type("", (), {"compare_digest": staticmethod(compare)}))
    assert keys.find(text) is not None
    for stranger in [*strangers(text), gone]:
        assert keys.find(stranger) is None, stranger
    assert compared == [(64, 64)] * (2 + len(strangers(text)))


KEY = {
    "id": "0" * 8,
    "hash": "0" * 64,
    "tenant": "a",
    "scopes": [],
    "created": "2026-01-01T00:00:00Z",
}
DAMAGE: dict[str, Any] = {
    "empty": b"",
    "cut": b'{"version": 1, "keys": [',
    "not an object": b"[]",
    "no version": {"keys": []},
    "too new": {"version": 2},
    "a version in words": {"version": "1"},
    "an unknown field": {"version": 1, "users": []},
    "an unknown scope": {"version": 1, "keys": [KEY | {"scopes": ["root"]}]},
    "a hash that is none": {"version": 1, "keys": [KEY | {"hash": "0" * 63}]},
    "a tenant that is none": {"version": 1, "keys": [KEY | {"tenant": ""}]},
    "a tenant with a newline": {"version": 1, "keys": [KEY | {"tenant": "a\n"}]},
    "an id twice": {"version": 1, "keys": [KEY, KEY]},
    "a negative limit": {"version": 1, "tenants": {"a": {"max_requests": -1}}},
    "more than all": {"version": 1, "tenants": {"a": {"max_pool_share": 1.01}}},
    "a limit misspelt": {"version": 1, "tenants": {"a": {"max_request": 1}}},
    "limits of nobody": {"version": 1, "tenants": {"a b": {}}},
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_by_name_and_left_alone(path: Path, content: Any) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.parent.mkdir()
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"keys\.json"):
        Keys(path)
    assert main(["keys", "create", "--tenant", "a", "--scopes", "infer", *at(path)]) == 2
    assert path.read_bytes() == raw


def at(path: Path) -> list[str]:
    return ["--api-keys", str(path)]


def test_the_undamaged_file_of_that_test_is_fine(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"version": 1, "keys": [KEY], "tenants": {"a": {}}}))
    assert Keys(path).guarded


def test_no_file_is_open_unless_it_was_named(path: Path) -> None:
    assert not Keys(path).guarded
    with pytest.raises(ConfigError, match="loramux keys create"):
        Keys(path, required=True)


def test_edits_are_followed_within_a_second(path: Path) -> None:
    clock = Clock()
    keys = Keys(path, clock=clock)
    text = grant(path)
    assert not keys.guarded and keys.find(text) is None
    clock.now += CHECK_S
    assert keys.guarded and keys.find(text) is not None
    with editing(path) as content:
        content.tenants["acme"] = Limits(max_requests=3)
    revoke(path, text)
    clock.now += CHECK_S
    assert keys.find(text) is None
    assert keys.limits("acme") == Limits(max_requests=3) and keys.limits("else") == Limits()
    assert keys.guarded, "revoking the last key opens nothing"
    assert not Keys(path).guarded


def test_an_edit_of_equal_size_is_seen(path: Path) -> None:
    """Written in place within the same tick of the clock is not; a new file has a new inode."""
    clock = Clock()
    grant(path)
    keys = Keys(path, clock=clock)
    old = path.stat()
    content = path.read_text().replace("infer", "admin")
    path.with_name("new").write_text(content)
    os.utime(path.with_name("new"), ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(path.with_name("new"), path)
    clock.now += CHECK_S
    assert keys.guarded
    assert [key.scopes for key in keys._keys.values()] == [("admin",)]


def test_the_file_is_looked_at_once_a_second(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = grant(path)
    clock = Clock()
    keys = Keys(path, clock=clock)
    looked = []
    plain = keys._stat
    monkeypatch.setattr(keys, "_stat", lambda: (looked.append(clock.now), plain())[1])
    monkeypatch.setattr(module, "read", None)  # unchanged: never read again
    for _ in range(100):
        assert keys.find(text) is not None and keys.guarded
        clock.now += 0.125
    assert len(looked) == 12


@pytest.mark.parametrize("damage", ["garbage", "gone", "unreadable"])
def test_damage_while_serving_leaves_the_last_good_keys(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = grant(path)
    clock = Clock()
    keys = Keys(path, clock=clock)
    path.unlink()
    if damage == "garbage":
        path.write_bytes(b"{")
    elif damage == "unreadable":
        path.mkdir()
    for _ in range(5):
        clock.now += CHECK_S
        assert keys.find(text) is not None and keys.guarded
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1
    if damage == "unreadable":
        path.rmdir()
    path.unlink(missing_ok=True)
    other = grant(path)
    clock.now += CHECK_S
    assert keys.find(other) is not None and keys.find(text) is None


def test_a_write_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grant(path)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, name, refuse)
            with pytest.raises(ConfigError, match="No space"):
                grant(path)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == ["keys.json"]


def test_the_file_is_durable_before_it_has_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        steps.append("dir" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def replaced(*names: Any) -> None:
        steps.append("rename")
        replace(*names)

    monkeypatch.setattr(module.os, "fsync", synced)
    monkeypatch.setattr(module.os, "replace", replaced)
    grant(path)
    assert steps == ["file", "rename", "dir"]


def test_editors_take_turns(path: Path) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(grant(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = Keys(path)
    assert len(texts) == 8 and all(keys.find(text) for text in texts)


def test_the_commands(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scopes = ["--scopes", "upload,infer"]
    create = ["keys", "create", "--tenant", "acme", *scopes, "--note", "[b] x", *at(path)]
    assert main(create) == 0
    said = capsys.readouterr()
    text = said.out.strip()
    assert "not shown again" in said.err and Keys(path).find(text) is not None
    key_id, secret = text.split("_", 2)[1:]
    assert main(["keys", "list", *at(path)]) == 0
    listed = capsys.readouterr().out
    for word in (key_id, "acme", "infer,upload", "[b] x"):
        assert word in listed
    assert secret not in listed
    assert main(["keys", "revoke", key_id, *at(path)]) == 0
    found = read(path)
    assert found is not None and found.keys[0].revoked is not None
    assert main(["keys", "revoke", key_id, *at(path)]) == 0
    assert read(path) == found, "the first time stands"
    assert main(["keys", "revoke", "0" * 8, *at(path)]) == 2


def test_the_limits_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["keys", "limits", "--tenant", "acme", *at(path)]
    assert main([*limits, "--max-requests", "3", "--tokens-per-minute", "0"]) == 0
    assert main([*limits, "--max-requests", "none", "--max-adapters", "2"]) == 0
    assert main([*limits, "--max-pool-share", "0.25"]) == 0
    capsys.readouterr()
    assert main(limits) == 0
    assert capsys.readouterr().out.split() == [
        *("max_adapters", "2", "max_adapter_bytes", "none"),
        *("max_requests", "none", "tokens_per_minute", "0", "max_pool_share", "0.25"),
    ]
    expected = Limits(max_adapters=2, tokens_per_minute=0, max_pool_share=0.25)
    assert Keys(path).limits("acme") == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "--tenant", "a b", "--scopes", "infer"],
        ["create", "--tenant", "", "--scopes", "infer"],
        ["create", "--tenant", "a", "--scopes", "infer,"],
        ["create", "--tenant", "a", "--scopes", "root"],
        ["create", "--tenant", "a"],
        ["create", "--scopes", "infer"],
        ["limits", "--tenant", "a", "--max-requests", "-1"],
        ["limits", "--tenant", "a", "--max-requests", "²"],
        ["limits", "--tenant", "a", "--max-pool-share", "25"],
        ["limits", "--tenant", "a", "--max-pool-share", "1.5"],
        ["limits", "--tenant", "a", "--max-pool-share", "nan"],
        ["limits"],
        ["revoke"],
        [],
    ],
)
def test_commands_that_make_no_sense(path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["keys", *arguments, *(at(path) if arguments else [])])
    assert caught.value.code == 2 and not path.exists()
