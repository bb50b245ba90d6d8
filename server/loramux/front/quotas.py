"""What each tenant uses of its limits: choices in flight, tokens a minute, uploads, adapters.

Limits are the keys file's and may change at any time; the counts are of this process. Everything
runs on the event loop, except ``check_adapters`` and ``check_bytes``, which keep no state.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loramux.errors import InvalidRequest, QuotaExceeded, RateLimited
from loramux.front.generation import GenerationSpec
from loramux.front.keys import Limits
from loramux.wire import Ready, frames_of

MAX_UPLOADS = 10
"""Uploads of one tenant that may be on their way at once."""
_RETRY_S = 1.0


@dataclass
class _Bucket:
    """Tokens a tenant may still ask for: refilled evenly, full after a minute."""

    level: float
    at: float

    def refill(self, per_minute: int, now: float) -> None:
        self.level = min(per_minute, self.level + (now - self.at) * per_minute / 60)
        self.at = now


class Quotas:
    """Counts by tenant. ``limits`` tells a tenant's limits now; ``rejected`` hears the codes of
    refusals for now."""

    def __init__(
        self,
        limits: Callable[[str], Limits],
        rejected: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._rejected, self._clock = limits, rejected, clock
        self._choices: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self._buckets: dict[str, _Bucket] = {}
        self._reserved: dict[str, int] = {}

    # Choices in flight.

    def hold(self, tenant: str, num: int, tokens: int = 0, certain: int = 0) -> int:
        """Take ``num`` places, and of the minute's tokens ``tokens``, until ``release``; how many
        were taken. ``certain`` of them are no estimate, and more than these never make a request
        impossible.

        Raises RateLimited when the tenant has too many choices in flight or too few tokens left,
        InvalidRequest when that many never fit.
        """
        most = self._limits(tenant).max_requests
        if most is not None and num > most:
            raise InvalidRequest(
                f"the request asks for {num} completions; this tenant may have {most}", param="n"
            )
        if most is not None and self._choices[tenant] + num > most:
            self._refuse(
                f"{self._choices[tenant]} completions are in flight; this tenant may have {most}",
                _RETRY_S,
            )
        rate = self._limits(tenant).tokens_per_minute
        if rate is None or not tokens:
            taken = 0
        else:
            taken = max(certain, min(tokens, rate))
            self.check_tokens(tenant, taken)
            self._bucket(tenant, rate).level -= taken
        self._choices[tenant] += num
        return taken

    def release(self, tenant: str, num: int, tokens: int = 0) -> None:
        """Give places back, and the tokens that ``hold`` took."""
        _subtract(self._choices, tenant, num)
        if tokens and (bucket := self._buckets.get(tenant)) is not None:
            bucket.level += tokens

    # Tokens a minute.

    def check_tokens(self, tenant: str, num: int) -> None:
        """Whether choices of ``num`` tokens (prompts and max_tokens) may start now; takes nothing.

        Raises RateLimited with the seconds until they may, InvalidRequest when they never may.
        """
        rate = self._limits(tenant).tokens_per_minute
        if rate is None:
            return
        if num > rate:
            raise InvalidRequest(
                f"the request may need {num} tokens; this tenant has {rate} a minute",
                param="max_tokens",
            )
        missing = num - self._bucket(tenant, rate).level
        if missing > 0:
            self._refuse(
                f"the request may need {num} tokens, more than is left now of the {rate} a minute",
                missing * 60 / rate,
            )

    def start(self, spec: GenerationSpec) -> None:
        """A choice was accepted: it holds a place, and its tokens are taken."""
        self._choices[spec.tenant] += 1
        rate = self._limits(spec.tenant).tokens_per_minute
        if rate is not None:
            reserved = len(spec.prompt_ids) + spec.sampling.max_tokens
            self._reserved[spec.request_id] = reserved
            self._bucket(spec.tenant, rate).level -= reserved

    def end(self, spec: GenerationSpec, num_outputs: int) -> None:
        """It ended after so many tokens; what it did not use comes back."""
        _subtract(self._choices, spec.tenant, 1)
        reserved = self._reserved.pop(spec.request_id, None)
        bucket = self._buckets.get(spec.tenant)
        if reserved is not None and bucket is not None:
            bucket.level += reserved - len(spec.prompt_ids) - num_outputs

    def _bucket(self, tenant: str, rate: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(tenant, _Bucket(rate, now))
        bucket.refill(rate, now)
        return bucket

    # The memory pool.

    def pool_share(self, tenant: str) -> float | None:
        """The part of the pool that the tenant's running choices may take; None for no limit."""
        return self._limits(tenant).max_pool_share

    def pool_tokens(self, tenant: str, info: Ready) -> int | None:
        """Of how many tokens the KV has room in that part; None for no limit."""
        share = self.pool_share(tenant)
        return None if share is None else frames_of(share, info.num_frames) * info.page_tokens

    # Adapters.

    @contextmanager
    def uploading(self, tenant: str) -> Iterator[None]:
        """An upload is on its way. Raises RateLimited when MAX_UPLOADS of the tenant are."""
        if self._uploads[tenant] >= MAX_UPLOADS:
            self._refuse(f"{MAX_UPLOADS} uploads are on their way already", _RETRY_S)
        self._uploads[tenant] += 1
        try:
            yield
        finally:
            _subtract(self._uploads, tenant, 1)

    def check_adapters(self, tenant: str, num: int, which: str) -> None:
        """Whether one more adapter may join ``num``. Raises QuotaExceeded."""
        most = self._limits(tenant).max_adapters
        if most is not None and num >= most:
            raise QuotaExceeded(
                f"this tenant has {num} {which} and may have {most}: delete some first"
            )

    def check_bytes(self, tenant: str, used: int, num_bytes: int) -> None:
        """Whether ``num_bytes`` more may be stored beside ``used``. Raises QuotaExceeded."""
        most = self._limits(tenant).max_adapter_bytes
        if most is not None and used + num_bytes > most:
            raise QuotaExceeded(
                f"this tenant has {used} bytes of weights, heads and files that wait for an "
                f"adapter, and may have {most}; this one has {num_bytes}"
            )

    def _refuse(self, message: str, retry_after_s: float) -> None:
        self._rejected(RateLimited.code)
        raise RateLimited(message, retry_after_s=retry_after_s)


def _subtract(counts: Counter[str], tenant: str, num: int) -> None:
    counts[tenant] -= num
    if not counts[tenant]:
        del counts[tenant]
