"""IA3 (arXiv 2205.05638): outputs, or the inputs of feed-forward modules, times a vector."""

from __future__ import annotations

import numpy as np

from loramux.adapters.formats.fields import Rules, suffixes, targets_of
from loramux.adapters.formats.upload import Upload, values_of
from loramux.adapters.strict_json import shown

RULES = Rules(
    implemented=frozenset(["feedforward_modules"]),
    neutral={"init_ia3_weights": "initialisation only"},
    refused={},
)
PARTS = {"ia3_l": "l"}
_OWN_INPUT = ("o_proj", "down_proj")
"""The modules whose input no other module reads."""


def read(upload: Upload) -> None:
    """See ``formats.FORMATS``."""
    config, problems = upload.config, upload.problems
    RULES.check(config, problems)
    targets = targets_of(config, problems, upload.warnings)
    feed_forward = config.get("feedforward_modules")
    if not isinstance(feed_forward, list) or not all(type(m) is str for m in feed_forward):
        problems.add(f"feedforward_modules is {shown(feed_forward)}, not a list of names")
        feed_forward = []
    upload.match(PARTS)
    upload.refuse_rest()
    for at in upload.ordered():
        tensor, name = upload.modules[at]["l"], upload.name(at)
        upload.scan(tensor)
        width_in, width_out = upload.base.widths[at[1]]
        if not set(suffixes(name)).isdisjoint(feed_forward):
            if at[1] not in _OWN_INPUT:
                problems.add(f"{name}: its input is other modules' too, and cannot be scaled alone")
            elif upload.fits(tensor, 1, width_in):
                upload.add_vector(at, "input_gain", values_of(tensor).reshape(-1) - np.float32(1))
        elif upload.fits(tensor, width_out, 1):
            gain = values_of(tensor).reshape(-1) - np.float32(1)
            upload.add_vector(at, "gain", gain)
            if (bias := upload.weights.bias(*at)) is not None:
                upload.add_vector(at, "shift", gain * bias)
    upload.check_targets(targets)
