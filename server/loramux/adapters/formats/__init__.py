"""From the files of an adapter to its canonical form, one module for each format.

Import is strict: every tensor of the file must be a part of a module of the base, every
field of the config must be one whose meaning we implement or know to be neutral, and the two must
agree. Whatever does not is listed, all of it, and nothing is imported: an adapter that runs with
half of its weights looks like a bad adapter, not like an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loramux.adapters.base_weights import BaseWeights
from loramux.adapters.canonical import CanonicalAdapter
from loramux.adapters.formats import adalora, ia3, lora, miss, s2ft, vera
from loramux.adapters.formats.upload import Upload
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import FileTensor
from loramux.adapters.strict_json import NotStrictJson, parse_object, shown
from loramux.errors import AdapterInvalid
from loramux.wire import BaseDescription

__all__ = ["FORMATS", "MAX_CONFIG_BYTES", "import_adapter", "parse_config", "read_upload"]

MAX_CONFIG_BYTES = 1 << 20

FORMATS: Mapping[str, Callable[[Upload], None]] = {
    "LORA": lora.read,
    "ADALORA": adalora.read,
    "VERA": vera.read,
    "MISS": miss.read,
    "IA3": ia3.read,
    "S2FT": s2ft.read,
}
"""By ``peft_type``. A reader puts pairs and vectors, and all that is wrong, into the Upload."""

_CONVERT = "convert it with PEFT's convert_to_lora and upload what that gives"
_REFUSED = {
    **dict.fromkeys(
        "LOHA LOKR HIRA OFT BOFT HRA FOURIERFT C3A WAVEFT RANDLORA VBLORA UNILORA DELORA GRALORA"
        " SHIRA ROAD LN_TUNING TINYLORA LILY GLORA PSOFT FROD PVERA ADAMSS BEFT PEANUT OSF".split(),
        f"its changes are not low-rank pairs: {_CONVERT}",
    ),
    "BONE": "PEFT no longer reads it; train it again as MISS",
    "XLORA": "routing between adapters is not served",
    "POLY": "routing between adapters is not served",
    **dict.fromkeys(
        "PROMPT_TUNING P_TUNING PREFIX_TUNING MULTITASK_PROMPT_TUNING CPT CARTRIDGE"
        " ADAPTION_PROMPT".split(),
        "prompt methods are not served",
    ),
}


def parse_config(data: bytes) -> dict[str, Any]:
    """The object in an adapter_config.json; AdapterInvalid when it is not plain JSON."""
    if len(data) > MAX_CONFIG_BYTES:
        text = f"the config is larger than {MAX_CONFIG_BYTES} bytes"
        raise AdapterInvalid(text, problems=[text])
    try:
        return parse_object(data)
    except NotStrictJson as error:
        text = f"the config is not valid: {error}"
        raise AdapterInvalid(text, problems=[text]) from None


def import_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, FileTensor],
    base: BaseDescription,
    weights: BaseWeights,
) -> CanonicalAdapter:
    """The adapter that ``config`` and ``tensors`` describe, checked against ``base``.

    Every value is looked at, in blocks. Raises AdapterInvalid with every problem (codes
    rank_mismatch, rank_too_large, non_finite, out_of_range, adapter_invalid).
    """
    upload = Upload(config, tensors, base, weights, Problems())
    read_upload(upload)
    upload.problems.raise_any()
    return upload.canonical()


def read_upload(upload: Upload) -> None:
    """Put all that an upload changes, and all that is wrong with it, into it."""
    config = upload.config
    kind = config.get("peft_type")
    reader = FORMATS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        why = _REFUSED.get(str(kind), f"served are {', '.join(FORMATS)}")
        upload.problems.add(f"peft_type is {shown(kind)}: {why}")
        # Read as the plainest format, so that one answer names all that is wrong.
        reader = lora.read
    reader(upload)
