"""The official client, unmodified: what it sends is understood, what it gets is typed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from tests.http.conftest import Running, Start
from tests.http.fake_front import fails_after, speak, tokens

from loramux.errors import EngineFailed, Overloaded
from loramux.front.generation import GenerationSpec


@pytest.fixture
def client(shared: Running) -> Iterator[openai.OpenAI]:
    shared.front.script = speak("hello wörld 😀, the dog")
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base", prompt="the dog", max_tokens=5, seed=3)
    assert answer.object == "text_completion" and answer.model == "base"
    [choice] = answer.choices
    assert choice.finish_reason == "length" and choice.index == 0 and choice.logprobs is None
    assert answer.usage and answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens == len(tokens("the dog"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_streamed_completion_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="base", prompt="a", max_tokens=30)
    chunks = list(client.completions.create(model="base", prompt="a", max_tokens=30, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert not any(chunk.choices[0].finish_reason for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_streamed_usage_comes_last_with_no_choices(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="base",
            prompt="a",
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.choices and chunk.usage is None for chunk in chunks[:-1])


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base", prompt="a", max_tokens=20, logprobs=3)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs and logprobs.tokens and logprobs.text_offset and logprobs.top_logprobs
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs) == 20
    assert logprobs.token_logprobs == [-0.375] * 20
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    assert any(token.startswith("bytes:") for token in logprobs.tokens), "a split character"
    assert -9999.0 in logprobs.top_logprobs[0].values(), "-inf has no JSON"


def test_streamed_logprobs_are_the_whole_ones_cut(client: openai.OpenAI) -> None:
    options = {"model": "base", "prompt": "the dog", "max_tokens": 12, "logprobs": 2, "echo": True}
    whole = client.completions.create(**options).choices[0]
    pieces = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    for name in ("text_offset", "tokens", "token_logprobs", "top_logprobs"):
        cut = [getattr(piece.logprobs, name) for piece in pieces if piece.logprobs]
        assert sum(cut, []) == getattr(whole.logprobs, name)
    assert "".join(piece.text for piece in pieces) == whole.text


def test_echo_with_logprobs_covers_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="base", prompt="the dog", max_tokens=2, logprobs=1, echo=True
    )
    choice, num = answer.choices[0], len(tokens("the dog"))
    assert choice.text.startswith("the dog") and choice.logprobs
    assert choice.logprobs.token_logprobs == [None] + [-0.375] * (num - 1 + 2)
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset[num] == len("the dog")
    assert "".join(choice.logprobs.tokens) == choice.text


@pytest.mark.parametrize("prompt", ["the dog", tokens("the dog")])
def test_echo_alone_makes_nothing(client: openai.OpenAI, prompt: str | list[int]) -> None:
    answer = client.completions.create(
        model="base", prompt=prompt, max_tokens=0, logprobs=0, echo=True
    )
    choice = answer.choices[0]
    assert choice.text == "the dog" and choice.finish_reason == "length"
    assert choice.logprobs and len(choice.logprobs.tokens) == len(tokens("the dog"))
    assert answer.usage and answer.usage.completion_tokens == 0


def test_prompts_times_n_come_in_openais_order(client: openai.OpenAI, shared: Running) -> None:
    async def name_prompt_and_choice(spec):
        yield tokens(f"{spec.prompt_ids[-1]}:{spec.sampling.choice}")
        yield [1]

    shared.front.script = name_prompt_and_choice
    ids = [[5, 11], [12], [13, 14, 15]]
    answer = client.completions.create(model="base", prompt=ids, n=2, max_tokens=50)
    assert [choice.index for choice in answer.choices] == list(range(6))
    wanted = ["11:0", "11:1", "12:0", "12:1", "15:0", "15:1"]
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage and answer.usage.prompt_tokens == 6, "every prompt once"
    echoed = client.completions.create(model="base", prompt=ids, n=2, echo=True)
    for choice, prompt in zip(echoed.choices, [p for p in ids for _ in range(2)], strict=True):
        assert choice.text.startswith(asyncio.run(shared.front.tokenizer.decode(prompt)))
    texts = [""] * 6
    for chunk in client.completions.create(model="base", prompt=ids, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


def test_cached_tokens_are_counted_once_a_prompt(start: Start) -> None:
    server = start()
    server.front.cached_tokens = 3
    usage = server.complete(["the dog", "the fox"], n=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}
    usage = server.chat(n=3, max_tokens=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert usage["completion_tokens"] == 6


def test_a_prompt_that_ends_inside_a_character(client: openai.OpenAI) -> None:
    prompt = [*tokens("a"), tokens("😀")[0]]
    answer = client.completions.create(
        model="base", prompt=prompt, max_tokens=3, echo=True, logprobs=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("a\ufffdh") and choice.logprobs
    assert choice.logprobs.text_offset[:3] == [0, 1, len("a\ufffd")]


def test_special_tokens_take_no_room_in_the_text(client: openai.OpenAI, shared: Running) -> None:
    async def special(spec):
        yield [*tokens("a"), 0, *tokens("b")]

    shared.front.script = special
    options = {"model": "base", "prompt": "x", "max_tokens": 3, "logprobs": 0}
    choice = client.completions.create(**options).choices[0]
    assert choice.text == "ab" and choice.logprobs.text_offset == [0, 1, 1]
    whole = client.completions.create(**options, extra_body={"skip_special_tokens": False})
    choice = whole.choices[0]
    assert choice.text == "a<s>b" and choice.logprobs.text_offset == [0, 1, 4]


def test_stop_string_and_eos(client: openai.OpenAI, shared: Running) -> None:
    answer = client.completions.create(model="base", prompt="a", max_tokens=30, stop=["rld"])
    assert answer.choices[0].text == "hello wö" and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra == {"stop_reason": "rld"}

    async def ends(spec):
        yield [*tokens("ab"), 1]

    shared.front.script = ends
    answer = client.completions.create(model="base", prompt="a", max_tokens=30)
    assert answer.choices[0].text == "ab" and answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra == {"stop_reason": None}


def test_chat(client: openai.OpenAI, shared: Running) -> None:
    answer = client.chat.completions.create(
        model="shout",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.object == "chat.completion" and answer.model == "shout"
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.logprobs and choice.logprobs.content
    first = choice.logprobs.content[0]
    assert bytes(first.bytes or ()).decode() == first.token and len(first.top_logprobs) == 2
    spec = shared.front.specs[-1]
    prompt = "<|system|>be brief</s>\n<|user|>hello</s>\n<|assistant|>"
    assert asyncio.run(shared.front.tokenizer.decode(spec.prompt_ids)) == prompt
    assert spec.adapters[0].digest == shared.front.adapters.show("shout").digest


def test_streamed_chat(client: openai.OpenAI, shared: Running) -> None:
    chunks = list(
        client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=6,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage
    for index in range(2):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert not any(piece.delta.role for piece in mine[1:])
        assert mine[-1].finish_reason == "length" and mine[-1].delta.content is None
        assert "".join(piece.delta.content or "" for piece in mine).startswith("hello")


def test_chat_without_a_limit_gets_what_the_context_leaves(
    client: openai.OpenAI, shared: Running
) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hello"}]
    )
    assert answer.usage and answer.usage.total_tokens == shared.front.info.max_model_len


def test_models(client: openai.OpenAI) -> None:
    cards = list(client.models.list())
    assert [card.id for card in cards] == ["base", "lonely", "shout", "whisper"]
    assert cards[0].model_extra == {"root": "base", "parent": None, "max_model_len": 128}
    assert cards[1].model_extra == {"root": "base", "parent": "base", "max_model_len": 128}
    assert all(card.object == "model" and card.owned_by == "loramux" for card in cards)
    assert client.models.retrieve("shout@2").id == "shout@2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"model": "shout@1"}, openai.NotFoundError, "generation_gone"),
        ({"model": "slow"}, openai.ConflictError, "adapter_not_ready"),
        ({"model": "broken"}, openai.ConflictError, "adapter_failed"),
        ({"model": "alien"}, openai.ConflictError, "adapter_incompatible"),
        ({"max_tokens": 128}, openai.BadRequestError, "context_length_exceeded"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_request"),
        ({"extra_headers": {"content-type": "text/plain"}}, openai.APIStatusError, None),
    ],
)
def test_errors_are_typed(client: openai.OpenAI, options, error, code) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "base", "prompt": "a", **options})
    assert code is None or caught.value.code == code
    assert caught.value.request_id


def test_overload_is_typed_and_says_when(start: Start) -> None:
    server = start()
    server.front.reasons = ["draining"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="base", prompt="a")
    assert caught.value.status_code == 503 and caught.value.code == "draining"
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["x-should-retry"] == "true"


def test_error_inside_a_stream_is_raised(client: openai.OpenAI, shared: Running) -> None:
    shared.front.script = fails_after("hello", EngineFailed("the engine died"))
    chunks = []
    with pytest.raises(openai.APIError, match="the engine died"):
        for chunk in client.completions.create(model="base", prompt="a", stream=True):
            chunks.append(chunk.choices[0].text)
    assert "".join(chunks) == "hello"
    with pytest.raises(openai.InternalServerError, match="the engine died"):
        client.completions.create(model="base", prompt="a")


def test_a_stream_refused_before_its_first_token_is_asked_for_again(start: Start) -> None:
    """As the client does it by itself with any 503 that says when."""
    server = start()
    tries = 0

    async def script(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
        nonlocal tries
        tries += 1
        if tries == 1:
            yield Overloaded("its first token would come too late", retry_after_s=0)
        for token_id in tokens("hello"):
            yield [token_id]

    server.front.script = script
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=1) as client:
        stream = client.completions.create(
            model="base", prompt="a", max_tokens=len(tokens("hello")), stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == "hello"
    assert tries == 2


def test_async_client(shared: Running) -> None:
    shared.front.script = speak("hello")

    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="-") as client:

            async def one(model: str) -> str:
                stream = await client.completions.create(
                    model=model, prompt="a", max_tokens=len(tokens("hello")), stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(model) for model in ("base", "shout") * 8))

    assert asyncio.run(talk()) == ["hello"] * 16
