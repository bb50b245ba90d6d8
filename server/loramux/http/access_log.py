"""The access log: one JSON object a line for every request, on the logger ``loramux.access``.

No text, no key, no path or query as they came: see ``exchanges``. Probes that are not refused are
told at level debug: they come many times a second, and the log has it why a server is not ready.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime

import msgspec

from loramux.http.exchanges import Exchange

log = logging.getLogger("loramux.access")

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
    is_quiet = exchange.is_probe and exchange.status // 100 != 4
    level = logging.DEBUG if is_quiet else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "%s", line(exchange))


def known_method(method: str) -> str:
    """One of HTTP's methods, or "_OTHER"."""
    return method if method in _METHODS else "_OTHER"


def pseudonym(tenant: str) -> str:
    """What tells a tenant from others without its name: the beginning of its SHA-256."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:12]


def line(exchange: Exchange) -> str:
    """The JSON object. Fields that do not apply are null."""
    when = datetime.fromtimestamp(exchange.began_at, UTC).isoformat(timespec="milliseconds")
    model = exchange.model
    first = exchange.first_token_s
    told = {
        "time": when,
        "request_id": exchange.request_id,
        "method": known_method(exchange.method),
        "route": exchange.route or None,
        "status": exchange.status,
        "error": exchange.error,
        "tenant": pseudonym(exchange.tenant) if exchange.tenant else None,
        "adapter": None if model is None else model[:MAX_NAME],
        "prompt_tokens": exchange.prompt_tokens,
        "output_tokens": exchange.output_tokens,
        "duration_s": round(exchange.seconds, 6),
        "ttft_s": None if first is None else round(first, 6),
    }
    return msgspec.json.encode(told).decode()
