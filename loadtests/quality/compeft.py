"""What ComPEFT costs in quality: the demo's adapters, compressed, on text they never saw.

    python loadtests/quality/compeft.py --out docs/results/compeft.md

An adapter's values (A and B of all modules) are reduced to the signs of the largest of them, a
share "density", all of one size, "alpha" standard deviations. "Times smaller" is the weights file
before over after; the demo's adapters are of 16-bit values and so small that up to half of what is
left is the list of their tensors. "At best" leaves that out, as for a large adapter. "Change" is
what push --compress prints: how far what a module adds has moved, |B'A' - BA| / |BA|, in the mean
over modules. "Loss" is the mean negative log-probability of the answers' own tokens, "agreement"
the share of them where the likeliest token (greedy, after the same text) is the full adapter's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / top) for top in (".", "server", "kernels", "clients/python")]

from rich.progress import track  # noqa: E402
from tests.harness import install_adapter  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from loramux.config import DEMO_DIR, ServerConfig  # noqa: E402
from loramux.demo.training.corpus import BEGIN, END  # noqa: E402
from loramux.demo.training.manners import MANNERS  # noqa: E402
from loramux.engine.assemble import assemble  # noqa: E402
from loramux.request import AdapterRef, SamplingParams  # noqa: E402
from loramux.wire import Submit, TokenLogprob  # noqa: E402
from loramux_client import Compressed, compress  # noqa: E402

DENSITIES = (0.05, 0.1, 0.2, 0.5)
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
HELD_OUT_SEED = 41
Answer = tuple[list[int], int]
"""Token ids, and how many of them were given."""


@dataclass(frozen=True)
class Score:
    """On the answers of one adapter's lessons."""

    loss: float
    first: list[int]

    def agreement(self, other: Score) -> float:
        return mean(a == b for a, b in zip(self.first, other.first, strict=True))


@dataclass(frozen=True)
class Line:
    """One adapter, compressed in one way."""

    name: str
    density: float
    alpha: float
    done: Compressed
    loss: float
    agreement: float

    @property
    def at_best(self) -> float:
        """The ratio to 16-bit values of the codes alone."""
        with self.done.files.weights.open() as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start, end = header["compeft.codes"]["data_offsets"]
        return self.done.ratio_16bit * self.done.bytes_after / (end - start)


class Reader:
    """An engine that is asked for nothing but prompts' log-probabilities."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        config = ServerConfig(data_dir=data_dir, device="cpu")
        self.assembled = assemble(config)
        self._serial = 0

    def install(self, folder: Path) -> str:
        return install_adapter(folder, self.data_dir, self.assembled.ready.base)

    def score(self, answers: list[Answer], adapter: str | None) -> Score:
        engine = self.assembled.engine
        self._serial += 1
        for number, (ids, _) in enumerate(answers):
            engine.submit(
                Submit(
                    request_id=str(number),
                    tenant=str(self._serial),  # nothing is cached
                    model_id=0,
                    adapters=(AdapterRef(adapter),) if adapter else (),
                    prompt_ids=ids,
                    sampling=SamplingParams(seed=0, max_tokens=0, prompt_logprobs=1),
                )
            )
        found: dict[str, list[TokenLogprob | None]] = {str(n): [] for n in range(len(answers))}
        while engine.has_work:
            done = engine.step()
            assert not done.failed, done.failed
            for output in done.outputs:
                found[output.request_id] += output.prompt_logprobs or ()
        kept = [
            position
            for number, (_, given) in enumerate(answers)
            for position in found[str(number)][given:]
            if position is not None
        ]
        return Score(-mean(p.logprob for p in kept), [p.top[0][0] for p in kept])


def lessons(name: str, tokenizer: Tokenizer, count: int) -> list[Answer]:
    rng = Random(HELD_OUT_SEED)
    found = []
    for _ in range(count):
        lesson = MANNERS[name](rng)
        given = tokenizer.encode(BEGIN + lesson.opening, add_special_tokens=False).ids
        rest = tokenizer.encode(lesson.rest + END, add_special_tokens=False).ids
        found.append((given + rest, len(given)))
    return found


def write(done: Compressed, folder: Path) -> Path:
    folder.mkdir(parents=True)
    files = {
        "adapter_config.json": done.files.config,
        "adapter_model.safetensors": done.files.weights,
    }
    for name, file in files.items():
        with file.open() as data:
            (folder / name).write_bytes(data.read())
    return folder


def measure(
    reader: Reader, folder: Path, answers: list[Answer], scratch: Path
) -> tuple[Score, Score, list[Line]]:
    """The base, the full adapter, and every way to compress it."""
    base, full = reader.score(answers, None), reader.score(answers, reader.install(folder))
    lines = []
    ways = [(density, alpha) for density in DENSITIES for alpha in ALPHAS]
    for density, alpha in track(ways, description=folder.name):
        done = compress(folder, density, alpha)
        small = write(done, scratch / folder.name / f"{density}-{alpha}")
        score = reader.score(answers, reader.install(small))
        lines.append(Line(folder.name, density, alpha, done, score.loss, score.agreement(full)))
    return base, full, lines


def row(density: object, alpha: object, lines: list[Line]) -> str:
    ratio, best = mean(x.done.ratio for x in lines), mean(x.at_best for x in lines)
    change = mean(line.done.relative_change or 0 for line in lines)
    loss, agreement = mean(x.loss for x in lines), mean(x.agreement for x in lines)
    return (
        f"| {density} | {alpha} | {ratio:.1f} | {best:.1f} | {100 * change:.0f} %"
        f" | {100 * agreement:.1f} % | {loss:.3f} |"
    )


def tables(base: dict[str, Score], full: dict[str, Score], lines: list[Line]) -> str:
    agreement = mean(base[name].agreement(full[name]) for name in base)
    out = [
        "## Mean over the adapters\n",
        "| density | alpha | times smaller | at best | change | agreement | loss |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| full adapter | | 1 | 1 | 0 % | 100 % | {mean(s.loss for s in full.values()):.3f} |",
        f"| base alone | | | | | {100 * agreement:.1f} %"
        f" | {mean(s.loss for s in base.values()):.3f} |",
    ]
    for density in DENSITIES:
        for alpha in ALPHAS:
            some = [x for x in lines if (x.density, x.alpha) == (density, alpha)]
            out.append(row(density, alpha, some))
    out += [
        "\n## Each adapter with the alpha of the least loss\n",
        "| adapter | loss full | loss of the base | "
        + " | ".join(f"density {d}: alpha, loss, agreement, times smaller" for d in DENSITIES)
        + " |",
        "| --- | ---: | ---: | " + " | ".join("---:" for _ in DENSITIES) + " |",
    ]
    for name in full:
        cells = [name, f"{full[name].loss:.3f}", f"{base[name].loss:.3f}"]
        for density in DENSITIES:
            some = [x for x in lines if (x.name, x.density) == (name, density)]
            best = min(some, key=lambda line: line.loss)
            cells.append(
                f"{best.alpha:g}, {best.loss:.3f}, {100 * best.agreement:.1f} %,"
                f" {best.done.ratio:.1f}"
            )
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lessons", type=int, default=12, help="texts for each adapter")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "base/tokenizer.json"))
    base: dict[str, Score] = {}
    full: dict[str, Score] = {}
    lines: list[Line] = []
    tokens = 0
    with tempfile.TemporaryDirectory() as scratch:
        reader = Reader(Path(scratch) / "data")
        for folder in sorted((DEMO_DIR / "adapters").iterdir()):
            answers = lessons(folder.name, tokenizer, args.lessons)
            tokens += sum(len(ids) - given for ids, given in answers)
            name = folder.name
            base[name], full[name], more = measure(reader, folder, answers, Path(scratch))
            lines += more
    text = tables(base, full, lines)
    print(text)
    if args.out:
        measured = f"{args.lessons} texts for each of {len(full)} adapters, {tokens} tokens."
        args.out.write_text(f"# ComPEFT on the demo's adapters\n\n{__doc__}\n{measured}\n\n{text}")


if __name__ == "__main__":
    main()
