"""Adapters that are none, over HTTP and through the real ingest process: each is refused with its
status and code whichever way it came, is listed as failed and serves nobody, and costs no memory.

The catalogue's rows 33 to 43; the others are where their routes are tested.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.adapters.peft_files import (
    Tensors,
    base_description,
    file_bytes,
    make_config,
    make_tensors,
    safetensors_bytes,
    tensor_name,
)
from tests.front.house import ENGINE, SERVER, configure
from tests.http.conftest import Running, serve
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import put, sha

from loramux.adapters.problems import MAX_LISTED
from loramux.adapters.safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS
from loramux.front.front import INGEST, Front

BASE = base_description(hidden=16, inter=16, heads=2, layers=1)  # as the scripted engine's
QA, QB = tensor_name(0, "q_proj", "A"), tensor_name(0, "q_proj", "B")
MEMORY_BYTES = 32 << 20
"""What all of the bombs together may add to the peak of the ingest process."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(tmp_path_factory.mktemp("bad"), port=0)
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
        assert upload(server, "good", make_config(), tensors()).status_code == 201
        yield server
        stop()


def tensors(**changes: Any) -> bytes:
    return safetensors_bytes({**make_tensors(BASE), **changes})


def changed(change: Callable[[Tensors], object]) -> bytes:
    whole = make_tensors(BASE)
    change(whole)
    return safetensors_bytes(whole)


def poked(value: float) -> bytes:
    """The very last element of one matrix is another."""
    return changed(lambda whole: whole[QB].flat.__setitem__(-1, value))


def as_bytes(config: Any) -> bytes:
    return config if isinstance(config, bytes) else json.dumps(config).encode()


def upload(server: Running, name: str, config: Any, weights: bytes) -> Any:
    files = {"config": as_bytes(config), "weights": weights}
    return server.http.post("/v1/adapters?wait=60", data={"name": name}, files=files)


def by_digest(server: Running, name: str, config: Any, weights: bytes) -> Any:
    for data in (as_bytes(config), weights):
        assert put(server, data).status_code in (200, 201)
    body = {
        "name": name,
        "config": f"sha256:{sha(as_bytes(config))}",
        "weights": f"sha256:{sha(weights)}",
    }
    return server.http.post("/v1/adapters?wait=60", json=body)


ZEROS = bytes(64)


def entry(start: int, end: int, shape: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def one(start: int, end: int, shape: Any, dtype: str = "F32") -> bytes:
    return file_bytes({"a": entry(start, end, shape, dtype)}, ZEROS)


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    extents = {"a": first, "b": second}
    header = {name: entry(at, end, [(end - at) // 4]) for name, (at, end) in extents.items()}
    return file_bytes(header, ZEROS)


FILES: dict[str, tuple[bytes, str]] = {
    # Row 33: other formats under the name of this one.
    "zip": (b"PK\x03\x04" + ZEROS, "not_safetensors"),
    "pickle": (b"\x80\x04\x95" + ZEROS, "not_safetensors"),
    "GGUF": (b"GGUF\x03\0\0\0" + ZEROS, "not_safetensors"),
    "ELF": (b"\x7fELF\x02\x01\x01" + ZEROS, "not_safetensors"),
    "gzip": (b"\x1f\x8b\x08\0" + ZEROS, "not_safetensors"),
    "empty": (b"", "not_safetensors"),
    "seven bytes": (bytes(7), "not_safetensors"),
    # Row 34: the header.
    "2^62 bytes of header": ((1 << 62).to_bytes(8, "little") + ZEROS, "header_too_large"),
    "101 MB of header": ((101 << 20).to_bytes(8, "little") + ZEROS, "header_too_large"),
    "over the cap": (file_bytes(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "header_too_large"),
    "no header": (file_bytes(b""), "header_invalid"),
    "not JSON": (file_bytes(b"{a: 1}"), "header_invalid"),
    "an array": (file_bytes([1, 2]), "header_invalid"),
    "deep": (file_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "header_invalid"),
    "cut in the header": (safetensors_bytes(make_tensors(BASE))[:100], "header_invalid"),
    # Row 35: tensors nobody writes.
    "200 000 tensors": (
        file_bytes({f"{i}": entry(0, 0, [0]) for i in range(200_000)}),
        "header_too_large",
    ),
    "too many tensors": (
        file_bytes(b"{" + b",".join(b'"%x":{}' % i for i in range(MAX_TENSORS + 1)) + b"}"),
        "header_invalid",
    ),
    "a name of 1 MB": (file_bytes({"n" * (1 << 20): entry(0, 64, [16])}), "header_too_large"),
    "a name of 257 bytes": (
        file_bytes({"n" * 257: entry(0, 64, [16])}, ZEROS),
        "header_invalid",
    ),
    "one name twice": (
        file_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 64, [16])).encode(),) * 2), ZEROS),
        "header_invalid",
    ),
    "no tensors": (file_bytes({"__metadata__": {"format": "pt"}}), "header_invalid"),
    "a dimension of zero": (file_bytes({"a": entry(0, 0, [0, 4])}), "header_invalid"),
    # Row 36: extents, shapes and types.
    "overlap": (two((0, 36), (32, 64)), "header_invalid"),
    "hole": (two((0, 28), (32, 64)), "header_invalid"),
    "past the end": (one(0, 68, [17]), "header_invalid"),
    "a terabyte past the end": (one(0, 1 << 40, [1 << 38]), "header_invalid"),
    "trailing bytes": (one(0, 60, [15]), "header_invalid"),
    "a product that overflows": (one(0, 64, [1 << 32, 1 << 32, 16]), "header_invalid"),
    "another shape": (one(0, 64, [15]), "header_invalid"),
    "F64": (one(0, 64, [8], "F64"), "header_invalid"),
    "I8": (one(0, 64, [64], "I8"), "header_invalid"),
    "F4": (one(0, 64, [128], "F4"), "header_invalid"),
    "an unknown type": (one(0, 64, [16], "Q7"), "header_invalid"),
    # Row 37: values.
    "NaN": (poked(np.nan), "non_finite"),
    "infinity": (poked(-np.inf), "non_finite"),
    "1e30": (poked(1e30), "out_of_range"),
    "beyond float16": (poked(65505.0), "out_of_range"),
    # Row 39: rank bombs in the file.
    "a rank over the cap": (safetensors_bytes(make_tensors(BASE, rank=65)), "rank_mismatch"),
    "A and B of two ranks": (tensors(**{QB: np.ones((16, 5), "<f4")}), "rank_mismatch"),
    # Row 41: tensors that fit nowhere.
    "another base": (tensors(**{QA: np.ones((4, 32), "<f4")}), "adapter_invalid"),
    "A without B": (changed(lambda whole: whole.pop(QB)), "adapter_invalid"),
    "an extra tensor": (tensors(stray=np.ones(3, "<f4")), "adapter_invalid"),
    "another layer": (
        tensors(**{QA.replace("layers.0.", "layers.1."): np.ones((4, 16), "<f4")}),
        "adapter_invalid",
    ),
}

DEEP = b'{"x": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
CONFIGS: dict[str, tuple[Any, str, str]] = {
    # Row 39: ranks.
    "r=0": (make_config(r=0), "adapter_invalid", "r is 0"),
    "r=-1": (make_config(r=-1), "adapter_invalid", "r is -1"),
    "r=4.0": (make_config(r=4.0), "adapter_invalid", "r is 4.0"),
    "r='4'": (make_config(r="4"), "adapter_invalid", "r is '4'"),
    "r=10^9": (make_config(r=10**9), "rank_mismatch", "1000000000 in the config"),
    "r=2^31": (make_config(r=2**31), "rank_mismatch", "2147483648 in the config"),
    "r of other tensors": (make_config(r=8), "rank_mismatch", "8 in the config"),
    "a pattern's rank": (make_config(rank_pattern={"v_proj": 3}), "rank_mismatch", "v_proj"),
    # Row 40: scales.
    "alpha NaN": (b'{"lora_alpha": NaN}', "adapter_invalid", "NaN is not JSON"),
    "alpha 1e308": (make_config(lora_alpha=1e308), "out_of_range", "scale would be"),
    "alpha 0": (make_config(lora_alpha=0), "adapter_invalid", "lora_alpha"),
    "alpha '8'": (make_config(lora_alpha="8"), "adapter_invalid", "lora_alpha"),
    "rslora, r=0": (make_config(use_rslora=True, r=0), "adapter_invalid", "r is 0"),
    # Row 41: what stays unsupported, by name.
    "a module it lacks": (
        make_config(target_modules=["q_proj", "v_proj", "fc1"]),
        "adapter_invalid",
        "'fc1'",
    ),
    "no magnitude": (make_config(use_dora=True), "adapter_invalid", "magnitude"),
    "layer_replication": (
        make_config(layer_replication=[[0, 1], [0, 1]]),
        "adapter_invalid",
        "layer_replication",
    ),
    "another method": (make_config(peft_type="LOHA"), "adapter_invalid", "convert_to_lora"),
    "of tomorrow": (make_config(a_new_field=1), "adapter_invalid", "a_new_field"),
    # Row 42: a pattern for every module, and many more.
    "5000 patterns": (
        make_config(rank_pattern={f"x{i}": 4 for i in range(5000)}),
        "adapter_invalid",
        "5000 keys",
    ),
    # Row 43: the config is not plain JSON.
    "depth": (DEEP, "adapter_invalid", "nested too deeply"),
    "a key twice": (b'{"r": 4, "r": 8}', "adapter_invalid", "given twice"),
    "BOM": (b"\xef\xbb\xbf{}", "adapter_invalid", "column 1"),
    "no object": (b"[]", "adapter_invalid", "not an object"),
    "no JSON": (b"r: 4", "adapter_invalid", "line 1"),
    "5000 digits": (b'{"r": ' + b"9" * 5000 + b"}", "adapter_invalid", "digits"),
    "empty": (b"", "adapter_invalid", "line 1"),
}


def ingest_pid() -> int:
    """The ingest process of the server in this process."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            ours = int(status.read_text().rpartition(")")[2].split()[1]) == os.getpid()
            if ours and "loramux.ingest.main" in (status.parent / "cmdline").read_text():
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError("there is none")


def peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError


@pytest.fixture(scope="module", autouse=True)
def memory_stays_flat(real: Running) -> Iterator[None]:
    """Around all of the tests here: one process read all of the bombs and hardly grew."""
    pid = ingest_pid()
    before = peak_bytes(pid)
    yield
    assert ingest_pid() == pid, "nothing that was uploaded has ended it"
    assert peak_bytes(pid) - before < MEMORY_BYTES


def refused(server: Running, config: Any, weights: bytes, code: str) -> list[str]:
    """Refused in both ways, listed as failed, served to nobody; its problems."""
    listed = []
    for send in (upload, by_digest):
        error = refusal(send(server, "bad", config, weights), 422)
        assert (error["type"], error["code"]) == ("adapter_invalid", code), error
        view = server.http.get("/v1/adapters/bad").json()
        assert view["status"] == "failed" and view["error"]["problems"] == error["problems"]
        assert refusal(server.complete(model="bad"), 409)["code"] == "adapter_failed"
        assert server.http.delete("/v1/adapters/bad").status_code == 202
        assert eventually(lambda: server.http.get("/v1/adapters/bad").status_code == 404)
        listed.append(error["problems"])
    assert listed[0] == listed[1] and listed[0]
    return list(listed[0])


@pytest.mark.parametrize("case", FILES)
def test_files(real: Running, case: str) -> None:
    weights, code = FILES[case]
    refused(real, make_config(), weights, code)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(real: Running, case: str) -> None:
    config, code, named = CONFIGS[case]
    problems = refused(real, config, tensors(), code)
    assert any(named in problem for problem in problems), problems


def test_a_rank_over_the_servers_cap(real: Running) -> None:
    weights = safetensors_bytes(make_tensors(BASE, rank=65))
    refused(real, make_config(r=65), weights, "rank_too_large")


def test_every_offender_is_listed(real: Running) -> None:
    config = make_config(a_new_field=1, use_dora=True, target_modules=["q_proj", "v_proj", "fc1"])
    weights = tensors(stray=np.ones(3, "<f4"), **{QA: np.ones((4, 32), "<f4")})
    problems = refused(real, config, weights, "adapter_invalid")
    for named in ("a_new_field", "magnitude", "'fc1'", "stray", QA):
        assert any(named in problem for problem in problems), (named, problems)


def test_a_long_list_of_offenders_is_cut(real: Running) -> None:
    header = {f"{i}": entry(4 * i, 4 * i + 4, [1]) for i in range(13_000)}
    answer = upload(real, "bad", make_config(), file_bytes(header, bytes(4 * 13_000)))
    assert answer.status_code == 422 and len(answer.content) < 20_000
    problems = answer.json()["error"]["problems"]
    assert len(problems) == MAX_LISTED + 1 and problems[-1].endswith("more")
    assert real.http.delete("/v1/adapters/bad").status_code == 202
    assert eventually(lambda: real.http.get("/v1/adapters/bad").status_code == 404)


HARMLESS: dict[str, tuple[Any, bytes, str]] = {
    # Row 38.
    "all zeros": (make_config(), changed(lambda whole: whole[QB].fill(0)), "zero"),
    # Row 37: tiny is not wrong.
    "subnormals": (make_config(), changed(lambda whole: whole[QB].fill(1e-40)), ""),
    # Row 42: an expression that takes for ever, were it run by Python.
    "a pattern of doom": (make_config(target_modules="(.+)+\\d"), tensors(), "not run"),
    # Row 42: fields that name code, hosts and files, which nobody runs, asks or opens.
    "names of things": (
        make_config(
            auto_mapping={"base_model_class": "system", "parent_library": "os"},
            megatron_core="os.path",
            base_model_name_or_path="http://169.254.169.254/",
            corda_config={"cache_file": "/etc/passwd"},
            loftq_config={"loftq_bits": 4},
        ),
        tensors(),
        "",
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_looks_bad_and_is_not(real: Running, case: str) -> None:
    config, weights, warning = HARMLESS[case]
    answer = upload(real, "odd", config, weights)
    assert answer.status_code == 201, answer.text
    warnings = answer.json()["report"]["warnings"]
    assert any(warning in each for each in warnings) if warning else not warnings, warnings
    assert real.complete(model="odd").status_code == 200
    assert real.http.delete("/v1/adapters/odd").status_code == 202
    assert eventually(lambda: real.http.get("/v1/adapters/odd").status_code == 404)


def test_a_config_over_its_limit(real: Running) -> None:
    """Row 43's gigabyte: refused where it passes the limit, in whichever way it comes."""
    config = b"{" + b" " * real.front.config.max_config_bytes + b"}"
    for send in (upload, by_digest):
        assert refusal(send(real, "bad", config, tensors()), 413)["param"] == "config"
    refusal(real.http.get("/v1/adapters/bad"), 404)


def test_the_good_one_has_been_served_all_the_while(real: Running) -> None:
    assert real.complete(model="good").status_code == 200
    assert real.http.get("/health/ready").status_code == 200
