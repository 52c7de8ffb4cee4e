"""Direct logit attribution against the oracle: every part, and that they add up."""

from collections.abc import Callable

import numpy as np
import pytest
from oracle import Oracle
from tiny import Tiny

from mia.errors import ModelError
from mia.lenses.linear import Norm, split
from mia.lenses.walk import Tanh
from mia.methods import attribution
from mia.methods.attribution import attribute, attribute_logit, head_contributions
from mia.methods.head_ablation import head_edits
from mia.ranges import Head

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
    shares = attribute_logit(case.model, tokens, token, token=at)
    sites = o.run(tokens)
    share = Frozen(o, sites, at)
    assert abs(shares.embed - share(sites["resid_pre.0"][at], token)) < TOLERANCE
    for i in range(o.n_layer):
        assert abs(shares.attn[i] - share(sites[f"attn_out.{i}"][at], token)) < TOLERANCE
        assert abs(shares.mlp[i] - share(sites[f"mlp_out.{i}"][at], token)) < TOLERANCE
        for h in range(o.n_head):
            assert abs(shares.heads[i, h] - share(share.head(i, h), token)) < TOLERANCE
        bias = o.weights.get(f"blk.{i}.attn_output.bias", np.zeros(o.n_embd))
        assert abs(shares.attn_bias[i] - share(bias, token)) < TOLERANCE
    assert abs(shares.bias - share.bias(token)) < TOLERANCE
    assert np.abs(shares.rest).max() < TOLERANCE


def test_parts_add_up_to_the_logit(case: Tiny) -> None:
    """Before soft-capping, which gemma2 does: there the capped sum is the model's logit."""
    tokens, o = case.prompt(), case.oracle
    logits = o.run(tokens)["logits"][-1]
    shares = attribute_logit(case.model, tokens, 30)
    cap = o.logit_cap
    uncapped = logits[30] if cap is None else cap * np.arctanh(logits[30] / cap)
    assert abs(shares.total - uncapped) < TOLERANCE
    assert abs(shares.recomputed - logits[30]) < TOLERANCE
    assert abs(shares.logit - logits[30]) < TOLERANCE
    assert case.model.lens.capped == (cap is not None)
    heads = shares.heads.sum(1) + shares.attn_bias + shares.rest
    assert np.abs(heads - shares.attn).max() < 1e-5


def test_against_is_the_difference(case: Tiny) -> None:
    tokens = case.prompt()
    one, two = (attribute_logit(case.model, tokens, t) for t in (30, 40))
    both = attribute_logit(case.model, tokens, 30, against=40)
    for name in ("embed", "attn", "mlp", "heads", "bias", "logit", "total"):
        difference = np.asarray(getattr(one, name)) - getattr(two, name)
        assert np.abs(np.asarray(getattr(both, name)) - difference).max() < 1e-5


def test_an_edited_run_is_attributed_as_it_ran(case: Tiny) -> None:
    shares = attribute_logit(
        case.model, case.prompt(), 30, edits=head_edits(case.model, [Head(1, 2)])
    )
    assert shares.heads[1, 2] == 0
    assert abs(shares.recomputed - shares.logit) < TOLERANCE


def test_heads_of_one_layer(llama: Tiny) -> None:
    z = llama.vector("head_out.1")
    heads, bias = head_contributions(llama.model, 1, z)
    w_o = llama.oracle.weights["blk.1.attn_output.weight"]
    assert np.abs(heads.sum(0) + bias - w_o @ z).max() < 1e-5
    assert not bias.any()


def test_wrong_sums_are_refused(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attribution.heads_of_tokens

    def half(*args: object) -> tuple[np.ndarray, np.ndarray]:
        heads, bias = plain(*args)  # type: ignore[arg-type]
        return heads / 2, bias

    monkeypatch.setattr(attribution, "heads_of_tokens", half)
    with pytest.raises(
        ModelError, match=r"heads of layer \d do not add up to its attention: 50.0% is missing"
    ):
        attribute_logit(llama.model, llama.prompt(), 30)


# -- the report -------------------------------------------------------------------------


def test_a_report_wraps_the_shares(llama: Tiny) -> None:
    tokens, m = llama.prompt(), llama.model
    report = attribute(m, tokens, " France", against=" Italy", token=6, k=3)
    ids = [m.token_id(t) for t in (" France", " Italy")]
    shares = attribute_logit(m, tokens, ids[0], against=ids[1], token=6)
    assert [report.answer.id, report.against and report.against.id] == ids
    for name in ("attn", "mlp", "heads", "embed", "logit"):
        np.testing.assert_array_equal(getattr(report.shares, name), getattr(shares, name))
    document = report.document()
    assert document["sum"] == round(shares.total, 6) and document["soft_capped"] is False
    sizes = [abs(t["value"]) for t in document["top"]]
    assert sizes[0] == np.abs(document["heads"]).max() and sizes == sorted(sizes, reverse=True)
    assert f"(the model's own difference: {shares.logit:.4f})" in report.plain()
    rows = report.rows()
    assert sum(r["value"] for r in rows if r["part"] == "mlp") == pytest.approx(shares.mlp.sum())
    assert len([r for r in rows if r["part"] == "head"]) == 18


def test_a_report_on_a_soft_capped_model(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("gemma2")
    report = attribute(t.model, t.prompt(), " France")
    assert report.soft_capped and report.document()["soft_capped"] is True
    assert f"; after soft-capping {report.shares.recomputed:.4f} (the model's own" in report.plain()


def test_attention_that_is_not_linear_in_its_heads_is_refused(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "walk", lambda *_, **__: [Tanh()])
    with pytest.raises(ModelError, match="attention of llama is not linear in its heads"):
        head_contributions(llama.model, 1, llama.vector("head_out.1"))


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
    shares, constant = split(steps, parts, np.zeros(8))
    assert np.abs(shares.sum(0) + constant - x[0]).max() < 1e-12
    without = np.vstack([parts[:2], np.zeros(8)])
    assert not split(steps, without, np.zeros(8))[0][2].any()
