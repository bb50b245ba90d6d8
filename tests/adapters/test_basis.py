"""A basis is named by its content and written once; what is left of an adapter are its middles."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from tests.adapters.blending import FILES, blend, deltas, differ
from tests.adapters.peft_files import (
    Tensors,
    base_description,
    import_files,
    make_config,
    make_tensors,
    module_name,
    safetensors_bytes,
)

from loramux.adapters import basis, pack
from loramux.adapters.basis import Basis
from loramux.adapters.blobs import BlobStore
from loramux.adapters.canonical import ITEMSIZE, CanonicalAdapter, ModuleVector, widen
from loramux.adapters.safetensors_file import read_tensors
from loramux.ingest.job import run
from loramux.wire import TABLE_MODULES, BaseDescription, IngestDone, IngestJob

BASE = base_description(hidden=40, inter=72, head_dim=10)
MODULES = ("q_proj", "v_proj", "down_proj")
RANK = 5


def files(seed: int = 0, own: int = 0, rank: int = RANK, dtype: str = "<f4") -> Tensors:
    """LoRA-XS: ``seed`` makes A and B, ``own`` makes R."""
    tensors = make_tensors(BASE, rank=rank, modules=MODULES, seed=seed)
    rng = np.random.default_rng([own, 1])
    for layer in range(BASE.num_layers):
        for module in MODULES:
            name = f"base_model.model.{module_name(layer, module)}"
            latent = rng.standard_normal((rank, rank))
            tensors[f"{name}.default_lora_latent_mapping.weight"] = latent
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


def config(rank: int = RANK, **fields: Any) -> dict[str, Any]:
    return make_config(r=rank, target_modules=list(MODULES), **fields)


Import = Callable[..., CanonicalAdapter]


@pytest.fixture
def canonical() -> Iterator[Import]:
    """Imports tensors; the files stay open until the end."""
    with ExitStack() as stack:

        def imported(tensors: Tensors, **fields: Any) -> CanonicalAdapter:
            file = stack.enter_context(tempfile.TemporaryFile())
            file.write(safetensors_bytes(tensors))
            file.flush()
            rank = next(t for name, t in tensors.items() if "lora_A" in name).shape[0]
            return import_files(config(rank, **fields), read_tensors(file), BASE)

        yield imported


def shared(adapter: CanonicalAdapter) -> Basis:
    found = basis.basis_of(adapter)
    assert found is not None
    return found


def test_the_digest_is_that_of_a_and_b_alone(canonical: Import) -> None:
    digest = shared(canonical(files())).digest
    assert shared(canonical(files(own=7))).digest == digest
    assert shared(canonical(files(), lora_alpha=99)).digest == digest
    adapter = canonical(files())
    assert all(pair.scale == 1 for pair in shared(adapter).pairs.pairs), "whoever came first"
    one_b = files()
    next(t for name, t in one_b.items() if "lora_B" in name)[-1, -1] += 1
    others = [
        canonical(one_b),
        canonical(files(seed=1)),
        canonical(files(rank=4)),
        canonical(files(dtype="<f2")),
        replace(adapter, pairs=adapter.pairs[:-1]),
        # The same bytes elsewhere: v of the first layer says it is k.
        replace(adapter, pairs=tuple(replace(p, module="k_proj") for p in adapter.pairs[1:2])),
        replace(adapter, pairs=adapter.pairs[1:2]),
    ]
    digests = [shared(other).digest for other in others]
    assert len({digest, *digests}) == len(digests) + 1


def test_pairs_without_a_middle_have_no_basis(canonical: Import) -> None:
    adapter = canonical(files())
    plain = tuple(pair.folded() for pair in adapter.pairs)
    assert basis.basis_of(replace(adapter, pairs=plain)) is None
    mixed = replace(adapter, pairs=(*plain[:4], *adapter.pairs[4:]))
    assert (
        shared(mixed).pairs.pairs == shared(replace(adapter, pairs=adapter.pairs[4:])).pairs.pairs
    )


def stream_of(packed: pack.PackedAdapter) -> npt.NDArray[Any]:
    assert pack.verify_payload(packed)
    storage = {"float32": "<f4", "float16": "<f2"}[packed.dtype]
    return np.fromfile(packed.path, storage, offset=packed.payload_offset)


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("mixed", [False, True])
def test_behind_its_basis_a_stream_has_every_matrix(
    canonical: Import, tmp_path: Path, dtype: str, mixed: bool
) -> None:
    adapter = canonical(files(dtype=dtype))
    if mixed:  # pairs and vectors of its own beside those with a middle
        vector = ModuleVector(1, "o_proj", "shift", np.arange(40, dtype=np.float32))
        own = tuple(p if i % 2 else p.folded() for i, p in enumerate(adapter.pairs))
        adapter = CanonicalAdapter("float32", own, vectors=(vector,))
    found = shared(adapter)
    basis.keep(found, BASE, tmp_path)
    first = pack.read_header(pack.packed_path(tmp_path, found.digest, BASE.fingerprint))
    assert first.basis is None and first.digest == found.digest
    pack.pack(adapter, BASE, "d" * 64, tmp_path / "own", basis=found.digest)
    second = pack.read_header(tmp_path / "own")
    assert second.basis == found.digest and second.dtype == first.dtype == adapter.dtype

    gap = 256 - first.num_bytes % 256  # the basis's frames are not full
    layout = second.after(first, first.num_bytes + gap)
    nothing = np.full(gap // ITEMSIZE[adapter.dtype], np.nan, dtype)
    stream = np.concatenate(
        [stream_of(first), nothing.astype(stream_of(first).dtype), stream_of(second)]
    )
    assert layout.num_elems == len(stream)

    def read(offset: int, count: int, width: int) -> npt.NDArray[Any]:
        padded = -(-width // layout.chunk) * layout.chunk
        assert offset % layout.chunk == 0
        return stream[offset : offset + count * padded].reshape(count, padded)[:, :width]

    for pair in adapter.pairs:
        at = pair.layer, TABLE_MODULES.index(pair.module)
        assert (layout.rank[at], layout.scale[at]) == (RANK, np.float32(pair.scale))
        a = read(int(layout.a_offset[at]), RANK, pair.a.shape[1])
        b = read(int(layout.b_offset[at]), RANK, pair.b.shape[0])
        np.testing.assert_array_equal(a.astype("f4"), widen(pair.a.read(), pair.a.dtype))
        np.testing.assert_array_equal(b.T.astype("f4"), widen(pair.b.read(), pair.b.dtype))
        if pair.middle is None:
            assert layout.middle_offset[at] == -1
        else:
            r = read(int(layout.middle_offset[at]), RANK, RANK)
            np.testing.assert_array_equal(r, widen(pair.middle.read(), pair.middle.dtype))
    assert (layout.middle_offset >= 0).sum() == sum(p.middle is not None for p in adapter.pairs)
    if mixed:
        offset = int(layout.vector_offset[1, TABLE_MODULES.index("o_proj"), 1])
        assert stream[offset : offset + 40].tolist() == list(range(40))
        assert (layout.vector_offset >= 0).sum() == 1
    else:
        per_layer = len(MODULES) * RANK * layout.chunk
        assert second.num_elems == BASE.num_layers * per_layer
        assert second.layer_ends().tolist() == [per_layer, 2 * per_layer, 3 * per_layer]


def job(
    data_dir: Path, tensors: Tensors, *, do_pack: bool = True, base: BaseDescription = BASE
) -> IngestJob:
    digests = []
    for data in (json.dumps(config()).encode(), safetensors_bytes(tensors)):
        with BlobStore(data_dir).writer(1 << 30) as writer:
            writer.write(data)
            digests.append(writer.commit())
    return IngestJob(
        job_id=1, config_digest=digests[0], weights_digest=digests[1], base=base, pack=do_pack
    )


def good(done: IngestDone) -> dict[str, Any]:
    assert not done.problems, done.problems
    return done.report


def on_disk(data_dir: Path) -> dict[str, bytes]:
    return {path.name[:64]: path.read_bytes() for path in (data_dir / "packed").glob("*.lmx")}


def test_adapters_of_one_basis_have_it_on_disk_once(tmp_path: Path) -> None:
    reports = [good(run(job(tmp_path, files(own=i)), tmp_path)) for i in range(3)]
    facts = reports[0]["basis"]
    assert all(report["basis"] == facts for report in reports)
    assert len(on_disk(tmp_path)) == 4
    packed = pack.read_header(pack.packed_path(tmp_path, facts["digest"], BASE.fingerprint))
    assert packed.num_bytes == facts["num_bytes"] > 2 * reports[0]["num_bytes"]
    assert facts["num_frames"] == packed.num_frames(BASE.slice_bytes)
    before = packed.path.stat().st_mtime_ns
    good(run(job(tmp_path, files(own=4)), tmp_path))
    assert packed.path.stat().st_mtime_ns == before
    whole = packed.path.read_bytes()
    for damaged in (b"", whole[:-1], whole[: -packed.num_bytes] + bytes(packed.num_bytes)):
        packed.path.write_bytes(damaged)
        good(run(job(tmp_path, files(own=4)), tmp_path))
        assert packed.path.read_bytes() == whole, "what is damaged is made again"
    packed.path.unlink()
    good(run(job(tmp_path, files(own=4)), tmp_path))
    assert packed.path.read_bytes() == whole, "and what is missing"
    other = good(run(job(tmp_path, files(seed=1)), tmp_path))["basis"]
    assert other["digest"] != facts["digest"] and len(on_disk(tmp_path)) == 7


def test_a_report_measures_all_three(tmp_path: Path) -> None:
    tensors = files(own=2)
    for name in (n for n in tensors if "v_proj.default" in n):
        tensors[name] *= 10  # there R has the largest value
    report = good(run(job(tmp_path, tensors, do_pack=False), tmp_path))
    for module in MODULES:
        norms, largest = [], 0.0
        for layer in range(BASE.num_layers):
            name = f"base_model.model.{module_name(layer, module)}"
            a, b = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
            r = tensors[f"{name}.default_lora_latent_mapping.weight"]
            norms.append(float(np.linalg.norm(8 / RANK * b.astype(np.float64) @ r @ a)))
            largest = max(largest, *(float(np.abs(m).max()) for m in (a, b, r)))
        said = report["by_module"][module]
        assert said["norm"] == pytest.approx(sorted(norms), rel=1e-5)
        assert said["largest"] == largest
    assert report["cost"]["row_bytes"] == report["num_bytes"] + report["basis"]["num_bytes"]


def test_validating_only_writes_no_basis(tmp_path: Path) -> None:
    report = good(run(job(tmp_path, files(), do_pack=False), tmp_path))
    assert report["basis"]["num_bytes"] > 0 and not (tmp_path / "packed").exists()


def test_the_limit_is_for_both(tmp_path: Path) -> None:
    report = good(run(job(tmp_path, files(), do_pack=False), tmp_path))
    total = report["num_bytes"] + report["basis"]["num_bytes"]
    for limit, code in ((total, ""), (total - 1, "adapter_too_large")):
        base = msgspec.structs.replace(BASE, max_adapter_bytes=limit)
        done = run(job(tmp_path, files(), do_pack=False, base=base), tmp_path)
        assert (done.code if done.problems else "") == code


def test_a_blend_takes_the_middles_into_account(tmp_path: Path) -> None:
    tensors = files(own=3)
    source, mixed = tmp_path / "source", tmp_path / "mixed"
    for folder in (source, mixed):
        folder.mkdir()
    (source / FILES[0]).write_text(json.dumps(config()))
    (source / FILES[1]).write_bytes(safetensors_bytes(tensors))
    blend(mixed, [(source, 0.5)], BASE, method="soup")
    want = {}
    for layer in range(BASE.num_layers):
        for module in MODULES:
            name = f"base_model.model.{module_name(layer, module)}"
            a, b = (tensors[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
            r = tensors[f"{name}.default_lora_latent_mapping.weight"].astype(np.float64)
            want[layer, module] = 0.5 * (8 / RANK) * b @ r @ a
    assert differ(deltas(mixed, BASE), want) < 1e-6


@pytest.mark.parametrize("call", range(3))
def test_killed_between_basis_and_adapter(tmp_path: Path, call: int) -> None:
    """Before the basis has its name (0), between the two (1), not at all (2)."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    good(run(job(whole, files()), whole))
    work = job(killed, files())
    if (child := os.fork()) == 0:
        left, publish = call, pack.publish

        def dying(source: Path, target: Path) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            publish(source, target)

        pack.publish = dying
        run(work, killed)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (call < 2)
    found = on_disk(killed)
    assert len(found) == min(call, 2)
    assert found.items() <= on_disk(whole).items(), "what has its name is whole"
    good(run(work, killed))
    assert on_disk(killed) == on_disk(whole)
