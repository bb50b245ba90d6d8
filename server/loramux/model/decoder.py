"""The forward pass of the Llama lineage over a paged arena, with every row's own adapters."""

from __future__ import annotations

import torch

from loramux.model.architecture import Architecture
from loramux.model.inputs import ModelInputs
from loramux.model.layers.rotary import rotary_tables
from loramux.model.loader import LayerWeights, Weights
from loramux_kernels.attention import paged_attention, rope_store
from loramux_kernels.dispatch import backend
from loramux_kernels.layers import LayerTable, Work, run_layers
from loramux_kernels.linear import Matrix, gather, project
from loramux_kernels.lora import AdapterTable, Runs, add_lora
from loramux_kernels.lora.table import HEAD, TABLE_SITES
from loramux_kernels.modulate import modulate_inputs, modulate_outputs
from loramux_kernels.norm import add_rms_norm, head_rms_norm, silu_mul
from loramux_kernels.vocabulary import change_embeddings, change_logits


class Decoder:
    """One model, its arena and its workspace; ``forward`` is the only verb.

    ``arena`` is the pool (1-D uint8) that holds the KV pages and the adapters of ``table``.
    ``max_tokens`` is the largest batch in token rows; the workspace is allocated here, once.
    ``max_positions`` bounds the rotary tables (default: the architecture's context). float32 on a
    CPU; float32, bfloat16 or float16 on CUDA: the dtype of the norms.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        arena: torch.Tensor,
        table: AdapterTable,
        device: torch.device,
        max_tokens: int,
        *,
        max_positions: int | None = None,
    ) -> None:
        self.architecture = architecture
        self.weights = weights
        self.arena = arena
        self.table = table
        self.max_tokens = max_tokens
        cos, sin = rotary_tables(
            architecture.rope,
            architecture.head_dim,
            max_positions or architecture.context_length,
        )
        self._cos, self._sin = cos.to(device), sin.to(device)
        like = weights.norm
        self._workspace = _allocate(architecture, max_tokens, like)
        self._layers = _layer_table(architecture, weights) if like.device.type == "cpu" else None
        self.reserve_logits(0)

    def reserve_logits(self, rows: int) -> None:
        """Make room for the logits of so many scored rows; ``forward`` makes more when it must. A
        vocabulary is too wide to hold ``max_tokens`` rows of from the start."""
        like = self.weights.norm
        self._logit_rows = like.new_empty(rows, self.architecture.vocab_size, dtype=torch.float32)
        narrow = rows if like.dtype != torch.float32 else 0
        self._narrow_logits = like.new_empty(narrow, self.architecture.vocab_size)

    @property
    def logits_address(self) -> int:
        """Where ``forward`` leaves its logits; another number once there had to be more room."""
        return self._logit_rows.data_ptr()

    def scored_hidden(self, count: int) -> torch.Tensor:
        """``[count, hidden]``: what the output matrix read in the last ``forward``, for the first
        scored rows. Good until the next call, as the logits are."""
        return self._workspace.hidden[:count]

    def forward(self, inputs: ModelInputs) -> torch.Tensor:
        """Run the batch, storing its keys and values; float32 logits ``[S, vocab]``.

        The logits live in the workspace: they are good until the next call. Raises ``ValueError``
        when the batch has more rows than ``max_tokens``.
        """
        rows, num_scored = inputs.token_ids.shape[0], inputs.scored.shape[0]
        if max(rows, num_scored) > self.max_tokens:
            raise ValueError(f"{rows} rows, {num_scored} scored: at most {self.max_tokens} fit")
        work = self._workspace.first(rows)
        work.residual.zero_()
        gather(work.hidden, self.weights.embedding, inputs.token_ids)
        change_embeddings(work.hidden, inputs.token_ids, self.arena, self.table, inputs.runs)
        if self._layers is not None and backend(work.hidden) == "cpu":
            run_layers(
                work,
                self._layers,
                cos=self._cos,
                sin=self._sin,
                positions=inputs.positions,
                arena=self.arena,
                pages=inputs.pages,
                table=self.table,
                runs=inputs.runs,
            )
        else:
            for index, layer in enumerate(self.weights.layers):
                inputs.before_layer(index)
                self._attend(index, layer, inputs, work)
                self._feed_forward(index, layer, inputs, work)
        eps = self.architecture.rms_eps
        add_rms_norm(work.normed, work.residual, work.hidden, self.weights.norm, eps)
        last = self.architecture.num_layers - 1
        modulate_outputs(work.normed, self.arena, self.table, inputs.runs, last, "norm")
        return self._logits(work.normed, inputs)

    def _attend(self, index: int, layer: LayerWeights, inputs: ModelInputs, work: Work) -> None:
        arch = self.architecture
        add_rms_norm(work.normed, work.residual, work.hidden, layer.input_norm, arch.rms_eps)
        where = (self.arena, self.table, inputs.runs, index)
        modulate_outputs(work.normed, *where, "input_layernorm")
        self._linear(work.qkv, work.normed, layer.qkv, layer.qkv_bias, inputs, index, "qkv")
        if layer.q_norm is not None and layer.k_norm is not None:
            head_rms_norm(
                work.qkv,
                layer.q_norm,
                layer.k_norm,
                num_heads=arch.num_heads,
                num_kv_heads=arch.num_kv_heads,
                head_dim=arch.head_dim,
                eps=arch.rms_eps,
            )
        rope_store(
            work.qkv,
            cos=self._cos,
            sin=self._sin,
            positions=inputs.positions,
            arena=self.arena,
            pages=inputs.pages,
            layer=index,
            num_heads=arch.num_heads,
        )
        paged_attention(
            work.attended,
            work.qkv,
            arena=self.arena,
            pages=inputs.pages,
            layer=index,
            num_heads=arch.num_heads,
            scale=arch.head_dim**-0.5,
            window=arch.windows[index],
        )
        self._linear(work.hidden, work.attended, layer.o, layer.o_bias, inputs, index, "o")

    def _feed_forward(
        self, index: int, layer: LayerWeights, inputs: ModelInputs, work: Work
    ) -> None:
        eps = self.architecture.rms_eps
        add_rms_norm(work.normed, work.residual, work.hidden, layer.post_norm, eps)
        where = (self.arena, self.table, inputs.runs, index)
        modulate_outputs(work.normed, *where, "post_attention_layernorm")
        self._linear(
            work.gate_up, work.normed, layer.gate_up, layer.gate_up_bias, inputs, index, "gate_up"
        )
        silu_mul(work.inner, work.gate_up)
        self._linear(work.hidden, work.inner, layer.down, layer.down_bias, inputs, index, "down")

    def _linear(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weight: Matrix,
        bias: torch.Tensor | None,
        inputs: ModelInputs,
        layer: int,
        site: str,
    ) -> None:
        """The base's raw ``W x``, then each row's adapters, then the bias."""
        where = (self.arena, self.table, inputs.runs, layer, site)
        modulate_inputs(x, *where)
        project(out, x, weight)
        modulate_outputs(out, *where)
        add_lora(
            out, x, arena=self.arena, table=self.table, runs=inputs.runs, layer=layer, site=site
        )
        if bias is not None:
            out += bias

    def _logits(self, normed: torch.Tensor, inputs: ModelInputs) -> torch.Tensor:
        """The output matrix, on the scored rows only."""
        count = inputs.scored.shape[0]
        picked = self._workspace.hidden[:count]
        torch.index_select(normed, 0, inputs.scored, out=picked)
        if self._logit_rows.shape[0] < count:
            self.reserve_logits(count)
        logits = self._logit_rows[:count]
        narrow = logits if normed.dtype == torch.float32 else self._narrow_logits[:count]
        project(narrow, picked, self.weights.lm_head)
        if self._changes_logits(inputs.runs):
            self._adapt_logits(narrow, picked, inputs.runs.of_rows(inputs.scored_rows))
        return logits if narrow is logits else logits.copy_(narrow)

    def _changes_logits(self, runs: Runs) -> bool:
        last = self.architecture.num_layers - 1
        site = list(TABLE_SITES).index("lm_head")
        vectors = bool(runs.modulated(self.table)[last, site].any())
        pairs = runs.top_rank(self.table, last, "lm_head") > 0
        return vectors or pairs or runs.names_tokens(self.table, HEAD)

    def _adapt_logits(self, logits: torch.Tensor, x: torch.Tensor, runs: Runs) -> None:
        """Each scored row's own changes of lm_head."""
        last = self.architecture.num_layers - 1
        where = (self.arena, self.table, runs, last, "lm_head")
        modulate_outputs(logits, *where)
        add_lora(
            logits, x, arena=self.arena, table=self.table, runs=runs, layer=last, site="lm_head"
        )
        change_logits(logits, x, self.arena, self.table, runs)


def _allocate(arch: Architecture, rows: int, like: torch.Tensor) -> Work:
    widths = arch.widths
    hidden, inner, q = arch.hidden_size, arch.intermediate_size, widths["q_proj"][1]
    sizes = (hidden, hidden, hidden, q + 2 * widths["k_proj"][1], q, 2 * inner, inner)
    return Work(*(like.new_zeros(rows, size) for size in sizes))


def _layer_table(arch: Architecture, weights: Weights) -> LayerTable:
    return LayerTable(
        [(w.qkv, w.o, w.gate_up, w.down) for w in weights.layers],
        [
            (w.input_norm, w.post_norm, w.q_norm, w.k_norm)
            + (w.qkv_bias, w.o_bias, w.gate_up_bias, w.down_bias)
            for w in weights.layers
        ],
        windows=arch.windows,
        num_heads=arch.num_heads,
        head_dim=arch.head_dim,
        eps=arch.rms_eps,
    )
