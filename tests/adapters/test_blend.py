"""Blends against PEFT's add_weighted_adapter: what they change, module by module."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from tests.adapters.blending import Deltas, blend, blend_job, deltas, differ
from tests.adapters.peft_files import (
    base_description,
    make_config,
    make_tensors,
    write_adapter,
)
from tests.adapters.peft_models import tiny_llama

from loramux.adapters.blend import Blend, Source, _keep_largest, _keep_some
from loramux.adapters.blobs import BlobStore
from loramux.adapters.canonical import CanonicalAdapter, Computed, TokenRows
from loramux.errors import AdapterInvalid
from loramux.ingest.job import run
from loramux.wire import MODULES, BaseDescription, BlendRecipe

BASE = base_description()
CONFIGS: dict[str, dict[str, Any]] = {
    # Every module another has, or PEFT finds nothing to blend there.
    "wide": {"r": 3, "lora_alpha": 5, "target_modules": list(MODULES)},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 7, "layers.2.mlp.down_proj": 1},
        "alpha_pattern": {"q_proj": 2.0},
    },
    "rslora": {
        "r": 5,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [1],
    },
}
WEIGHTS = {"wide": 0.75, "patterns": -0.5, "rslora": 1.3}


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """PEFT's model with all adapters, trained at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, *others = CONFIGS
        model = get_peft_model(tiny_llama(BASE), LoraConfig(**CONFIGS[first]), adapter_name=first)
        for name in others:
            model.add_adapter(name, LoraConfig(**CONFIGS[name]))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def folders(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=False)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def exact(model: PeftModel, folders: dict[str, Path]) -> PeftModel:
    """The same model in float64, once the files are written."""
    return model.double()


def by_peft(
    model: PeftModel, combination: str, weights: dict[str, float], **options: Any
) -> Deltas:
    """What PEFT's own blend changes. Modules where nobody has anything are left out."""
    if "svd_rank" in options:
        options["svd_full_matrices"] = False  # which fails above a module's smaller side
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # density 1 prunes nothing, PEFT says
        model.base_model.add_weighted_adapter(
            list(weights), list(weights.values()), "mix", combination, **options
        )
        found = deltas_of(model, "mix")
        model.delete_adapter("mix")
    return found


def deltas_of(model: PeftModel, name: str) -> Deltas:
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            layer, _, leaf = path.split(".layers.")[1].split(".")
            found[int(layer), leaf] = module.get_delta_weight(name).detach().numpy()
    return found


def chosen(folders: dict[str, Path], weights: dict[str, float]) -> list[tuple[Path, float]]:
    return [(folders[name], weight) for name, weight in weights.items()]


def test_a_soup_is_the_exact_sum(
    exact: PeftModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    done = blend(tmp_path, chosen(folders, WEIGHTS), BASE, method="soup")
    got = deltas(tmp_path, BASE)
    assert differ(got, by_peft(exact, "cat", WEIGHTS)) < 1e-6
    one_by_one = {
        at: sum(
            weight * change[at]
            for name, weight in WEIGHTS.items()
            if at in (change := deltas(folders[name], BASE))
        )
        for at in got
    }
    assert differ(got, one_by_one) < 1e-6
    assert done.report == {}, "nothing is lost"
    config = json.loads(done.config)
    assert config["r"] == config["lora_alpha"] == 3, "most modules have only one source"
    assert config["rank_pattern"]["model.layers.1.self_attn.q_proj"] == 3 + 4 + 5
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["target_modules"] == sorted(MODULES)


@pytest.mark.parametrize("rank", [1, 6, 11])
def test_a_soup_of_a_rank_is_the_best_of_that_rank(
    exact: PeftModel, folders: dict[str, Path], tmp_path: Path, rank: int
) -> None:
    done = blend(tmp_path, chosen(folders, WEIGHTS), BASE, method="soup", rank=rank)
    got, whole = deltas(tmp_path, BASE), by_peft(exact, "cat", WEIGHTS)
    assert differ(got, by_peft(exact, "svd", WEIGHTS, svd_rank=rank)) < 1e-5
    shares = {at: float((got[at] ** 2).sum() / (whole[at] ** 2).sum()) for at in whole}
    layer, module = worst = min(shares, key=lambda at: shares[at])
    kept = sum(float((d**2).sum()) for d in got.values())
    assert done.report["kept"] == pytest.approx(
        kept / sum(float((d**2).sum()) for d in whole.values()), rel=1e-5
    )
    assert done.report["worst"]["module"].startswith(f"layers.{layer}.")
    assert done.report["worst"]["module"].endswith(module)
    assert done.report["worst"]["kept"] == pytest.approx(shares[worst], rel=1e-5)
    assert 0 < done.report["worst"]["kept"] < done.report["kept"] < 1


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.07])
def test_ties_are_pefts(
    exact: PeftModel, folders: dict[str, Path], tmp_path: Path, density: float, sign: str
) -> None:
    recipe = {"density": density, "majority_sign_method": sign}
    done = blend(tmp_path, chosen(folders, WEIGHTS), BASE, method="ties", rank=32, **recipe)
    full = by_peft(exact, "ties_svd", WEIGHTS, svd_rank=32, **recipe)
    # Of the smaller side's rank nothing is cut off: every value can be told from its neighbour's.
    assert differ(deltas(tmp_path, BASE), full) < 1e-5
    assert done.report["kept"] == pytest.approx(1, abs=1e-9)
    low = tmp_path / "low"
    low.mkdir()
    done = blend(low, chosen(folders, WEIGHTS), BASE, method="ties", rank=2, **recipe)
    got = deltas(low, BASE)
    assert differ(got, by_peft(exact, "ties_svd", WEIGHTS, svd_rank=2, **recipe)) < 1e-4
    norms = [sum(float((d**2).sum()) for d in found.values()) for found in (got, full)]
    assert done.report["kept"] == pytest.approx(norms[0] / norms[1], rel=1e-5)


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_dare_is_pefts_with_our_draws(
    exact: PeftModel,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    """PEFT prunes module after module and adapter after adapter: it is told what to keep."""
    modules = [(layer, module) for layer in range(BASE.num_layers) for module in MODULES]
    held = {name: deltas(folders[name], BASE) for name in WEIGHTS}
    keys = [
        (7, layer, MODULES.index(module), number)
        for layer, module in modules
        for number, name in enumerate(WEIGHTS)
        if (layer, module) in held[name]
    ]
    order = iter(keys)

    def prune(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        ones = np.ones(tuple(tensor.shape), np.float32)
        stays = _keep_some(ones, density, next(order)) > 0
        return tensor * torch.from_numpy(stays) / density

    monkeypatch.setattr(merge_utils, "random_pruning", prune)
    recipe = {"rank": 32, "density": 0.4, "seed": 7}
    blend(tmp_path, chosen(folders, WEIGHTS), BASE, method=method, **recipe)
    want = by_peft(exact, f"{method}_svd", WEIGHTS, svd_rank=32, density=0.4)
    assert next(order, None) is None
    assert differ(deltas(tmp_path, BASE), want) < 1e-5


def test_dare_keeps_the_share_it_says_and_the_mean() -> None:
    """By the binomial's own deviation; the controls are a mask too thin and one not divided."""
    size, density = 1 << 18, 0.3
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32) + 1

    def deviations(got: Any) -> tuple[float, float]:
        share = (np.count_nonzero(got) / size - density) / (density * (1 - density) / size) ** 0.5
        noise = float((values.astype(np.float64) ** 2).sum() * (1 - density) / density) ** 0.5
        return abs(share), abs(float(got.sum(dtype=np.float64) - values.sum())) / noise

    for seed in range(4):
        kept = _keep_some(values.copy(), density, (seed, 1, 2, 3))
        assert max(deviations(kept)) < 4
        stays = kept != 0
        np.testing.assert_allclose(kept[stays], values[stays] / density, rtol=1e-6)
        assert deviations(kept * density)[1] > 100
        thin = kept * (np.arange(size) % 20 > 0)
        assert min(deviations(thin)) > 4
        # Neighbours are drawn apart from each other, and so are blocks.
        both = np.count_nonzero(stays[1:] & stays[:-1]) / size
        assert both == pytest.approx(density**2, rel=0.03)
    odd = _keep_some(np.ones((1, 7), np.float32), 0.5, (1, 0, 0, 0))
    assert set(odd.reshape(-1).tolist()) <= {0.0, 2.0}
    assert _keep_some(np.ones(5, np.float32), 1 - 1e-12, (1, 0, 0, 0)).all()


def test_the_largest_stay_and_of_equal_ones_the_first() -> None:
    change = np.array([[1, -3, 2], [2, -2, 0]], np.float32)
    got = _keep_largest(change.copy(), 0.5)
    assert got.tolist() == [[0, -3, 2], [2, 0, 0]]
    assert not _keep_largest(change.copy(), 0.1).any()
    assert _keep_largest(np.zeros((2, 2), np.float32), 0.5).tolist() == [[0, 0], [0, 0]]


def test_layers_are_scaled_in_a_line(folders: dict[str, Path], tmp_path: Path) -> None:
    blend(tmp_path, [(folders["patterns"], 1.0)], BASE, method="scale_layers", alpha=0.5, beta=-1.0)
    before = deltas(folders["patterns"], BASE)
    want = {at: change * [0.5, 0.0, -0.5][at[0]] for at, change in before.items()}
    got = deltas(tmp_path, BASE)
    assert got.keys() == want.keys()
    assert all(np.abs(got[at] - want[at]).max() < 1e-6 for at in want)
    assert got[0, "q_proj"].any() and not got[1, "q_proj"].any()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_block_and_what_is_outside_of_blocks_are_scaled_by_alpha(
    tmp_path: Path, layers: int
) -> None:
    base = base_description(layers=layers)
    base = type(base)(**{f: getattr(base, f) for f in base.__struct_fields__} | {"vocab_size": 40})
    tensors = make_tensors(base, modules=("q_proj",))
    rng = np.random.default_rng(3)
    for name, shape in {
        "model.embed_tokens.lora_embedding_A": (4, 40),
        "model.embed_tokens.lora_embedding_B": (32, 4),
        "lm_head.lora_A.weight": (4, 32),
        "lm_head.lora_B.weight": (40, 4),
    }.items():
        tensors[f"base_model.model.{name}"] = rng.standard_normal(shape).astype("<f4")
    targets = ["q_proj", "embed_tokens", "lm_head"]
    source = tmp_path / "source"
    write_adapter(source, make_config(target_modules=targets), tensors)
    done = blend(tmp_path, [(source, 1.0)], base, method="scale_layers", alpha=0.25, beta=8.0)
    before, after = deltas(source, base), deltas(tmp_path, base)
    assert len(before) == 2 + layers
    scales = {at: 8.25 if at == (1, "q_proj") else 0.25 for at in before}
    assert differ(after, {at: scales[at] * change for at, change in before.items()}) < 1e-6
    assert json.loads(done.config)["target_modules"] == ["embed_tokens", "lm_head", "q_proj"]
    thin = tmp_path / "thin"
    thin.mkdir()
    blend(thin, [(source, 1.0), (source, -3.0)], base, method="ties", rank=40, density=1.0)
    # Twice the same signs: the average of the two weights.
    assert differ(deltas(thin, base), {at: -1 * change for at, change in before.items()}) < 1e-5


@pytest.mark.parametrize("rank", [7, 12, 64])
def test_compressed_to_its_own_rank_it_stays_as_it_was(
    folders: dict[str, Path], tmp_path: Path, rank: int
) -> None:
    done = blend(tmp_path, [(folders["patterns"], 1.0)], BASE, method="compress", rank=rank)
    assert differ(deltas(tmp_path, BASE), deltas(folders["patterns"], BASE)) < 1e-6
    assert done.report["kept"] == done.report["worst"]["kept"] == 1
    assert json.loads(done.config)["r"] < 12, "and no rank grew"


def test_compressed_it_is_the_best_of_that_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    done = blend(tmp_path, [(folders["patterns"], 1.0)], BASE, method="compress", rank=2)
    before, after = deltas(folders["patterns"], BASE), deltas(tmp_path, BASE)
    kept = whole = 0.0
    for at, change in before.items():
        u, s, vh = np.linalg.svd(change, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        assert np.abs(after[at] - best).max() < 1e-5 * np.abs(best).max()
        kept, whole = kept + (s[:2] ** 2).sum(), whole + (s**2).sum()
    assert done.report["kept"] == pytest.approx(kept / whole, rel=1e-6)


RECIPES: list[dict[str, Any]] = [
    {"method": "soup"},
    {"method": "soup", "rank": 3},
    {"method": "ties", "rank": 5, "density": 0.3},
    {"method": "dare_ties", "rank": 5, "density": 0.3, "seed": 1},
    {"method": "dare_linear", "rank": 5, "density": 0.3, "seed": 1},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, r.values())))
def test_the_same_recipe_gives_the_same_bytes(
    folders: dict[str, Path], tmp_path: Path, recipe: dict[str, Any]
) -> None:
    job = blend_job(tmp_path, chosen(folders, WEIGHTS), BASE, **recipe)
    first, again = run(job, tmp_path), run(job, tmp_path)
    assert not first.problems
    assert (first.digest, first.config) == (again.digest, again.config)
    if "seed" in recipe:
        other = run(
            blend_job(tmp_path, chosen(folders, WEIGHTS), BASE, **{**recipe, "seed": 2}), tmp_path
        )
        assert other.digest != first.digest and other.config == first.config


def test_peft_reads_what_a_blend_wrote(
    exact: PeftModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    blend(tmp_path, chosen(folders, WEIGHTS), BASE, method="soup")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny_llama(BASE), str(tmp_path), adapter_name="x")
    assert differ(deltas_of(loaded, "x"), deltas(tmp_path, BASE)) < 1e-5
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).r == 3


def test_only_pairs_are_blended(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = make_tensors(BASE)
    for name, values in list(tensors.items()):
        if ".lora_B." in name:
            tensors[name.replace("lora_B.weight", "lora_B.bias")] = values[:, 0].copy()
    config = make_config(lora_bias=True, target_modules=["q_proj", "v_proj"])
    for name in ("biased", "shifted"):
        write_adapter(tmp_path / name, config, tensors)
    sources = [(tmp_path / "biased", 1.0), (folders["wide"], 1.0), (tmp_path / "shifted", 1.0)]
    for recipe in [{"method": "soup"}, {"method": "ties", "rank": 4, "density": 0.5}]:
        done = run(blend_job(tmp_path, sources, BASE, **recipe), tmp_path)
        assert [problem.split()[0] for problem in done.problems] == ["biased", "shifted"]
        assert all("trained biases" in problem for problem in done.problems)
        assert done.code == "adapter_invalid" and not done.digest


def test_modules_in_some_layers_are_named_in_full(folders: dict[str, Path], tmp_path: Path) -> None:
    """The importer takes a config at its word: what it targets has to be in the file."""
    done = blend(tmp_path, [(folders["rslora"], -0.1)], BASE, method="soup")
    want = {at: -0.1 * change for at, change in deltas(folders["rslora"], BASE).items()}
    assert differ(deltas(tmp_path, BASE), want) < 1e-6
    assert json.loads(done.config)["target_modules"] == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_sources_that_change_nothing() -> None:
    adapter = CanonicalAdapter("float32", ())
    with pytest.raises(AdapterInvalid, match="none of the sources"):
        Blend([Source("idle@1", adapter, 1.0)], BlendRecipe(method="soup"), BASE)


def test_token_rows_are_no_pairs() -> None:
    rows = Computed((1, 32), lambda: np.zeros((1, 32), np.float32))
    tokens = TokenRows("lm_head", np.array([3], np.int32), rows)
    adapter = CanonicalAdapter("float32", (), tokens=(tokens,))
    with pytest.raises(AdapterInvalid, match=r"^tokens@2 is more .* token rows"):
        Blend([Source("tokens@2", adapter, 1.0)], BlendRecipe(method="soup"), BASE)


def test_ranks_that_add_up_to_too_many(folders: dict[str, Path], tmp_path: Path) -> None:
    base = base_description(max_rank=11)
    job = blend_job(tmp_path, chosen(folders, WEIGHTS), base, method="soup")
    done = run(job, tmp_path)
    assert done.code == "rank_too_large"
    (problem,) = done.problems
    assert "layers.1.self_attn.q_proj would have rank 12" in problem
    assert "up to 11" in problem and "with a rank" in problem
    assert not run(
        blend_job(tmp_path, chosen(folders, WEIGHTS), base, method="soup", rank=11), tmp_path
    ).problems
    wide = tmp_path / "wide64"
    write_adapter(wide, make_config(r=11), make_tensors(base, rank=11))
    recipe = {"rank": 12, "density": 0.5}
    done = run(blend_job(tmp_path, [(wide, 1.0)], base, method="ties", **recipe), tmp_path)
    assert done.code == "rank_too_large" and "with a rank" not in done.problems[0]


def test_a_source_that_is_no_longer_good_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    job = blend_job(tmp_path, chosen(folders, WEIGHTS), BASE, method="soup")
    path = BlobStore(tmp_path).path(job.sources[1].weights_digest)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = run(job, tmp_path)
    assert done.problems[0].startswith("patterns: ")
    assert done.code == "blob_corrupt"


def test_a_result_over_the_limit_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    job = blend_job(tmp_path, chosen(folders, WEIGHTS), BASE, limit_bytes=9000, method="soup")
    before = set(BlobStore(tmp_path).digests())
    done = run(job, tmp_path)
    assert done.code == "payload_too_large"
    assert set(BlobStore(tmp_path).digests()) == before
    assert not list(BlobStore(tmp_path).temporary_dir.iterdir())


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_memory_does_not_grow_with_the_sources(tmp_path: Path, traced: None, method: str) -> None:
    """Of whole changes a handful, one module at a time; numpy tells tracemalloc of its memory."""
    base: BaseDescription = base_description(hidden=32, inter=48, heads=128, layers=2)
    matrix = 4 * 32 * 1024
    peaks = []
    for num in (2, 9):
        sources = []
        for number in range(num):
            folder = tmp_path / f"{num}-{number}"
            tensors = make_tensors(base, modules=("q_proj", "o_proj"), seed=number)
            write_adapter(folder, make_config(target_modules=["q_proj", "o_proj"]), tensors)
            sources.append((folder, 1.0))
        job = blend_job(tmp_path, sources, base, method=method, rank=4, density=0.5)
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        assert not run(job, tmp_path).problems
        peaks.append((tracemalloc.get_traced_memory()[1] - start) / matrix)
    few, many = peaks
    assert many < 1.5 * few and many < 20, peaks
