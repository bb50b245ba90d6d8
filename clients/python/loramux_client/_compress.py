"""ComPEFT (arXiv 2311.13171): a LoRA adapter reduced to the signs of its largest values.

All values of A and B together, tensors sorted by name, are one vector. The share ``density`` of it
that is largest by magnitude stays (more where several are as large as the last), each value as its
sign times ``alpha`` * the vector's standard deviation. What is written is described where the
server reads it, in its ``adapters/compeft.py`` and ``adapters/ternary.py``.

Needs numpy: ``pip install loramux-client[compress]``.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loramux_client._errors import AdapterFilesError
from loramux_client._files import AdapterFiles, File, blocks

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Float32 = npt.NDArray[np.float32]

KEY = "loramux_compeft"
_STORAGE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_MAX_RICE_BITS = 31


@dataclass(frozen=True)
class Compressed:
    """An adapter's files after compression, to be pushed, and what it did to them.

    ``density``, ``alpha``: what was asked for. ``kept``: the share of values that are not zero
    now. ``bytes_before``, ``bytes_after``: of the weights file. ``ratio`` is theirs,
    ``ratio_16bit`` what it would be had the file been of 16-bit values. ``relative_change``: how
    far what a module adds has moved, |B'A' - BA| / |BA| (Frobenius) in the mean over modules; None
    when no module had added anything.
    """

    files: AdapterFiles
    density: float
    alpha: float
    kept: float
    bytes_before: int
    bytes_after: int
    ratio: float
    ratio_16bit: float
    relative_change: float | None


def compress(files: AdapterFiles, density: float, alpha: float = 1.0) -> Compressed:
    """Compress a LoRA adapter (also rsLoRA, patterns). ``density``: above 0, at most 1.

    The adapter is held in memory. Raises AdapterFilesError when it is not LoRA or has trained
    values other than A and B, ValueError for a density or alpha out of range, and ImportError
    without numpy.
    """
    np = _numpy()
    if not 0 < density <= 1:
        raise ValueError(f"density {density!r} is not above 0 and at most 1")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha {alpha!r} is not a positive number")
    config = _config(files.config)
    before = dict(sorted(_read(files.weights).items()))
    _check(config, list(before))
    dtypes = {dtype for dtype, _ in before.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    tau = np.concatenate([_floats(*tensor).reshape(-1) for tensor in before.values()])
    scale = _rounded(alpha * _deviation(tau), dtype)
    if not (scale > 0 and np.isfinite(tau).all()):
        raise AdapterFilesError("all values are equal or zero, or some are not finite")
    signs = _signs(tau, density)
    shapes = {name: values.shape for name, (_, values) in before.items()}
    weights = _file(shapes, dtype, scale, signs)
    after = np.split(signs * np.float32(scale), np.cumsum([math.prod(s) for s in shapes.values()]))
    change = _relative_change(
        {name: _floats(*tensor) for name, tensor in before.items()},
        {name: part.reshape(shapes[name]) for name, part in zip(shapes, after, strict=False)},
    )
    ratio = files.weights.size / len(weights)
    claims = {"density": density, "alpha": alpha, "ratio": ratio, "relative_change": change}
    config[KEY] = {"version": 1, **claims}
    return Compressed(
        AdapterFiles(files.name, _memory(json.dumps(config).encode()), _memory(weights)),
        density,
        alpha,
        kept=float((signs != 0).mean()),
        bytes_before=files.weights.size,
        bytes_after=len(weights),
        ratio=ratio,
        ratio_16bit=2 * tau.size / len(weights),
        relative_change=change,
    )


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as exc:
        text = "compressing needs numpy: pip install loramux-client[compress]"
        raise ImportError(text) from exc
    return numpy


def _memory(data: bytes) -> File:
    return File(partial(io.BytesIO, data), len(data))


def _config(file: File) -> dict[str, Any]:
    try:
        config = json.loads(b"".join(blocks(file, 0, file.size)))
    except ValueError as exc:
        raise AdapterFilesError(f"the config is not JSON: {exc}") from exc
    if not isinstance(config, dict) or KEY in config:
        what = "compressed already" if isinstance(config, dict) else "not an object"
        raise AdapterFilesError(f"the adapter's config is {what}")
    return config


def _check(config: dict[str, Any], names: list[str]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        why = "its trained values are not low-rank matrices, where being near zero means little"
        raise AdapterFilesError(f"peft_type {kind!r} cannot be compressed: {why}")
    halves = tuple(f".{half}" for pair in _PAIRS for half in pair)
    others = [name for name in names if not name.removesuffix(".weight").endswith(halves)]
    if others:
        raise AdapterFilesError(
            "only A and B of LoRA can be compressed: a magnitude, bias or whole weight near zero is"
            f" not a small change. The adapter has {others[0]}"
            + (f" and {len(others) - 1} more" if others[1:] else "")
        )


def _read(file: File) -> dict[str, tuple[str, Array]]:
    """The tensors of a safetensors file: (dtype, values as stored)."""
    import numpy as np

    data = b"".join(blocks(file, 0, file.size))
    size = int.from_bytes(data[:8], "little")
    found = {}
    try:
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[start:end], _STORAGE[entry["dtype"]])
            found[name] = entry["dtype"], values.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise AdapterFilesError(
            f"the weights are not safetensors of {', '.join(_STORAGE)}: {exc!r}"
        ) from exc
    if not found:
        raise AdapterFilesError("the weights file holds no tensors")
    return found


def _floats(dtype: str, values: Array) -> Float32:
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4")


def _deviation(tau: Float32) -> float:
    """The standard deviation of all values, unbiased, in double precision and piece by piece."""
    mean = float(tau.sum(dtype="f8")) / tau.size
    pieces = (tau[i : i + (1 << 20)].astype("f8") - mean for i in range(0, tau.size, 1 << 20))
    return math.sqrt(sum(float(piece @ piece) for piece in pieces) / max(1, tau.size - 1))


def _rounded(value: float, dtype: str) -> float:
    """The nearest number that ``dtype`` holds."""
    import numpy as np

    if dtype == "BF16":
        bits = int(np.float32(value).view(np.uint32))
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return float(np.uint32(bits).view(np.float32))
    return float(np.float32(value) if dtype == "F32" else np.float16(value))


def _signs(tau: Float32, density: float) -> npt.NDArray[np.int8]:
    """-1, 0 or 1 for each value."""
    import numpy as np

    size = np.abs(tau)
    keep = math.ceil(density * len(tau))
    threshold = np.partition(size, len(tau) - keep)[len(tau) - keep]
    return np.where(size >= threshold, np.sign(tau), 0).astype(np.int8)


def _file(
    shapes: dict[str, tuple[int, ...]], dtype: str, scale: float, signs: npt.NDArray[np.int8]
) -> bytes:
    """The compressed weights file."""
    import numpy as np

    at = np.flatnonzero(signs)
    bits = rice_bits(len(signs), len(at))
    tensors, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(_STORAGE[dtype]).itemsize
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = {"scale": scale, "kept": len(at), "rice_bits": bits, "tensors": tensors}
    text, codes = json.dumps(header).encode(), encode(at, signs[at] < 0, bits)
    sizes = {"compeft.header": len(text), "compeft.codes": len(codes)}
    outer, end = {}, 0
    for name, size in sizes.items():
        outer[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    first = json.dumps(outer).encode()
    return len(first).to_bytes(8, "little") + first + text + codes


def rice_bits(count: int, kept: int) -> int:
    """The best width of a remainder where ``kept`` of ``count`` values are kept, wherever they
    are (Kiely 2004, as sparse ternary compression uses it)."""
    if kept in (0, count):
        return 0
    golden = (math.sqrt(5) + 1) / 2
    best = 1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-kept / count)))
    return min(max(best, 0), _MAX_RICE_BITS)


def encode(at: npt.NDArray[np.int64], negative: npt.NDArray[np.bool_], bits: int) -> bytes:
    """The code of values kept at these increasing indices: quotients, remainders, signs."""
    import numpy as np

    gaps = np.diff(at, prepend=-1) - 1
    quotients = gaps >> bits
    ones = np.cumsum(quotients + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
    unary[ones] = 1
    shifts = np.arange(bits - 1, -1, -1)
    remainders = ((gaps[:, None] >> shifts) & 1).astype(np.uint8)
    return b"".join(np.packbits(part).tobytes() for part in (unary, remainders, negative))


def _relative_change(before: dict[str, Float32], after: dict[str, Float32]) -> float | None:
    """The mean over modules of |B'A' - BA| / |BA|, from products of small triangles."""
    import numpy as np

    changes = []
    for name in before:
        for half_a, half_b in _PAIRS:
            other = name.replace(f".{half_a}", f".{half_b}")
            if f".{half_a}" not in name or other not in before:
                continue
            a, b, new_a, new_b = before[name], before[other], after[name], after[other]
            if not (a.ndim == b.ndim == 2 and len(a) == b.shape[1]):
                continue  # no pair; the server says what is wrong
            norm = _norm(b, a)
            if norm:
                moved = _norm(np.hstack([new_b, -b]), np.vstack([new_a, a]))
                changes.append(moved / norm)
    return float(np.mean(changes)) if changes else None


def _norm(b: Float32, a: Float32) -> float:
    """|BA| without the product."""
    import numpy as np

    left = np.linalg.qr(b.astype("f8"), mode="r")
    right = np.linalg.qr(a.astype("f8").T, mode="r")
    return float(np.linalg.norm(np.asarray(left) @ np.asarray(right).T))
