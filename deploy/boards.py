"""Writes the Grafana boards: ``python deploy/boards.py``, after which the JSON is committed.

Every query names metrics of ``/metrics`` as they are; ``tests/deploy`` holds each of them against a
running server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "grafana/dashboards"
WIDTH = 24
PANEL_HEIGHT, STAT_HEIGHT = 8, 4
FIRST_TOKEN_SLO_S = "1.0"
"""A bucket's bound of vllm:time_to_first_token_seconds: what counts as goodput."""

SELECT = '{job=~"$job", instance=~"$instance"}'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Panel = dict[str, Any]
Query = tuple[str, str]
"""PromQL and the legend."""


def only(**labels: str) -> str:
    """A selector with more labels than the board's own."""
    more = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{SELECT[:-1]}, {more}}}"


def rate(metric: str, select: str = SELECT) -> str:
    """A counter's rate a second."""
    return f"rate({metric}{select}[$__rate_interval])"


def by(label: str, expression: str) -> Query:
    """The sum for each value of a label."""
    labels = [name.strip() for name in label.split(",")]
    legend = " ".join(f"{{{{{name}}}}}" for name in labels)
    return f"sum by ({label}) ({expression})", legend


def total(expression: str, legend: str) -> Query:
    """The sum over every instance."""
    return f"sum({expression})", legend


def quantiles(
    metric: str, shares: Sequence[float] = (0.5, 0.95, 0.99), label: str = ""
) -> list[Query]:
    """Quantiles of a histogram, over every instance; apart for each value of ``label``."""
    groups = f"le, {label}" if label else "le"
    inner = f"sum by ({groups}) ({rate(metric + '_bucket')})"
    legend = f" {{{{{label}}}}}" if label else ""
    return [
        (f"histogram_quantile({share:g}, {inner})", f"p{share * 100:g}{legend}") for share in shares
    ]


def panel(title: str, queries: Sequence[Query], unit: str = "short", **options: Any) -> Panel:
    """One graph over time. ``options``: ``width``, ``about``, ``stacked``, ``most``, ``kind``."""
    custom: dict[str, Any] = {"fillOpacity": 60 if options.get("stacked") else 8, "lineWidth": 1}
    if options.get("stacked"):
        custom["stacking"] = {"mode": "normal"}
    defaults: dict[str, Any] = {"unit": unit, "min": 0, "custom": custom}
    if "most" in options:
        defaults["max"] = options["most"]
    kind = options.get("kind", "timeseries")
    shown: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}}
    if kind == "stat":
        shown = {
            "colorMode": "value",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"]},
        }
    if kind == "bargauge":
        shown = {"displayMode": "basic", "orientation": "horizontal"}
    instant = kind == "bargauge"
    return {
        "title": title,
        "description": options.get("about", ""),
        "type": kind,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": shown,
        "width": options.get("width", 8),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "instant": instant,
                "range": not instant,
            }
            for index, (expression, legend) in enumerate(queries)
        ],
    }


def stat(title: str, query: str, unit: str = "short", about: str = "") -> Panel:
    """One number."""
    return panel(title, [(query, "")], unit, kind="stat", width=4, about=about)


def bars(title: str, query: Query, unit: str = "short", **options: Any) -> Panel:
    """A bar for each series, as things are now."""
    return panel(title, [query], unit, kind="bargauge", **options)


def overview() -> list[Panel]:
    """How users fare."""
    first_token = "vllm:time_to_first_token_seconds"
    in_time = rate(f"{first_token}_bucket", only(le=FIRST_TOKEN_SLO_S))
    ended = total(rate("vllm:e2e_request_latency_seconds_count"), "")[0]
    return [
        stat("Ready servers", f"sum(loramux_ready{SELECT})"),
        stat("Running", f"sum(vllm:num_requests_running{SELECT})"),
        stat("Waiting", f"sum(vllm:num_requests_waiting{SELECT})"),
        stat("Oldest waits", f"max(loramux_oldest_waiting_seconds{SELECT})", "s"),
        stat(
            "Pool in use",
            f"max(vllm:kv_cache_usage_perc{SELECT})",
            "percentunit",
            "Frames that cannot be reclaimed now",
        ),
        stat("Engine restarts, 1 h", f"sum(increase(loramux_engine_restarts_total{SELECT}[1h]))"),
        panel(
            "Choices ended by reason",
            [by("finished_reason", rate("vllm:request_success_total"))],
            "reqps",
            stacked=True,
        ),
        panel(
            "Goodput",
            [(ended, "ended"), total(in_time, f"first token within {FIRST_TOKEN_SLO_S} s")],
            "reqps",
        ),
        panel(
            "Tokens",
            [
                total(rate("vllm:prompt_tokens_total"), "prompt"),
                total(rate("vllm:generation_tokens_total"), "generated"),
            ],
            "short",
        ),
        panel("Time to first token", quantiles(first_token), "s"),
        panel("Between tokens", quantiles("vllm:inter_token_latency_seconds"), "s"),
        panel("Whole request", quantiles("vllm:e2e_request_latency_seconds"), "s"),
        panel("Time in the queue", quantiles("vllm:request_queue_time_seconds"), "s"),
        panel(
            "Oldest waiting request",
            [(f"max by (instance) (loramux_oldest_waiting_seconds{SELECT})", "{{instance}}")],
            "s",
        ),
        panel(
            "Requests in hand",
            [
                total(f"vllm:num_requests_running{SELECT}", "running"),
                total(f"vllm:num_requests_waiting{SELECT}", "waiting"),
            ],
        ),
        panel(
            "Errors before an answer, by type",
            [by("type", rate("loramux_errors_total", only(stage="answer")))],
            "reqps",
        ),
        panel(
            "Errors within a stream, by type",
            [by("type", rate("loramux_errors_total", only(stage="stream")))],
            "reqps",
            about="After the 200: an HTTP status never shows these",
        ),
        panel(
            "Refused at the door, by reason",
            [by("reason", rate("loramux_admission_rejected_total"))],
            "reqps",
        ),
        panel(
            "Choices that failed, by code",
            [by("code", rate("loramux_request_failed_total"))],
            "reqps",
        ),
        panel(
            "Clients that left", [total(rate("loramux_disconnect_aborts_total"), "left")], "reqps"
        ),
        panel(
            "Engine restarts by reason",
            [by("reason", f"increase(loramux_engine_restarts_by_reason_total{SELECT}[5m])")],
        ),
        panel(
            "Saved from a dead engine, and computed wrongly",
            [
                total(f"increase(loramux_requests_resumed_total{SELECT}[5m])", "choices resumed"),
                total(f"increase(loramux_nan_aborts_total{SELECT}[5m])", "not finite"),
                total(f"increase(loramux_canary_misses_total{SELECT}[5m])", "canaries missed"),
            ],
        ),
    ]


def pool() -> list[Panel]:
    """Who has the memory, and how close it is to running out."""
    lows = f"loramux_pool_frames_minimum{SELECT}"
    hits, queries = rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total")
    return [
        panel(
            "Frames by owner",
            [by("owner", f"loramux_pool_frames{SELECT}")],
            stacked=True,
            width=16,
            about="free, prefix and adapter_warm can be had by whoever needs them",
        ),
        panel(
            "In use",
            [(f"max by (instance) (vllm:kv_cache_usage_perc{SELECT})", "{{instance}}")],
            "percentunit",
            most=1,
        ),
        panel(
            "Lowest of the last minute",
            [(f"min by (kind) ({lows})", "{{kind}}")],
            about="available: free or reclaimable. It is this one that runs out",
        ),
        panel("Preemptions", [total(rate("vllm:num_preemptions_total"), "rows a second")]),
        panel(
            "Evicted adapters, by who needed the room",
            [by("reason", rate("loramux_adapter_evictions_total"))],
        ),
        panel(
            "Evicted prefix pages",
            [total(rate("loramux_prefix_evictions_total"), "pages a second")],
        ),
        panel(
            "Prompt tokens found in the cache",
            [(f"sum({hits}) / sum({queries})", "share")],
            "percentunit",
            most=1,
        ),
        panel(
            "Memory of the front process",
            [(f"sum by (instance) (process_resident_memory_bytes{SELECT})", "{{instance}}")],
            "bytes",
        ),
    ]


def adapters() -> list[Panel]:
    """Which adapters are where, and what getting them there takes."""
    loads, begun = (
        rate("loramux_adapter_loads_total"),
        rate("vllm:request_queue_time_seconds_count"),
    )
    queue = f"sum by (le) ({rate('vllm:request_queue_time_seconds_bucket')})"
    fairness = f"histogram_quantile(0.99, {queue}) / histogram_quantile(0.5, {queue})"
    asked = f"sum by (le) (loramux_adapter_requests_per_minute_bucket{SELECT})"
    drafted = rate("loramux_accepted_draft_tokens_total"), rate("loramux_draft_tokens_total")
    return [
        panel(
            "Adapters",
            [
                total(f"loramux_resident_adapters{SELECT}", "in the pool"),
                total(f"loramux_pinned_adapters{SELECT}", "pinned"),
                total(f"loramux_loading_adapters{SELECT}", "loading"),
            ],
        ),
        panel("Loads by where from", [by("transition", loads)], "short"),
        panel(
            "Time of a load",
            quantiles("loramux_adapter_load_seconds", (0.5, 0.95), "transition"),
            "s",
        ),
        panel(
            "Loads a request",
            [(f"sum({loads}) / sum({begun})", "cold share")],
            "percentunit",
            about="0: every request finds its adapters in the pool",
        ),
        panel("Adapter lists in a step", quantiles("loramux_batch_adapters", (0.5, 0.95))),
        panel(
            "Queue time: p99 over median",
            [(fairness, "ratio")],
            about="How much longer the unlucky wait than most",
        ),
        bars(
            "Busiest adapters by tokens since the start",
            (f"topk(21, sum by (adapter) (loramux_top_adapter_tokens{SELECT}))", "{{adapter}}"),
            width=12,
        ),
        bars(
            "Adapters with at most so many requests in the last minute", (asked, "{{le}}"), width=12
        ),
        panel("Uploads by result", [by("result", rate("loramux_uploads_total"))], "reqps"),
        panel(
            "Time to examine an adapter",
            quantiles("loramux_adapter_validation_seconds", (0.5, 0.95)),
            "s",
        ),
        panel(
            "Adapters at fault, by code",
            [by("code", rate("loramux_adapter_validation_failures_total"))],
            "reqps",
        ),
        panel(
            "Guesses that were right, by adapter",
            [(f"sum by (adapter) ({drafted[0]}) / sum by (adapter) ({drafted[1]})", "{{adapter}}")],
            "percentunit",
            most=1,
        ),
        panel(
            "Waiting for adapters to arrive",
            [total(rate("loramux_adapter_arrival_wait_seconds_total"), "device stands still")],
            "percentunit",
        ),
        panel(
            "Bytes loaded",
            [total(rate("loramux_adapter_load_bytes_total"), "into the pool")],
            "Bps",
        ),
    ]


def engine() -> list[Panel]:
    """What a step takes and gives."""
    tokens = "vllm:iteration_tokens_total"
    per_step = f"sum({rate(f'{tokens}_sum')}) / sum({rate(f'{tokens}_count')})"
    right, guessed = (
        rate(f"vllm:spec_decode_num_{kind}_tokens_total") for kind in ("accepted", "draft")
    )
    drafts = rate("vllm:spec_decode_num_drafts_total")
    places = [
        f"sum by (drafter, position) ({rate(f'loramux_{kind}draft_positions_total')})"
        for kind in ("accepted_", "")
    ]
    phases = rate("loramux_engine_step_seconds_sum")
    return [
        panel(
            "Time of a step by phase, p95",
            quantiles("loramux_engine_step_seconds", (0.95,), "phase"),
            "s",
        ),
        panel(
            "Where the engine's time goes",
            [by("phase", phases)],
            "percentunit",
            stacked=True,
            about="Of one second of one engine; what is missing to 1 it was idle",
        ),
        panel("Steps", [total(rate("loramux_engine_steps_total"), "steps a second")]),
        panel("Tokens in a step", [(per_step, "mean"), *quantiles(tokens, (0.95,))]),
        panel(
            "Prefill and decode, p95",
            [
                (quantiles(f"vllm:request_{phase}_time_seconds", (0.95,))[0][0], phase)
                for phase in ("prefill", "decode")
            ],
            "s",
        ),
        panel(
            "Guesses: right of those made",
            [(f"sum({right}) / sum({guessed})", "share")],
            "percentunit",
            most=1,
        ),
        panel("Tokens gained a verified guess", [(f"sum({right}) / sum({drafts})", "tokens")]),
        panel(
            "Right by drafter and position",
            [(f"{places[0]} / {places[1]}", "{{drafter}} {{position}}")],
            "percentunit",
            most=1,
        ),
        panel(
            "CPU of the front process",
            [(f"sum by (instance) ({rate('process_cpu_seconds_total')})", "{{instance}}")],
            "percentunit",
        ),
    ]


BOARDS = {
    "overview": ("loramux: overview", overview),
    "pool": ("loramux: pool", pool),
    "adapters": ("loramux: adapters", adapters),
    "engine": ("loramux: engine", engine),
}


def placed(panels: Sequence[Panel]) -> list[Panel]:
    """The panels with ids and places, in rows from left to right."""
    found, x, y, height = [], 0, 0, 0
    for number, one in enumerate(panels, start=1):
        one = dict(one)
        width = one.pop("width")
        if x + width > WIDTH:
            x, y = 0, y + height
        height = STAT_HEIGHT if one["type"] == "stat" else PANEL_HEIGHT
        found.append({"id": number, "gridPos": {"x": x, "y": y, "w": width, "h": height}, **one})
        x += width
    return found


def variable(name: str, query: str) -> dict[str, Any]:
    """A choice of label values at the top of the board."""
    return {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def board(name: str) -> dict[str, Any]:
    """One board as Grafana reads it."""
    title, panels = BOARDS[name]
    links = [
        {
            "type": "dashboards",
            "tags": ["loramux"],
            "title": "boards",
            "asDropdown": True,
            "keepTime": True,
        }
    ]
    choices = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {}},
        variable("job", "label_values(loramux_build_info, job)"),
        variable("instance", 'label_values(loramux_build_info{job=~"$job"}, instance)'),
    ]
    return {
        "uid": f"loramux-{name}",
        "title": title,
        "tags": ["loramux"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": links,
        "templating": {"list": choices},
        "panels": placed(panels()),
    }


def text(name: str) -> str:
    """One board as it is committed."""
    return json.dumps(board(name), indent=1) + "\n"


if __name__ == "__main__":
    for name in BOARDS:
        (FOLDER / f"{name}.json").write_text(text(name))
