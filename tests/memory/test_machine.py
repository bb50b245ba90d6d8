"""Free memory in groups that have limits, read from files made like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny

from loramux.config import ServerConfig
from loramux.engine import assemble
from loramux.memory.machine import free_memory, oom_kills
from loramux.model.architecture import read_architecture

MIB = 1 << 20
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(group: str, limit: object, used: int, inactive: int = 0, **more: int) -> dict[str, object]:
    folder = f"sys/fs/cgroup/{group}".rstrip("/")
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7",
        **{f"{folder}/memory.{name}": value for name, value in more.items()},
    }


def v1(group: str, limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{group}".rstrip("/")
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"cache 5\ninactive_file 1\ntotal_inactive_file {inactive}",
    }


@pytest.mark.parametrize(
    ("lines", "files", "free"),
    [
        # In a container the group is the root of what is mounted.
        ("0::/", v2("", 100 * MIB, 30 * MIB), 70 * MIB),
        ("0::/", v2("", 100 * MIB, 90 * MIB, inactive=60 * MIB), 70 * MIB),
        ("0::/", v2("", 100 * MIB, 30 * MIB, high=80 * MIB), 50 * MIB),
        ("0::/", v2("", "max", 30 * MIB, high=80 * MIB), 50 * MIB),
        # An ancestor's limit counts too; the smallest room does.
        (
            "0::/a.slice/b.service",
            {**v2("a.slice", 90 * MIB, 80 * MIB), **v2("a.slice/b.service", 50 * MIB, 10 * MIB)},
            10 * MIB,
        ),
        (
            "0::/a.slice/b.service",
            {**v2("a.slice", "max", 80 * MIB), **v2("a.slice/b.service", 50 * MIB, 10 * MIB)},
            40 * MIB,
        ),
        ("0::/", v2("", 100 * MIB, 130 * MIB), 0),
        # v1: beside other controllers, and with the path the host gave the group.
        (
            "12:cpu,cpuacct:/x\n7:memory:/x\n1:name=systemd:/x",
            v1("x", 100 * MIB, 60 * MIB, 10 * MIB),
            50 * MIB,
        ),
        ("7:memory:/docker/0123abc", v1("", 100 * MIB, 60 * MIB), 40 * MIB),
        (
            "7:memory:/kubepods/pod",
            {
                **v1("", UNLIMITED_V1, 900 * MIB),
                **v1("kubepods", 80 * MIB, 50 * MIB),
                **v1("kubepods/pod", UNLIMITED_V1, 20 * MIB),
            },
            30 * MIB,
        ),
        # A hybrid machine: the memory controller is v1's, the unified group has no files of it.
        ("7:memory:/x\n0::/x", v1("x", 64 * MIB, 4 * MIB), 60 * MIB),
    ],
)
def test_the_groups_limit_counts(
    tmp_path: Path, lines: str, files: dict[str, object], free: int
) -> None:
    assert free_memory(write(tmp_path, {"proc/self/cgroup": lines, **files})) == free


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/"},
        {"proc/self/cgroup": "0::/x", **v2("x", "max", 30 * MIB)},
        {"proc/self/cgroup": "7:memory:/", **v1("", UNLIMITED_V1, 30 * MIB)},
    ],
)
def test_without_a_limit_it_is_the_machines(
    tmp_path: Path, files: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_AVPHYS_PAGES": 1000}.get(name, 4096))
    assert free_memory(write(tmp_path, files)) == 1000 * 4096


EVENTS = "low 0\nhigh 4\nmax 9\noom 2\noom_kill {}\noom_group_kill 0"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}"


@pytest.mark.parametrize(
    ("lines", "files", "num"),
    [
        ("0::/", {"memory.events": EVENTS.format(3)}, 3),
        (
            "0::/a/b",
            {"a/b/memory.events": EVENTS.format(1), "a/memory.events": EVENTS.format(8)},
            1,
        ),
        ("0::/host/path", {"memory.events": EVENTS.format(5)}, 5),
        ("7:memory:/x\n0::/x", {"memory/x/memory.oom_control": CONTROL.format(2)}, 2),
        ("7:cpu:/x", {"memory/x/memory.oom_control": CONTROL.format(2)}, 0),
        ("0::/", {}, 0),
    ],
)
def test_kills_for_want_of_memory(
    tmp_path: Path, lines: str, files: dict[str, object], num: int
) -> None:
    """Its own group's, where that can be seen."""
    events = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    assert oom_kills(write(tmp_path, {"proc/self/cgroup": lines, **events})) == num
    assert oom_kills(tmp_path / "nothing") == 0


def test_the_pool_is_a_share_of_what_the_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = v2("", 40 * MIB, 8 * MIB)
    root = write(tmp_path / "root", {"proc/self/cgroup": "0::/", **files})
    monkeypatch.setattr(assemble, "free_memory", lambda: free_memory(root))
    model = tiny.write_model(tmp_path / "tiny", "llama")
    kv = assemble._kv_format(read_architecture(model), 16, torch.float32)

    def num_bytes(asked: str) -> int:
        config = ServerConfig(model=model, data_dir=tmp_path / "d", pool_memory=asked)
        return assemble._num_frames(config, kv, torch.device("cpu")) * kv.frame.frame_bytes

    for asked, share in (("0.5", 0.5), ("auto", assemble.CPU_POOL_SHARE)):
        assert 0 <= share * 32 * MIB - num_bytes(asked) < kv.frame.frame_bytes
    assert num_bytes("33M") <= 33 * MIB, "what was asked for is not made less"
    assert num_bytes("33M") > 33 * MIB - kv.frame.frame_bytes
