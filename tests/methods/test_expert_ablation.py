"""Experts out of the choice, silenced or forced: against the oracle, and a model without them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle
from reference import TOLERANCE, check
from tiny import Tiny
from tiny_gguf import ARCHS

from mia.errors import RangeError, SiteError, UsageError
from mia.methods.changes import Changes
from mia.methods.expert_ablation import MARGIN, expert_counts, expert_edits
from mia.ranges import Expert, parse_experts
from mia.request import Capture, Request, Result
from mia.sites import Site

LAYER = 1
READ = Capture([Site(name, LAYER) for name in ("router", "experts", "expert_weights")])


def _run(t: Tiny, **changes: Any) -> Result:
    """A run under `expert_edits`, which must be the oracle's."""
    edits = expert_edits(t.model, **changes)
    request = Request(t.prompt(), edits, [READ], "all", n_predict=3, stop_at_eog=False)
    result = t.model.run([request])[0]
    check(result, request, t.oracle)
    return result


def _busiest(t: Tiny) -> Expert:
    chosen = _run(t)[f"experts.{LAYER}"].astype(int)
    return Expert(LAYER, int(np.bincount(chosen.ravel()).argmax()))


def _without_expert(path: Path, expert: Expert) -> Oracle:
    """The model as if its file had no such expert."""
    oracle = Oracle(path)
    blk = f"blk.{expert.layer}"
    for name in ("ffn_gate_inp.weight", "exp_probs_b.bias"):
        if f"{blk}.{name}" in oracle.weights:
            oracle.weights[f"{blk}.{name}"] = np.delete(
                oracle.weights[f"{blk}.{name}"], expert.expert, 0
            )
    for part in ("gate", "up", "down"):
        name = f"{blk}.ffn_{part}_exps.weight"
        oracle.weights[name] = np.delete(oracle.weights[name], expert.expert, 0)
    return oracle


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe"])
def test_out_of_the_choice_is_a_model_without_the_expert(
    name: str, tiny: Callable[[str], Tiny]
) -> None:
    t = tiny(name)
    expert = _busiest(t)
    result = _run(t, exclude=[expert])
    pruned = _without_expert(t.path, expert).run(t.prompt())["logits"]
    assert result.logits is not None
    assert np.abs(result.logits - pruned).max() < TOLERANCE
    assert np.abs(t.oracle.run(t.prompt())["logits"] - pruned).max() > 0.01


def test_an_expert_out_of_the_choice_is_chosen_by_no_token(mixture: Tiny) -> None:
    """dots1 compares sigmoids plus a bias: the router's logit alone would not do it."""
    expert = _busiest(mixture)
    result = _run(mixture, exclude=[expert])
    assert not (result[f"experts.{LAYER}"] == expert.expert).any()
    n_edits = 2 if ARCHS[mixture.name].experts.bias else 1  # type: ignore[union-attr]
    assert len(expert_edits(mixture.model, exclude=[expert])) == n_edits


def test_a_bias_may_choose_what_the_router_never_would(tiny: Callable[[str], Tiny]) -> None:
    """Why `exclude` edits `router_choice` too."""
    t = tiny("dots1")
    chosen_anyway = 0
    for e in range(8):
        edit, _ = expert_edits(t.model, exclude=[Expert(LAYER, e)])
        assert edit.site == Site("router", LAYER)
        result = t.model.run([Request(t.prompt(), [edit], [READ])])[0]
        chosen_anyway += int((result[f"experts.{LAYER}"] == e).sum())
    assert chosen_anyway > 0


def test_a_silenced_expert_changes_no_choice_and_no_other_weight(mixture: Tiny) -> None:
    expert = _busiest(mixture)
    clean, result = _run(mixture), _run(mixture, silence=[expert])
    n = len(mixture.prompt())
    for name in ("experts", "router"):
        np.testing.assert_array_equal(result[f"{name}.{LAYER}"][:n], clean[f"{name}.{LAYER}"][:n])
    want = clean[f"expert_weights.{LAYER}"].copy()
    want[:, expert.expert] = 0
    np.testing.assert_array_equal(result[f"expert_weights.{LAYER}"], want)


@pytest.mark.parametrize("n_forced", [1, 2])
def test_a_forced_expert_is_chosen_by_each_token(mixture: Tiny, n_forced: int) -> None:
    clean = _run(mixture)
    load = np.bincount(clean[f"experts.{LAYER}"].astype(int).ravel(), minlength=6)
    rarest = np.argsort(load)[0]
    forced = [int(rarest), int(rarest) ^ 1][:n_forced]  # of one group, in dots1
    result = _run(mixture, force=[Expert(LAYER, e) for e in forced])
    chosen = result[f"experts.{LAYER}"]
    assert all((chosen == e).any(1).all() for e in forced) and load[rarest] < len(chosen)
    logits, before = result[f"router.{LAYER}"], clean[f"router.{LAYER}"]
    others = np.delete(before, forced, 1).max(1, keepdims=True)
    want = np.maximum(before[:, forced], others + np.float32(MARGIN))
    np.testing.assert_allclose(logits[:, forced], want, rtol=0, atol=1e-6)


def test_a_forced_expert_of_softmax_weighs_as_much_as_the_favourite(
    tiny: Callable[[str], Tiny],
) -> None:
    t = tiny("mixtral")
    result = _run(t, force=[Expert(LAYER, 5)])
    weights = np.sort(result[f"expert_weights.{LAYER}"], 1)
    alike = result[f"router.{LAYER}"][:, 5] - np.sort(result[f"router.{LAYER}"], 1)[:, -2] < 0.011
    assert alike.sum() > 5
    np.testing.assert_allclose(weights[alike, -1] / weights[alike, -2], np.exp(MARGIN), rtol=1e-4)


def test_all_three_together_at_some_tokens(mixture: Tiny) -> None:
    changes = {"exclude": [Expert(1, 0), Expert(2, 3)], "silence": [Expert(2, 1)]}
    edits = expert_edits(mixture.model, **changes, force=[Expert(1, 4)], tokens=[2, -1])
    everything = Capture(list(mixture.model.topology.sites))
    request = Request(mixture.prompt(), edits, [everything], "all")
    check(mixture.model.run([request])[0], request, mixture.oracle)


# -- refused -----------------------------------------------------------------------------


def _all(layer: int, *experts: int) -> list[Expert]:
    return [Expert(layer, e) for e in experts]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "mixtral",
            {"exclude": _all(1, 0, 1, 2, 3, 4)},
            "chooses 2 of 6 .* leave at least 2, not 1",
        ),
        ("mixtral", {"force": _all(1, 0, 1, 2)}, "3 cannot be forced"),
        ("mixtral", {"force": _all(2, 3), "exclude": _all(2, 3)}, "2.3 cannot be both"),
        ("dots1", {"force": _all(1, 0, 2, 4)}, "from 2 groups of 2: experts of more groups"),
        ("dots1", {"exclude": _all(1, 0, 2, 4)}, "from 2 groups of 2: too few are left"),
        ("dots1", {"exclude": _all(1, 0), "force": _all(1, 1)}, "another one left in its group"),
    ],
)
def test_what_a_router_cannot_do(
    name: str, changes: dict[str, Any], message: str, tiny: Callable[[str], Tiny]
) -> None:
    with pytest.raises(UsageError, match=message):
        expert_edits(tiny(name).model, **changes)


def test_two_groups_must_be_whole(tiny: Callable[[str], Tiny]) -> None:
    """dots1 chooses 3 experts from the best 2 of 4 groups of 2."""
    t = tiny("dots1")
    _run(t, exclude=_all(1, 0, 2))  # two groups of two are left
    with pytest.raises(UsageError, match="too few are left to choose from"):
        expert_edits(t.model, exclude=_all(1, 0, 2, 5))


def test_a_dense_model_has_none_to_change(llama: Tiny) -> None:
    with pytest.raises(SiteError, match="this model has no experts"):
        Changes(ablate_experts="1.0").edits(llama.model, llama.prompt())


# -- as text -----------------------------------------------------------------------------


def test_changes_read_experts(mixture: Tiny) -> None:
    changes = Changes(ablate_experts="1.0,2.3", zero_experts=[Expert(2, 1)], force_experts="1.4")
    tokens = mixture.prompt()
    a, b = (
        mixture.model.run([Request(tokens, edits, logits="all")])[0].logits
        for edits in (
            changes.edits(mixture.model, tokens),
            expert_edits(
                mixture.model,
                exclude=[Expert(1, 0), Expert(2, 3)],
                silence=[Expert(2, 1)],
                force=[Expert(1, 4)],
            ),
        )
    )
    np.testing.assert_array_equal(a, b)


COUNTS = {1: 8, 2: 6}


@pytest.mark.parametrize(
    ("given", "experts"),
    [
        ("1.5", [(1, 5)]),
        ("1.6-7,2.0", [(1, 6), (1, 7), (2, 0)]),
        ("*.0", [(1, 0), (2, 0)]),
        ("2.-1", [(2, 5)]),
        ("1..2.4..5", [(1, 4), (1, 5), (2, 4), (2, 5)]),
        ([(2, 1), Expert(1, 0)], [(1, 0), (2, 1)]),
        (Expert(2, 2), [(2, 2)]),
    ],
)
def test_experts_as_text(given: Any, experts: list[tuple[int, int]]) -> None:
    assert parse_experts(given, 3, COUNTS) == [Expert(*e) for e in experts]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("5", UsageError, "experts '5': '5' is not LAYER.EXPERT, like 3.5 or 7.0-3"),
        ("0.1", RangeError, r"experts '0\.1': layer 0 has no experts; layers 1\.\.2 have"),
        ("2.6", RangeError, "expert 6 is out of range; there are 0 to 5"),
        ("3.0", RangeError, "layer 3 is out of range"),
    ],
)
def test_what_is_no_expert(given: str, error: type[UsageError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_experts(given, 3, COUNTS)


def test_counts(tiny: Callable[[str], Tiny]) -> None:
    assert expert_counts(tiny("dots1").model) == {1: 8, 2: 8}
    assert expert_counts(tiny("mixtral").model) == {0: 6, 1: 6, 2: 6}
