"""Heads of adapters at hand: read beside the steps, kept within their bytes, forgotten at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.heads import saying

from loramux.adapters.blobs import BlobStore
from loramux.request import Request, SamplingParams, Speculation
from loramux.speculation import own_heads
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.heads import Heads, Medusa
from loramux.speculation.own_heads import OwnHeads, reader
from loramux_kernels.linear import Matrix

HIDDEN, VOCAB = 8, 20


def within(condition: Callable[[], object], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


class Files:
    """Heads by name, 10 bytes each; reading waits for ``gate``, fails for names in ``broken``."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.read: list[str] = []
        self.broken: set[str] = set()

    def __call__(self, digest: str) -> tuple[Heads, int]:
        self.read.append(digest)
        assert self.gate.wait(20)
        if digest in self.broken:
            raise OSError("no such disk")
        return Heads((), (), ((float(len(self.read)),),)), 10


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def own(files: Files) -> Iterator[OwnHeads]:
    own = OwnHeads(files, 30)
    yield own
    files.gate.set()
    own.close()


def test_nobody_waits_and_each_is_read_once(own: OwnHeads, files: Files) -> None:
    files.gate.clear()
    for _ in range(5):
        assert own.get("a") is None
    files.gate.set()
    assert within(lambda: own.get("a"))
    assert own.get("a") is own.get("a")
    assert files.read == ["a"]


def test_those_used_longest_ago_give_way(own: OwnHeads, files: Files) -> None:
    for name in "abc":
        assert within(lambda n=name: own.get(n))  # type: ignore[misc]
    own.get("a")
    assert within(lambda: own.get("d"))
    assert list(own._kept) == ["c", "a", "d"] and own._num_bytes == 30
    assert own.get("b") is None, "it is read again"
    assert within(lambda: own.get("b"))
    assert list(own._kept) == ["a", "d", "b"] and own._num_bytes == 30
    assert files.read == ["a", "b", "c", "d", "b"]


def test_what_is_forgotten_is_gone_also_while_it_is_read(own: OwnHeads, files: Files) -> None:
    assert within(lambda: own.get("a"))
    own.forget("a")
    own.forget("nobody's")
    assert own._kept == {} and own._num_bytes == 0
    files.gate.clear()
    assert own.get("b") is None
    assert within(lambda: files.read == ["a", "b"])
    own.forget("b")
    assert own.get("c") is None
    files.gate.set()
    assert within(lambda: own.get("c"))
    assert list(own._kept) == ["c"] and own._num_bytes == 10


def test_what_cannot_be_read_is_said_once_and_tried_again_later(
    own: OwnHeads, files: Files, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.broken = {"a"}
    with caplog.at_level(logging.ERROR):
        assert own.get("a") is None
        assert within(lambda: not own._reading)
        for _ in range(3):
            assert own.get("a") is None
            assert within(lambda: not own._reading)
    assert files.read == ["a"] and len(caplog.records) == 1
    assert "cannot be read" in caplog.text
    assert within(lambda: own.get("b")), "others are read all the same"
    monkeypatch.setattr(own_heads, "RETRY_S", 0.0)
    files.broken = set()
    assert within(lambda: own.get("a"))
    assert own._failed == {}


def stored(data_dir: Path, data: bytes) -> str:
    with BlobStore(data_dir).writer(1 << 20) as writer:
        writer.write(data)
        return writer.commit()


def lm_head() -> Matrix:
    return Matrix.of(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)))


def test_they_are_read_by_their_digest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = stored(tmp_path, saying(7, HIDDEN, VOCAB))
    read = reader(tmp_path, lm_head(), torch.zeros(1))
    heads, num_bytes = read(digest)
    assert num_bytes == BlobStore(tmp_path).size(digest)
    assert heads.logits(torch.randn(2, HIDDEN), 3).argmax(-1).tolist() == [[7, 7]] * 3
    path = BlobStore(tmp_path).path(digest)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\x3f")  # heads still, but not these
    own = OwnHeads(read, 1 << 20)
    assert own.get(digest) is None and within(lambda: not own._reading)
    assert own.get(digest) is None and "no longer has its digest" in caplog.text
    own.close()


def ask(name: str, heads: str, *, tree: bool = False) -> Ask:
    speculation = Speculation(drafters=("medusa",), heads=heads, tree=tree)
    params = SamplingParams(seed=1, temperature=0.0, max_tokens=9)
    request = Request(name, prompt_ids=[3], sampling=params, speculation=speculation)
    return Ask(request, 3)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("tree", [False, True])
def test_each_request_is_guessed_by_its_own_heads(
    tmp_path: Path, has_base: bool, tree: bool
) -> None:
    """Three kinds of heads in one question, some of whose requests share theirs; the last kind is
    not at hand."""
    read = reader(tmp_path, lm_head(), torch.zeros(1))

    def heads(token_id: int, count: int) -> Heads:
        return read(stored(tmp_path, saying(token_id, HIDDEN, VOCAB, heads=count)))[0]

    own = {"a": heads(5, 3), "b": heads(6, 1)}
    medusa = Medusa(heads(4, 2) if has_base else None, own.get)
    wants = {"r1": "a", "r2": "", "r3": "b", "r4": "a", "r5": "away", "r6": ""}
    asks = [ask(name, which, tree=tree) for name, which in wants.items()]
    states = torch.randn(len(asks), HIDDEN, generator=torch.Generator().manual_seed(2))
    medusa.saw([a.request for a in asks], states)
    first = [list(guess.token_ids) for guess in medusa.propose(asks)]
    base = [4] * has_base
    if tree:
        assert [tokens[:1] for tokens in first] == [[5], base, [6], [5], [], base]
    else:
        assert first == [[5, 5, 5], base * 2, [6], [5, 5, 5], [], base * 2]
    unseen = ask("r7", "a")
    assert medusa.propose([unseen]) == [Guess()]
