"""An adapter that keeps breaking requests is named, and only one that surely did it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tests.front.house import collect, configure, running, spec
from tests.front.uploading import upload

from loramux.errors import EngineFailed, NumericalError
from loramux.front.faults import FLAGGED_FROM, MOST_DIGESTS, AdapterFaults
from loramux.front.front import Front
from loramux.metrics.prometheus import Exporter
from loramux.request import AdapterRef, EntropyAdaptive

BROKEN = NumericalError("not finite")
A, B = AdapterRef("a" * 64), AdapterRef("b" * 64)


async def fail(front: Front, name: str, *, tenant: str = "", num: int = 1) -> None:
    served = front.adapters.resolve(name, tenant=tenant)
    for _ in range(num):
        asked = spec("r", "fail=numerical_error", adapters=served.adapters, tenant=tenant)
        with pytest.raises(NumericalError):
            await collect(front.submit(asked))


def test_an_adapter_that_keeps_breaking_requests_is_flagged_and_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            front.observer = exporter = Exporter(front, front.adapters.labels)

            async def metric(adapter: str) -> list[str]:
                exporter._rendered_at = -1e9
                text = (await exporter.render()).decode()
                line = f'loramux_flagged_adapter_errors{{adapter="{adapter}"}} '
                return [each.removeprefix(line) for each in text.splitlines() if line in each]

            for name in ("cat", "dog"):
                await upload(front, name, weights=name.encode())
            await fail(front, "cat", num=FLAGGED_FROM - 1)
            assert front.adapters.show("cat").faults == {"numerical_error": FLAGGED_FROM - 1}
            assert not front.adapters.show("cat").flagged and not await metric("cat")
            assert not caplog.records
            await fail(front, "cat", num=2)
            cat, dog = front.adapters.list()
            assert (cat.faults, cat.flagged) == ({"numerical_error": FLAGGED_FROM + 1}, True)
            assert (dog.faults, dog.flagged, cat.status) == ({}, False, "ready")
            assert [r.levelno for r in caplog.records if "flagged" in r.message] == [
                logging.WARNING
            ]
            assert await metric("cat") == [f"{FLAGGED_FROM + 1}.0"] and not await metric("dog")
            served = front.adapters.resolve("cat")
            assert (await collect(front.submit(spec("r", adapters=served.adapters)))).token_ids
            await upload(front, "cat", expected_generation=1, weights=b"repaired")
            assert not front.adapters.show("cat").flagged and front.adapters.show("cat@1").flagged
            assert not await metric("cat"), "what the name means now is fine"

    asyncio.run(main())


def test_a_tenant_sees_what_its_own_requests_met(tmp_path: Path) -> None:
    """Two have uploaded the same bytes, and neither is to know of the other."""

    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            for tenant in ("", "acme", "rival"):
                await upload(front, "cat", tenant=tenant)
            await fail(front, "cat", tenant="acme", num=FLAGGED_FROM)
            assert front.adapters.show("cat", tenant="acme").flagged
            view = front.adapters.show("cat", tenant="rival")
            assert (view.faults, view.flagged) == ({}, False)
            assert front.adapters.show("cat").flagged, "of a shared one everybody's count"

    asyncio.run(main())


def test_nobody_is_blamed_for_what_another_may_have_done() -> None:
    faults = AdapterFaults()
    alone = spec(adapters=(A,))
    for innocent in (
        spec(adapters=(A, B)),
        spec(adapters=(AdapterRef(A.digest, 1e30),)),
        spec(),
        replace(alone, entropy=EntropyAdaptive(threshold=1.0)),
    ):
        faults.failed(innocent, BROKEN)
    faults.failed(alone, EngineFailed("another fault"))
    assert faults.count(A.digest) == faults.count(B.digest) == 0
    faults.failed(alone, BROKEN)
    assert faults.count(A.digest) == 1


def test_what_is_remembered_is_bounded() -> None:
    faults = AdapterFaults()
    for number in range(MOST_DIGESTS + 5):
        faults.failed(spec(adapters=(AdapterRef(f"{number:064x}"),)), BROKEN)
    counts = [faults.count(f"{number:064x}") for number in range(MOST_DIGESTS + 5)]
    assert counts == [0] * 5 + [1] * MOST_DIGESTS
