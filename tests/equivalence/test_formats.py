"""Every format as PEFT, or its change merged into the base, answers: alone, and mixed with all the
others in one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests import formats, tiny
from tests.equivalence.test_oracle import Excuses, prompts
from tests.harness import Harness, install_adapter

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import Computed
from loramux.adapters.formats import residual, s2ft
from loramux.adapters.formats.upload import Module, Upload, values_of
from loramux.wire import MODULES

CLOSE = 2e-4
"""Log-probabilities are of size 6; float32 sums in another order differ by 2e-5."""
ARCHS: tuple[tiny.Arch, ...] = ("llama", "qwen2", "llama_mha_tied")


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> tiny.Arch:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(arch: tiny.Arch, checkpoints: Callable[[tiny.Arch], Path]) -> Path:
    return checkpoints(arch)


@pytest.fixture(scope="module")
def adapters(
    arch: tiny.Arch, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(f"formats-{arch}")
    return {
        name: formats.write(folder / name, model, name, seed=seed)
        for seed, name in enumerate(formats.FORMATS)
    }


# Ten seconds and more: PEFT loads and runs each of some forty adapters, one after the other.
def test_all_formats_in_one_batch_answer_as_peft_and_as_alone(
    model: Path, adapters: dict[str, Path]
) -> None:
    harness = Harness(model, max_num_seqs=32, num_frames=1500)
    prompt = prompts(1, seed=5)[0]
    base = harness.generate(prompt, max_tokens=16)
    mixed = {harness.submit(prompt, path, max_tokens=16): name for name, path in adapters.items()}
    outputs = harness.run()
    excuses = Excuses()
    for request_id, name in mixed.items():
        assert request_id in harness.finished, (name, harness.failed.get(request_id))
        excuses.compare(outputs[request_id], *tiny.greedy(model, prompt, 16, adapters[name]))
        alone = harness.generate(prompt, adapters[name], max_tokens=16, tenant="nothing cached")
        assert alone == outputs[request_id], name
    excuses.check()
    same = [name for request_id, name in mixed.items() if outputs[request_id] == base]
    assert not same, "too weak to tell from the base"
    harness.close()


def differences(model: Path, adapters: dict[str, Path]) -> dict[str, float]:
    """How far any log-probability of a prompt is from PEFT's, format by format, in one batch."""
    harness = Harness(model, max_num_seqs=32, num_frames=1500)
    prompt = prompts(1, seed=6)[0][:20] + [7, 5, 319, 40, 7]
    asked = {
        harness.submit(prompt, path, max_tokens=1, prompt_logprobs=0): name
        for name, path in adapters.items()
    }
    harness.run()
    found = {}
    for request_id, name in asked.items():
        (first,) = [o for o in harness.details[request_id] if o.prompt_logprobs]
        got = torch.tensor([p.logprob for p in first.prompt_logprobs[1:] if p])  # type: ignore[index]
        logits = tiny.logits(model, prompt, adapters[name]).log_softmax(-1)
        want = logits[torch.arange(len(prompt) - 1), prompt[1:]]
        found[name] = float((got - want).abs().max())
    harness.close()
    return found


def test_log_probabilities_of_a_prompt_are_pefts(model: Path, adapters: dict[str, Path]) -> None:
    """Closer than ids can tell: a bias forgotten, a gain off by a little."""
    far = {name: far for name, far in differences(model, adapters).items() if far > CLOSE}
    assert not far


Change = Callable[..., Any]


def scale_dropped(add: Change) -> Change:
    return lambda self, at, scale, *rest: add(self, at, 1.0, *rest)


def one_layer_skipped(add: Change) -> Change:
    return lambda self, at, *rest: None if at[0] == 1 else add(self, at, *rest)


def gain_dropped(add: Change) -> Change:
    return lambda self, at, kind, v: None if kind == "gain" else add(self, at, kind, v)


def shift_dropped(add: Change) -> Change:
    return lambda self, at, kind, v: None if kind == "shift" else add(self, at, kind, v)


def bias_scaled_too(add: Change) -> Change:
    def broken(self: Upload, at: Module, kind: str, values: Float32) -> None:
        add(self, at, kind, values)
        if kind == "gain" and at[1] in MODULES and (own := self.weights.bias(*at)) is not None:
            add(self, at, "shift", values * own)

    return broken


def bias_forgotten(add: Change) -> Change:
    return shift_dropped(add)


def base_taken_as_it_is(factors: Change) -> Change:
    return lambda upload, at, init, scale, a, b: (a, b)


def taken_out_unscaled(factors: Change) -> Change:
    return lambda upload, at, init, scale, a, b: factors(upload, at, init, 1.0, a, b)


def scaled_when_taken_out(factors: Change) -> Change:
    return lambda upload, at, init, scale, a, b: factors(upload, at, "pissa", scale, a, b)


def r_dropped(add: Change) -> Change:
    return lambda self, at, scale, a, b, r: add(self, at, scale, a, b)


def r_transposed(add: Change) -> Change:
    def broken(self: Upload, at: Module, scale: float, a: Any, b: Any, r: Any) -> None:
        add(self, at, scale, a, b, Computed(r.shape, lambda: values_of(r).T))

    return broken


def next_channel(one_hot: Change) -> Change:
    return lambda channels, width: one_hot([(i + 1) % width for i in channels], width)


def sides_swapped(add: Change) -> Change:
    """Where the weight is square; elsewhere the shapes would tell."""

    def broken(self: Upload, at: Module, scale: float, a: Any, b: Any, _: None = None) -> None:
        if a.shape[1] != b.shape[0]:
            return add(self, at, scale, a, b)
        turned = [Computed(m.shape[::-1], lambda m=m: values_of(m).T) for m in (b, a)]
        return add(self, at, scale, *turned)

    return broken


PISSA, OLORA = ["pissa", "pissa_patterns", "pissa_dora"], ["olora", "olora_embeddings"]
XS = ["lora_xs", "lora_xs_joined"]
FAULTS: list[tuple[Any, str, Callable[[Change], Change], list[str]]] = [
    (Upload, "add_pair", scale_dropped, ["lora", "rslora", "patterns", "adalora", "head"]),
    (Upload, "add_pair", one_layer_skipped, ["lora", "dora", "vera", "miss", "adalora"]),
    (Upload, "add_vector", one_layer_skipped, ["dora", "ia3", "ia3_outputs", "saved_norms"]),
    (Upload, "add_vector", gain_dropped, ["dora", "dora_head", "ia3", "saved_norms"]),
    (Upload, "add_vector", shift_dropped, ["lora_bias"]),
    (Upload, "add_vector", bias_scaled_too, ["dora", "dora_bias_all"]),
    (Upload, "add_vector", bias_forgotten, ["adalora_bias", "vera_bias", "miss_bias"]),
    (Upload, "add_pair", scale_dropped, [*PISSA, *OLORA, *XS]),
    (Upload, "add_pair", one_layer_skipped, [*PISSA, *OLORA, *XS, "s2ft"]),
    (residual, "factors", base_taken_as_it_is, [*PISSA, *OLORA]),
    (residual, "factors", taken_out_unscaled, PISSA),
    (residual, "factors", scaled_when_taken_out, OLORA),
    (Upload, "add_pair", r_dropped, XS),
    (Upload, "add_pair", r_transposed, XS),
    (s2ft, "_one_hot", next_channel, ["s2ft"]),
    (Upload, "add_pair", sides_swapped, ["s2ft"]),
]
NEED_BIASES = (bias_scaled_too, bias_forgotten)


@pytest.mark.parametrize(
    ("owner", "where", "fault", "shown"), FAULTS, ids=lambda f: getattr(f, "__name__", None)
)
def test_a_broken_importer_is_caught(
    owner: Any,
    where: str,
    fault: Callable[[Change], Change],
    shown: list[str],
    model: Path,
    arch: tiny.Arch,
    adapters: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault in NEED_BIASES and arch != "qwen2":
        pytest.skip("the base has no biases")
    monkeypatch.setattr(owner, where, fault(getattr(owner, where)))
    found = differences(model, {name: adapters[name] for name in shown})
    assert all(far > 20 * CLOSE for far in found.values()), found


def test_several_adapters_at_once_are_pefts_weighted_sum(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Mixed into one adapter by PEFT (``cat``: exact), entries of one work list here."""
    names, weights = ["lora", "rslora", "patterns"], [0.5, -0.75, 1.5]
    folder = formats.write_sum(
        tmp_path / "sum", model, {name: adapters[name] for name in names}, weights
    )
    harness = Harness(model)
    prompt = prompts(1, seed=8)[0]
    chosen = [(adapters[name], weight) for name, weight in zip(names, weights, strict=True)]
    together = harness.submit(prompt, chosen, max_tokens=16)
    first = harness.submit(prompt, chosen[:1], max_tokens=16)
    outputs = harness.run()
    excuses = Excuses()
    excuses.compare(outputs[together], *tiny.greedy(model, prompt, 16, folder))
    excuses.check()
    assert outputs[together] != outputs[first]
    harness.close()


def test_a_scale_multiplies_the_whole_change(model: Path, adapters: dict[str, Path]) -> None:
    """Of a gain, a shift, an input gain as of a pair: nothing of it is left at zero."""
    harness = Harness(model, max_num_seqs=32, num_frames=1500)
    prompt = prompts(1, seed=9)[0]
    base = harness.generate(prompt, max_tokens=12)
    off = {harness.submit(prompt, [(path, 0.0)], max_tokens=12): n for n, path in adapters.items()}
    half = {harness.submit(prompt, [(path, 0.5)], max_tokens=12): n for n, path in adapters.items()}
    full = {harness.submit(prompt, [(path, 1.0)], max_tokens=12): n for n, path in adapters.items()}
    outputs = harness.run()
    assert all(outputs[request_id] == base for request_id in off)
    between = [outputs[h] not in (base, outputs[f]) for h, f in zip(half, full, strict=True)]
    assert sum(between) > len(between) / 2, "half a change looks like none or all of it"
    harness.close()


def test_whole_embeddings_may_take_a_quarter_of_the_pool(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    harness = Harness(model)
    base = msgspec.structs.replace(harness.ready.base, pool_bytes=4 * 50_000)
    harness.close()
    with pytest.raises(
        AssertionError, match=r"takes \d+ bytes .* up to 50000 \(--max-adapter-bytes"
    ):
        install_adapter(adapters["saved_head"], tmp_path, base)
    install_adapter(adapters["lora"], tmp_path, base)
    small = msgspec.structs.replace(base, max_adapter_bytes=4096)
    with pytest.raises(AssertionError, match="up to 4096"):
        install_adapter(adapters["lora"], tmp_path / "small", small)
