"""From the files of an adapter folder to the profile that is pushed."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.client.conftest import Connect
from tests.client.doubles import write_adapter_files
from tests.client.test_push import Blobs

from loramux_client import Adapter, AdapterFilesError, _profile
from loramux_client._files import find_adapter
from loramux_client._profile import profile_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter_files(tmp_path / "mine")


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def pushed(folder: Path) -> dict[str, Any]:
    return profile_of(find_adapter(folder), True)


def test_a_folder_without_any_has_none(folder: Path) -> None:
    assert pushed(folder) == {}
    write(folder, "tokenizer_config.json", {"model_max_length": 5, "chat_template": None})
    write(folder, "generation_config.json", {"transformers_version": "5", "top_p": None})
    assert pushed(folder) == {}


def test_the_template_of_the_tokenizer_and_the_file_that_beats_it(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": "T é"})
    assert pushed(folder) == {"chat_template": "T é"}
    named = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert pushed(folder) == {"chat_template": "D"}
    write(folder, "tokenizer_config.json", {"chat_template": named[:1]})
    assert pushed(folder) == {}
    write(folder, "chat_template.jinja", "{{ messages }}\n")
    assert pushed(folder) == {"chat_template": "{{ messages }}\n"}


def test_sampling_defaults_and_ends_of_a_generation_config(folder: Path) -> None:
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 99,
        "max_length": 4096,
        "eos_token_id": [1, 7],
        "stop_strings": "END",
        "transformers_version": "5.0",
        "use_cache": True,
        "pad_token_id": 1,
        "num_beams": 1,
        "length_penalty": 2.0,
        "no_repeat_ngram_size": None,
    }
    write(folder, "generation_config.json", config)
    generation = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_tokens": 99,
    }
    assert pushed(folder) == {"generation": generation, "eos_token_id": [1, 7], "stop": ["END"]}
    write(folder, "generation_config.json", {**config, "do_sample": False})
    assert pushed(folder)["generation"] == {**generation, "temperature": 0}
    write(folder, "generation_config.json", {"do_sample": False})
    assert pushed(folder) == {"generation": {"temperature": 0}}


def test_our_own_file_wins_field_by_field(folder: Path) -> None:
    write(folder, "chat_template.jinja", "theirs")
    write(folder, "generation_config.json", {"temperature": 0.6, "top_p": 0.5, "eos_token_id": 3})
    own = {"chat_template": "ours", "generation": {"top_p": 0.9}, "companions": {"draft": "d"}}
    write(folder, "loramux.json", own)
    assert pushed(folder) == {
        "chat_template": "ours",
        "generation": {"temperature": 0.6, "top_p": 0.9},
        "eos_token_id": 3,
        "companions": {"draft": "d"},
    }
    write(folder, "loramux.json", {"generation": 5})  # the server says what is wrong with it
    assert pushed(folder)["generation"] == 5


REFUSED: dict[str, Any] = {
    "num_beams": 4,
    "penalty_alpha": 0.6,
    "typical_p": 0.9,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [5],
    "guidance_scale": 1.5,
    "min_new_tokens": 3,
    "renormalize_logits": True,
    "watermarking_config": {},
    "num_return_sequences": 2,
    "forced_eos_token_id": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_decoding_and_nobody_does_is_refused(folder: Path, name: str) -> None:
    write(folder, "generation_config.json", {name: REFUSED[name]})
    with pytest.raises(AdapterFilesError, match=f"{name}.*--no-profile"):
        pushed(folder)
    assert profile_of(find_adapter(folder), False) == {}


def test_every_decoding_field_of_transformers_has_a_fate() -> None:
    """Each is taken, refused, or among those that concern something else."""
    from transformers import GenerationConfig

    elsewhere = """
        max_length early_stopping length_penalty use_cache cache_implementation cache_config
        prefill_chunk_size return_legacy_cache output_attentions output_hidden_states output_scores
        output_logits return_dict_in_generate pad_token_id bos_token_id decoder_start_token_id
        is_assistant num_assistant_tokens num_assistant_tokens_schedule target_lookbehind
        assistant_confidence_threshold assistant_early_exit assistant_lookbehind
        prompt_lookup_num_tokens max_matching_ngram_size low_memory compile_config
        disable_compile transformers_version generation_kwargs continuous_batching_config
        assistant_ensemble_weight speculation_type use_mtp max_cache_len
    """.split()
    known = {*_profile._DEFAULTS, *_profile._HARMLESS, "do_sample", "eos_token_id", "stop_strings"}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - known - set(elsewhere) == set()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", "[1]"),
        ("generation_config.json", "{"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("loramux.json", "[" * 100_000),
    ],
)
def test_files_that_are_not_what_they_should_be(folder: Path, name: str, text: str) -> None:
    write(folder, name, text)
    with pytest.raises(AdapterFilesError, match=f"{name}.*--no-profile"):
        pushed(folder)


def test_a_file_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_profile, "MAX_BYTES", 3)
    write(folder, "chat_template.jinja", "abcd")
    with pytest.raises(AdapterFilesError, match="4 bytes"):
        pushed(folder)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_brings_its_own_folders_files_only(
    folder: Path, kind: str, tmp_path: Path
) -> None:
    write(folder, "chat_template.jinja", "mine")
    (folder / "other").mkdir()
    write(folder / "other", "generation_config.json", {"top_p": 0.5})
    archive = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for path in folder.rglob("*.*"):
                packed.write(path, Path("in") / path.relative_to(folder))
    else:
        with tarfile.open(archive, "w") as tar:
            tar.add(folder, "in")
    assert pushed(archive) == {"chat_template": "mine"}


def test_two_files_bring_nothing_else(folder: Path) -> None:
    write(folder, "chat_template.jinja", "mine")
    two = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
    assert profile_of(find_adapter(two), True) == {}


def test_push_sends_what_was_chosen(connect: Connect, folder: Path, tmp_path: Path) -> None:
    write(folder, "chat_template.jinja", "mine")
    write(tmp_path, "p.json", {"system": "s"})
    for choice, expected in [
        (True, {"chat_template": "mine"}),
        (False, None),
        ({"stop": ["x"]}, {"stop": ["x"]}),
        (tmp_path / "p.json", {"system": "s"}),
        (str(tmp_path / "p.json"), {"system": "s"}),
    ]:
        server = Blobs()
        connect(server).call("adapters.push", folder, profile=choice)
        assert server.registered[0].get("profile") == expected
    server = Blobs()
    with pytest.raises(AdapterFilesError, match="missing.json"):
        connect(server).call("adapters.push", folder, profile=tmp_path / "missing.json")
    assert server.log == [], "refused before anything is sent"


def test_one_for_another_model_says_so_and_takes_no_profile_along(
    connect: Connect, folder: Path
) -> None:
    write(folder, "generation_config.json", {"temperature": 0.5})
    for fields, sent in (
        ({}, {"profile"}),
        ({"base": "target"}, {"profile"}),
        ({"base": "draft"}, {"base"}),
        ({"base": "small", "profile": False}, {"base"}),
        ({"base": "draft", "profile": {"system": "x"}}, {"base", "profile"}),
    ):
        server = Blobs()
        connect(server).call("adapters.push", folder, **fields)
        [body] = server.registered
        assert body.keys() - {"name", "config", "weights"} == sent
        assert body.get("base", "target") == fields.get("base", "target")


def test_the_list_says_which_companions_an_adapter_does_without(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from loramux.console import adapter_table

    companions = {
        "draft": {"name": "swift", "status": "missing", "digest": None},
        "small": {"name": "short", "status": "ready", "digest": "d" * 64},
    }
    adapter_table(
        Adapter.from_json({"name": "cat", "status": "ready", **fields})
        for fields in ({"companions": companions}, {"base": "small"})
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "cat 0 target ready" in told and "cat 0 small ready" in told
    assert "cat: does without its companion 'swift' for the draft model: missing" in told
    assert "short" not in told


@pytest.mark.parametrize("flags", [[], ["--no-profile"]])
def test_the_command_can_leave_the_profile_out(
    folder: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import loramux_client
    from loramux.cli import main
    from loramux_client import Adapter

    seen: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, *_: object, **__: object) -> None:
            self.adapters = self

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def push(self, source: object, **options: Any) -> Adapter:
            seen.append(options)
            return Adapter(name="a", status="ready")

    monkeypatch.setattr(loramux_client, "Client", Recorder)
    assert main(["adapters", "push", str(folder), *flags]) == 0
    assert seen[0]["profile"] is not bool(flags) and seen[0]["base"] == "target"
    assert main(["adapters", "push", str(folder), "--base", "draft", *flags]) == 0
    assert seen[1]["base"] == "draft"
