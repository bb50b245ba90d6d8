"""What a PromQL query asks of the metrics: which names, which labels, which values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

TARGET_LABELS = {"job", "instance"}
"""Prometheus adds these to everything it scrapes."""
ITS_OWN = {"up"}


@dataclass
class Live:
    """The series of a scrape: by name, by label, the values there are."""

    labels: dict[str, dict[str, set[str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Live:
        live = cls({name: {} for name in ITS_OWN})
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values = live.labels.setdefault(sample.name, {})
                for name, value in sample.labels.items():
                    values.setdefault(name, set()).add(value)
        return live

    def has(self, name: str) -> bool:
        """Whether there is a metric, or a histogram, of that name."""
        return name in self.labels or f"{name}_bucket" in self.labels

    def problems(self, query: str) -> list[str]:
        """What ``query`` asks for that is not there. Raises ValueError when it is no PromQL."""
        return list(self._check(promql_parser.parse(_concrete(query))))

    def _check(self, node: Any) -> Iterator[str]:
        for part in _walk(node):
            if isinstance(part, promql_parser.VectorSelector):
                yield from self._selector(part)
            elif isinstance(part, promql_parser.AggregateExpr) and part.modifier:
                yield from self._grouped(part.expr, set(part.modifier.labels))
            elif isinstance(part, promql_parser.BinaryExpr) and part.modifier:
                matching = part.modifier.matching
                if matching and matching.type == promql_parser.LabelModifierType.Include:
                    yield from self._grouped(part, set(matching.labels))

    def _selector(self, selector: Any) -> Iterator[str]:
        if selector.name not in self.labels:
            yield f"no metric {selector.name}"
            return
        there = self.labels[selector.name]
        for matcher in selector.matchers.matchers:
            if matcher.name in TARGET_LABELS:
                continue
            if matcher.name not in there:
                yield f"{selector.name} has no label {matcher.name}"
                continue
            several = matcher.op == promql_parser.MatchOp.Re
            wanted = set(matcher.value.split("|")) if several else {matcher.value}
            for value in wanted - there[matcher.name]:
                yield f"{selector.name}: no series with {matcher.name}={value!r}"

    def _grouped(self, node: Any, labels: set[str]) -> Iterator[str]:
        selectors = [p for p in _walk(node) if isinstance(p, promql_parser.VectorSelector)]
        for selector in selectors:
            for label in labels - TARGET_LABELS - set(self.labels.get(selector.name, ())):
                yield f"{selector.name} has no label {label} to group by"


def _walk(node: Any) -> Iterator[Any]:
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None and type(child).__module__.startswith("promql_parser"):
            yield from _walk(child)
    for child in getattr(node, "args", ()):
        yield from _walk(child)


def _concrete(query: str) -> str:
    return query.replace("$__rate_interval", "1m")


def of_board(board: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(panel's title, query, legend)."""
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def of_rules(rules: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(alert's name, query)."""
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
