"""The access log: one JSON object a line for every request, on the logger ``loramux.access``.

No text, no key, no path or query as they came: see ``exchanges``. Probes that succeed are told at
level debug: they come many times a second and say nothing.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime

import msgspec

from loramux.http.exchanges import Exchange

log = logging.getLogger("loramux.access")

PROBES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
MAX_NAME = 64
"""So much of an adapter's name is told."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def to_stderr(level: str) -> None:
    """Lines without a prefix, so that every one is JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(level.upper())


def write(exchange: Exchange) -> None:
    """One line."""
    is_quiet = exchange.route in PROBES and exchange.status < 400
    level = logging.DEBUG if is_quiet else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "%s", line(exchange))


def line(exchange: Exchange) -> str:
    """The JSON object. Tenants are told as the beginning of their name's SHA-256; fields that do
    not apply are null."""
    when = datetime.fromtimestamp(exchange.began_at, UTC).isoformat(timespec="milliseconds")
    tenant = hashlib.sha256(exchange.tenant.encode()).hexdigest()[:12] if exchange.tenant else None
    model = exchange.model
    first = exchange.first_token_s
    told = {
        "time": when,
        "request_id": exchange.request_id,
        "method": exchange.method if exchange.method in _METHODS else "other",
        "route": exchange.route or None,
        "status": exchange.status,
        "error": exchange.error,
        "tenant": tenant,
        "adapter": None if model is None else model[:MAX_NAME],
        "prompt_tokens": exchange.prompt_tokens,
        "output_tokens": exchange.output_tokens,
        "duration_s": round(exchange.seconds, 6),
        "ttft_s": None if first is None else round(first, 6),
    }
    return msgspec.json.encode(told).decode()
