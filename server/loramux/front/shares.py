"""Which of several weighted targets answers a request."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

from loramux.adapters.aliases import Target


def choose(targets: Sequence[Target], tenant: str, alias: str, user: str | None) -> Target:
    """One target, each in proportion to its weight: for a ``user`` always the same one while the
    weights stay, without one drawn anew each time.

    Weighted rendezvous hashing (Thaler and Ravishankar 1998; the logarithm is Schindelhauer and
    Schomaker's, 2005): every target has a share of the users for its own, so when weights move, or
    a target comes or goes, no user moves between two targets whose ratio stayed. Neither the
    revision nor the order of the targets plays a part.
    """
    if user is None:
        return random.choices(targets, [target.weight for target in targets])[0]
    return min(targets, key=lambda target: _wait(target, tenant, alias, user))


def _wait(target: Target, tenant: str, alias: str, user: str) -> float:
    """An exponential variate of the target's weight as rate; of several the shortest is a target's
    in proportion to its rate."""
    digest = hashlib.sha256()
    for text in (tenant, alias, target.owner, target.name, target.digest, user):
        data = text.encode()
        digest.update(len(data).to_bytes(8) + data)
    # 52 bits and a half: never 0 and never 1.
    uniform = ((int.from_bytes(digest.digest()[:8]) >> 12) + 0.5) / 2**52
    return -math.log(uniform) / target.weight
