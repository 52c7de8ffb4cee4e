"""Mixtures of experts: what is read of the choice, and edits of it, against the oracle. (Operators
at every site, joint and alone, are in tests/test_edits.py.)"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from reference import check, check_same
from tiny import Tiny
from tiny_gguf import ARCHS

from mia.edits import Edit
from mia.errors import EngineError, SiteError, UsageError
from mia.request import Capture, Request
from mia.sites import OF_EXPERTS, Site

NAMES = ["router", "experts", "expert_weights", "mlp_out"]


def _layers(t: Tiny) -> range:
    experts = ARCHS[t.name].experts
    assert experts is not None
    return range(experts.n_dense, t.oracle.n_layer)


def test_every_site_of_every_layer_is_there(mixture: Tiny) -> None:
    sites = mixture.model.topology.sites
    assert {str(s) for s in sites} == set(mixture.oracle.run(mixture.prompt()))
    experts = ARCHS[mixture.name].experts
    assert experts is not None
    for i in _layers(mixture):
        assert sites[Site("router", i)].shape == (experts.n_expert,)
        assert sites[Site("experts", i)].shape == (experts.n_used,)
        assert sites[Site("expert_weights", i)].shape == (experts.n_expert,)
        assert (Site("router_choice", i) in sites) == experts.bias
        picked = {sites[Site(name, i)].outputs_only for name in NAMES}
        assert picked == {i == mixture.oracle.n_layer - 1}
        gate = "sigmoid" if experts.sigmoid else "softmax"
        assert mixture.model.topology.gate(i) == gate


def test_reads_equal_the_oracle_and_agree_with_each_other(mixture: Tiny) -> None:
    """Not all rows of the last layer, an order of tokens, generated ones."""
    sites = [Site(name, i) for i in _layers(mixture) for name in NAMES]
    capture = Capture(sites, tokens=[-1, 3, 0], generated=True)
    request = Request(mixture.prompt(), captures=[capture], n_predict=5, stop_at_eog=False)
    result = mixture.model.run([request])[0]
    check(result, request, mixture.oracle)
    for i in _layers(mixture):
        ids = result[f"experts.{i}"]
        weights = result[f"expert_weights.{i}"]
        assert ids.dtype == np.float32 and (ids == ids.round()).all()
        assert ((weights > 0).sum(1) == ids.shape[1]).all()
        assert (np.take_along_axis(weights, ids.astype(int), 1) > 0).all()


def test_small_micro_batches(mixture: Tiny, reopen: Callable[..., Tiny], five_rows: None) -> None:
    sites = [Site(name, i) for i in _layers(mixture) for name in NAMES]
    request = Request(mixture.prompt(23), captures=[Capture(sites)], logits="all")
    small = reopen(mixture)
    check(small.model.run([request])[0], request, mixture.oracle)


def without(*experts: int) -> Callable[[np.ndarray], np.ndarray]:
    def edit(rows: np.ndarray) -> np.ndarray:
        rows[:, experts] = -np.inf
        return rows

    return edit


@pytest.mark.parametrize("layer", [1, 2])
def test_an_expert_at_minus_infinity_is_not_chosen(mixture: Tiny, layer: int) -> None:
    sites = [Site(name, layer) for name in ("router", "router_choice")]
    sites = [s for s in sites if s in mixture.model.topology.sites]
    clean = mixture.model.look(mixture.prompt(), f"experts.{layer}")[:]
    busiest = int(np.bincount(clean.astype(int).ravel()).argmax())
    edits = [Edit(s, without(busiest)) for s in sites]
    capture = Capture([*sites, *(Site(name, layer) for name in NAMES), "resid_post"])
    request = Request(mixture.prompt(), edits, [capture], "all", n_predict=4, stop_at_eog=False)
    result = mixture.model.run([request])[0]
    check(result, request, mixture.oracle)
    assert (clean == busiest).any() and not (result[f"experts.{layer}"] == busiest).any()
    assert not result[f"expert_weights.{layer}"][:, busiest].any()
    assert np.isneginf(result[f"router.{layer}"][:, busiest]).all()


def test_a_weight_of_zero_leaves_the_expert_out_and_chooses_no_other(mixture: Tiny) -> None:
    prompt, layer = mixture.prompt(), 1
    clean = mixture.model.look(prompt, [f"{name}.{layer}" for name in NAMES])
    e = int(np.bincount(clean[f"experts.{layer}"].astype(int).ravel()).argmax())
    edit = Edit(f"expert_weights.{layer}", "zero", dims=[e])
    capture = Capture([f"{name}.{layer}" for name in NAMES])
    request = Request(prompt, [edit], [capture], "all")
    result = mixture.model.run([request])[0]
    check(result, request, mixture.oracle)
    np.testing.assert_array_equal(result[f"experts.{layer}"], clean[f"experts.{layer}"])
    o, weights = mixture.oracle, clean[f"expert_weights.{layer}"]
    b = o.run(prompt)[f"mlp_norm.{layer}"]
    gate, up, down = (
        o.weights[f"blk.{layer}.ffn_{n}_exps.weight"][e] for n in ("gate", "up", "down")
    )
    share = weights[:, e : e + 1] * ((o.spec.act(b @ gate.T) * (b @ up.T)) @ down.T)
    np.testing.assert_allclose(
        result[f"mlp_out.{layer}"], clean[f"mlp_out.{layer}"] - share, rtol=0, atol=1e-4
    )


def test_an_expert_that_is_not_chosen_has_no_weight_to_edit(mixture: Tiny) -> None:
    sites = [f"{name}.1" for name in NAMES]
    edit = Edit("expert_weights.1", "replace", np.full(1, 0.5), dims=[2])
    request = Request(mixture.prompt(), [edit], [Capture(sites)])
    result = mixture.model.run([request])[0]
    check(result, request, mixture.oracle)
    chosen = (result["experts.1"] == 2).any(1)
    assert 0 < chosen.sum() < len(chosen)
    np.testing.assert_array_equal(result["expert_weights.1"][:, 2], np.where(chosen, 0.5, 0))


def test_random_requests_together_are_as_alone(mixture: Tiny) -> None:
    """Prefixes, twins, resumed segments and generations under edits of the choice."""
    rng = np.random.default_rng(5)
    prompt, layers = mixture.prompt(10), list(_layers(mixture))
    n = mixture.model.topology.sites[Site("router", layers[0])].shape[0]
    edits = [
        [
            Edit(s, f, tokens=tokens)
            for s in (Site("router", i), Site("router_choice", i))
            if s in mixture.model.topology.sites
        ]
        for i in layers
        for tokens in (None, -1, [4, 8], slice(5, None))
        for f in [without(int(rng.integers(n)))]
    ] + [
        [Edit(Site("expert_weights", i), "scale", coeff=c, dims=[int(rng.integers(n))], tokens=-1)]
        for i in layers
        for c in (0.0, 2.0)
    ]
    requests = []
    for _ in range(40):
        own = [e for k in rng.choice(len(edits), rng.integers(3), replace=False) for e in edits[k]]
        cut = int(rng.integers(9, 11))
        captures = [Capture([Site(str(rng.choice(NAMES)), layers[-1])], tokens=[-1])]
        requests.append(
            Request(
                [*prompt[:cut], *mixture.prompt(2, seed=int(rng.integers(3)))],
                own,
                captures,
                n_predict=int(rng.integers(3)),
                stop_at_eog=False,
            )
        )
    together = mixture.model.run(requests)
    for request, result in zip(requests, together, strict=True):
        check(result, request, mixture.oracle)
        check_same(result, mixture.model.run([request])[0])


# -- refused -----------------------------------------------------------------------------


def test_enough_experts_must_be_left(mixture: Tiny) -> None:
    shapes = mixture.model.topology.sites
    n, used = (shapes[Site(name, 2)].shape[0] for name in ("router", "experts"))
    left = Edit("router.2", without(*range(n - used)), tokens=3)
    if Site("router_choice", 2) not in shapes:  # else they are chosen by the bias
        mixture.model.run([Request(mixture.prompt(), [left])])
    few = Edit("router.2", without(*range(n - used + 1)), tokens=3)
    with pytest.raises(
        UsageError,
        match=f"layer 2 chooses {used} experts for each token, but an edit at router.2 leaves {used - 1} of {n}",
    ):
        mixture.model.run([Request(mixture.prompt(), [few])])
    request = Request(mixture.prompt(), captures=[Capture("resid_post")])
    check(mixture.model.run([request])[0], request, mixture.oracle)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("site", ["router.1", "expert_weights.1"])
def test_what_is_no_number_is_refused(mixture: Tiny, site: str, value: float) -> None:
    edit = Edit(site, lambda h: np.full_like(h, value), tokens=2)
    with pytest.raises(UsageError, match=f"edit at {site} makes numbers that are not finite"):
        mixture.model.run([Request(mixture.prompt(), [edit])])


def test_weights_may_not_be_minus_infinity(mixture: Tiny) -> None:
    with pytest.raises(UsageError, match="not finite"):
        mixture.model.run([Request(mixture.prompt(), [Edit("expert_weights.1", without(0, 1, 2))])])


def test_who_is_chosen_cannot_be_edited(mixture: Tiny) -> None:
    with pytest.raises(UsageError, match=r"experts\.1 can be captured, not edited"):
        mixture.model.run([Request(mixture.prompt(), [Edit("experts.1", "zero")])])


@pytest.mark.parametrize("name", OF_EXPERTS)
def test_a_dense_model_has_no_experts(llama: Tiny, name: str) -> None:
    with pytest.raises(SiteError, match=rf"no site {name}\.1 \(this model has no experts\)"):
        llama.model.look(llama.prompt(), f"{name}.1")


def test_dense_layers_and_missing_biases_are_told_apart(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("dots1")
    with pytest.raises(SiteError, match=r"no site router\.0 \(this layer has no experts\)"):
        t.model.look(t.prompt(), "router")
    t = tiny("mixtral")
    with pytest.raises(
        SiteError, match=r"no site router_choice\.1 \(this router chooses without a bias"
    ):
        t.model.look(t.prompt(), "router_choice.1")


def test_a_run_without_logits_reads_and_edits_the_same(mixture: Tiny) -> None:
    """llama.cpp builds another graph for it, and in dots1 one of another shape."""
    tokens, m = mixture.prompt(7), mixture.model
    for site in [s for s in m.unfused_topology.sites if s.name != "logits"]:
        request = Request(tokens, captures=[Capture(site)], logits="last")
        want, got = m.run([request, replace(request, logits=None)])
        again = m.run([replace(request, logits=None)])[0]
        for result in (got, again):
            np.testing.assert_allclose(result[site], want[site], rtol=1e-4, atol=1e-4)
        if site.kind.headed and not site.kind.by_key:
            m.run([Request(tokens, [Edit(site, "zero", tokens=-1, heads=[1])], logits=None)])


def test_numbers_that_one_edit_breaks_and_another_hides_spoil_no_later_run(
    tiny: Callable[[str], Tiny],
) -> None:
    """qwen2moe's gate of the shared expert is silu(x)/x: 0/0 where an edit makes zeros."""
    t = tiny("qwen2moe")
    short = Request(t.prompt(2), captures=[Capture("embed")])
    want = t.model.run([short])[0]
    zeros = np.zeros(t.model.n_embd)
    edits = [Edit("resid_mid.0", "replace", zeros, tokens=4)]
    with pytest.raises(EngineError, match="not numbers"):
        t.model.run([Request(t.prompt(6), edits)])
    hidden = Edit("resid_post.1", "mean", np.ones((2, t.model.n_embd)))
    t.model.run([Request(t.prompt(6), [*edits, hidden])])
    check_same(want, t.model.run([short])[0])


def test_what_an_edit_hides_spoils_no_request_beside_it(tiny: Callable[[str], Tiny]) -> None:
    """The NaN lies in the cache beside the others' cells, and llama.cpp multiplies it by zero."""
    t = tiny("qwen2moe")
    zeros = Edit("resid_mid.0", "replace", np.zeros(t.model.n_embd), tokens=0)
    hidden = Edit("resid_post.1", "mean", np.ones((2, t.model.n_embd)))
    plain = Request(t.prompt(9), captures=[Capture("l_out")], n_predict=3, stop_at_eog=False)
    requests = [plain, Request(t.prompt(4, seed=5), [zeros, hidden], logits="all"), plain]
    alone = [t.model.run([r])[0] for r in requests]
    counts: list[int] = []
    joint = t.model.run(requests, progress=lambda done, n: counts.append(done))
    for a, b in zip(alone, joint, strict=True):
        check_same(a, b)
    assert counts[-1] == 3
    with pytest.raises(EngineError, match="not numbers"):
        t.model.run([*requests, Request(t.prompt(4), [zeros])])
