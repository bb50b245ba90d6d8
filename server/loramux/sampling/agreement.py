"""How often keyed noise gives two distributions the same token: what a draft model can hope for.

Draft and target race with the same ``E``: y wins both ``argmin E/p`` and ``argmin E/q`` when every
other x has ``E_x > E_y max(p_x/p_y, q_x/q_y)``, which has the chance ``1 / sum_x max(p_x/p_y,
q_x/q_y)``. Between ``(1 - TV) / (1 + TV)`` and ``1 - TV``, the most that any rule can accept, the
residual one included (Gumbel coupling: Daliri, Musco, Suresh, arXiv 2408.07978).
"""

from __future__ import annotations

import torch
from torch import Tensor


def acceptance(p: Tensor, q: Tensor, token: Tensor) -> Tensor:
    """[...]: the chance that the target, which has ``p`` [..., V], draws the ``token`` [...] that
    the draft drew from ``q`` [..., V] with the same noise. ``q`` of the token must not be 0."""
    own_p, own_q = p.gather(-1, token[..., None]), q.gather(-1, token[..., None])
    return own_p.squeeze(-1) / torch.maximum(p * own_q, q * own_p).sum(-1)


def agreement(p: Tensor, q: Tensor) -> Tensor:
    """[...]: the chance that ``p`` and ``q`` [..., V] draw the same token with the same noise; the
    mean of :func:`acceptance` over the draft's tokens."""
    # Which of the two is the maximum for x and y depends on the order of their q/p alone; where
    # ids that neither has (0/0) stand in it does not matter.
    order = (q / p).argsort(-1)
    p, q = p.gather(-1, order), q.gather(-1, order)
    below, above = p.cumsum(-1), q.flip(-1).cumsum(-1).flip(-1) - q
    both = p * q
    return torch.where(both > 0, both / (q * below + p * above), 0.0).sum(-1)
