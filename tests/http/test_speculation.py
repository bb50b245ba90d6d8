"""``speculation`` and ``entropy_adaptive``: what is refused, what is resolved, what is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import openai
import pytest
from tests.front.house import PROMPT
from tests.http.conftest import Running, Start
from tests.http.fake_front import BASE, INFO, tokens
from tests.http.test_bad_inputs import SECRET, label, refusal, send
from tests.http.test_real_front import real  # noqa: F401  # a fixture

from loramux.request import AdapterRef, EntropyAdaptive, Speculation
from loramux.wire import Output

DRAFTERS = ("lookup", "suffix", "trigram")
READY = msgspec.structs.replace(INFO, drafters=DRAFTERS, partners={2: BASE})
OFF = {"speculation": "off", "lossless": True}
COMPANION = (AdapterRef("c" * 64),)


def guess(**fields: Any) -> dict[str, Any]:
    return {"speculation": fields}


def turns(**fields: Any) -> dict[str, Any]:
    return {"entropy_adaptive": {"threshold": 1.0, **fields}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"speculation": "on"}, "speculation"),
    ({"speculation": SECRET}, "speculation"),
    ({"speculation": True}, "speculation"),
    ({"speculation": 5}, "speculation"),
    ({"speculation": ["lookup"]}, "speculation"),
    (guess(drafter="lookup"), "speculation"),
    (guess(**{SECRET: 1}), "speculation"),
    (guess(drafters=[]), "speculation.drafters"),
    (guess(drafters="lookup"), "speculation.drafters"),
    (guess(drafters=["lookup"] * 9), "speculation.drafters"),
    (guess(drafters={"lookup": 1}), "speculation.drafters"),
    (guess(drafters=[1]), "speculation.drafters[0]"),
    (guess(drafters=["lookup", None]), "speculation.drafters[1]"),
    (guess(drafters=["lookup", SECRET]), "speculation.drafters[1]"),
    (guess(drafters=["lookup", "suffix", "lookup"]), "speculation.drafters[2]"),
    (guess(drafters=["Lookup"]), "speculation.drafters[0]"),
    (guess(max_draft_tokens=0), "speculation.max_draft_tokens"),
    (guess(max_draft_tokens=65), "speculation.max_draft_tokens"),
    (guess(max_draft_tokens=4.0), "speculation.max_draft_tokens"),
    (guess(max_draft_tokens=True), "speculation.max_draft_tokens"),
    (guess(max_draft_tokens="4"), "speculation.max_draft_tokens"),
    (guess(tree=1), "speculation.tree"),
    (guess(tree="yes"), "speculation.tree"),
    (guess(acceptance="lossy"), "speculation.acceptance"),
    (guess(acceptance="typical"), "speculation.acceptance"),
    (guess(acceptance=True), "speculation.acceptance"),
    ({"entropy_adaptive": True}, "entropy_adaptive"),
    ({"entropy_adaptive": 1.0}, "entropy_adaptive"),
    ({"entropy_adaptive": SECRET}, "entropy_adaptive"),
    ({"entropy_adaptive": {}}, "entropy_adaptive.threshold"),
    ({"entropy_adaptive": {"window": 5}}, "entropy_adaptive.threshold"),
    (turns(threshold=None), "entropy_adaptive.threshold"),
    (turns(threshold="auto"), "entropy_adaptive.threshold"),
    (turns(threshold=float("inf")), "entropy_adaptive"),
    (turns(threshold=float("nan")), "entropy_adaptive"),
    (turns(threshold=10**400), "entropy_adaptive.threshold"),
    (turns(threshold=-1.01), "entropy_adaptive.threshold"),
    (turns(threshold=True), "entropy_adaptive.threshold"),
    (turns(window=0), "entropy_adaptive.window"),
    (turns(window=65), "entropy_adaptive.window"),
    (turns(window=2.0), "entropy_adaptive.window"),
    (turns(min_dwell=-1), "entropy_adaptive.min_dwell"),
    (turns(min_dwell=1025), "entropy_adaptive.min_dwell"),
    (turns(start="medium"), "entropy_adaptive.start"),
    (turns(starts="small"), "entropy_adaptive"),
    ({**turns(), "model": "shout"}, "entropy_adaptive"),
    ({**turns(), "adapters": [{"id": "shout"}, {"id": "whisper"}]}, "entropy_adaptive"),
]


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    front = shared.front
    front.info, front.specs = READY, []
    yield shared
    front.info, front.told = INFO, lambda _: None


@pytest.mark.parametrize("case", BAD, ids=label)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_bad_values_name_their_field_and_change_nothing(
    server: Running, path: str, case: tuple[dict[str, Any], str]
) -> None:
    body = {"model": "base", "max_tokens": 3, **case[0]}
    body |= {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    error = refusal(send(server, f"/v1/{path}", body))
    assert error["param"] == case[1] and error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{case[1]}: ")
    assert not server.front.specs and not server.front.ledger._entries
    assert server.front.reserved == 0


def test_a_missing_drafter_is_told_which_there_are(server: Running) -> None:
    error = refusal(server.complete(**guess(drafters=["suffix", "medusa"])))
    assert error["message"].endswith("there are: lookup, suffix, trigram")
    server.front.info = INFO
    error = refusal(server.complete(**guess(drafters=["suffix"])))
    assert error["message"].endswith("there are: none")


RESOLVED: list[tuple[Any, Speculation | None]] = [
    (None, Speculation(drafters=DRAFTERS)),
    ("auto", Speculation(drafters=DRAFTERS)),
    ("off", None),
    ({}, Speculation(drafters=DRAFTERS)),
    ({"max_draft_tokens": 64}, Speculation(drafters=DRAFTERS, max_draft_tokens=64)),
    ({"drafters": ["suffix", "lookup"]}, Speculation(drafters=("suffix", "lookup"))),
    (
        {"drafters": ["trigram"], "max_draft_tokens": 1, "tree": True, "acceptance": "exact"},
        Speculation(drafters=("trigram",), max_draft_tokens=1, tree=True),
    ),
    (
        {"drafters": None, "max_draft_tokens": None, "tree": None, "acceptance": None},
        Speculation(drafters=DRAFTERS),
    ),
]


@pytest.mark.parametrize(("asked", "wanted"), RESOLVED)
def test_what_is_asked_is_resolved(server: Running, asked: Any, wanted: Speculation | None) -> None:
    assert server.complete(n=2, max_tokens=2, speculation=asked).status_code == 200
    assert server.chat(max_tokens=2, speculation=asked, model="shout").status_code == 200
    assert [spec.speculation for spec in server.front.specs] == [wanted] * 3
    assert [spec.entropy for spec in server.front.specs] == [None] * 3


def test_what_a_server_without_drafters_makes_of_it(server: Running) -> None:
    server.front.info = INFO
    for asked in (None, "auto", "off"):
        usage = server.complete(max_tokens=2, speculation=asked).json()["usage"]
        assert usage["details"] == OFF and "completion_tokens_details" not in usage
    assert all(spec.speculation is None for spec in server.front.specs)
    assert refusal(server.complete(speculation={"tree": True}))["param"] == "speculation"


def test_auto_takes_eight_drafters_at_most(server: Running) -> None:
    names = tuple(f"d{n}" for n in range(10))
    server.front.info = msgspec.structs.replace(READY, drafters=names)
    assert server.complete(speculation="auto").status_code == 200
    assert server.front.specs[0].speculation == Speculation(drafters=names[:8])
    assert server.complete(speculation={"drafters": ["d9"]}).status_code == 200


def test_the_servers_default(start: Start) -> None:
    server = start(speculation="off")
    server.front.info = READY
    assert server.complete(max_tokens=2).json()["usage"]["details"] == OFF
    for asked in ("auto", {}):
        details = server.complete(max_tokens=2, speculation=asked).json()["usage"]["details"]
        assert details["speculation"]["drafters"] == list(DRAFTERS)


def test_typical_acceptance_needs_heads_and_is_not_lossless(server: Running) -> None:
    server.front.info = msgspec.structs.replace(READY, drafters=("lookup", "medusa"))
    answer = server.complete(**guess(drafters=["medusa"], acceptance="typical"))
    details = answer.json()["usage"]["details"]
    assert details["speculation"]["acceptance"] == "typical" and details["lossless"] is False
    assert server.front.specs[0].speculation == Speculation(drafters=("medusa",), typical=True)


def drafting(output: Output) -> None:
    """Of pieces of several tokens all but the last were guessed, by a drafter a choice."""
    if len(output.token_ids) > 1:
        choice = int(output.request_id.rpartition("-")[2])
        output.drafted = (DRAFTERS[choice % 2], 4, 4)


async def in_threes(spec: Any) -> Any:
    yield tokens("a")
    yield tokens("bcd")
    yield tokens("efg")


def test_usage_adds_up_over_choices(server: Running) -> None:
    server.front.script, server.front.told = in_threes, drafting
    usage = server.complete(["x", "y"], n=2, max_tokens=7).json()["usage"]
    each = {"steps": 4, "drafted": 16, "accepted": 8}
    assert usage["completion_tokens"] == 4 * 7
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 16,
        "rejected_prediction_tokens": 16,
    }
    assert usage["details"] == {
        "speculation": {
            "drafters": list(DRAFTERS),
            "max_draft_tokens": 8,
            "tree": False,
            "acceptance": "exact",
            **{name: 2 * count for name, count in each.items()},
            "by_drafter": {
                "lookup": each,
                "suffix": each,
                "trigram": dict.fromkeys(each, 0),
            },
        },
        "lossless": True,
    }


def test_a_stream_ends_with_the_same_usage(server: Running) -> None:
    server.front.script, server.front.told = in_threes, drafting
    body = {"n": 2, "max_tokens": 7, "stop": "ef"}
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    for ask in (server.complete, server.chat):
        usage = ask(**body).json()["usage"]
        last = ask(**body, **asked).text.split("data: ")[-2]
        assert msgspec.json.decode(last)["usage"] == usage
        assert usage["completion_tokens"] == 12, "two letters of the last three, a choice"
        assert usage["details"]["speculation"]["accepted"] == 8, "those two were guesses"


def test_openais_client_knows_the_details(server: Running) -> None:
    server.front.script, server.front.told = in_threes, drafting
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        answer = client.completions.create(
            model="base", prompt="a", max_tokens=7, extra_body={"speculation": "auto"}
        )
    assert answer.usage and answer.usage.completion_tokens_details
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 4
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 4
    assert answer.usage.model_extra and answer.usage.model_extra["details"]["lossless"] is True


def with_companions(server: Running, patch: pytest.MonkeyPatch) -> None:
    resolve = server.front.adapters.resolve  # type: ignore[attr-defined]

    def resolved(*args: Any, **named: Any) -> Any:
        served = resolve(*args, **named)
        return replace(served, companions={2: COMPANION}) if served.adapters else served

    patch.setattr(server.front.adapters, "resolve", resolved)


def test_entropy_adaptive_is_resolved(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with_companions(server, monkeypatch)
    full = {"threshold": -1, "window": 64, "min_dwell": 0, "start": "large"}
    for model in ("base", "shout"):
        assert server.complete(model=model, **turns()).status_code == 200
        assert server.chat(model=model, max_tokens=2, entropy_adaptive=full).status_code == 200
    one = [{"id": "shout", "scale": 0.5}]
    assert server.complete(adapters=one, **turns()).status_code == 200
    error = refusal(server.complete(adapters=[*one, {"id": "whisper"}], **turns()))
    assert "several adapters" in error["message"]
    wanted = [EntropyAdaptive(threshold=1.0), EntropyAdaptive(**full)]  # type: ignore[arg-type]
    specs = server.front.specs
    assert [spec.entropy for spec in specs] == [*wanted, *wanted, wanted[0]]
    assert [spec.companions for spec in specs] == [{}, {}, *[{2: COMPANION}] * 3]


def test_a_server_without_a_small_model(server: Running) -> None:
    server.front.info = INFO
    error = refusal(server.complete(**turns()))
    assert error["param"] == "entropy_adaptive" and "no small model" in error["message"]
    assert server.complete(entropy_adaptive=None).status_code == 200


def test_who_made_which_tokens(server: Running) -> None:
    def told(output: Output) -> None:
        made = output.start_index + len(output.token_ids)
        output.ledger = (min(made, 4), max(0, made - 4), 40 + made, 30 + made)

    server.front.script, server.front.told = in_threes, told
    answer = server.complete(n=2, max_tokens=10, **turns(window=3)).json()
    details = answer["usage"]["details"]
    assert details["lossless"] is False
    assert details["entropy_adaptive"] == {
        "threshold": 1.0,
        "window": 3,
        "min_dwell": 8,
        "start": "small",
        "tokens": {"large": 8, "small": 12},
        "computed": {"large": 100, "small": 80},
        "share_large": 0.4,
    }
    assert answer["usage"]["completion_tokens"] == 20


def test_no_tokens_have_no_share(server: Running) -> None:
    body = {"max_tokens": 0, "echo": True, "logprobs": 1}
    details = server.complete(**body, **turns()).json()["usage"]["details"]
    assert details["entropy_adaptive"]["share_large"] is None


def test_the_schema_shows_the_fields(server: Running) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        fields = schemas[name]["properties"]
        for field, kind in (
            ("speculation", "SpeculationChoice"),
            ("entropy_adaptive", "EntropyAdaptiveChoice"),
        ):
            assert kind in str(fields[field])
            assert schemas[kind]["additionalProperties"] is False
    assert schemas["EntropyAdaptiveChoice"]["required"] == ["threshold"]
    assert schemas["SpeculationChoice"]["properties"].keys() == {
        "drafters", "max_draft_tokens", "tree", "acceptance",
    }  # fmt: skip


def test_through_the_real_front(real: Running) -> None:  # noqa: F811
    """An engine that only plays: what it is told, and what its guesses come to."""
    body = {"max_tokens": 9, "return_token_ids": True, "cache_salt": "burst=3 draft=4"}
    answers = {
        str(asked): real.complete(PROMPT, **body, speculation=asked).json()
        for asked in ("off", None, {"drafters": ["suffix"], "max_draft_tokens": 4})
    }
    ids = [answer["choices"][0]["token_ids"] for answer in answers.values()]
    assert ids == [[PROMPT[i % 5] for i in range(9)]] * 3
    off, auto, suffix = (answer["usage"]["details"]["speculation"] for answer in answers.values())
    assert off == "off"
    assert (auto["drafters"], auto["drafted"], auto["accepted"]) == (["lookup", "suffix"], 12, 6)
    assert (suffix["drafters"], suffix["by_drafter"]["suffix"]["steps"]) == (["suffix"], 3)
    text = real.http.get("/metrics").text
    assert 'loramux_draft_tokens_total{adapter="base",drafter="suffix"} 12.0' in text
    assert 'loramux_accepted_draft_positions_total{drafter="lookup",position="2"} 3.0' in text
