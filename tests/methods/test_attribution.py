"""Direct logit attribution against the oracle: every part, and that they add up."""

from collections.abc import Callable

import numpy as np
import pytest
from oracle import Oracle
from tiny import Tiny

from mia.errors import ModelError
from mia.lenses.linear import Norm, split
from mia.methods import attribution
from mia.methods.ablation import head_edits
from mia.methods.attribution import attribute, head_contributions

TOLERANCE = 1e-4


class Frozen:
    """The oracle's logit as a sum: the final norm divides as it does at this residual."""

    def __init__(self, o: Oracle, sites: dict[str, np.ndarray], at: int) -> None:
        self.o, self.sites, self.at = o, sites, at
        self.x = sites[f"resid_post.{o.n_layer - 1}"][at]

    def __call__(self, part: np.ndarray, token: int) -> float:
        """The share of a part (n_embd,) in the logit."""
        return float(self._norm(part, self.x, "output_norm") @ self._unembedding()[token])

    def bias(self, token: int) -> float:
        w = self.o.weights
        return float(
            np.dot(w.get("output_norm.bias", np.zeros_like(self.x)), self._unembedding()[token])
        )

    def head(self, layer: int, head: int) -> np.ndarray:
        """What one head adds to the residual: (n_embd,)."""
        o, d = self.o, self.o.head_dim
        z = self.sites[f"head_out.{layer}"][self.at]
        w_o = o.weights[f"blk.{layer}.attn_output.weight"]  # (n_embd, n_head * head_dim)
        mine = w_o[:, head * d : (head + 1) * d] @ z[head * d : (head + 1) * d]
        name = f"blk.{layer}.post_attention_norm"
        return self._norm(mine, w_o @ z, name) if f"{name}.weight" in o.weights else mine

    def _norm(self, part: np.ndarray, whole: np.ndarray, name: str) -> np.ndarray:
        if self.o.arch == "gpt2":
            part, whole = part - part.mean(), whole - whole.mean()
        size = np.sqrt(np.mean(whole**2) + self.o.eps)
        return part / size * self.o.weights[f"{name}.weight"]

    def _unembedding(self) -> np.ndarray:
        w = self.o.weights
        return w.get("output.weight", w["token_embd.weight"])


@pytest.mark.parametrize("at", [-1, 6])
def test_every_part_agrees_with_the_oracle(case: Tiny, at: int) -> None:
    tokens, token, o = case.prompt(), 30, case.oracle
    found = attribute(case.model, tokens, token, token=at)
    sites = o.run(tokens)
    share = Frozen(o, sites, at)
    assert abs(found.embed - share(sites["resid_pre.0"][at], token)) < TOLERANCE
    for i in range(o.n_layer):
        assert abs(found.attn[i] - share(sites[f"attn_out.{i}"][at], token)) < TOLERANCE
        assert abs(found.mlp[i] - share(sites[f"mlp_out.{i}"][at], token)) < TOLERANCE
        for h in range(o.n_head):
            assert abs(found.heads[i, h] - share(share.head(i, h), token)) < TOLERANCE
        bias = o.weights.get(f"blk.{i}.attn_output.bias", np.zeros(o.n_embd))
        assert abs(found.attn_bias[i] - share(bias, token)) < TOLERANCE
    assert abs(found.bias - share.bias(token)) < TOLERANCE
    assert np.abs(found.rest).max() < TOLERANCE


def test_parts_add_up_to_the_logit(case: Tiny) -> None:
    """Before soft-capping, which gemma2 does: there the capped sum is the model's logit."""
    tokens, o = case.prompt(), case.oracle
    logits = o.run(tokens)["logits"][-1]
    found = attribute(case.model, tokens, 30)
    cap = o.logit_cap
    uncapped = logits[30] if cap is None else cap * np.arctanh(logits[30] / cap)
    assert abs(found.total - uncapped) < TOLERANCE
    assert abs(found.recomputed - logits[30]) < TOLERANCE
    assert abs(found.logit - logits[30]) < TOLERANCE
    assert case.model.lens.capped == (cap is not None)
    heads = found.heads.sum(1) + found.attn_bias + found.rest
    assert np.abs(heads - found.attn).max() < 1e-5


def test_against_is_the_difference(case: Tiny) -> None:
    tokens = case.prompt()
    one, two = (attribute(case.model, tokens, t) for t in (30, 40))
    both = attribute(case.model, tokens, 30, against=40)
    for name in ("embed", "attn", "mlp", "heads", "bias", "logit", "total"):
        difference = np.asarray(getattr(one, name)) - getattr(two, name)
        assert np.abs(np.asarray(getattr(both, name)) - difference).max() < 1e-5


def test_an_edited_run_is_attributed_as_it_ran(case: Tiny) -> None:
    found = attribute(case.model, case.prompt(), 30, edits=head_edits(case.model, {1: [2]}))
    assert found.heads[1, 2] == 0
    assert abs(found.recomputed - found.logit) < TOLERANCE


def test_heads_of_one_layer(llama: Tiny) -> None:
    z = llama.vector("head_out.1")
    heads, bias = head_contributions(llama.model, 1, z)
    w_o = llama.oracle.weights["blk.1.attn_output.weight"]
    assert np.abs(heads.sum(0) + bias - w_o @ z).max() < 1e-5
    assert not bias.any()


def test_wrong_sums_are_refused(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attribution.head_contributions

    def half(*args: object) -> tuple[np.ndarray, np.ndarray]:
        heads, bias = plain(*args)  # type: ignore[arg-type]
        return heads / 2, bias

    monkeypatch.setattr(attribution, "head_contributions", half)
    with pytest.raises(
        ModelError, match=r"heads of layer \d do not add up to its attention: 50.0% is missing"
    ):
        attribute(llama.model, llama.prompt(), 30)


@pytest.mark.parametrize("centred", [False, True])
def test_frozen_norms_split_exactly(centred: bool) -> None:
    rng = np.random.default_rng(0)
    parts, weight, bias, matrix = (rng.normal(size=s) for s in ((3, 8), 8, 8, (5, 8)))
    steps: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x + bias,
        Norm(1e-5, centred),
        lambda x: x * weight + bias,
        lambda x: x @ matrix.T,
    ]
    x = parts.sum(0)[None]
    for step in steps:
        x = step(x)
    found, constant = split(steps, parts, np.zeros(8))
    assert np.abs(found.sum(0) + constant - x[0]).max() < 1e-12
    without = np.vstack([parts[:2], np.zeros(8)])
    assert not split(steps, without, np.zeros(8))[0][2].any()
