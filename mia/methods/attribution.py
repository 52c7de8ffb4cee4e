"""Direct logit attribution: what each part of the model adds to the answer's logit.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (the residual
stream is a sum, and a logit reads it linearly once the final norm is frozen); Wang et al. 2022
(arXiv 2211.00593), sec. 3, the logit difference between two answers.

| in the papers                   | here                                                    |
|---------------------------------|---------------------------------------------------------|
| x_0, the embedding              | `resid_pre.0` (with positions and scale, if any)        |
| sum over heads of W_O^h z^h     | `heads`, from `head_out` and W_O of the file            |
| MLP output                      | `mlp_out.i`                                             |
| LN frozen at the final residual | `mia.lenses.linear.Norm.frozen`                         |
| W_U[t], logit of t              | `LogitLens.attribute`                                   |
| logit difference                | `against`                                               |

The sum: embedding + attention and MLP of each layer + biases of the final norm and the
unembedding = the logit (before soft-capping, in models that have it). Every call checks the
parts against the residual, and the sum against the model's own logit.

An attention layer is further split into its heads and its bias; a norm after attention
(gemma2) is frozen as well. The remainder (`rest`) is rounding: llama.cpp multiplies a
quantized W_O with activations rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, norms
from mia.edits import Edit
from mia.engine.delegate import check
from mia.errors import ModelError, UsageError
from mia.generation import Token
from mia.lenses.linear import Norm, split
from mia.lenses.walk import Tanh, walk
from mia.measure.prompts import check_answer
from mia.ranges import every_head, top_heads
from mia.request import Capture, Request, Result, one_or_more
from mia.show.report import Report
from mia.show.text import rounded, visible
from mia.sites import Site

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model

#: floats of what heads add that are in memory at a time
_FLOATS = 64 << 20


@dataclass(frozen=True, eq=False)
class Attribution:
    """Shares of one logit, or of the difference of two.

    Attributes:
        embed: of the embedding.
        attn, mlp: (n_layer,) of each layer's attention and MLP.
        heads: (n_layer, n_head); they, `attn_bias` and `rest` add up to `attn`.
        attn_bias, rest: (n_layer,) of W_O's bias (and a post-norm's), and of rounding.
        bias: of the final norm's and the unembedding's biases.
        logit: the model's own logit (difference), after soft-capping if it has that.
        recomputed: the sum of the parts after soft-capping; close to `logit`.
    """

    embed: float
    attn: Array
    mlp: Array
    heads: Array
    attn_bias: Array
    rest: Array
    bias: float
    logit: float
    recomputed: float

    @property
    def total(self) -> float:
        """The sum of the parts: the logit (difference) before soft-capping."""
        return float(self.embed + self.attn.sum() + self.mlp.sum() + self.bias)

    def __sub__(self, other: Attribution) -> Attribution:
        """The shares of a logit difference."""
        names = self.__dataclass_fields__
        return Attribution(**{n: getattr(self, n) - getattr(other, n) for n in names})


def attribute_logit(
    model: Model,
    tokens: Sequence[int],
    answer: int,
    *,
    against: int | None = None,
    token: int = -1,
    edits: Edit | Sequence[Edit] = (),
) -> Attribution:
    """What each part of the model adds to the logit of `answer` at a token of the prompt.

    Args:
        answer: a token id.
        against: another; then it is the difference of their logits.
        token: at which token of the prompt, the last by default.

    Raises:
        ModelError: the parts do not add up to what the model computes.
    """
    request = attribution_request(model, tokens, [token], edits=edits)
    result = model.run([request])[0]
    ids = [answer] if against is None else [answer, against]
    shares = shares_of(model, request, result, [ids])[0]
    if isinstance(shares, ModelError):
        raise shares
    return shares[0] if against is None else shares[0] - shares[1]


def attribution_request(
    model: Model,
    tokens: Sequence[int],
    positions: Sequence[int],
    *,
    edits: Edit | Sequence[Edit] = (),
) -> Request:
    """The request behind `attribute_logit` for several tokens, to be run together with others."""
    n = model.n_layer
    names = [Site("resid_pre", 0), Site("resid_post", n - 1)]
    names += [Site(name, i) for name in ("attn_out", "mlp_out", "head_out") for i in range(n)]
    captures = [Capture(names, positions)]
    return Request(tokens, one_or_more(edits, Edit), captures, logits=positions)


def shares_of(
    model: Model, request: Request, result: Result, answers: Sequence[Sequence[int]]
) -> list[list[Attribution] | ModelError]:
    """The shares of some tokens' logits at each position of an `attribution_request`.

    Args:
        request, result: what was run, and what it gave.
        answers: token ids for each of its positions.

    Returns:
        For each position its shares, or the error that says why its parts do not add up to what
        the model computes.
    """
    assert result.logits is not None
    out: list[list[Attribution] | ModelError] = []
    positions = range(len(answers))
    size = max(1, _FLOATS // (model.n_layer * model.n_head * model.n_embd))
    for start in positions[::size]:
        rows = positions[start : start + size]
        for row, parts in zip(rows, _parts(model, result, rows), strict=True):
            check()
            try:
                _check(model, parts, is_changed=bool(request.edits))
                logits = result.logits[row]
                out.append([_of_token(model, parts, logits, t) for t in answers[row]])
            except ModelError as err:
                out.append(err)
    return out


@dataclass(frozen=True, eq=False)
class _Parts:
    """The terms of the last residual at one token."""

    embed: Array  # (n_embd,)
    attn: Array  # (n_layer, n_embd)
    mlp: Array  # (n_layer, n_embd)
    heads: Array  # (n_layer, n_head, n_embd)
    attn_bias: Array  # (n_layer, n_embd)
    end: Array  # (n_embd,) what they should add up to


def _parts(model: Model, result: Result, rows: range) -> list[_Parts]:
    """The terms at some of the captured tokens; each layer's W_O is read once for all of them."""
    chosen = slice(rows.start, rows.stop)
    layers = range(model.n_layer)

    def stack(name: str) -> Array:
        return np.stack([result.captures[Site(name, i)][chosen] for i in layers], 1)

    embed = result["resid_pre.0"][chosen]
    end = result[f"resid_post.{model.n_layer - 1}"][chosen]
    attn, mlp, z = stack("attn_out"), stack("mlp_out"), stack("head_out")
    split_up = [heads_of_tokens(model, i, z[:, i]) for i in layers]
    heads, bias = (np.stack(x, 1) for x in zip(*split_up, strict=True))
    return [_Parts(*terms) for terms in zip(embed, attn, mlp, heads, bias, end, strict=True)]


def _check(model: Model, p: _Parts, *, is_changed: bool) -> None:
    """Raises `ModelError` if the parts do not add up to the last residual."""
    missing = np.abs(p.embed + p.attn.sum(0) + p.mlp.sum(0) - p.end).max()
    missing /= max(np.abs(p.end).max(), 1e-6)
    if not missing < 1e-3:
        other = f"{model.architecture} adds something else"
        raise ModelError(
            f"embedding, attention and MLPs of {model.name} do not add up to its last residual: "
            f"{missing:.1%} of it comes from elsewhere "
            f"({'what is changed adds to it, or ' * is_changed}{other})"
        )
    rest = norms(p.attn - p.heads.sum(1) - p.attn_bias) / np.maximum(norms(p.attn), 1e-6)
    if not rest.max() < 0.1:
        raise ModelError(
            f"the heads of layer {int(rest.argmax())} do not add up to its attention: "
            f"{rest.max():.1%} is missing; refusing to show wrong numbers"
        )


def head_contributions(model: Model, layer: int, z: Array) -> tuple[Array, Array]:
    """What each head adds to the residual, and what the biases add.

    Args:
        z: (n_head × head_dim,) one token's `head_out`.

    Returns:
        (n_head, n_embd) and (n_embd,). Their sum is `attn_out`, up to rounding. A norm behind
        W_O is frozen at its size for this token.
    """
    parts, bias = heads_of_tokens(model, layer, z[None])
    return parts[0], bias[0]


def heads_of_tokens(model: Model, layer: int, z: Array) -> tuple[Array, Array]:
    """`head_contributions` of each row of z (n, n_head × head_dim): (n, n_head, n_embd) and
    (n, n_embd)."""
    topology = model.topology
    n_head, width = topology.sites[Site("head_out", layer)].shape
    n = len(z)
    apart = np.zeros((n, n_head, n_head, width), np.float32)
    apart[:, range(n_head), range(n_head)] = z.reshape(n, n_head, width)
    rows = apart.reshape(n, n_head, n_head * width)
    begin, end = Site("head_out", layer), Site("attn_out", layer)
    steps = walk(topology, model.weights, begin, end, architecture=model.architecture)
    if any(isinstance(step, Tanh) for step in steps):
        raise ModelError(f"attention of {model.architecture} is not linear in its heads")
    zero = np.zeros(n_head * width, np.float32)
    if any(isinstance(step, Norm) for step in steps):  # each token's has a size of its own
        each = [split(steps, parts, zero) for parts in rows]
        split_up, constants = (np.stack(x) for x in zip(*each, strict=True))
    else:
        flat, constant = split(steps, rows.reshape(n * n_head, -1), zero)
        split_up, constants = flat.reshape(n, n_head, -1), np.repeat(constant[None], n, 0)
    return split_up.astype(np.float32), constants.astype(np.float32)


def _of_token(model: Model, p: _Parts, logits: Array, token: int) -> Attribution:
    n, n_head = p.heads.shape[:2]
    components = np.concatenate([p.embed[None], p.attn, p.mlp])
    shares, bias, recomputed = model.lens.attribute(components, token)
    # the finer parts have the same sum, so that the norm is frozen at the same size
    rest = p.attn - p.heads.sum(1) - p.attn_bias
    finer = np.concatenate(
        [p.embed[None], p.mlp, p.attn_bias, rest, p.heads.reshape(n * n_head, -1)]
    )
    fine, _, _ = model.lens.attribute(finer, token)
    error = abs(recomputed - float(logits[token])) / max(float(np.ptp(logits)), 1e-6)
    if not error < 0.02:
        raise ModelError(
            f"the parts add up to a logit of {recomputed:.3f}, the model says {logits[token]:.3f}; "
            "refusing to show wrong numbers"
        )
    return Attribution(
        embed=float(shares[0]),
        attn=shares[1 : n + 1].astype(np.float32),
        mlp=shares[n + 1 :].astype(np.float32),
        heads=fine[3 * n + 1 :].reshape(n, n_head).astype(np.float32),
        attn_bias=fine[n + 1 : 2 * n + 1].astype(np.float32),
        rest=fine[2 * n + 1 : 3 * n + 1].astype(np.float32),
        bias=bias,
        logit=float(logits[token]),
        recomputed=recomputed,
    )


# -- the experiment --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LogitAttribution(Report):
    """What each part of a model writes into the logit of an answer.

    Attributes:
        answer, against: a token, and the one that its logit is compared with.
        shares: the numbers.
        soft_capped: whether the model soft-caps its logits.
        k: how many heads the text lists.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    answer: Token
    against: Token | None
    shares: Attribution
    soft_capped: bool
    k: int

    def document(self) -> dict[str, Any]:
        s, other = self.shares, self.against
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "answer": self.answer.named(),
            "against": None if other is None else other.named(),
            "logit": rounded(s.logit),
            "sum": rounded(s.total),
            "sum_after_capping": rounded(s.recomputed),
            "soft_capped": self.soft_capped,
            "embed": rounded(s.embed),
            "bias": rounded(s.bias),
            "attn": rounded(s.attn),
            "mlp": rounded(s.mlp),
            "heads": rounded(s.heads),
            "attn_bias": rounded(s.attn_bias),
            "rest": rounded(s.rest),
            "top": self._top(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record for each head, and for the MLP of each layer (head None)."""
        s = self.shares
        heads = [
            h.document(part="head", value=float(s.heads[h])) for h in every_head(*s.heads.shape)
        ]
        mlps = [
            {"layer": i, "head": None, "part": "mlp", "value": x}
            for i, x in enumerate(s.mlp.tolist())
        ]
        return heads + mlps

    def plain(self) -> str:
        s = self.shares
        lines = [f"{'embed':<9s} {s.embed:9.4f}", f"{'layer':<9s} {'attention':>9s} {'MLP':>9s}"]
        lines += [
            f"{i:<9d} {a:9.4f} {b:9.4f}" for i, (a, b) in enumerate(zip(s.attn, s.mlp, strict=True))
        ]
        what = "logit" if self.against is None else "difference"
        capped = f"; after soft-capping {s.recomputed:.4f}" if self.soft_capped else ""
        heads = " | ".join(f"{t['layer']}.{t['head']} {t['value']:+.4f}" for t in self._top())
        return "\n".join(
            [
                *lines,
                f"{'biases':<9s} {s.bias:9.4f}",
                f"{'sum':<9s} {s.total:9.4f}{capped} (the model's own {what}: {s.logit:.4f})",
                f"heads: {heads}",
                f"rounding not given to any head: {abs(s.rest).sum():.4f} in all",
            ]
        )

    def plot(self, path: str | Path) -> None:
        """Draws the shares of the heads as a heatmap, layers down, heads across."""
        from mia.show import plots

        than = "" if self.against is None else f" over {visible(self.against.text)!r}"
        fig = plots.heatmap(
            self.shares.heads,
            x="head",
            y="layer",
            bar="logit",
            title=f"{self.facts.name} · what each head writes for {visible(self.answer.text)!r}{than}",
            diverging=True,
        )
        plots.save(fig, path)

    def _top(self) -> list[dict[str, Any]]:
        heads = self.shares.heads
        return [h.document(value=rounded(heads[h])) for h in top_heads(heads, self.k, by_size=True)]


def attribute(
    model: Model,
    prompt: str | Sequence[int],
    answer: str,
    *,
    against: str | None = None,
    token: int = -1,
    k: int = 10,
    edits: Edit | Sequence[Edit] = (),
) -> LogitAttribution:
    """What each layer's attention and MLP, and each head, writes into the logit of an answer.

    Args:
        prompt: a text or token ids.
        answer: a text of one token; against: another, to attribute the difference of the two.
        token: at which token of the prompt, the last by default.
        k: how many heads the text lists.
        edits: changes while it runs.

    Raises:
        UsageError: the answer is not one token, or `against` is the same token.
        ModelError: the parts do not add up to what the model computes.
    """
    ids = model.ids(prompt)
    target = model.token_id(answer)
    other = None if against is None else model.token_id(against)
    if other == target:
        raise UsageError(f"answer and against are the same token, {answer!r}")
    for text in (answer, against):
        if text is not None and token % len(ids) == len(ids) - 1:
            check_answer(model, ids, text)
    shares = attribute_logit(model, ids, target, against=other, token=token, edits=edits)
    place = token % len(ids) + 1
    return LogitAttribution(
        facts=model.facts,
        tokens=model.token_rows(ids),
        answer=Token(place, **model.described(target)),
        against=None if other is None else Token(place, **model.described(other)),
        shares=shares,
        soft_capped=model.lens.capped,
        k=k,
    )
