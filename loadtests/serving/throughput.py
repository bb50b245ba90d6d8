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
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the server sets it for its engine

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]


from tests.harness import install_adapter  # noqa: E402

from loramux.config import ServerConfig  # noqa: E402
from loramux.engine.assemble import Assembled, assemble  # noqa: E402
from loramux.request import AdapterRef, SamplingParams  # noqa: E402
from loramux.wire import Submit  # noqa: E402

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16


@dataclass(frozen=True)
class Job:
    """One request: which adapter it names, its prompt, how many tokens it wants."""

    adapter: int
    prompt: list[int]
    num_new: int


def make_jobs(num: int, seed: int) -> list[Job]:
    rng = np.random.default_rng(seed)
    return [
        Job(
            adapter=i,
            prompt=rng.integers(10, SHAPE["vocab_size"], rng.integers(64, 129)).tolist(),
            num_new=int(rng.integers(32, 65)),
        )
        for i in range(num)
    ]


def write_checkpoint(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).float().save_pretrained(folder / "base")
    return folder / "base"


def write_adapters(folder: Path, base: Path, num: int) -> list[Path]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    paths = []
    for index in range(num):
        torch.manual_seed(index)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        paths.append(folder / f"adapter{index}")
        model.save_pretrained(paths[-1])
    return paths


class Ours:
    """The engine, in this process."""

    def __init__(self, base: Path, adapters: list[Path], data_dir: Path) -> None:
        config = ServerConfig(model=base, data_dir=data_dir, device="cpu", pool_memory="3G")
        self.assembled: Assembled = assemble(config)
        description = self.assembled.ready.base
        self.digests = [install_adapter(path, data_dir, description) for path in adapters]
        self._serial = 0

    def run(self, jobs: list[Job], *, with_adapters: bool) -> None:
        engine = self.assembled.engine
        left = 0
        for job in jobs:
            self._serial += 1
            refs = (AdapterRef(self.digests[job.adapter]),) if with_adapters else ()
            engine.submit(
                Submit(
                    request_id=str(self._serial),
                    tenant=str(self._serial),  # nothing may come from the prefix cache
                    model_id=0,
                    adapters=refs,
                    prompt_ids=job.prompt,
                    sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=job.num_new),
                )
            )
            left += job.num_new
        while engine.has_work:
            done = engine.step()
            assert not done.failed, done.failed
            left -= sum(len(output.token_ids) for output in done.outputs)
        assert left == 0


class Peft:
    """transformers generate() with adapter_names, left-padded, all rows in one batch."""

    def __init__(self, base: Path, adapters: list[Path]) -> None:
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(base)
        self.model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
        for index, path in enumerate(adapters[1:], 1):
            self.model.load_adapter(path, adapter_name=f"a{index}")
        self.model.eval()

    @torch.inference_mode()
    def run(self, jobs: list[Job]) -> None:
        widest = max(len(job.prompt) for job in jobs)
        ids = torch.zeros(len(jobs), widest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(jobs):
            ids[row, widest - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, widest - len(job.prompt) :] = 1
        longest = max(job.num_new for job in jobs)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=[f"a{job.adapter}" for job in jobs],
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape[1] == widest + longest


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of ``work``."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def interleave(
    a: Callable[[], None], b: Callable[[], None], pairs: int, say: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Wall-clock seconds of ``pairs`` runs of each, in the order A B B A A B ..."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[side].append(timed((a, b)[side])[0])
        say(f"pair {pair + 1}/{pairs}")
    return seconds[0], seconds[1]


def median_interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval."""
    rng = np.random.default_rng(0)
    values = np.array(ratios)
    medians = np.median(rng.choice(values, (4000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def self_ratio(seconds: list[float]) -> tuple[float, float, float]:
    """A against A: neighbouring runs of the same side."""
    return median_interval([x / y for x, y in zip(seconds, seconds[1:], strict=False)])


def machine() -> dict[str, Any]:
    """This machine's name and what it can do at most: GEMM rate and memory bandwidth."""
    n = 1024
    left, right = torch.randn(n, n), torch.randn(n, n)
    gemm = max(2 * n**3 / timed(lambda: torch.mm(left, right))[0] for _ in range(8)) / 1e9
    source = torch.randn(64 << 20)
    target = torch.empty_like(source)
    copy = max(2 * source.nbytes / timed(lambda: target.copy_(source))[0] for _ in range(5)) / 1e9
    read = max(source.nbytes / timed(lambda: source.sum())[0] for _ in range(5)) / 1e9
    cpu = Path("/proc/cpuinfo").read_text().split("model name", 2)[1].split("\n")[0].strip("\t: ")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemm_gflops": round(gemm, 1),
        "copy_gb_s": round(copy, 1),
        "read_gb_s": round(read, 1),
    }


def header() -> dict[str, Any]:
    """What a report says of itself; its cases follow."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": machine(),
        "cases": [],
    }


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
    jobs = make_jobs(num, seed=num)
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
