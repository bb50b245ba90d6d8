from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from loramux.sampling.history import History

IDS = st.lists(st.integers(0, 30), max_size=60)


@given(prompt=IDS, outputs=st.lists(IDS, max_size=4))
def test_history_counts_what_it_saw(prompt: list[int], outputs: list[list[int]]) -> None:
    history = History(prompt, [])
    for part in outputs:
        history.extend(part)
    flat = [token for part in outputs for token in part]
    seen = dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))
    assert len(seen) == len(history.ids)
    assert seen == {token: flat.count(token) for token in {*prompt, *flat}}
    assert history.num_outputs == len(flat)

    again = History(prompt, flat)
    assert Counter(zip(again.ids.tolist(), again.counts.tolist(), strict=True)) == Counter(
        seen.items()
    )
