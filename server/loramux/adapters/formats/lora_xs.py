"""LoRA-XS (arXiv 2405.17604): ``B R A``, of which only R [r, r] was trained. A and B are kept once
for all adapters that have the same (``adapters.basis``).

Its authors' code is PEFT's LoRA with one more tensor a module: a LoRA config, lora_A and lora_B
that came from the SVD of the base's weight, and R, whose name an older PEFT runs into the module's
when it takes the adapter's name "default" out.
"""

from __future__ import annotations

from loramux.adapters.formats.upload import Upload

PARTS = {
    "default_lora_latent_mapping.weight": "R",
    "_lora_latent_mapping.weight": "R",
}
MISSING = (
    "is LoRA-XS's R without its A and B; singular vectors have other signs on other machines, so "
    "they cannot be computed again: save lora_A and lora_B beside it"
)


def check(upload: Upload, *, plain: bool) -> None:
    """R is there for every pair or for none, and nothing else is asked of these (``plain``)."""
    with_r = [at for at, parts in upload.modules.items() if "R" in parts]
    if not with_r:
        return
    if not plain:
        upload.problems.add(
            "LoRA-XS (lora_latent_mapping) is not defined with use_dora, lora_bias or an "
            "init_lora_weights that changes the base"
        )
    for at in with_r:
        if at[1] == "embed_tokens":
            upload.problems.add("LoRA-XS (lora_latent_mapping) of embed_tokens is not defined")
    for at in upload.ordered():
        if "R" not in upload.modules[at]:
            text = f"{upload.name(at)} has no lora_latent_mapping, and other modules have one"
            upload.problems.add(text)
