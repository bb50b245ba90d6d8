"""Biases of the base's own linear modules that were trained along (``bias``), in any format."""

from __future__ import annotations

from loramux.adapters.formats.upload import Module, Upload, values_of
from loramux.adapters.strict_json import shown

PARTS = {"base_layer.bias": "bias", "bias": "bias"}


def read_biases(upload: Upload, only: str) -> None:
    """Take the parts above out of ``upload.modules`` and put what they change into the upload.

    ``only``: what the format calls the biases of its targets alone, like ``lora_only``.
    """
    biases = {at: parts.pop("bias") for at, parts in upload.modules.items() if "bias" in parts}
    for at in biases:
        if not upload.modules[at]:
            del upload.modules[at]
    bias = upload.config.get("bias") or "none"
    if bias not in ("none", "all", only):
        upload.problems.add(f"bias is {shown(bias)}: it is none, all or {only}")
    for at, tensor in biases.items():
        upload.scan(tensor)
        own = upload.weights.bias(*at)
        name = shown(tensor.name)
        if bias == "none":
            upload.problems.add(f"tensor {name}: the config says that no bias was trained")
        elif own is None:
            upload.problems.add(f"tensor {name}: the base has no bias there")
        elif upload.fits(tensor, len(own)):
            upload.add_vector(at, "shift", values_of(tensor) - own)
    if bias == "none":
        return
    for at in sorted(_biased(upload, everywhere=bias == "all")):
        if at not in biases:
            upload.problems.add(
                f"{upload.name(at)}: the config says its bias was trained (bias: {bias}), "
                "and the file does not hold it"
            )


def _biased(upload: Upload, *, everywhere: bool) -> list[Module]:
    """The modules whose bias the config says was trained."""
    all_of_them = [(x, m) for x in range(upload.base.num_layers) for m in upload.base.widths]
    some = all_of_them if everywhere else list(upload.modules)
    return [at for at in some if upload.weights.bias(*at) is not None]
