"""Looking into an adapter's folder as a server would that was asked to serve it; no server needed.

The importer is the one that validates uploads, against the base a ``loramux serve`` with the same
environment would load. Nothing is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loramux.adapters import pack
from loramux.adapters.basis import basis_of
from loramux.adapters.formats import MAX_CONFIG_BYTES
from loramux.adapters.formats.upload import Upload
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import MAX_TENSORS, FileTensor
from loramux.adapters.strict_json import shown
from loramux.config import ServerConfig
from loramux.errors import AdapterInvalid, ConfigError
from loramux.ingest.job import check_size
from loramux.ingest.reading import read_adapter
from loramux.ingest.report import report_of
from loramux.memory.formats import KvFormat
from loramux.model.architecture import read_architecture
from loramux.model.description import describe
from loramux.request import BASE_MODEL_ID
from loramux.wire import BaseDescription

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FLOAT32_BYTES = 4
_OF_NO_LAYER = ("norm", "lm_head", "embed_tokens")
_MOST_PROBLEMS = 4 * MAX_TENSORS


def inspect(folder: Path, config: ServerConfig) -> dict[str, Any]:
    """What a server of ``config`` on a CPU would say to the adapter in ``folder``.

    ``accepted``; every one of the ``problems`` if not, with their ``code``; every tensor of the
    file: what it is (``layer``, ``module``, ``part``; null where it is nothing, or shared) and what
    is wrong with it (``problem``); and the ``report`` of the upload it would be. Raises ConfigError
    when a file is missing or the base cannot be read.
    """
    base = _base(config)
    problems = Problems(_MOST_PROBLEMS)
    found: dict[str, Any] = {
        "folder": str(folder),
        "model": str(config.model),
        "accepted": False,
        "code": None,
        "problems": [],
        "tensors": [],
        "report": None,
    }
    try:
        with open(folder / CONFIG, "rb") as file:
            fields = file.read(MAX_CONFIG_BYTES + 1)
        with open(folder / WEIGHTS, "rb") as file:
            read = read_adapter(fields, file, base, problems)
            found["tensors"] = [_tensor(t, read.upload) for t in read.upload.tensors.values()]
            adapter = read.canonical()
            check_size(adapter, base)
            layout, basis = pack.lay_out(adapter, base), basis_of(adapter)
            found["report"] = report_of(adapter, layout, basis, base, read)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    except AdapterInvalid as error:
        return {**found, "code": error.code, "problems": list(error.problems)}
    return {**found, "accepted": True}


def _base(config: ServerConfig) -> BaseDescription:
    architecture = read_architecture(config.model)
    kv = KvFormat(
        model_id=BASE_MODEL_ID,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        page_tokens=config.page_tokens,
        itemsize=_FLOAT32_BYTES,
    )
    # How large its pool would be nobody knows; nor is its fingerprint needed where nothing is kept.
    return describe(
        config,
        architecture,
        config.model,
        fingerprint="",
        slice_bytes=kv.frame.slice_bytes,
        pool_bytes=0,
    )


def _tensor(tensor: FileTensor, upload: Upload) -> dict[str, Any]:
    place = upload.placed.get(tensor.name)
    at, part = place or (None, "shared" if tensor.name in upload.placed else None)
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "layer": at[0] if at and at[1] not in _OF_NO_LAYER else None,
        "module": at[1] if at else None,
        "part": part,
        "problem": _problem(tensor.name, at and upload.name(at), upload.problems),
    }


def _problem(name: str, module: str | None, problems: Problems) -> str | None:
    """The first problem that names the tensor, or else its module."""
    for text in problems.listed:
        if shown(name) in text or (module and text.startswith((f"{module} ", f"{module}:"))):
            return text
    return None
