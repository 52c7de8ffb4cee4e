"""Hooks: a subclass changes and reads what the oracle says it should."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from reference import TOLERANCE, UNTOUCHED
from tiny import Tiny, logits

from mia import Hook
from mia.errors import SiteError
from mia.request import Capture, Request
from mia.sites import Site


def test_everything_in_one_line(case: Tiny) -> None:
    prompt = case.prompt()
    seen = Hook("all").look(case.model, prompt)
    assert set(seen) == set(case.model.topology.sites)
    truth = case.oracle.run(prompt)
    for site, rows in seen.items():
        np.testing.assert_allclose(rows, truth[str(site)], atol=TOLERANCE, err_msg=str(site))


class Halve(Hook):
    sites = "mlp_out.1"
    tokens = -1

    def change(self, site: Site, rows: np.ndarray) -> np.ndarray:
        assert site == Site("mlp_out", 1)
        return rows / 2


def test_a_change_is_an_edit_and_touches_nothing_else(llama: Tiny) -> None:
    prompt = llama.prompt()
    request = Request(prompt, logits="all")
    hook = Halve()
    assert not hook.captures(llama.model)
    changed, plain = hook.run(llama.model, [request])[0], llama.model.run([request])[0]

    def halved(x: np.ndarray) -> np.ndarray:
        x[-1] /= 2
        return x

    truth = llama.oracle.run(prompt, {"mlp_out.1": halved})
    np.testing.assert_allclose(logits(changed), truth["logits"], atol=TOLERANCE)
    np.testing.assert_allclose(logits(changed)[:-1], logits(plain)[:-1], atol=UNTOUCHED)
    assert hook.edits(llama.model)[0] is hook.edits(llama.model)[0]
    assert hook.look(llama.model, prompt) == {}


class Watch(Halve):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, np.ndarray]] = []

    def read(self, index: int, seen: Mapping[Site, np.ndarray]) -> None:
        self.seen.append((index, seen[Site("mlp_out", 1)]))


def test_a_hook_may_do_both_and_reads_what_it_changed(llama: Tiny) -> None:
    prompts = [llama.prompt(seed=s) for s in (1, 2, 3)]
    hook = Watch()
    hook.run(llama.model, [Request(p, logits=None) for p in prompts])
    assert [i for i, _ in hook.seen] == [0, 1, 2]
    for (_, rows), prompt in zip(hook.seen, prompts, strict=True):
        truth = llama.oracle.run(prompt)["mlp_out.1"][-1:] / 2
        np.testing.assert_allclose(rows, truth, atol=TOLERANCE)


def test_where_a_hook_is_can_be_given(llama: Tiny) -> None:
    prompt = llama.prompt()
    seen = Hook(["l_out-1", "embed"], tokens=[0, -1]).look(llama.model, prompt)
    assert [str(s) for s in seen] == ["resid_post.1", "embed"]
    np.testing.assert_allclose(
        seen[Site("resid_post", 1)],
        llama.oracle.run(prompt)["resid_post.1"][[0, -1]],
        atol=TOLERANCE,
    )
    assert len(Hook().look(llama.model, "The cat")) == llama.model.n_layer
    with pytest.raises(SiteError, match="unknown site 'l_outt'"):
        Hook("l_outt").look(llama.model, prompt)


class OwnInit(Halve):
    def __init__(self, factor: float) -> None:  # and no super().__init__()
        self.factor = factor

    def change(self, site: Site, rows: np.ndarray) -> np.ndarray:
        return rows * self.factor


def test_a_subclass_need_not_call_init(llama: Tiny) -> None:
    prompt = llama.prompt()
    hook, other = OwnInit(0.5), OwnInit(1.0)
    changed = hook.run(llama.model, [Request(prompt)])[0]
    halved = Halve().run(llama.model, [Request(prompt)])[0]
    np.testing.assert_allclose(logits(changed), logits(halved), atol=UNTOUCHED)
    assert hook.edits(llama.model)[0] is hook.edits(llama.model)[0]
    assert hook.edits(llama.model)[0] is not other.edits(llama.model)[0]


def test_tokens_may_be_all_again(llama: Tiny) -> None:
    assert [h.tokens for h in (Halve(), Halve(tokens=None), Halve(tokens=[0]))] == [-1, None, [0]]
    prompt = llama.prompt()
    changed = Halve(tokens=None).run(llama.model, [Request(prompt, logits="all")])[0]
    truth = llama.oracle.run(prompt, {"mlp_out.1": lambda x: x / 2})
    np.testing.assert_allclose(logits(changed), truth["logits"], atol=TOLERANCE)


def test_a_hook_beside_a_capture_of_the_same_site(llama: Tiny) -> None:
    """Each has the tokens that it asked for."""
    seen: list[np.ndarray] = []

    class Reads(Hook):
        sites = "l_out-1"
        tokens = -1

        def read(self, index: int, at: Any) -> None:
            seen.append(at[Site("resid_post", 1)])

    own = Capture("l_out-1", tokens=[0, 2])
    result = Reads().run(llama.model, [Request(llama.prompt(6), captures=[own])])[0]
    want = llama.oracle.run(llama.prompt(6))["resid_post.1"]
    np.testing.assert_allclose(seen[0], want[[5]], rtol=0, atol=1e-4)
    np.testing.assert_allclose(result.of(own)[Site("resid_post", 1)], want[[0, 2]], atol=1e-4)
    np.testing.assert_allclose(result["l_out-1"], want[[0, 2, 5]], rtol=0, atol=1e-4)
