"""Where an adapter to push may come from: files of this machine, a model in memory, a hub."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from loramux_client._compress import Compressed
from loramux_client._errors import AdapterFilesError
from loramux_client._files import (
    BESIDE,
    CONFIG,
    HEADS,
    WEIGHTS,
    AdapterFiles,
    Source,
    find_adapter,
)

HUB = "hf:"


class PeftModel(Protocol):
    """What is asked of a model in memory: PEFT's way to save its adapters."""

    def save_pretrained(self, save_directory: str, *, safe_serialization: bool) -> object:
        """Write adapter_config.json and adapter_model.safetensors, or a folder of them for every
        adapter that is not called "default"."""
        ...


AnySource = Source | PeftModel | Compressed
"""Also ``hf:org/repo`` or ``hf:org/repo@revision`` on the Hugging Face hub, with the extra hub."""


@contextlib.contextmanager
def open_adapter(source: AnySource) -> Iterator[AdapterFiles]:
    """The files of an adapter wherever it is; those of a model in memory are gone afterwards.

    Their name is empty when the source has none. Raises AdapterFilesError, ImportError for a hub
    without its library.
    """
    if isinstance(source, Compressed):
        yield source.files
    elif isinstance(source, (tuple, os.PathLike)):
        yield find_adapter(source)
    elif isinstance(source, str):
        yield _download(source[len(HUB) :]) if source.startswith(HUB) else find_adapter(source)
    elif hasattr(source, "save_pretrained"):
        with tempfile.TemporaryDirectory(prefix="loramux-") as folder:
            source.save_pretrained(folder, safe_serialization=True)
            yield _saved(Path(folder))
    else:
        raise TypeError(f"an adapter cannot be pushed from a {type(source).__name__}")


def _saved(folder: Path) -> AdapterFiles:
    places = [path.parent for path in folder.rglob(CONFIG)]
    if len(places) != 1:
        names = ", ".join(sorted(path.name for path in places if path != folder))
        raise AdapterFilesError(
            f"the model holds {len(places)} adapters, not one"
            + (f" ({names}): save the one you mean and push its folder" if places else "")
        )
    return replace(find_adapter(places[0]), name="")


def _download(repository: str) -> AdapterFiles:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:
        text = f"{HUB} needs huggingface_hub: pip install loramux-client[hub]"
        raise ImportError(text) from exc
    name, _, revision = repository.partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise AdapterFilesError(f"{HUB}{repository} is not {HUB}ORGANISATION/REPOSITORY")
    folder = snapshot_download(
        name, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS, HEADS, *BESIDE]
    )
    return replace(find_adapter(folder), name=name.rpartition("/")[2])
