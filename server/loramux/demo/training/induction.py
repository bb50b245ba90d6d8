"""Weights that begin with an induction circuit (Olsson et al., 2022) in place.

Texts that tell a name early and again later are learned by "what followed this token last time?":
a head of the first layer writes the previous token into a part of the residual that embeddings
leave free, a head of the second layer looks there for the current token and copies what stands at
that place. A small model finds this only after many million tokens of a flat loss; here it starts
with it, in rough, and everything stays trainable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCALE = 0.3  # of the embeddings
SHARP = 8.0  # of the previous-token head
MATCH = 2.5  # of the matching head


@torch.no_grad()
def begin_with_induction(model: Any) -> None:
    """For a Llama of two layers or more. Residual: constant | tokens | what the last token was."""
    config = model.config
    hidden, width, kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
    free = kv_heads * width
    tokens = slice(1, hidden - free)
    table = model.model.embed_tokens.weight
    table.normal_(0.0, SCALE)
    table[:, 0] = 3 * SCALE
    table[:, hidden - free :] *= 0.1
    model.model.norm.weight.fill_(0.2)

    previous, matching = (model.model.layers[i].self_attn for i in (0, 1))
    group = config.num_attention_heads // kv_heads
    angles = config_angles(config)
    fast, slow = torch.arange(4), torch.arange(7, width // 2)
    for kv in range(kv_heads):
        q, k = _rows(kv * group, width), _rows(kv, width)
        place = slice(hidden - free + kv * width, hidden - free + (kv + 1) * width)
        seen = _orthogonal(width, hidden - free - 1)

        # Looks one token back: the keys point one way, the queries the same way one step earlier.
        amount = SHARP / 4
        previous.k_proj.weight[k][fast, 0] = amount
        previous.q_proj.weight[q][fast, 0] = amount * angles[fast].cos()
        previous.q_proj.weight[q][fast + width // 2, 0] = -amount * angles[fast].sin()
        previous.v_proj.weight[k, tokens] = seen
        previous.o_proj.weight[place, q] = SCALE * torch.eye(width)

        # Looks for the place whose previous token is this one; slow rotations hardly move it.
        for dims in (slow, slow + width // 2):
            matching.q_proj.weight[q][dims, tokens] = MATCH * seen[dims]
            matching.k_proj.weight[k][dims, place] = MATCH * torch.eye(width)[dims]
        copied = _orthogonal(width, hidden - free - 1)
        matching.v_proj.weight[k, tokens] = copied
        matching.o_proj.weight[tokens, q] = copied.T


def config_angles(config: Any) -> Tensor:
    half = config.head_dim // 2
    theta: float = config.rope_parameters["rope_theta"]
    return torch.full((half,), theta).pow(-torch.arange(half) / half)


def _rows(head: int, width: int) -> slice:
    return slice(head * width, (head + 1) * width)


def _orthogonal(rows: int, columns: int) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))
