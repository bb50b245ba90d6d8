"""Two packages that may not import each other number the same things: they must agree."""

from __future__ import annotations

from loramux import wire
from loramux.adapters import canonical
from loramux_kernels.lora import table


def test_server_and_kernels_number_modules_vectors_and_vocabularies_alike() -> None:
    assert wire.MODULES == table.MODULES
    assert wire.TABLE_MODULES == table.TABLE_MODULES
    kinds = {"gain": table.GAIN, "shift": table.SHIFT, "input_gain": table.INPUT_GAIN}
    assert {kind: index for index, kind in enumerate(canonical.VECTOR_KINDS)} == kinds
    where = {"embed_tokens": table.EMBEDDING, "lm_head": table.HEAD}
    assert {module: index for index, module in enumerate(canonical.TOKEN_MODULES)} == where
