"""``loramux adapters inspect --verify``: an adapter's greedy answers beside PEFT's own.

transformers and PEFT run the adapter's folder in float32 on the CPU; an engine in this process
runs the upload it would be. Two sums of the same numbers in another order may differ where the
two likeliest tokens are as good as equal; what follows such a near tie is not compared.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.adapters import compeft
from loramux.adapters.blobs import BlobStore
from loramux.config import ServerConfig
from loramux.errors import AdapterInvalid, ConfigError
from loramux.inspection import CONFIG, WEIGHTS

NEAR_TIE = 1e-4
"""Where the likeliest token's logit is no further than this above the next one's."""
PROMPTS = (
    "One sunny morning Mira the baker left Oldport with seven apples.",
    "Otto the clockmaker had a silver bell made of glass.",
    "What is the capital of France, and why?",
    "1, 2, 3, 5, 8, 13,",
)
MAX_TOKENS = 24
_POOL_BYTES = "256M"


@dataclass(frozen=True)
class Compared:
    """One prompt. The first ``equal`` of ``tokens`` tokens are PEFT's. ``near_tie`` is the first
    position where PEFT's best two logits are within NEAR_TIE, ``gap`` their distance where the
    two differ first (None: nowhere)."""

    prompt: str
    tokens: int
    equal: int
    near_tie: int | None
    gap: float | None

    @property
    def agrees(self) -> bool:
        """Whether they are equal up to a near tie at least."""
        return self.equal >= (self.tokens if self.near_tie is None else self.near_tie)


def verify(
    folder: Path,
    config: ServerConfig,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = MAX_TOKENS,
) -> list[Compared]:
    """Ask both. Raises ConfigError when transformers or PEFT is missing or the adapter is stored
    compressed, which PEFT does not read; AdapterInvalid when it is refused."""
    from tokenizers import Tokenizer

    if compeft.KEY in json.loads((folder / CONFIG).read_bytes()):
        raise ConfigError("--verify: PEFT does not read compressed adapters")
    tokenizer = Tokenizer.from_file(str(config.model / "tokenizer.json"))
    asked = [tokenizer.encode(prompt).ids for prompt in prompts]
    wanted = list(_peft(folder, config.model, asked, max_tokens))
    served = _engine(folder, config, asked, max_tokens)
    return [
        _compare(prompt, got, ids, gaps)
        for prompt, got, (ids, gaps) in zip(prompts, served, wanted, strict=True)
    ]


def _compare(prompt: str, got: list[int], ids: list[int], gaps: list[float]) -> Compared:
    differ = [i for i, (a, b) in enumerate(zip(got, ids, strict=True)) if a != b]
    near = [i for i, gap in enumerate(gaps) if gap <= NEAR_TIE]
    equal = differ[0] if differ else len(ids)
    return Compared(
        prompt, len(ids), equal, near[0] if near else None, gaps[equal] if differ else None
    )


def _peft(
    folder: Path, model: Path, prompts: list[list[int]], max_tokens: int
) -> Iterator[tuple[list[int], list[float]]]:
    """PEFT's greedy tokens, and at each how far the best logit is above the next."""
    try:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConfigError(
            f"--verify needs transformers and peft ({error}): pip install loramux[verify]"
        ) from error
    disable_progress_bar()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # advice on how to train
        base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()
        for prompt in prompts:
            ids: list[int] = []
            gaps: list[float] = []
            feed, cache = torch.tensor([prompt]), None
            for _ in range(max_tokens):
                out = adapted(feed, past_key_values=cache, use_cache=True)
                best = out.logits[0, -1].topk(2)
                ids.append(int(best.indices[0]))
                gaps.append(float(best.values[0] - best.values[1]))
                feed, cache = best.indices[:1][None], out.past_key_values
            yield ids, gaps


def _engine(
    folder: Path, config: ServerConfig, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    from loramux.engine.assemble import assemble
    from loramux.request import AdapterRef, SamplingParams
    from loramux.wire import Submit

    with tempfile.TemporaryDirectory(prefix="loramux-") as temporary:
        data_dir = Path(temporary)
        changes = {"device": "cpu", "dtype": "auto", "quantize": "none", "pool_memory": _POOL_BYTES}
        assembled = assemble(config.model_copy(update={**changes, "data_dir": data_dir}))
        engine = assembled.engine
        try:
            digest = install(folder, data_dir, assembled.ready.base)
            for number, prompt in enumerate(prompts):
                engine.submit(
                    Submit(
                        request_id=str(number),
                        tenant="",
                        model_id=0,
                        adapters=(AdapterRef(digest),),
                        prompt_ids=prompt,
                        sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=max_tokens),
                    )
                )
            outputs: dict[str, list[int]] = {str(n): [] for n in range(len(prompts))}
            while engine.has_work:
                done = engine.step()
                for failed in done.failed:
                    raise ConfigError(f"--verify: the engine failed: {failed.message}")
                for output in done.outputs:
                    outputs[output.request_id] += output.token_ids
            return list(outputs.values())
        finally:
            engine.close()


def install(folder: Path, data_dir: Path, base: Any) -> str:
    """What an upload would make of the folder; the adapter's digest."""
    from loramux.ingest.job import run
    from loramux.wire import IngestJob

    blobs, digests = BlobStore(data_dir), []
    for name in (CONFIG, WEIGHTS):
        with blobs.writer(1 << 40) as writer, open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                writer.write(block)
            digests.append(writer.commit())
    done = run(
        IngestJob(job_id=0, config_digest=digests[0], weights_digest=digests[1], base=base),
        data_dir,
    )
    if done.problems:
        raise AdapterInvalid(done.problems[0], problems=done.problems, code=done.code)
    return done.digest
