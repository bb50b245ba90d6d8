"""Guesses as a scraper sees them: sums that agree, and few series whoever comes."""

from __future__ import annotations

import pytest
from tests.metrics.test_prometheus import Source, digest, samples, spec, value

from loramux.front.drafts import SEATS
from loramux.metrics.prometheus import Exporter

NAMES = {digest(n): [f"a{n}"] for n in range(1000)}


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def exporter(source: Source) -> Exporter:
    return Exporter(source, lambda: NAMES)


def lines(exporter: Exporter, name: str, label: str) -> dict[tuple[str, str], float]:
    """(label's value, drafter) -> value."""
    return {
        (dict(labels)[label], dict(labels)["drafter"]): number
        for (found, labels), number in samples(exporter).items()
        if found == name
    }


def test_guesses_by_adapter_drafter_and_position(source: Source, exporter: Exporter) -> None:
    watch = source.observations
    watch.drafted(spec(), "lookup", 3, 3, 1)
    watch.drafted(spec(1), "lookup", 12, 12, 11)
    watch.drafted(spec(1), "lookup", 3, 3, 0)
    watch.drafted(spec(1), "trigram", 7, 2, 2)  # a tree
    assert lines(exporter, "loramux_draft_tokens_total", "adapter") == {
        ("base", "lookup"): 3,
        ("a1", "lookup"): 15,
        ("a1", "trigram"): 7,
    }
    assert lines(exporter, "loramux_accepted_draft_tokens_total", "adapter") == {
        ("base", "lookup"): 1,
        ("a1", "lookup"): 11,
        ("a1", "trigram"): 2,
    }
    guessed = lines(exporter, "loramux_draft_positions_total", "position")
    right = lines(exporter, "loramux_accepted_draft_positions_total", "position")
    assert guessed == {
        **{(str(n), "lookup"): 3 if n <= 3 else 1 for n in range(1, 9)},
        ("9+", "lookup"): 4,
        ("1", "trigram"): 1,
        ("2", "trigram"): 1,
    }
    assert right == {
        **{(str(n), "lookup"): 2 if n == 1 else 1 for n in range(1, 9)},
        ("9+", "lookup"): 3,
        ("1", "trigram"): 1,
        ("2", "trigram"): 1,
    }
    assert value(exporter, "loramux_draft_steps_total", drafter="lookup") == 3


def test_under_vllms_names(source: Source, exporter: Exporter) -> None:
    watch = source.observations
    watch.drafted(spec(), "lookup", 3, 3, 1)
    watch.drafted(spec(1), "suffix", 10, 10, 10)
    assert value(exporter, "vllm:spec_decode_num_drafts_total") == 2
    assert value(exporter, "vllm:spec_decode_num_draft_tokens_total") == 13
    assert value(exporter, "vllm:spec_decode_num_accepted_tokens_total") == 11
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    found = [value(exporter, name, position=str(position)) for position in range(10)]
    assert found == [2] + [1] * 9


def test_nobody_guesses(exporter: Exporter) -> None:
    found = samples(exporter)
    assert (
        found["vllm:spec_decode_num_drafts_total", (("engine", "0"), ("model_name", "base"))] == 0
    )
    assert not any(name.startswith("loramux_draft") for name, _ in found)
    assert not any(name.startswith("loramux_entropy") for name, _ in found)


def test_tokens_by_model(source: Source, exporter: Exporter) -> None:
    source.observations.by_model(3, 0)
    source.observations.by_model(0, 4)
    name = "loramux_entropy_adaptive_tokens_total"
    assert value(exporter, name, model="large") == 3 and value(exporter, name, model="small") == 4


def test_a_thousand_adapters_make_twenty_one_lines(source: Source, exporter: Exporter) -> None:
    watch = source.observations
    for number in range(1000):
        watch.drafted(spec(number), "lookup", number + 1, number + 1, 1)
    name = "loramux_draft_tokens_total"
    found = lines(exporter, name, "adapter")
    assert set(found) == {("(other)", "lookup")}, "those that came first are not the busiest"
    for number in range(1000):
        watch.drafted(spec(number), "lookup", 1, 1, 1)
    later = lines(exporter, name, "adapter")
    assert {adapter for adapter, _ in later} == {
        "(other)",
        *(f"a{n}" for n in range(1000 - SEATS, 1000)),
    }
    assert all(later[key] >= number for key, number in found.items())
    watch.drafted(spec(5000), "lookup", 10**6, 4, 0)
    assert ("(other)", "lookup") in lines(exporter, name, "adapter")
    assert len(samples(exporter)) < 900


def test_an_adapter_without_a_name_any_more(source: Source, exporter: Exporter) -> None:
    source.observations.drafted(spec(5000), "lookup", 3, 3, 1)
    label = f"sha256:{digest(5000)[:12]}"
    name = "loramux_draft_tokens_total"
    assert value(exporter, name, adapter=label, drafter="lookup") == 3


def test_two_versions_of_a_name_are_one_line(source: Source) -> None:
    """A scraper refuses a text in which a series stands twice."""
    names = {digest(1): ["same"], digest(2): ["same"]}
    exporter = Exporter(source, lambda: names)
    source.observations.drafted(spec(1), "lookup", 3, 3, 1)
    source.observations.drafted(spec(2), "lookup", 4, 4, 1)
    found = lines(exporter, "loramux_draft_tokens_total", "adapter")
    assert found == {("same", "lookup"): 7}
