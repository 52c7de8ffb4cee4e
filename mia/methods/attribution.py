"""Direct logit attribution: what each part of the model writes into the answer's logit.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (the residual
stream is a sum, and a logit reads it linearly once the final norm is frozen); Wang et al. 2022
(arXiv 2211.00593), sec. 3, the logit difference between two answers.

| in the papers                   | here                                                    |
|---------------------------------|---------------------------------------------------------|
| x_0, the embedding              | `resid_pre.0` (with positions and scale, where there are)|
| sum over heads of W_O^h z^h     | `heads`, from `head_out` and W_O of the file            |
| MLP output                      | `mlp_out.i`                                             |
| LN frozen at the final residual | `mia.lenses.linear.Norm.frozen`                                |
| W_U[t], logit of t              | `LogitLens.attribute`                                   |
| logit difference                | `against`                                               |

What is added up: embedding + attention and MLP of each layer + biases of the final norm and
the unembedding = the logit, before soft-capping where the model does that. It is checked every
time: the parts against the residual, and the sum against the model's own logit.

An attention layer is further split into its heads and its bias; a norm after attention
(gemma2) is frozen as well. What is left over (`rest`) is rounding: llama.cpp multiplies a
quantized W_O with activations that it has rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.errors import ModelError
from mia.lenses.linear import Norm, Step, split
from mia.request import Capture, Request, Result
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Shares of one logit, or of the difference of two.

    Attributes:
        embed: of the embedding.
        attn, mlp: (n_layer,) of each layer's attention and MLP.
        heads: (n_layer, n_head); they, `attn_bias` and `rest` add up to `attn`.
        attn_bias, rest: (n_layer,) of W_O's bias (and a post-norm's), and of rounding.
        bias: of the final norm's and the unembedding's biases.
        logit: the model's own logit (difference), after soft-capping where it has that.
        recomputed: what the sum of the parts becomes after soft-capping; close to `logit`.
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


def attribute(
    model: Model,
    tokens: Sequence[int],
    answer: int,
    *,
    against: int | None = None,
    token: int = -1,
    edits: Sequence[Edit] = (),
) -> Attribution:
    """What every part writes into the logit of `answer` at a token of the prompt.

    Args:
        answer, against: token ids; with `against`, the difference of their logits.
        token: at which token of the prompt, the last by default.

    Raises:
        ModelError: the parts do not add up to what the model computes; nothing wrong is shown.
    """
    n = model.n_layer
    names = [Site("resid_pre", 0), Site("resid_post", n - 1)]
    names += [Site(name, i) for name in ("attn_out", "mlp_out", "head_out") for i in range(n)]
    request = Request(tokens, edits, [Capture(names, token)], logits=[token])
    result = model.run([request])[0]
    assert result.logits is not None
    parts = _parts(model, result)
    ids = [answer] if against is None else [answer, against]
    found = [_of_token(model, parts, result.logits[0], t) for t in ids]
    return found[0] if against is None else found[0] - found[1]


@dataclass(frozen=True, eq=False)
class _Parts:
    """What was added to the residual at one token."""

    embed: Array  # (n_embd,)
    attn: Array  # (n_layer, n_embd)
    mlp: Array  # (n_layer, n_embd)
    heads: Array  # (n_layer, n_head, n_embd)
    attn_bias: Array  # (n_layer, n_embd)


def _parts(model: Model, result: Result) -> _Parts:
    def stack(name: str) -> Array:
        return np.concatenate([result.captures[Site(name, i)] for i in range(model.n_layer)])

    embed, end = result["resid_pre.0"][0], result[f"resid_post.{model.n_layer - 1}"][0]
    attn, mlp, z = stack("attn_out"), stack("mlp_out"), stack("head_out")
    missing = np.abs(embed + attn.sum(0) + mlp.sum(0) - end).max() / max(np.abs(end).max(), 1e-6)
    if not missing < 1e-3:
        raise ModelError(
            f"embedding, attention and MLPs of {model.name} do not add up to its last residual: "
            f"{missing:.1%} of it comes from elsewhere ({model.architecture} adds something else)"
        )
    split_up = [head_contributions(model, i, z[i]) for i in range(model.n_layer)]
    heads, bias = (np.stack(x) for x in zip(*split_up, strict=True))
    rest = np.linalg.norm(attn - heads.sum(1) - bias, axis=1) / np.maximum(
        np.linalg.norm(attn, axis=1), 1e-6
    )
    if not rest.max() < 0.1:
        raise ModelError(
            f"the heads of layer {int(rest.argmax())} do not add up to its attention: "
            f"{rest.max():.1%} is missing; refusing to show wrong numbers"
        )
    return _Parts(embed, attn, mlp, heads, bias)


def head_contributions(model: Model, layer: int, z: Array) -> tuple[Array, Array]:
    """What each head adds to the residual, and what the biases add.

    Args:
        z: (n_head × head_dim,) one token's `head_out`.

    Returns:
        (n_head, n_embd) and (n_embd,). Their sum is `attn_out`, but for rounding. A norm behind
        W_O is frozen at this token's size.
    """
    topology = model.topology
    n_head, width = topology.sites[Site("head_out", layer)].shape
    apart = np.zeros((n_head, n_head, width), np.float32)
    apart[range(n_head), range(n_head)] = z.reshape(n_head, width)
    steps = _output_steps(model, layer)
    parts, constant = split(steps, apart.reshape(n_head, -1), np.zeros(n_head * width, np.float32))
    return parts.astype(np.float32), constant.astype(np.float32)


def _output_steps(model: Model, layer: int) -> list[Step]:
    """The operations from `head_out` to `attn_out`, read off the graph backwards."""
    topology, weights = model.topology, model.weights
    begin, end = Site("head_out", layer), Site("attn_out", layer)
    node = topology.nodes[topology.sites[end].index]
    stop = topology.nodes[topology.sites[begin].index].addr
    steps: list[Step] = []
    while node.addr != stop:
        source = node.src[0]
        if node.op == "MUL_MAT" and topology.is_leaf(source):
            steps.append(partial(_product, weights.matrix, topology.node(source).name))
            source = node.src[1]
        elif node.op in ("ADD", "MUL") and topology.is_leaf(node.src[1]):
            v = weights.vector(topology.node(node.src[1]).name)
            steps.append(partial(np.add if node.op == "ADD" else np.multiply, v))
        elif node.op in ("RMS_NORM", "NORM"):
            steps.append(Norm(node.param_f32(0), centred=node.op == "NORM"))
        elif node.op == "SCALE":
            steps.append(partial(_scaled, node.param_f32(0), node.param_f32(1)))
        elif node.op not in ("RESHAPE", "VIEW", "CONT", "GET_ROWS"):
            raise ModelError(
                f"attribution does not know {node.op} behind the heads of {model.architecture}"
            )
        if topology.is_leaf(source):
            raise ModelError(
                f"attention of {model.architecture} does not come from its heads alone"
            )
        node = topology.node(source)
    return steps[::-1]


def _product(matrix: Callable[[str], Array], name: str, x: Array) -> Array:
    return x @ matrix(name).T.astype(x.dtype)


def _scaled(factor: float, offset: float, x: Array) -> Array:
    return x * factor + offset


def _of_token(model: Model, p: _Parts, logits: Array, token: int) -> Attribution:
    n, n_head = p.heads.shape[:2]
    components = np.concatenate([p.embed[None], p.attn, p.mlp])
    shares, bias, recomputed = model.lens.attribute(components, token)
    # heads are shares of the same frozen map, so they go through it beside what they replace
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
