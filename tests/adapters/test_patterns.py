"""rank_pattern and alpha_pattern keys mean what they mean to PEFT, whose function is the oracle."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from tests.adapters.peft_files import make_config, module_name

from loramux.adapters.formats.fields import Pattern, Targets, compile_key
from loramux.adapters.formats.lora import LoraConfig
from loramux.adapters.problems import Problems
from loramux.wire import MODULES

NAMES = [module_name(layer, module) for layer in (0, 1, 2, 10, 11, 21) for module in MODULES]
NAMES += [name.removeprefix("model.") for name in NAMES[:14]]

PIECES = (
    "q_proj k_proj o_proj proj self_attn mlp layers model 0 1 2 10 11 . .* .+ [0-9] [0-9]+ \\d \\."
    " \\w+ [^.]+ [qk] | ( ) (?: ? * + {2} {1,2} {,2} ^ $ _ \\b (q|k) (?i:Q) [] [[:alpha:]] \\1"
    " (?=q) (?i) (?P<n> \\Z \\z \\Q \\pL (?# #) ++ *? - a é \\x71 \\161 \\u0071 (?<!q) \\C"
).split()

keys = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.text(alphabet="qk_proj.layers01*+?()[]|\\^${},-", max_size=12),
    st.sampled_from(NAMES),
    st.tuples(st.sampled_from(NAMES), st.integers(0, 20)).map(lambda t: t[0][t[1] :]),
)


def pefts_key(patterns: list[str], name: str) -> str | None:
    """The key PEFT decides by; None when it would crash on the patterns or match none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        key = get_pattern_key(patterns, name)
    return key if key in patterns else None


@settings(max_examples=400, deadline=None)
@given(keys)
@example("q_proj)|(.*")
@example("q.proj")
@example("")
@example("[^.]*")
@example("q{,2}_proj")
@example("[a[:alpha:]]_proj")
@example("_proj")
@example("(?i:Q_PROJ)")
@example("model.layers.1.self_attn.q_proj")
def test_a_key_matches_as_in_peft_or_is_refused(key: str) -> None:
    try:
        ours = compile_key(key)
    except ValueError:
        return
    for name in NAMES:
        theirs = pefts_key([key], name)
        assert bool(ours.match(name)) == (theirs is not None), (key, name)


@settings(max_examples=200, deadline=None)
@given(st.lists(keys, max_size=5, unique=True))
def test_the_first_key_in_file_order_decides(candidates: list[str]) -> None:
    pattern, taken = Pattern(), []
    for key in candidates:
        try:
            pattern.add(key, len(taken))
        except ValueError:
            continue
        taken.append(key)
    for name in NAMES:
        theirs = pefts_key(taken, name)
        assert pattern.lookup(name, -1) == (-1 if theirs is None else taken.index(theirs))


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"[A-Za-z0-9_.-]{1,80}", fullmatch=True))
def test_literal_keys_are_never_refused(key: str) -> None:
    compile_key(key)


@pytest.mark.parametrize("key", ["(q", "*", "(?=q)q", r"(q)\1", "q_prøj", "[z-a]", "a" * 300, "\n"])
def test_keys_outside_the_common_language_are_refused_by_name(key: str) -> None:
    problems = Problems()
    LoraConfig(make_config(rank_pattern={key: 4}), problems, [])
    with pytest.raises(Exception, match="rank_pattern"):
        problems.raise_any()


# The backtracking engine needs longer than the universe has: there is no close call.
@pytest.mark.timeout(60)
def test_expressions_that_would_backtrack_for_ever_end_at_once() -> None:
    bombs = [
        "(.+)+\\d",
        "(a|a)*" * 20 + "$",
        "([a-z_.0-9]+)+x",
        "(.*.*.*.*.*.*.*.*)*y",
        "(.?){30}z",
    ]
    pattern = Pattern()
    for bomb in bombs:
        try:
            pattern.add(bomb, 1)
        except ValueError:
            continue
    assert pattern.unused()
    for name in NAMES:
        pattern.lookup(name, 0)


def test_target_expressions_are_not_run() -> None:
    problems = Problems()
    config = LoraConfig(
        make_config(target_modules="(.+)+\\d", exclude_modules="(.+)+\\d"), problems, []
    )
    problems.raise_any()
    assert config.targets.selects(NAMES[0] * 5, 0)


@settings(max_examples=200, deadline=None)
@given(
    st.sets(st.sampled_from(["q_proj", "proj", "mlp.up_proj", "self_attn", *NAMES]), max_size=4),
    st.sets(st.sampled_from(["q_proj", "v_proj", "mlp.up_proj", *NAMES]), max_size=3),
    st.one_of(st.none(), st.lists(st.integers(0, 3), max_size=3)),
)
def test_target_lists_select_as_in_peft(
    modules: set[str], excluded: set[str], layers: list[int] | None
) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    theirs = LoraConfig(
        target_modules=sorted(modules), exclude_modules=sorted(excluded), layers_to_transform=layers
    )
    ours = Targets(
        frozenset(modules), frozenset(excluded), None if not layers else frozenset(layers)
    )
    for name in NAMES:
        if not name.startswith("model."):
            continue  # of the bare model PEFT cannot tell the layer
        found = check_target_module_exists(theirs, name)
        layer = int(name.split(".")[2])
        want = bool(found) and not isinstance(found, _ExcludedModule)
        assert ours.selects(name, layer) == want
