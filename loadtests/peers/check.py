"""Whether a peer serves the adapter it was asked for: its greedy tokens beside PEFT's.

All adapters and the base are asked at once, a few tokens each, so that a peer whose places for
adapters run out is seen doing so. Those of ``CHECKED`` and the base are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cases import Job, make_jobs
from peer import Models, Peer

CHECKED = (3, 31)
NUM_PROMPT, NUM_NEW = 16, 8


@dataclass(frozen=True)
class Expected:
    """Greedy tokens, and at each the distance of the best two logits."""

    tokens: list[int]
    gaps: list[float]


class WrongAnswer(RuntimeError):
    """The peer serves something else than it was asked for."""


class Check:
    """What PEFT says, computed once for a mix; then any number of peers."""

    def __init__(self, models: Models) -> None:
        num = len(models.adapters)
        jobs = [
            replace(job, prompt=job.prompt[:NUM_PROMPT], num_new=NUM_NEW)
            for job in make_jobs(range(num + 2), seed=99)
        ]
        # Two for the base, the last at the very end: behind everybody.
        self.jobs = [replace(j, adapter=i - 1) for i, j in enumerate(jobs[:-1])]
        self.jobs.append(replace(jobs[-1], adapter=-1))
        self.expected = _ask_peft(
            models, [job for job in self.jobs if job.adapter in (-1, *CHECKED)]
        )

    def run(self, peer: Peer, tie: float) -> dict[str, Any]:
        """How many tokens agreed; raises WrongAnswer if one did not.

        A row is compared up to the first position whose best two logits are within ``tie``.
        """
        outputs = peer.run(self.jobs, len(self.jobs)).outputs
        compared: dict[int, int] = {}
        for job, tokens in zip(self.jobs, outputs, strict=True):
            if job.adapter not in (-1, *CHECKED):
                continue
            expected = self.expected[job.adapter, job.prompt[0]]
            sure = next((i for i, gap in enumerate(expected.gaps) if gap < tie), NUM_NEW)
            if tokens[:sure] != expected.tokens[:sure]:
                raise WrongAnswer(
                    f"{peer.name} with adapter {job.adapter}: {tokens}, "
                    f"PEFT says {expected.tokens} (of which {sure} are compared)"
                )
            compared[job.adapter] = compared.get(job.adapter, 0) + sure
        if not all(compared.values()):
            raise WrongAnswer(f"{peer.name}: nothing could be compared, {compared}")
        return {"tokens_compared": compared}


def _ask_peft(models: Models, jobs: Sequence[Job]) -> dict[tuple[int, int], Expected]:
    """By adapter and first prompt token. Refuses adapters that change nothing."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    @torch.inference_mode()
    def greedy(model: Any, job: Job) -> Expected:
        ids, tokens, gaps = list(job.prompt), [], []
        for _ in range(NUM_NEW):
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            ids.append(tokens[-1])
        return Expected(tokens, gaps)

    model: Any = LlamaForCausalLM.from_pretrained(models.base).eval()
    answers: dict[tuple[int, int], Expected] = {}
    plain = [greedy(model, job) for job in jobs]
    wrapped = model
    for job, bare in zip(jobs, plain, strict=True):
        if job.adapter < 0:
            answers[job.adapter, job.prompt[0]] = bare
            continue
        name, path = f"a{job.adapter}", models.adapters[job.adapter]
        if wrapped is model:
            wrapped = PeftModel.from_pretrained(model, path, adapter_name=name).eval()
        else:
            wrapped.load_adapter(path, adapter_name=name)
        wrapped.set_adapter(name)
        answers[job.adapter, job.prompt[0]] = greedy(wrapped, job)
        if answers[job.adapter, job.prompt[0]].tokens[0] == bare.tokens[0]:
            raise RuntimeError(f"adapter {job.adapter} does not change the first token")
    return answers
