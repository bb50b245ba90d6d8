"""What ``--quantize int8`` costs in quality: the demo's base and adapters on text they never saw.

    python loadtests/quality/int8.py [--documents 1000] [--out docs/results/int8-quality.json]

Every document's own log-probabilities, and the most likely token at every position, from two
engines: one serves the base as it is, the other rounded to 8 bits with a scale for each output
column. Adapters stay as they are. Reported: perplexity of both, the share of positions with
the same first choice, and the mean and the 99th percentile of how far the log-probability moved.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]
sys.path.append(str(ROOT / "loadtests" / "serving"))

import numpy as np  # noqa: E402
import throughput  # noqa: E402
from rich.progress import track  # noqa: E402
from tests.harness import install_adapter  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from loramux.config import DEMO_DIR, ServerConfig  # noqa: E402
from loramux.demo.training.corpus import HELD_OUT_SEED, MIXTURE  # noqa: E402
from loramux.demo.training.perplexity import documents  # noqa: E402
from loramux.engine.assemble import assemble  # noqa: E402
from loramux.request import AdapterRef, SamplingParams  # noqa: E402
from loramux.wire import Submit, TokenLogprob  # noqa: E402

BATCH = 32


class Reader:
    """An engine that is asked for nothing but prompts' log-probabilities."""

    def __init__(self, data_dir: str, quantize: Literal["none", "int8"]) -> None:
        self.data_dir = Path(data_dir)
        config = ServerConfig(
            model=DEMO_DIR / "base", data_dir=self.data_dir, device="cpu", quantize=quantize
        )
        self.assembled = assemble(config)
        self._serial = 0

    def install(self, folder: Path) -> str:
        return install_adapter(folder, self.data_dir, self.assembled.ready.base)

    def read(self, texts: list[list[int]], adapter: str | None) -> list[TokenLogprob]:
        """Every position of every text but its first."""
        engine = self.assembled.engine
        for ids in texts:
            self._serial += 1
            engine.submit(
                Submit(
                    request_id=str(self._serial),
                    tenant=str(self._serial),
                    model_id=0,
                    adapters=(AdapterRef(adapter),) if adapter else (),
                    prompt_ids=ids,
                    sampling=SamplingParams(seed=0, max_tokens=0, prompt_logprobs=1),
                )
            )
        found: list[TokenLogprob] = []
        while engine.has_work:
            done = engine.step()
            assert not done.failed, done.failed
            found += [p for o in done.outputs for p in o.prompt_logprobs or () if p is not None]
        return found


def compare(name: str, texts: list[list[int]], readers: list[Reader], folder: Path | None) -> Any:
    digests = [reader.install(folder) if folder else None for reader in readers]
    exact: list[TokenLogprob] = []
    rounded: list[TokenLogprob] = []
    for start in track(range(0, len(texts), BATCH), description=name):
        some = texts[start : start + BATCH]
        # A batch's answers come in the order in which its rows end, the same for both.
        exact += readers[0].read(some, digests[0])
        rounded += readers[1].read(some, digests[1])
    assert [p.token_id for p in exact] == [p.token_id for p in rounded]
    before = np.array([p.logprob for p in exact])
    after = np.array([p.logprob for p in rounded])
    moved = np.abs(after - before)
    same = [p.top[0][0] == q.top[0][0] for p, q in zip(exact, rounded, strict=True)]
    return {
        "served": name,
        "tokens": len(exact),
        "perplexity": round(float(np.exp(-before.mean())), 4),
        "perplexity_int8": round(float(np.exp(-after.mean())), 4),
        "same_first_choice": round(float(np.mean(same)), 4),
        "moved_mean": round(float(moved.mean()), 4),
        "moved_p99": round(float(np.percentile(moved, 99)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "base/tokenizer.json"))
    texts = documents(tokenizer, HELD_OUT_SEED, MIXTURE, limit=args.documents)
    report = throughput.header()
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as small:
        readers = [Reader(plain, "none"), Reader(small, "int8")]
        adapters = sorted((DEMO_DIR / "adapters").iterdir())
        for folder in [None, *adapters]:
            name = folder.name if folder else "base"
            report["cases"].append(compare(name, texts, readers, folder))
            print(json.dumps(report["cases"][-1]))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
