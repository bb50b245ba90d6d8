"""All that the front, engine and ingest processes say to each other: msgpack structs, never pickle.

    front  -> engine   Submit, Abort, Command
    engine -> front    Ready, StepDone (one a step), Reply, Heartbeat
    front  -> ingest   IngestJob, BlendJob
    ingest -> front    IngestDone

A socket carries one encoded message per frame. ``engine_epoch`` counts the engine processes the
front has started; anything from an older epoch is dropped by the front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from loramux.request import (
    Adapters,
    EntropyAdaptive,
    FinishReason,
    SamplingParams,
    Speculation,
)

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear modules of a decoder layer, in the order every table of loramux uses."""

TABLE_MODULES = (
    *MODULES,
    "input_layernorm",
    "post_attention_layernorm",
    "norm",
    "lm_head",
    "embed_tokens",
)
"""All that an adapter may change. The last three are not a layer's: ``embed_tokens`` stands with
the first layer, ``norm`` and ``lm_head`` with the last."""


def module_path(layer: int, module: str) -> str:
    """Where one of TABLE_MODULES stands in a model, below ``model.`` except for lm_head."""
    if module in ("norm", "lm_head", "embed_tokens"):
        return module
    block = "self_attn." if module in MODULES[:4] else "mlp." if module in MODULES else ""
    return f"layers.{layer}.{block}{module}"


def table_widths(
    widths: Mapping[str, tuple[int, int]], vocab_size: int
) -> dict[str, tuple[int, int]]:
    """``widths`` and those of the other TABLE_MODULES; a norm's width is its in and its out."""
    hidden = widths["q_proj"][0]
    norms = dict.fromkeys(TABLE_MODULES[len(MODULES) : -2], (hidden, hidden))
    return {
        **widths,
        **norms,
        "lm_head": (hidden, vocab_size),
        "embed_tokens": (vocab_size, hidden),
    }


def frames_of(share: float, num_frames: int) -> int:
    """The frames in a ``share`` of the pool; what a person means by 0.29 of 100 is 29."""
    return math.floor(share * num_frames + 1e-9)


class BaseDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the ingest process must know of the base model to validate and pack for it.

    ``widths[module] = (in_features, out_features)``; ``slice_bytes`` is the pool's slice, of which
    a frame has ``frame_slices`` (0: one per layer, as where the target's pool is concerned).
    ``max_adapter_bytes`` is what one may take of the pool's ``pool_bytes``, 0 when nothing is set.
    ``directory`` holds the checkpoint; ``step_bytes`` of its matrices are read in a step, however
    many rows it has; ``quantized``: it is served rounded; ``tied``: lm_head is
    embed_tokens.
    """

    fingerprint: str
    num_layers: int
    widths: dict[str, tuple[int, int]]
    slice_bytes: int
    frame_slices: int = 0
    max_rank: int
    vocab_size: int = 0
    max_adapter_bytes: int = 0
    pool_bytes: int = 0
    directory: str = ""
    step_bytes: int = 0
    quantized: bool = False
    tied: bool = False

    @property
    def table_widths(self) -> dict[str, tuple[int, int]]:
        """See the function."""
        return table_widths(self.widths, self.vocab_size)


class Submit(msgspec.Struct, tag=True, kw_only=True):
    """Start, or after a restart continue, one choice of a request.

    ``prompt_ids`` and ``output_ids`` (already delivered) are token ids. ``cache_salt`` separates
    prefix caches beyond the tenant. ``resume`` is that of the last Output, for a request that is
    continued and had one. ``companions``: the adapters that another model wears for this
    request, by model id. ``deadline_s`` is the time still allowed, counted from arrival
    at the engine; None for no limit. ``pool_share``: the part of the pool that the KV of the
    tenant's running requests may take, from now on; None for no limit.
    """

    request_id: str
    tenant: str
    model_id: int
    adapters: Adapters
    prompt_ids: list[int]
    sampling: SamplingParams
    output_ids: list[int] = []
    cache_salt: str = ""
    resume: bytes | None = None
    speculation: Speculation | None = None
    entropy: EntropyAdaptive | None = None
    companions: dict[int, Adapters] = {}
    deadline_s: float | None = None
    pool_share: float | None = None


class Abort(msgspec.Struct, tag=True):
    """The front wants nothing more of these requests. No terminal event is sent back."""

    request_ids: list[str]


class Command(msgspec.Struct, tag=True, kw_only=True):
    """An operator's wish. ``digest`` is set for pin, unpin and evict; the answer is a Reply."""

    command_id: int
    kind: Literal["pin", "unpin", "evict", "drain", "state"]
    digest: str | None = None


class TokenLogprob(msgspec.Struct, array_like=True):
    """Log-softmax of the raw logits at one position.

    ``logprob``/``rank`` are the token's own (rank 1 is the most likely); ``top`` lists
    ``(token_id, logprob)``, most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, array_like=True):
    """New tokens of one request, ``start_index`` being the output position of the first.

    ``drafted`` is (the drafter's name, how many tokens it had guessed, how far ahead they went)
    when these tokens verified guesses: all of them but the last were guessed right.
    ``prompt_logprobs`` comes once, complete, in the request's first Output when it was asked for:
    one entry per prompt token, None for the first. ``started`` comes once, in the first Output:
    Finished's (cached_tokens, queue_s, prefill_s), for requests the front ends (a stop string).
    ``resume``: what another engine needs beside the ids so far to go on just so.
    ``ledger`` of an entropy-adaptive request, so far: output tokens by the large model and by the
    small one, then tokens each of them has computed, prompts and catching up included. Another
    engine counts on: it travels in ``resume``.
    """

    request_id: str
    start_index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    resume: bytes | None = None
    started: tuple[int, float, float] | None = None
    drafted: tuple[str, int, int] | None = None
    ledger: tuple[int, int, int, int] | None = None


class Finished(msgspec.Struct, array_like=True):
    """The terminal event of a request that ended as asked.

    ``stop_token_id`` is the token that ended it (EOS or one of stop_token_ids), which is the last
    token of its outputs. ``cached_tokens`` counts prompt tokens served from the prefix cache.
    """

    request_id: str
    reason: FinishReason
    stop_token_id: int | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0


class Failed(msgspec.Struct, array_like=True):
    """The terminal event of a request that could not be finished; ``code`` is an errors.py code,
    ``param`` the field of the request that is at fault."""

    request_id: str
    code: str
    message: str
    param: str | None = None


class Ready(msgspec.Struct, tag=True, kw_only=True):
    """The engine has a model, a pool and compiled kernels: requests may come.

    ``drafters`` are those it has, in the order in which a request that leaves the choice to the
    server asks them; for an adapter with heads of its own it has ``medusa`` as well, also when the
    base has no heads. ``partners`` are the other models it has, by model id.
    """

    engine_epoch: int
    base: BaseDescription
    vocab_size: int
    max_model_len: int
    page_tokens: int
    num_frames: int
    frame_bytes: int
    max_num_seqs: int
    device: str
    dtype: str
    drafters: tuple[str, ...] = ()
    partners: dict[int, BaseDescription] = {}
    startup_s: dict[str, float] = {}


class StepDone(msgspec.Struct, tag=True, kw_only=True):
    """What one step produced. ``stats`` is ``metrics.stats.StepStats`` as builtins."""

    engine_epoch: int
    step: int
    outputs: list[Output] = []
    finished: list[Finished] = []
    failed: list[Failed] = []
    stats: dict[str, Any] = {}

    @property
    def moved(self) -> bool:
        """Something was launched or came to an end: the next step may find more to do. After
        another only a message or a loaded adapter can bring work."""
        tried = self.stats.keys() & {"batch_rows", "shortages"}
        return bool(tried or self.outputs or self.finished or self.failed)


class Reply(msgspec.Struct, tag=True, kw_only=True):
    """The answer to one Command: ``payload`` on success, ``error`` (code, message) otherwise."""

    engine_epoch: int
    command_id: int
    payload: dict[str, Any] = {}
    error: tuple[str, str] | None = None


class Heartbeat(msgspec.Struct, tag=True):
    """Sent by a thread of the engine, so a long step is told from a dead process.

    ``step_running_s`` is how long the current step has run, and ``predicted_s`` how long it was
    expected to; 0 when idle.
    """

    engine_epoch: int
    step_running_s: float = 0.0
    predicted_s: float = 0.0


class IngestJob(msgspec.Struct, tag=True, kw_only=True):
    """Validate two blobs as a PEFT adapter and, if they are good, write the packed form.

    ``profile_digest`` and ``heads_digest``: two more blobs, the adapter's profile and its own
    Medusa heads; "" when it has none. ``base`` rides along so the ingest process keeps no state.
    ``pack=False`` only validates.
    """

    job_id: int
    config_digest: str
    weights_digest: str
    base: BaseDescription
    profile_digest: str = ""
    heads_digest: str = ""
    pack: bool = True


BlendMethod = Literal["soup", "ties", "dare_ties", "dare_linear", "scale_layers", "compress"]


class BlendRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """How adapters become one. Which fields a method reads: ``adapters.blend.FIELDS``.

    ``rank``: of the result; 0: the sources' ranks add up. ``density``: the share of values that
    stays when changes are pruned. ``alpha``, ``beta``: the scale of the first block, and how much
    is added to it up to the last.
    """

    method: BlendMethod
    rank: int = 0
    density: float = 1.0
    majority_sign_method: Literal["total", "frequency"] = "total"
    seed: int = 0
    alpha: float = 1.0
    beta: float = 0.0


class BlendSource(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of a blend: what to call it, its version, its files, its weight."""

    name: str
    digest: str
    config_digest: str
    weights_digest: str
    weight: float


class BlendJob(msgspec.Struct, tag=True, kw_only=True):
    """Make an adapter of others and store its weights, at most ``limit_bytes``, as a blob."""

    job_id: int
    sources: list[BlendSource]
    recipe: BlendRecipe
    base: BaseDescription
    limit_bytes: int


class IngestDone(msgspec.Struct, tag=True, kw_only=True):
    """The outcome of one IngestJob or BlendJob.

    ``problems`` is empty exactly when the adapter is good; then ``digest`` is its version and
    ``report`` holds rank, num_bytes, num_frames, dtype, tensors, modules, layers, warnings.
    ``code`` is an errors.py code when there are problems. Of a BlendJob: ``digest`` is that of the
    weights, ``config`` the adapter_config.json to go with them, ``report`` what the rank has kept.
    """

    job_id: int
    digest: str = ""
    config: bytes = b""
    report: dict[str, Any] = {}
    problems: list[str] = []
    code: str = "adapter_invalid"


ToEngine = Submit | Abort | Command
FromEngine = Ready | StepDone | Reply | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
decode_ingest_job = msgspec.msgpack.Decoder(IngestJob | BlendJob).decode
decode_ingest_done = msgspec.msgpack.Decoder(IngestDone).decode
