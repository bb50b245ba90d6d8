"""An engine's draft model on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.harness import Harness

from loramux.batch import Batch, Row
from loramux.memory.frames import Owner
from loramux.model.runner import Plan, Scored
from loramux.request import DRAFT_MODEL_ID, Kv, Request, SamplingParams, Speculation
from loramux.speculation.drafter import Ask

DRAFTED = Speculation(drafters=("draft",), max_draft_tokens=4)


class Bench:
    """The draft model of an engine on its own: requests that the test moves on, and every forward
    pass of the draft model, as (request id, first token, number) for each of its rows."""

    def __init__(self, model: Path, draft: Path, **config: Any) -> None:
        self.harness = Harness(model, draft_model=draft, page_tokens=4, **config)
        engine = self.harness.engine
        self.pool = engine.pool
        self.drafter: Any = engine.drafting.drafters["draft"]
        self.sampler = engine._sampler
        self.partner = engine.partners[DRAFT_MODEL_ID]
        self.passes: list[list[tuple[str, int, int]]] = []
        self.scored: list[tuple[list[int], torch.Tensor]] = []
        self._forward = self.partner.runner.forward
        self.partner.runner.forward = self._watched  # type: ignore[method-assign]

    def _watched(self, plan: Plan) -> Scored:
        rows = plan.batch.rows
        self.passes.append([(r.request.id, r.kv.num_computed, r.num_tokens) for r in rows])
        scored = self._forward(plan)
        for row, logits in zip([r for r in rows if r.samples], scored.logits, strict=True):
            end = row.kv.num_computed + row.num_tokens
            self.scored.append((row.request.ids[:end].tolist(), logits.clone()))
        return scored

    def request(self, name: str, ids: Sequence[int], **knobs: Any) -> Request:
        companions = knobs.pop("companions", None)
        sampling = SamplingParams(**{"seed": 0, "temperature": 0.0, "max_tokens": 200, **knobs})
        self.sampler.add(name, sampling, ids, ())
        return Request(name, prompt_ids=ids, sampling=sampling, companions=companions)

    def propose(self, *asked: tuple[Request, int]) -> list[list[int]]:
        guesses = self.drafter.propose([Ask(request, most) for request, most in asked])
        self.harness.engine.pool.check()
        return [list(guess.token_ids) for guess in guesses]

    def goes_on(self, request: Request, *token_ids: int) -> None:
        """These are what the target drew."""
        request.ids[request.num_ids : request.num_ids + len(token_ids)] = token_ids
        request.num_ids += len(token_ids)
        self.sampler.commit(request.id, token_ids)

    def fresh(self, ids: Sequence[int]) -> torch.Tensor:
        """The draft model's logits behind ``ids``, computed all at once in pages of their own."""
        request = Request("fresh", prompt_ids=ids, sampling=SamplingParams(seed=0))
        row = Row(request, len(ids))
        row.kv, row.samples = Kv(DRAFT_MODEL_ID), True
        pages = self.partner.kv.num_pages(len(ids))
        row.kv.reserve(pages)
        frames = self.pool.obtain(pages, Owner.KV)
        assert frames is not None
        row.kv.add_frames(frames)
        logits = self._forward(self.partner.runner.plan(Batch.of(DRAFT_MODEL_ID, [row]))).logits
        self.pool.frames.give_back(frames, Owner.KV)
        return logits[0].clone()
