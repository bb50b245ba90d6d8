"""Equal names, bytes and prompts of two tenants find nothing of each other in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny
from tests.harness import Harness

PROMPT = list(range(5, 55))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_no_prefix_hit_across_tenants(tmp_path: Path, with_adapter: bool) -> None:
    model = tiny.write_model(tmp_path / "base", "llama")
    harness = Harness(model)
    adapter = tiny.write_adapter(tmp_path / "a", model) if with_adapter else None
    asked = [
        ("alice", "", 0),
        ("alice", "", 48),  # the control: its own pages are found
        ("bob", "", 0),
        ("bob", "", 48),
        ("", "", 0),
        ("", "alice", 0),  # a salt that spells a tenant
        ("ali", "ce", 0),
        ("alice", "bob", 0),
        ("bob", "alice", 0),
    ]
    outputs = []
    for tenant, salt, cached in asked:
        name = harness.submit(PROMPT, adapter, tenant=tenant, cache_salt=salt)
        outputs.append(harness.run()[name])
        assert harness.finished[name].cached_tokens == cached, (tenant, salt)
    assert all(output == outputs[0] for output in outputs)
    harness.close()
