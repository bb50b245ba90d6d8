"""The server as its users meet it: started by its command, asked over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests import tiny
from tests.e2e.server import Server

from loramux.cli import main
from loramux_client import AdapterInvalidError, AsyncClient, Client


@pytest.fixture(scope="module")
def shouters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Path]]:
    folder = tmp_path_factory.mktemp("e2e")
    model = tiny.write_model(folder / "tiny", "llama", shoutable=True)
    made = {t: tiny.shouting_adapter(folder / f"a{t}", model, t) for t in range(40, 44)}
    return model, made


@pytest.fixture(scope="module")
def server(
    shouters: tuple[Path, dict[int, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    # Starting a process that loads torch and compiles kernels takes seconds; one serves them all.
    server = Server(shouters[0], tmp_path_factory.mktemp("data") / "d")
    for token, folder in shouters[1].items():
        response = server.upload(f"say-{token}", folder)
        assert response.status_code == 201, response.text
    yield server
    assert server.close() == 0


def test_base_and_adapters_answer_together(server: Server) -> None:
    fields: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "return_token_ids": True}

    async def ask() -> list[Any]:
        async with AsyncClient(server.url) as client:
            models = ["tiny", *(f"say-{t}" for t in range(40, 44))]
            return await asyncio.gather(
                *(client.complete([5, 6, 7], model=m, **fields) for m in models)
            )

    base, *others = asyncio.run(ask())
    for token, answer in zip(range(40, 44), others, strict=True):
        assert answer.choices[0].token_ids == [token] * 5
    assert set(base.choices[0].token_ids) != {40}


def test_the_openai_package_works_unmodified(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert {"tiny", "say-40"} <= {model.id for model in client.models.list()}
    whole = client.completions.create(model="say-41", prompt="Hello", max_tokens=6, seed=1)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 6
    stream = client.completions.create(
        model="say-41", prompt="Hello", max_tokens=6, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True
    )
    assert chat.choices[0].message.role == "assistant"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="nobody", prompt="Hello")
    assert error.value.code == "model_not_found"


def test_a_compressed_adapter_is_what_it_says(
    server: Server, shouters: tuple[Path, dict[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["adapters", "--url", server.url, "push", str(shouters[1][40]), "--name", "small"]
    assert main([*command, "--compress", "density=0.3"]) == 0
    assert "of the values kept" in " ".join(capsys.readouterr().out.split())
    with Client(server.url) as client:
        view = client.adapters.show("small")
        facts = view.report["compression"]
        assert view.status == "ready" and facts["claimed"]["density"] == 0.3
        assert facts["kept"] == pytest.approx(0.3 * facts["values"], rel=0.01)
        assert client.complete([5, 6], model="small", max_tokens=3).choices[0].text
        client.adapters.delete("small")


def test_adapters_speak_in_their_own_voice(
    server: Server, shouters: tuple[Path, dict[int, Path]]
) -> None:
    """One adapter, three versions: prompts as transformers makes them, and their own ends."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(shouters[0]))
    templates = {
        "loud": "{{ bos_token }}{% for m in messages %}{{ m.content | upper }}!{% endfor %}",
        "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    }
    chat = [{"role": "user", "content": "Zwölf Jäger"}]
    with Client(server.url) as client:
        for name, template in templates.items():
            profile = {"chat_template": template, "generation": {"max_tokens": 7}}
            client.adapters.push(shouters[1][43], name, profile=profile)
        ending = client.adapters.push(shouters[1][43], "ending", profile={"stop_token_ids": [43]})
        assert ending.digest != client.adapters.show("say-43").digest
        templates |= {"say-43": tokenizer.chat_template, "ending": tokenizer.chat_template}
        for name, template in templates.items():
            expected = tokenizer.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=True, return_dict=False
            )
            body = {"model": name, "messages": chat, "return_token_ids": True, "temperature": 0}
            if name == "say-43":
                body["max_tokens"] = 7
            answer = server.http.post("/v1/chat/completions", json=body).json()
            assert answer["prompt_token_ids"] == expected
            assert answer["choices"][0]["token_ids"] == [43] * (1 if name == "ending" else 7)


def test_two_choices_of_two_prompts_keep_their_order(server: Server) -> None:
    body = server.complete("tiny", ["One", "Two"], n=2, max_tokens=4, seed=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    again = server.complete("tiny", "Two", n=2, max_tokens=4, seed=3).json()
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts[:2])) == 2
    assert len(again["choices"]) == 2


def test_guessing_ahead_changes_nothing_but_the_steps(server: Server) -> None:
    """Whether it pays on this machine at this moment is the planner's to say."""
    prompt = [5, 6, 7, 8, 9] * 4
    drafted = server.metric("vllm:spec_decode_num_draft_tokens_total")
    for model, temperature in (("tiny", 1.0), ("say-41", 1.0), ("say-42", 0.0)):
        body = {"max_tokens": 24, "seed": 7, "temperature": temperature, "return_token_ids": True}
        asked = ("off", "auto", None, {"drafters": ["lookup"], "max_draft_tokens": 3})
        answers = [
            server.complete(model, prompt, **body, speculation=each).json() for each in asked
        ]
        ids = [answer["choices"][0]["token_ids"] for answer in answers]
        assert ids == [ids[0]] * len(asked)
        off, auto, default, three = (answer["usage"]["details"] for answer in answers)
        assert off == {"speculation": "off", "lossless": True}
        assert auto["speculation"]["drafters"] == default["speculation"]["drafters"]
        assert three["speculation"]["drafters"] == ["lookup"]
        for told in (auto["speculation"], default["speculation"], three["speculation"]):
            assert told["drafted"] >= told["accepted"] >= 0
            assert told["steps"] + told["accepted"] <= 24
            drafted += told["drafted"]
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") == drafted
    assert server.metric("loramux_draft_tokens_total") == drafted


def test_echo_gives_the_prompts_own_log_probabilities(server: Server) -> None:
    body = server.complete("tiny", [5, 6, 7, 8], max_tokens=2, echo=True, logprobs=1, seed=0).json()
    logprobs = body["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == 6
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])


def test_the_second_request_reads_the_prefix_cache(server: Server) -> None:
    prompt = list(range(10, 60))
    first = server.complete("say-42", prompt, max_tokens=1).json()["usage"]
    second = server.complete("say-42", prompt, max_tokens=1).json()["usage"]
    other = server.complete("say-43", prompt, max_tokens=1).json()["usage"]
    cached = [u["prompt_tokens_details"]["cached_tokens"] for u in (first, second, other)]
    assert cached == [0, 48, 0]


def test_an_upload_that_cannot_be_served_says_why_and_leaves_nothing(
    server: Server, shouters: tuple[Path, dict[int, Path]], tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    source = shouters[1][40]
    text = (source / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(
        text.replace('"use_dora": false', '"use_dora": true')
    )
    (folder / "adapter_model.safetensors").write_bytes(
        (source / "adapter_model.safetensors").read_bytes()
    )
    with Client(server.url) as client:
        with pytest.raises(AdapterInvalidError) as error:
            client.adapters.push(folder, name="bad")
        assert any("use_dora" in problem for problem in error.value.problems)
        assert "bad" not in {model.id for model in client.models()}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_stops_the_work(server: Server, streaming: bool) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        if streaming:
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                soon = httpx.Timeout(30, read=0.02)  # 3,200 tokens take longer anywhere
                client.post("/v1/completions", json={**body, "n": 16}, timeout=soon)
    deadline = time.monotonic() + 10
    while server.metric("vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline, "the request goes on without its client"
        time.sleep(0.3)


def test_a_deleted_adapter_is_gone(server: Server, shouters: tuple[Path, dict[int, Path]]) -> None:
    assert server.upload("short-lived", shouters[1][40]).status_code in (200, 201)
    assert server.complete("short-lived", [1, 2], max_tokens=1).status_code == 200
    assert server.http.delete("/v1/adapters/short-lived").status_code in (202, 204)
    deadline = time.monotonic() + 10
    while server.complete("short-lived", [1, 2], max_tokens=1).status_code != 404:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.complete("say-40", [1, 2], max_tokens=1).status_code == 200


def test_a_packed_file_that_rots_is_made_again(
    server: Server, shouters: tuple[Path, dict[int, Path]], tmp_path: Path
) -> None:
    """From the uploaded files, when those are whole; else the adapter is no longer served."""
    source = shouters[1][40]
    for name, whole in (("mended", True), ("lost", False)):
        folder = tmp_path / name
        folder.mkdir()
        config = (source / "adapter_config.json").read_text() + " " * len(name)
        (folder / "adapter_config.json").write_text(config)
        weights = (source / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(weights)
        digest = server.upload(name, folder).json()["digest"]
        [packed] = (server.data_dir / "packed").glob(f"{digest}*")
        spoil(packed)
        blob = hashlib.sha256(config.encode()).hexdigest()
        if not whole:
            spoil(server.data_dir / "blobs" / "sha256" / blob[:2] / blob)
        assert server.complete(name, [5, 6], max_tokens=3).status_code == 500
        deadline = time.monotonic() + 30
        fields = {"max_tokens": 3, "temperature": 0, "return_token_ids": True}
        while True:
            answer = server.complete(name, [5, 6], **fields)
            error = answer.json().get("error", {})
            if error.get("code") != "adapter_not_ready":
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        if whole:
            assert answer.json()["choices"][0]["token_ids"] == [40] * 3
        else:
            assert (answer.status_code, error["code"]) == (409, "adapter_failed")
            reason = server.http.get(f"/v1/adapters/{name}").json()["error"]
            assert reason["code"] == "blob_corrupt"


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_adapters_survive_a_restart(shouters: tuple[Path, dict[int, Path]], tmp_path: Path) -> None:
    # A server of its own, started twice.
    server = Server(shouters[0], tmp_path / "data")
    assert server.upload("say-40", shouters[1][40]).status_code == 201
    assert server.close() == 0
    again = Server(shouters[0], tmp_path / "data")
    fields = {"max_tokens": 3, "temperature": 0, "return_token_ids": True}
    answer = again.complete("say-40", [5, 6], **fields).json()
    assert answer["choices"][0]["token_ids"] == [40] * 3
    again.close()
