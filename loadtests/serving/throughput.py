"""Output tokens per second with many adapters, beside transformers+PEFT on the same machine.

    python loadtests/serving/throughput.py [--pairs 10] [--cases 1,8,32] [--out docs/results/x.json]

The model is a random Llama of 135M parameters in fp32; each of ``n`` requests has its own rank-16
adapter on all seven linear modules, a prompt of 64-128 tokens and 32-64 new tokens; all arrive at
once, so concurrency is n. Three ways to serve the same requests, in warm processes' turns:

    ours      loramux's engine, one mixed batch
    bare      loramux's engine, the same requests without adapters
    peft      transformers generate() on a PeftModel with one adapter name per row (mixed batch)

Both sides run on the same threads with the same OpenMP settings. A ratio is the median over
interleaved pairs (A B B A ...), with a bootstrap 95 % interval, beside the interval of A against
itself. Tokens are the ones the requests asked for, whatever a side pads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the server sets it for its engine

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]


from cases import RANK, SHAPE, Job, make_jobs, write_adapters, write_checkpoint  # noqa: E402
from pairs import header, interleave, machine, median_interval, self_ratio, timed  # noqa: E402
from tests.harness import install_adapter  # noqa: E402

from loramux.config import ServerConfig  # noqa: E402
from loramux.engine.assemble import Assembled, assemble  # noqa: E402
from loramux.request import AdapterRef, SamplingParams  # noqa: E402
from loramux.wire import Submit  # noqa: E402

__all__ = [
    "RANK",
    "ROOT",
    "SHAPE",
    "Job",
    "Ours",
    "Peft",
    "header",
    "interleave",
    "machine",
    "make_jobs",
    "median_interval",
    "self_ratio",
    "timed",
    "write_adapters",
    "write_checkpoint",
]


class Ours:
    """The engine, in this process."""

    def __init__(self, base: Path, adapters: list[Path], data_dir: Path) -> None:
        config = ServerConfig(model=base, data_dir=data_dir, device="cpu", pool_memory="3G")
        self.assembled: Assembled = assemble(config)
        description = self.assembled.ready.base
        self.digests = [install_adapter(path, data_dir, description) for path in adapters]
        self._serial = 0

    def run(
        self, jobs: Sequence[Job], *, with_adapters: bool = True, concurrency: int | None = None
    ) -> list[list[int]]:
        """The new tokens of each job, at most ``concurrency`` of them (all) running at a time."""
        engine = self.assembled.engine
        waiting = list(reversed(jobs))
        outputs: dict[str, list[int]] = {}
        running = 0
        while waiting or engine.has_work:
            while waiting and (concurrency is None or running < concurrency):
                self._submit(waiting.pop(), outputs, with_adapters=with_adapters)
                running += 1
            done = engine.step()
            assert not done.failed, done.failed
            running -= len(done.finished)
            for output in done.outputs:
                outputs[output.request_id] += output.token_ids
        tokens = list(outputs.values())
        assert [len(ids) for ids in tokens] == [job.num_new for job in jobs]
        return tokens

    def _submit(self, job: Job, outputs: dict[str, list[int]], *, with_adapters: bool) -> None:
        self._serial += 1
        wants = with_adapters and job.adapter >= 0
        self.assembled.engine.submit(
            Submit(
                request_id=str(self._serial),
                tenant=str(self._serial),  # nothing may come from the prefix cache
                model_id=0,
                adapters=(AdapterRef(self.digests[job.adapter]),) if wants else (),
                prompt_ids=job.prompt,
                sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=job.num_new),
            )
        )
        outputs[str(self._serial)] = []


class Peft:
    """transformers generate() with adapter_names, left-padded, all rows in one batch."""

    def __init__(self, base: Path, adapters: list[Path]) -> None:
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(base)
        if adapters:
            model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
        for index, path in enumerate(adapters[1:], 1):
            model.load_adapter(path, adapter_name=f"a{index}")
        self.model = model.eval()
        self.has_adapters = bool(adapters)

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> list[list[int]]:
        """The new tokens of each job; one batch of all of them, as wide as the widest."""
        widest = max(len(job.prompt) for job in jobs)
        ids = torch.zeros(len(jobs), widest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(jobs):
            ids[row, widest - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, widest - len(job.prompt) :] = 1
        longest = max(job.num_new for job in jobs)
        names = ["__base__" if job.adapter < 0 else f"a{job.adapter}" for job in jobs]
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **({"adapter_names": names} if self.has_adapters else {}),
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == widest + longest
        return [
            row[widest : widest + job.num_new] for row, job in zip(out.tolist(), jobs, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--cases", default="1,8,32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = [int(case) for case in args.cases.split(",")]
    report = header()
    print(json.dumps(report["machine"]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = write_checkpoint(folder)
        adapters = write_adapters(folder, base, max(cases))
        ours = Ours(base, adapters, folder / "data")
        peft = Peft(base, adapters)
        for case in cases:
            report["cases"].append(run_case(case, ours, peft, args.pairs))
            print(json.dumps(report["cases"][-1]))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def run_case(num: int, ours: Ours, peft: Peft, pairs: int) -> dict[str, Any]:
    jobs = make_jobs(range(num), seed=num)
    tokens = sum(job.num_new for job in jobs)

    def say(text: str) -> None:
        print(f"\r{num} adapters: {text}   ", end="", file=sys.stderr, flush=True)

    for warm in (True, False):
        ours.run(jobs, with_adapters=warm)
    peft.run(jobs)
    ours_s, peft_s = interleave(
        lambda: ours.run(jobs, with_adapters=True), lambda: peft.run(jobs), pairs, say
    )
    mixed_s, bare_s = interleave(
        lambda: ours.run(jobs, with_adapters=True),
        lambda: ours.run(jobs, with_adapters=False),
        pairs,
        say,
    )
    return {
        "adapters": num,
        "tokens": tokens,
        "ours_tok_s": round(tokens / float(np.median(ours_s + mixed_s)), 1),
        "bare_tok_s": round(tokens / float(np.median(bare_s)), 1),
        "peft_tok_s": round(tokens / float(np.median(peft_s)), 1),
        "ours_over_peft": median_interval([p / o for o, p in zip(ours_s, peft_s, strict=True)]),
        "ours_over_bare": median_interval([b / o for o, b in zip(mixed_s, bare_s, strict=True)]),
        "ours_over_ours": self_ratio(ours_s + mixed_s),
    }


if __name__ == "__main__":
    main()
