"""Every adapter format beside PEFT: a table of ids and log-probabilities, alone and mixed.

    python loadtests/quality/formats.py --out docs/results/formats.md

For each tiny architecture all formats of ``tests/formats.py`` answer together in one batch with the
base, and each alone. Ids are greedy; one that differs where PEFT's best two logits are nearer than
1e-4 is excused and counted. Log-probabilities are those of a prompt's own tokens. Formats that PEFT
does not write (lora_xs, s2ft) are compared with transformers running the base's weights with the
change added to them in float64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]

from tests import formats, tiny  # noqa: E402
from tests.equivalence.test_oracle import NEAR_TIE  # noqa: E402
from tests.harness import Harness  # noqa: E402

ARCHS: tuple[tiny.Arch, ...] = ("llama", "qwen2", "llama_mha_tied")
PROMPTS, TOKENS, LENGTH = 4, 32, 24


@dataclass
class Line:
    """What one format showed over all prompts of one architecture."""

    compared: int = 0
    excused: int = 0
    wrong: int = 0
    alone_differs: int = 0
    difference: float = 0.0

    def ids(self, got: list[int], want: list[int], gaps: list[float]) -> None:
        for index, (a, b, gap) in enumerate(zip(got, want, gaps, strict=True)):
            if gap < NEAR_TIE:
                self.excused += len(got) - index
                return
            self.compared += 1
            if a != b:
                self.wrong += 1
                return


def measure(arch: tiny.Arch, folder: Path) -> dict[str, Line]:
    model = tiny.write_model(folder / arch / "base", arch)
    adapters = {
        name: formats.write(folder / arch / name, model, name, seed=seed)
        for seed, name in enumerate(formats.FORMATS)
    }
    lines = {name: Line() for name in adapters}
    source = np.random.default_rng(0)
    harness = Harness(model, max_num_seqs=64, num_frames=3000)
    for _ in range(PROMPTS):
        prompt = source.integers(4, tiny.VOCAB_SIZE, LENGTH).tolist()
        asked = {
            harness.submit(prompt, path, max_tokens=TOKENS, prompt_logprobs=0): name
            for name, path in adapters.items()
        }
        outputs = harness.run()
        for request_id, name in asked.items():
            line, path = lines[name], adapters[name]
            line.ids(outputs[request_id], *tiny.greedy(model, prompt, TOKENS, path))
            alone = harness.generate(prompt, path, max_tokens=TOKENS, tenant="nothing cached")
            line.alone_differs += alone != outputs[request_id]
            (first,) = [o for o in harness.details[request_id] if o.prompt_logprobs]
            assert first.prompt_logprobs is not None
            got = torch.tensor([p.logprob for p in first.prompt_logprobs[1:] if p is not None])
            table = tiny.logits(model, prompt, path).log_softmax(-1)
            want = table[torch.arange(LENGTH - 1), prompt[1:]]
            line.difference = max(line.difference, float((got - want).abs().max()))
    harness.close()
    return lines


def table(results: dict[tiny.Arch, dict[str, Line]]) -> str:
    rows = [
        "| format | architecture | ids equal to the oracle's | excused | alone = mixed | largest"
        " difference of a log-probability |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for name in formats.FORMATS:
        for arch, lines in results.items():
            line = lines[name]
            equal = f"{line.compared - line.wrong} of {line.compared}"
            same = "no" if line.alone_differs else "yes"
            rows.append(
                f"| {name} | {arch} | {equal} | {line.excused} | {same} | {line.difference:.1e} |"
            )
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[tiny.Arch, dict[str, Line]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, arch in enumerate(ARCHS, 1):
            print(f"{arch} ({number} of {len(ARCHS)})", file=sys.stderr, flush=True)
            results[arch] = measure(arch, Path(folder))
    text = table(results)
    print(text)
    if args.out is not None:
        args.out.write_text(f"# Formats beside PEFT\n{__doc__}\n{text}".replace("\n\n\n", "\n\n"))
    bad = [line for lines in results.values() for line in lines.values()]
    return int(any(line.wrong or line.alone_differs for line in bad))


if __name__ == "__main__":
    sys.exit(main())
