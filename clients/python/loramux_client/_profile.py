"""How an adapter is spoken to and speaks, read from what lies beside it in its folder.

PEFT users have chat_template.jinja or tokenizer_config.json, and generation_config.json, there;
loramux.json is a profile as the server takes it, and wins field by field.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramux_client._errors import AdapterFilesError
from loramux_client._files import AdapterFiles, blocks

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
GENERATION, OWN = "generation_config.json", "loramux.json"

Choice = bool | Mapping[str, Any] | str | os.PathLike[str]
"""What lies beside the adapter; nothing; this profile; or the one in this JSON file."""

MAX_BYTES = 64 << 20
"""Of one such file; tokenizer_config.json can be large, but not that large."""

_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": ({},),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
"""Fields of a generation config that change what is said and that no server implements: the values
beside null that change nothing."""


def profile_of(files: AdapterFiles, choice: Choice) -> dict[str, Any]:
    """The profile to push; empty for none. Raises AdapterFilesError when it cannot be had."""
    if isinstance(choice, Mapping):
        return dict(choice)
    if not isinstance(choice, bool):
        path = Path(choice)
        try:
            return _object(str(path), path.read_bytes())
        except OSError as exc:
            raise AdapterFilesError(f"{path} cannot be read: {exc}") from exc
    if not choice:
        return {}
    for name, file in files.beside.items():
        if file.size > MAX_BYTES:
            raise _refused(f"{name} has {file.size} bytes")
    found = {name: b"".join(blocks(file, 0, file.size)) for name, file in files.beside.items()}
    profile = _generation(found)
    if template := _template(found):
        profile["chat_template"] = template
    if OWN in found:
        own = _object(OWN, found[OWN])
        generation = own.get("generation")
        if isinstance(generation, dict) and "generation" in profile:
            own["generation"] = {**profile["generation"], **generation}
        profile.update(own)
    return profile


def _template(found: Mapping[str, bytes]) -> str | None:
    if TEMPLATE in found:
        return _text(TEMPLATE, found[TEMPLATE])
    if TOKENIZER not in found:
        return None
    template = _object(TOKENIZER, found[TOKENIZER]).get("chat_template")
    if isinstance(template, list):
        named = [t.get("template") for t in template if isinstance(t, dict) and _is_default(t)]
        template = named[0] if named else None
    if template is not None and not isinstance(template, str):
        raise _refused(f"{TOKENIZER}: chat_template is neither a text nor a list of texts")
    return template


def _is_default(template: dict[str, Any]) -> bool:
    return template.get("name") == "default"


def _generation(found: Mapping[str, bytes]) -> dict[str, Any]:
    """Sampling defaults and ends. What concerns anything else is left where it is."""
    if GENERATION not in found:
        return {}
    config = _object(GENERATION, found[GENERATION])
    for name, harmless in _HARMLESS.items():
        value = config.get(name)
        if value is not None and not any(_same(value, ok) for ok in harmless):
            raise _refused(f"{GENERATION}: {name} changes what the adapter says; no server does it")
    given = {name: value for name, value in config.items() if value is not None}
    defaults = {ours: given[name] for name, ours in _DEFAULTS.items() if name in given}
    if given.get("do_sample") is False:
        defaults["temperature"] = 0
    profile: dict[str, Any] = {"generation": defaults} if defaults else {}
    if "eos_token_id" in given:
        profile["eos_token_id"] = given["eos_token_id"]
    if stops := given.get("stop_strings"):
        profile["stop"] = [stops] if isinstance(stops, str) else stops
    return profile


def _same(value: Any, harmless: Any) -> bool:
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)


def _refused(message: str) -> AdapterFilesError:
    return AdapterFilesError(f"{message} (--no-profile, profile=False, leaves the file out)")


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise _refused(f"{name} is not UTF-8") from exc


def _object(name: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_text(name, data))
    except (ValueError, RecursionError) as exc:
        raise _refused(f"{name} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise _refused(f"{name} is not a JSON object")
    return value
