"""The sampler against a row-by-row rendering of the parameters in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.errors import InvalidRequest
from loramux.request import SamplingParams
from loramux.sampling.sampler import Sampler
from loramux_kernels.sampling import DrawParams, reference, stream_key

torch.set_num_threads(1)

f32 = np.float32
Request = tuple[SamplingParams, list[int], list[int]]


def processed(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> torch.Tensor:
    """One row [V] after logit_bias, min_tokens and the penalties, in vLLM's meaning of each."""
    row = logits.numpy().copy()
    for token, bias in params.logit_bias.items():
        row[token] += f32(bias)
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids:
            row[token] = -math.inf
    for token in {*prompt, *output}:
        penalty = f32(params.repetition_penalty)
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in set(output):
        row[token] -= f32(params.frequency_penalty) * f32(output.count(token))
        row[token] -= f32(params.presence_penalty)
    return torch.from_numpy(row)


def expected_token(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int]
) -> int:
    how = DrawParams(
        temperature=np.array([params.temperature]),
        log_min_p=np.array([math.log(params.min_p) if params.min_p else -math.inf]),
        top_k=np.array([params.top_k]),
        top_p=np.array([params.top_p]),
        key=np.array([stream_key(params.seed, params.choice)], np.uint64),
    )
    row = processed(logits, params, prompt, output)
    return int(reference.draw(row[None], how, np.array([len(output)]))[0][0])


def requests(vocab_size: int) -> st.SearchStrategy[list[Request]]:
    token = st.integers(0, vocab_size - 1)
    ids = st.lists(token, max_size=12)
    params = st.builds(
        SamplingParams,
        seed=st.integers(-(2**63), 2**63 - 1),
        choice=st.integers(0, 3),
        temperature=st.sampled_from([0.0, 0.5, 1.0]),
        top_k=st.sampled_from([0, 1, 3]),
        top_p=st.sampled_from([1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.1]),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -1.5]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, -2.0]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.6]),
        logit_bias=st.dictionaries(token, st.sampled_from([-100.0, 100.0, 0.5, -0.25]), max_size=3),
        min_tokens=st.sampled_from([0, 0, 1, 8]),
        stop_token_ids=st.lists(token, max_size=3).map(tuple),
    )
    return st.lists(st.tuples(params, ids, ids), min_size=1, max_size=6)


@given(data=st.data(), vocab_size=st.sampled_from([1, 5, 131]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_batches_equal_rows_alone(data: st.DataObject, vocab_size: int, seed: int) -> None:
    # Over 10 s only where the kernels are not in numba's cache yet: they compile here.
    batch = data.draw(requests(vocab_size))
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(vocab_size, "cpu")
    outputs = {}
    for i, (params, prompt, output) in enumerate(batch):
        sampler.add(str(i), params, prompt, output)
        outputs[str(i)] = list(output)
    for _ in range(3):
        logits = torch.randn(len(batch), vocab_size, generator=generator).mul_(4).round_()
        before = logits.clone()
        order = torch.randperm(len(batch), generator=generator).tolist()
        rows = [(str(i), len(outputs[str(i)])) for i in order]
        result = sampler.sample(logits, rows)
        assert torch.equal(logits, before)
        for row, i in enumerate(order):
            params, prompt, _ = batch[i]
            output = outputs[str(i)]
            assert result.bad[row] == (
                not processed(logits[row], params, prompt, output).isfinite().any()
            )
            assert result.token_ids[row] == expected_token(logits[row], params, prompt, output)
            drawn = max(int(result.token_ids[row]), 0)
            sampler.commit(str(i), [drawn])
            output.append(drawn)


def greedy(**fields: object) -> SamplingParams:
    return SamplingParams(**{"seed": 0, "temperature": 0.0} | fields)  # type: ignore[arg-type]


def draw_one(sampler: Sampler, logits: torch.Tensor, position: int = 0) -> int:
    return int(sampler.sample(logits, [("r", position)]).token_ids[0])


def test_logits_of_an_inference_mode_are_edited_too() -> None:
    sampler = Sampler(5, "cpu")
    sampler.add("r", greedy(logit_bias={3: 1.0}), [], [])
    with torch.inference_mode():
        logits = torch.zeros(1, 5)
    assert draw_one(sampler, logits) == 3


def test_min_tokens_masks_stop_tokens_until_they_are_reached() -> None:
    sampler = Sampler(5, "cpu")
    sampler.add("r", greedy(min_tokens=2, stop_token_ids=(4, 3, 99)), [], [])
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    assert [draw_one(sampler, logits, position) for position in range(4)] == [2, 2, 4, 4]


def test_a_request_may_have_several_rows() -> None:
    sampler = Sampler(64, "cpu")
    sampler.add("r", SamplingParams(seed=3, min_tokens=3, stop_token_ids=(1,)), [], [])
    sampler.add("s", SamplingParams(seed=4), [], [])
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rows = [("r", 0), ("r", 1), ("s", 7), ("r", 2), ("r", 9)]
    together = sampler.sample(logits, rows).token_ids.tolist()
    alone = [
        sampler.sample(logits[i : i + 1], [row]).token_ids[0].item() for i, row in enumerate(rows)
    ]
    assert together == alone


def test_state_is_rebuilt_from_the_ids() -> None:
    params = SamplingParams(seed=1, repetition_penalty=1.4, frequency_penalty=0.5)
    prompt, output = [1, 2, 3, 3], [4, 4, 2, 9]
    lived, restored = Sampler(20, "cpu"), Sampler(20, "cpu")
    lived.add("r", params, prompt, [])
    for token in output:
        lived.commit("r", [token])
    restored.add("r", params, prompt, output)
    for seed in range(20):
        logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)) * 3
        assert draw_one(lived, logits, 4) == draw_one(restored, logits, 4)


def test_an_id_used_again_gets_its_new_parameters() -> None:
    sampler = Sampler(5, "cpu")
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    sampler.add("r", greedy(logit_bias={0: 100.0}), [], [])
    assert draw_one(sampler, logits) == 0
    sampler.remove("r")
    sampler.add("r", greedy(logit_bias={1: 100.0}), [], [])
    assert draw_one(sampler, logits) == 1


def test_parameters_of_an_unchanged_batch_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from loramux.sampling import sampler as module

    built = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args: built.append(1) or build(*args))
    sampler = Sampler(8, "cpu")
    for name in "ab":
        sampler.add(name, greedy(), [], [])
    for step in range(3):
        sampler.sample(torch.zeros(2, 8), [("a", step), ("b", step)])
    sampler.sample(torch.zeros(1, 8), [("b", 3)])
    assert len(built) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params",
    [
        greedy(),
        greedy(min_tokens=3, stop_token_ids=(4,)),
        greedy(repetition_penalty=2.0),
        greedy(logit_bias={4: -100.0}),
    ],
    ids=["plain", "masked", "penalized", "biased"],
)
def test_no_processor_hides_a_broken_row(value: float, params: SamplingParams) -> None:
    sampler = Sampler(5, "cpu")
    sampler.add("r", params, [4], [])
    sampler.add("s", greedy(logprobs=1), [], [])
    logits = torch.zeros(2, 5)
    logits[0, 4] = value
    result = sampler.sample(logits, [("r", 0), ("s", 0)])
    assert result.bad.tolist() == [True, False]
    assert result.token_ids.tolist() == [-1, 0]
    assert logits[0, 4].isnan() if math.isnan(value) else logits[0, 4] == value


def test_forbidding_every_token_is_reported() -> None:
    sampler = Sampler(5, "cpu")
    sampler.add("r", greedy(logit_bias=dict.fromkeys(range(5), -math.inf), logprobs=2), [], [])
    result = sampler.sample(torch.zeros(1, 5), [("r", 0)])
    assert (result.bad.tolist(), result.token_ids.tolist()) == ([True], [-1])
    assert result.logprobs == [None]


def test_logprobs_are_of_the_raw_logits() -> None:
    sampler = Sampler(6, "cpu")
    sampler.add("a", greedy(logit_bias={5: 100.0}, logprobs=2), [], [])
    sampler.add("b", greedy(), [], [])
    sampler.add("c", SamplingParams(seed=0, top_k=1, temperature=0.1, logprobs=0), [], [])
    logits = torch.tensor([[3.0, 1.0, 3.0, 0.0, 0.0, -1.0]]).repeat(3, 1)
    first, second, third = sampler.sample(logits, [("a", 0), ("b", 0), ("c", 0)]).logprobs
    table = logits[0].double().log_softmax(0).tolist()
    assert first is not None and second is None and third is not None
    assert (first.token_id, first.rank) == (5, 6)
    assert first.logprob == pytest.approx(table[5], rel=1e-12)
    assert [token for token, _ in first.top] == [0, 2]
    assert [value for _, value in first.top] == pytest.approx([table[0], table[2]], rel=1e-12)
    assert (third.token_id, third.rank, third.top) == (0, 1, [])


@pytest.mark.parametrize("token", [-1, 5])
def test_ids_outside_the_vocabulary_are_named(token: int) -> None:
    sampler = Sampler(5, "cpu")
    with pytest.raises(InvalidRequest, match=f"logit_bias: token id {token}") as caught:
        sampler.add("r", greedy(logit_bias={token: 1.0}), [], [])
    assert caught.value.param == "logit_bias"
    with pytest.raises(InvalidRequest, match=f"prompt: token id {token}"):
        sampler.add("r", greedy(repetition_penalty=1.1), [0, token], [])
    sampler.add("r", greedy(), [0, token], [])


def test_warm_up_leaves_nothing_behind() -> None:
    sampler = Sampler(300, "cpu")
    sampler.warm_up()
    assert sampler.sample(torch.empty(0, 300), []).token_ids.shape == (0,)


def test_entropies_are_of_what_the_model_made_and_only_for_who_asked() -> None:
    logits = torch.randn(4, 131, generator=torch.Generator().manual_seed(3)) * 2
    sampler = Sampler(131, "cpu")
    changed = SamplingParams(seed=1, temperature=0.1, logit_bias={7: 50.0}, top_k=2)
    sampler.add("plain", changed, [1], [])
    sampler.add("watched", changed, [1], [], watched=True)
    sampler.add("greedy", SamplingParams(seed=0, temperature=0.0), [1], [], watched=True)
    assert sampler.sample(logits[:1].clone(), [("plain", 0)]).entropies is None
    rows = [("watched", 0), ("plain", 0), ("watched", 1), ("greedy", 0)]
    told = sampler.sample(logits.clone(), rows, {2: [9]}).entropies
    expected = reference.entropy_bits(logits).tolist()
    assert told is not None and math.isnan(told[1])
    assert [told[0], *told[2:]] == pytest.approx([expected[0], *expected[2:]], rel=1e-12)
