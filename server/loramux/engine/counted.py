"""Which of a batch's draws count: a row's own, and those behind guesses that were right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loramux.batch import Row
from loramux.model.runner import Scored
from loramux.request import Request, Status
from loramux.sampling.logprobs import logprobs
from loramux.sampling.sampler import SampleResult
from loramux.sampling.verify import verified
from loramux.wire import TokenLogprob


class Counted(NamedTuple):
    """A row's new ``token_ids``, drawn at ``nodes`` of it, the last at ``line`` of the sampling
    lines. ``broken``: what came behind them has no finite logits."""

    nodes: list[int]
    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    line: int
    broken: bool = False


def counted(
    rows: Sequence[Row], scored: Scored, result: SampleResult
) -> Iterator[tuple[Row, Counted | None]]:
    """Row after row; None for one that drew nothing, or ended while it was on its way."""
    ids, bad = result.token_ids.tolist(), result.bad.tolist()
    line = judged = 0
    for row in rows:
        request, first = row.request, line
        line += row.num_samples
        typical: list[bool] = []
        if row.drafts and is_judged(request):
            typical = result.typical[judged : judged + len(row.drafts)]
            judged += len(row.drafts)
        if request.router is not None:
            request.router.computed(row.num_tokens)
        if request.status is Status.DONE or line == first:
            yield row, None
            continue
        stops = request.sampling.stop_token_ids
        nodes = verified(row.drafts, ids[first:line], stops, row.parents, typical)
        if request.router is not None and result.entropies is not None:
            nodes = request.router.follow(nodes, result.entropies[first:line])
        last = first + nodes[-1]
        token_ids = [row.drafts[node - 1] for node in nodes[1:]]
        if bad[last]:
            nodes.pop()
        else:
            token_ids.append(ids[last])
        lines = [first + node for node in nodes]
        asked = [result.logprobs[at] for at in lines]
        if typical and asked and asked[0] is not None:
            asked = _of_delivered(scored, lines, token_ids, request)
        yield row, Counted(nodes, token_ids, asked, last, bad[last])


def is_judged(request: Request) -> bool:
    """Its guesses may pass without being drawn."""
    speculation = request.speculation
    return speculation is not None and speculation.typical and request.sampling.temperature > 0


def _of_delivered(
    scored: Scored, lines: list[int], token_ids: list[int], request: Request
) -> list[TokenLogprob | None]:
    """The log-probabilities at ``lines``, where others may have been drawn."""
    num = [request.sampling.logprobs or 0] * len(lines)
    return logprobs(scored.logits[scored.sampling[lines]], token_ids, num)
