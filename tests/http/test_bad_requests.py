"""What the catalogue of bad inputs has beside wrong fields: requests built to hurt, not to ask.

Whatever is asked here, the next request is answered, nothing is opened, and nothing new is counted
by name.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.peft_files import make_config
from tests.front.house import PROMPT
from tests.http.conftest import Running
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal


def ask(server: Running, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    body = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    if path == "/v1/completions":
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 2}
    return server.post(path, **{**body, **fields})


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


# Row 22: nothing compiles schemas yet, so each of them is refused before it is looked at.
SCHEMAS: dict[str, Any] = {
    "1 MB": {"type": "object", "description": "x" * (1 << 20)},
    "depth": nested(200),
    "an expression of doom": {"type": "string", "pattern": "(a+)+$"},
    "a loop": {"$ref": "#"},
    "a remote reference": {"$ref": "http://169.254.169.254/latest"},
    "a million values": {"enum": list(range(100_000))},
    "a billion items": {"type": "array", "minItems": 10**9},
    "an unknown type": {"type": "whatever"},
    "unique items": {"type": "array", "uniqueItems": True},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_schemas(shared: Running, schema: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for path in ("/v1/completions", "/v1/chat/completions"):
        for name, value in {
            "response_format": wanted,
            "guided_json": schema,
            "structured_outputs": {"json": schema},
        }.items():
            assert refusal(ask(shared, path, **{name: value}))["param"] == name
    assert not shared.front.ledger._entries and shared.front.reserved == 0
    assert ask(shared).status_code == 200


# Rows 23 and 24: malformed grammars and tools, beside a stream that must not notice.
GRAMMARS: list[tuple[str, Any]] = [
    ("guided_grammar", "root ::= ("),
    ("guided_regex", "(((("),
    ("guided_choice", [[]]),
    ("structured_outputs", {"grammar": "root ::= root"}),
    ("tools", [{"type": "function", "function": {"parameters": {"type": 7, "pattern": "("}}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"type": "?"}}}]),
    ("tools", "f"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
]


def test_grammars_and_tools_beside_a_stream(shared: Running) -> None:
    alone = ask(shared, stream=True, max_tokens=20, seed=1).text
    with shared.http.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "base",
            "messages": [{"role": "user", "content": "a"}],
            "stream": True,
            "max_tokens": 20,
            "seed": 1,
        },
    ) as answer:
        for name, value in GRAMMARS:
            assert refusal(ask(shared, **{name: value}))["param"] == name
        beside = "".join(answer.iter_text())
    assert texts(beside) == texts(alone) and beside.endswith("data: [DONE]\n\n")


def texts(stream: str) -> list[Any]:
    events = [line.removeprefix("data: ") for line in stream.split("\n\n") if "{" in line]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    return ["".join(delta.get("content", "") for delta in deltas)]


# Row 8.
@pytest.mark.parametrize(
    ("char", "size"), [("😀", 1 << 20), ("\u202e", 1 << 16), ("\x00", 1 << 16), (" ", 1 << 16)]
)
def test_a_lot_of_one_character(shared: Running, char: str, size: int) -> None:
    text = char * (size // len(char.encode()))
    error = refusal(ask(shared, "/v1/completions", prompt=text))
    assert error["code"] == "context_length_exceeded"
    assert ask(shared).status_code == 200


# Row 15.
def test_names_make_no_series(shared: Running) -> None:
    def series() -> set[str]:
        lines = shared.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def ask_all(tag: str) -> None:
        for name in (f"nobody-{tag}", f"../../{tag}", f"a,{tag}", tag * 3000, f"shout@9{tag}"):
            for path in ("/v1/completions", "/v1/chat/completions"):
                assert ask(shared, path, model=name).status_code in (400, 404)
            shared.http.get(f"/{tag}")
            shared.http.get(f"/v1/adapters/{tag}")
            ask(shared, **{tag: tag})

    def unknown_fields() -> float:
        return shared.metric("loramux_unknown_fields_total")

    asked = unknown_fields()
    ask_all("one")  # five fields; /metrics is a quarter of a second old at most
    assert eventually(lambda: unknown_fields() >= asked + 5)
    before = series()
    ask_all("two")
    assert eventually(lambda: unknown_fields() >= asked + 10)
    assert series() == before


WATCHED = "hunter2hunter2"


def test_an_adapter_that_names_hosts_files_and_code(tmp_path: Path) -> None:
    """Row 42, seen from inside: while it is imported, Python's audit events say that nothing it
    names is opened, resolved, imported or run."""
    config = make_config(
        auto_mapping={"base_model_class": WATCHED, "parent_library": WATCHED},
        megatron_core=f"{WATCHED}.path",
        base_model_name_or_path=f"http://{WATCHED}/",
        corda_config={"cache_file": f"/{WATCHED}/passwd"},
        revision=WATCHED,
        target_modules=f"(.+)+{WATCHED}",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path

        from tests.adapters.peft_files import base_description, make_tensors, safetensors_bytes

        from loramux.ingest.reading import read_adapter

        base = base_description(hidden=16, inter=16, heads=2, layers=1)
        folder = Path({str(tmp_path)!r})
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(make_tensors(base)))
        seen = []

        def audit(event, args):
            seen.append((event, repr(args)))

        class Finder:
            def find_spec(self, name, path=None, target=None):
                seen.append(("import", name))

        sys.meta_path.insert(0, Finder())
        sys.addaudithook(audit)
        with (folder / "adapter_model.safetensors").open("rb") as weights:
            read_adapter((folder / "adapter_config.json").read_bytes(), weights, base).canonical()
        done = len(seen)
        seen = seen[:done]
        found = [event for event in seen if {WATCHED!r} in event[1]]
        far = ("socket.", "subprocess.", "os.exec", "os.system", "os.posix_spawn", "urllib.")
        reached = [event for event, _ in seen if event.startswith(far)]
        assert seen and not found and not reached, (found, reached)
        """
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
