"""The vocabulary of a request: what to sample, with which adapters, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from loramux.speculation.entropy import Router

FinishReason = Literal["stop", "length", "abort"]
"""``stop``: EOS, a stop token or a stop string. ``length``: max_tokens or the context. ``abort``:
the client left or an operator asked."""

BASE_MODEL_ID = 0
"""``model_id`` of the target model: ``--model``."""
DRAFT_MODEL_ID = 1
"""``--draft-model``, which guesses for the target."""
SMALL_MODEL_ID = 2
"""``--small-model``, which takes over where a text is easy (entropy-adaptive decoding)."""

Role = Literal["target", "draft", "small"]
MODEL_IDS: dict[Role, int] = {
    "target": BASE_MODEL_ID,
    "draft": DRAFT_MODEL_ID,
    "small": SMALL_MODEL_ID,
}
"""What the models are called where an adapter says which one it is for."""


class AdapterRef(msgspec.Struct, frozen=True, array_like=True):
    """One adapter of a request: its content digest (64 lower-case hex) and the request's scale."""

    digest: str
    scale: float = 1.0


Adapters = tuple[AdapterRef, ...]
"""The ordered adapter list of a request. The base model is the empty one."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one choice of one request picks its tokens; everything resolved, nothing left to default.

    The fields mean what OpenAI and vLLM mean by them. ``seed`` is always set: the front draws one
    when the client gives none. ``stop_token_ids`` already holds the model's EOS ids unless the
    client asked to ignore them. ``logprobs``: how many alternatives per token (0: only the chosen
    one's), None for no log-probabilities at all; ``prompt_logprobs`` likewise for the prompt.
    """

    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class Speculation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which drafters guess ahead for a request, the first that has something to say, and how many
    tokens at most in a step; ``tree``: guesses may branch. What is delivered does not depend on
    it, unless ``typical``: then a guess passes that is likely enough, where tokens are drawn at
    random (see ``sampling.typical``). ``heads``: the digest of the file of heads that ``medusa``
    guesses with, which an adapter has brought; "" for the base's own."""

    drafters: tuple[str, ...]
    max_draft_tokens: int = 8
    tree: bool = False
    typical: bool = False
    heads: str = ""


class EntropyAdaptive(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a request moves between the large and the small model (entropy-adaptive decoding,
    arXiv 2502.06833): to the large one while the mean entropy in bits of the last ``window``
    distributions is above ``threshold``, else to the small one; never within ``min_dwell`` tokens
    of the last move. What is delivered depends on it."""

    threshold: float
    window: int = 5
    min_dwell: int = 8
    start: Literal["small", "large"] = "small"


class Status(IntEnum):
    """Where a request is: only forward, except that preemption sends it back to WAITING."""

    WAITING = 0
    RUNNING = 1
    DONE = 2


class Kv:
    """What a model has computed of a request's ids, wearing ``adapters``, and where.

    ``num_computed`` ids have their KV in the pool, in the frames ``page_table[:num_pages]``, of
    which the first ``num_shared`` are full and in the prefix cache. ``page_keys`` are the content
    keys of the first pages, as far as they were needed yet.
    """

    __slots__ = (
        "adapters",
        "model_id",
        "num_computed",
        "num_pages",
        "num_shared",
        "page_keys",
        "page_table",
    )

    def __init__(self, model_id: int = BASE_MODEL_ID, adapters: Adapters = ()) -> None:
        self.model_id = model_id
        self.adapters = adapters
        self.num_computed = 0
        self.page_table: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.num_pages = 0
        self.num_shared = 0
        self.page_keys: list[bytes] = []

    def reserve(self, num_pages: int) -> None:
        """Make room in the page table for so many pages."""
        self.page_table.resize(num_pages, refcheck=False)

    def add_frames(self, frames: Sequence[int]) -> None:
        """The next pages live in ``frames``."""
        self.page_table[self.num_pages : self.num_pages + len(frames)] = frames
        self.num_pages += len(frames)

    def take_frames(self) -> list[int]:
        """Forget all KV and hand back the frames it was in, in order."""
        frames: list[int] = self.page_table[: self.num_pages].tolist()
        self.num_pages = self.num_shared = self.num_computed = 0
        return frames


class Request:
    """One choice of one request as the engine carries it.

    ``ids[:num_ids]`` is prompt then output; ``kv`` is what the model that serves it now has of
    them, and ``companions`` what other models wear for it, by model id. A step computes some of
    those it has not; when it reaches the end, one more id is sampled. While that step is on its way
    the id counts already, but is not known (``expects``). Of ``num_drafted`` guesses that were
    verified ``num_accepted`` were right.

    One that moves between two models has a ``router``, and in ``lagging`` what the other one has.
    """

    def __init__(
        self,
        request_id: str,
        *,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        output_ids: Sequence[int] = (),
        adapters: Adapters = (),
        model_id: int = BASE_MODEL_ID,
        tenant: str = "",
        pool_share: float | None = None,
        cache_salt: str = "",
        speculation: Speculation | None = None,
        companions: Mapping[int, Adapters] | None = None,
        deadline: float | None = None,
        arrival: float = 0.0,
    ) -> None:
        self.id = request_id
        self.tenant = tenant
        self.pool_share = pool_share
        self.adapters = adapters
        self.cache_salt = cache_salt
        self.sampling = sampling
        self.speculation = speculation
        self.companions = companions or {}
        self.deadline = deadline
        self.arrival = arrival
        self.status = Status.WAITING
        self.num_prompt = len(prompt_ids)
        self.max_ids = self.num_prompt + sampling.max_tokens
        self.ids = np.empty(self.max_ids, dtype=np.int64)
        self.num_ids = self.num_prompt + len(output_ids)
        self.ids[: self.num_prompt] = prompt_ids
        self.ids[self.num_prompt : self.num_ids] = output_ids
        self.kv = Kv(model_id, adapters)
        self.lagging: Kv | None = None
        self.router: Router | None = None
        self.expects = False
        self.num_cached: int | None = None
        self.first_scheduled: float | None = None
        self.first_sampled: float | None = None
        self.prompt_logprobs: list[Any] = []
        self.num_drafted = 0
        self.num_accepted = 0

    @property
    def fair_key(self) -> tuple[str, Adapters]:
        """Whose share of the server this request uses: a tenant's traffic on one adapter list."""
        return (self.tenant, self.adapters)

    @property
    def kvs(self) -> tuple[Kv, ...]:
        """What each of its models has of it, first the one that serves it now."""
        return (self.kv,) if self.lagging is None else (self.kv, self.lagging)

    def route(self, router: Router, lagging: Kv) -> None:
        """``router`` says from now on which model serves it: that of ``kv`` or of ``lagging``."""
        self.router, self.lagging = router, lagging
        self.follow_router()

    def follow_router(self) -> bool:
        """Go on with the model that the router is on; whether that is another than before."""
        if self.router is None or self.router.model_id == self.kv.model_id:
            return False
        assert self.lagging is not None
        self.kv, self.lagging = self.lagging, self.kv
        return True

    @property
    def num_outputs(self) -> int:
        return self.num_ids - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Ids whose KV is still to be computed."""
        return self.num_ids - self.kv.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until the log-probabilities of the whole prompt are collected."""
        return (
            self.sampling.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt
        )

    @property
    def is_ending(self) -> bool:
        """Whatever the id is that it expects, it will be the last."""
        return self.expects and self.num_ids == self.max_ids

    def expect(self) -> None:
        """One more output is on its way."""
        self.num_ids += 1
        self.expects = True

    def receive(self, token_ids: Sequence[int]) -> None:
        """What came: one id, and one more for every guess that was right; or none after all."""
        self.expects = False
        self.num_ids += len(token_ids) - 1
        self.ids[self.num_ids - len(token_ids) : self.num_ids] = token_ids
