"""What a scraper reads, with prometheus_client's own parser."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.http.fake_front import INFO

from loramux.front.generation import Done, GenerationSpec
from loramux.front.observations import Observations, Observer
from loramux.metrics.prometheus import CACHE_S, Exporter
from loramux.metrics.stats import AdapterLoad, PoolStats, StepStats
from loramux.request import AdapterRef, SamplingParams


@dataclass
class Source:
    """The part of a front that is read."""

    observations: Observations = field(default_factory=Observations)
    base_name: str = "base"
    info: Any = INFO

    reasons: list[str] = field(default_factory=list)

    @property
    def snapshot(self) -> Any:
        return self.observations.snapshot

    def not_ready(self) -> list[str]:
        return self.reasons


def digest(number: int) -> str:
    return f"{number:064x}"


def spec(number: int | None = None, **sampling: Any) -> GenerationSpec:
    return GenerationSpec(
        request_id="r",
        adapters=() if number is None else (AdapterRef(digest(number)),),
        prompt_ids=[1] * 7,
        sampling=SamplingParams(seed=1, **sampling),
        arrived_at=100.0,
    )


def done(tokens: int = 3, reason: Any = "stop") -> Done:
    return Done(
        finish_reason=reason,
        stop_reason=None,
        num_output_tokens=tokens,
        cached_tokens=0,
        queue_s=0.5,
        prefill_s=0.25,
        first_token_at=101.0,
        finished_at=103.0,
    )


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def exporter(source: Source) -> Exporter:
    exporter = Exporter(source, lambda: {digest(n): [f"a{n}"] for n in range(1000)})
    observer: Observer = exporter
    source.observations.observer = observer
    return exporter


def samples(exporter: Exporter) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    exporter._rendered_at = -CACHE_S
    text = asyncio.run(exporter.render()).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(exporter: Exporter, name: str, **labels: str) -> float:
    found = samples(exporter)
    if name.startswith("vllm:") and name not in ("vllm:lora_requests_info",):
        labels = {"model_name": "base", "engine": "0"} | labels
    return found[name, tuple(sorted(labels.items()))]


def test_protocol_gauges(source: Source, exporter: Exporter) -> None:
    source.observations.step(
        StepStats(
            num_running=3,
            num_waiting=4,
            pool=PoolStats(100, 10, 30, 20, 15, 20, 5),
        )
    )
    assert value(exporter, "vllm:num_requests_running") == 3
    assert value(exporter, "vllm:num_requests_waiting") == 4
    held = 30 + 15 + 5  # kv, leased adapters, loading: what cannot be reclaimed now
    assert value(exporter, "vllm:kv_cache_usage_perc") == held / 100
    found = samples(exporter)
    [config] = [dict(labels) for name, labels in found if name == "vllm:cache_config_info"]
    assert config["block_size"] == "16" and config["num_gpu_blocks"] == "100"
    frames = {dict(k[1])["owner"]: v for k, v in found.items() if k[0] == "loramux_pool_frames"}
    assert sum(frames.values()) == found["loramux_pool_frames_total", ()] == 100


def lora_info(exporter: Exporter) -> tuple[dict[str, str], float]:
    [(labels, stamp)] = [
        (dict(labels), stamp)
        for (name, labels), stamp in samples(exporter).items()
        if name == "vllm:lora_requests_info"
    ]
    return labels, stamp


def test_lora_requests_info_is_one_series_for_ever(source: Source, exporter: Exporter) -> None:
    for number in range(5):
        source.observations.step(
            StepStats(resident=[digest(number), digest(2)], waiting_adapters=[digest(7)])
        )
        labels, stamp = lora_info(exporter)
        assert labels["running_lora_adapters"] == ",".join(sorted({f"a{number}", "a2"}))
        assert labels["waiting_lora_adapters"] == "a7"
        assert abs(stamp - time.time()) < 5
    source.observations.step(StepStats(resident=[digest(n) for n in range(20)]))
    labels, _ = lora_info(exporter)
    assert int(labels["max_lora"]) >= len(labels["running_lora_adapters"].split(",")) == 20


def test_no_engine_no_shape(source: Source, exporter: Exporter) -> None:
    source.info = None
    names = {name for name, _ in samples(exporter)}
    assert "vllm:cache_config_info" not in names and "vllm:num_requests_running" in names


def test_a_request_from_end_to_end(source: Source, exporter: Exporter) -> None:
    watch = source.observations
    watch.submitted(spec(max_tokens=9))
    watch.tokens(spec(), 2, None, 0.0, 100.75)
    watch.tokens(spec(), 4, 100.75, 100.75, 102.75)
    watch.finished(spec(), done())
    for name, total in (
        ("vllm:time_to_first_token_seconds", 0.75),
        ("vllm:e2e_request_latency_seconds", 3.0),
        ("vllm:request_queue_time_seconds", 0.5),
        ("vllm:request_prefill_time_seconds", 0.25),
        ("vllm:request_decode_time_seconds", 2.0),
        ("vllm:request_inference_time_seconds", 2.25),
        ("vllm:request_prompt_tokens", 7),
        ("vllm:request_generation_tokens", 3),
        ("vllm:request_params_max_tokens", 9),
    ):
        assert value(exporter, name + "_sum") == total and value(exporter, name + "_count") == 1
    assert value(exporter, "vllm:inter_token_latency_seconds_count") == 5
    assert value(exporter, "vllm:inter_token_latency_seconds_sum") == pytest.approx(2.0)
    assert value(exporter, "vllm:request_success_total", finished_reason="stop") == 1


def test_totals(source: Source, exporter: Exporter) -> None:
    watch = source.observations
    for _ in range(3):
        watch.step(
            StepStats(
                prompt_tokens=5,
                generation_tokens=2,
                prefix_queries=7,
                prefix_hits=6,
                preemptions=1,
                batch_rows=2,
                batch_tokens=7,
                batch_adapters=2,
                loads=[
                    AdapterLoad(digest(1), 0.5, 1000),
                    AdapterLoad(digest(2), 0.25, 100, source="host"),
                ],
                evictions={"adapter": 3, "prefix": 4},
                adapter_evictions={"kv": 2, "removed": 1},
                phase_s={"forward": 0.25},
                arrival_wait_s=0.125,
            )
        )
    watch.rejected("draining")
    watch.uploaded("ready")
    watch.engine_restarted("exit")
    exporter.ignored(4)
    exporter.disconnected()
    exporter.asked(2)
    for name, total in (
        ("vllm:prompt_tokens_total", 15),
        ("vllm:generation_tokens_total", 6),
        ("vllm:num_preemptions_total", 3),
        ("vllm:prefix_cache_queries_total", 21),
        ("vllm:prefix_cache_hits_total", 18),
        ("vllm:iteration_tokens_total_sum", 21),
        ("vllm:request_params_n_sum", 2),
        ("loramux_batch_adapters_sum", 6),
        ("loramux_adapter_load_bytes_total", 3300),
        ("loramux_prefix_evictions_total", 12),
        ("loramux_adapter_arrival_wait_seconds_total", 0.375),
        ("loramux_engine_restarts_total", 1),
        ("loramux_unknown_fields_total", 4),
        ("loramux_disconnect_aborts_total", 1),
    ):
        assert value(exporter, name) == total, name
    for reason, num in {"kv": 6, "adapter": 0, "removed": 3}.items():
        assert value(exporter, "loramux_adapter_evictions_total", reason=reason) == num
    for transition, seconds in {"disk_to_pool": 1.5, "host_to_pool": 0.75}.items():
        name = "loramux_adapter_load_seconds"
        assert value(exporter, "loramux_adapter_loads_total", transition=transition) == 3
        assert value(exporter, f"{name}_sum", transition=transition) == seconds
        assert value(exporter, f"{name}_count", transition=transition) == 3
    assert value(exporter, "loramux_admission_rejected_total", reason="draining") == 1
    assert value(exporter, "loramux_admission_rejected_total", reason="overloaded") == 0
    assert value(exporter, "loramux_uploads_total", result="ready") == 1
    assert value(exporter, "loramux_engine_restarts_by_reason_total", reason="exit") == 1
    assert value(exporter, "loramux_engine_restarts_by_reason_total", reason="heartbeat") == 0
    assert value(exporter, "loramux_engine_step_seconds_sum", phase="forward") == 0.75


def test_idle_steps_are_no_batches(source: Source, exporter: Exporter) -> None:
    source.observations.step(StepStats())
    assert value(exporter, "loramux_batch_adapters_count") == 0


def test_labels_stay_bounded(source: Source, exporter: Exporter) -> None:
    """A thousand adapters: twenty and the rest, and the text stays small."""
    watch = source.observations
    watch.submitted(spec())
    watch.finished(spec(), done(tokens=5000))
    for number in range(999):
        watch.submitted(spec(number))
        watch.finished(spec(number), done(tokens=number))
    found = samples(exporter)
    lines = {k[1]: v for k, v in found.items() if k[0] == "loramux_top_adapter_tokens"}
    assert len(lines) == 2 * 21
    outputs = {dict(k)["adapter"]: v for k, v in lines.items() if dict(k)["kind"] == "generation"}
    assert outputs["base"] == 5000 and outputs["a998"] == 998 and "a979" not in outputs
    assert sum(outputs.values()) == 5000 + sum(range(999)), "nothing is lost"
    assert len(found) < 700


def test_an_adapter_without_a_name_any_more(source: Source, exporter: Exporter) -> None:
    watch = source.observations
    watch.submitted(spec(5000))
    watch.finished(spec(5000), done())
    label = f"sha256:{digest(5000)[:12]}"
    assert value(exporter, "loramux_top_adapter_tokens", adapter=label, kind="generation") == 3


def test_the_text_is_made_at_most_four_times_a_second(source: Source, exporter: Exporter) -> None:
    async def scrape() -> list[bytes]:
        texts = await asyncio.gather(*(exporter.render() for _ in range(20)))
        source.observations.rejected("draining")
        return [*texts, await exporter.render()]

    assert len(set(scraped := asyncio.run(scrape()))) == 1 and len(scraped) == 21
    exporter._rendered_at -= CACHE_S
    assert asyncio.run(exporter.render()) != scraped[0]


def families(exporter: Exporter) -> Iterator[Any]:
    exporter._rendered_at = -CACHE_S
    yield from text_string_to_metric_families(asyncio.run(exporter.render()).decode())


def test_every_family_is_documented_and_ours(exporter: Exporter) -> None:
    for family in families(exporter):
        assert family.documentation, family.name
        assert family.name.startswith(("vllm:", "loramux_", "process_")), family.name
        assert not family.name.endswith("_created")
