"""What adapters are called in labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OTHERS = "(other)"
"""No adapter can be called so."""


def adapter_label(digest: str, base_name: str, names: Mapping[str, Sequence[str]]) -> str:
    """The first of the names that mean ``digest`` now, or its beginning; "" is the base model."""
    if not digest:
        return base_name
    return names[digest][0] if names.get(digest) else f"sha256:{digest[:12]}"
