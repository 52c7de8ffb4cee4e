"""Activation addition: Turner et al. 2023 (arXiv 2308.10248), algorithm 1.

| paper      | here                                                            |
|------------|-----------------------------------------------------------------|
| p+, p-     | `Addition.plus`, `.minus`, padded by spaces to equal length      |
| l          | `Addition.layer`: `resid_pre` of block l                         |
| c          | `Addition.coeff`                                                 |
| h+, h-     | activations of all tokens of both, (n_tokens, n_embd)            |
| h_A        | `difference`, (n_tokens, n_embd)                                 |
| a = 1      | front-aligned: row i is added at token i of the prompt           |

Where we deviate: a BOS stands in front of all three texts only where the model asks for
one or `bos` is true (GPT-2 in the paper always has it; its row of h_A is zero either
way); an addition longer than the prompt is refused, as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.request import Capture, Request, Sampling
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Addition:
    """One contrast and how much of it: coeff · (plus - minus) at `resid_pre.layer`."""

    plus: str
    minus: str
    coeff: float = 1.0
    layer: int = 6


@dataclass(frozen=True, slots=True)
class Sample:
    """The same seed with and without."""

    seed: int
    plain: str
    steered: str


def padded(model: Model, plus: str, minus: str, *, bos: bool | None = None) -> list[list[int]]:
    """Token ids of both, the shorter with space tokens on its right.

    Raises `UsageError` where both are empty, or the vocabulary has no token for a space."""
    if not plus and not minus:
        raise UsageError("plus and minus are both empty")
    # the space inside a text: alone, SentencePiece puts a second one in front of it
    space = model.continuation(":", " ")
    if len(space) != 1:
        raise UsageError(f"{model.name} has no token for a space to pad with")
    ids = [model.tokenize(t, bos=bos) for t in (plus, minus)]
    n = max(map(len, ids))
    return [x + space * (n - len(x)) for x in ids]


def difference(
    model: Model,
    addition: Addition,
    layers: Sequence[int] | None = None,
    *,
    bos: bool | None = None,
) -> dict[int, Array]:
    """h+ - h- by layer, (n_tokens, n_embd), without the coefficient; at the addition's layer, or
    at all of `layers`."""
    chosen = [addition.layer] if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < model.n_layer:
            raise RangeError(
                f"layer {layer} is out of range; {model.name} has 0 to {model.n_layer - 1}"
            )
    sites = [Site("resid_pre", i) for i in chosen]
    texts = padded(model, addition.plus, addition.minus, bos=bos)
    plus, minus = model.run([Request(t, captures=[Capture(sites)], logits=None) for t in texts])
    return {i: plus[s] - minus[s] for i, s in zip(chosen, sites, strict=True)}


def edits(
    model: Model, additions: Sequence[Addition], n_prompt: int, *, bos: bool | None = None
) -> list[Edit]:
    """An edit per addition for a prompt of `n_prompt` tokens.

    Raises:
        UsageError: an addition covers more tokens than the prompt has.
    """
    out = []
    for a in additions:
        h = difference(model, a, bos=bos)[a.layer]
        out.append(front_edit(h, a.coeff, a.layer, n_prompt))
    return out


def front_edit(h: Array, coeff: float, layer: int, n_prompt: int) -> Edit:
    """Adds coeff · h (n_tokens, n_embd) at the first tokens of a prompt."""
    if len(h) > n_prompt:
        raise UsageError(
            f"the addition covers {len(h)} tokens, the prompt has {n_prompt}: use a longer prompt"
        )
    return Edit(Site("resid_pre", layer), "add", h, tokens=range(len(h)), coeff=coeff)


def compare(
    model: Model,
    prompt: Sequence[int],
    changes: Sequence[Edit],
    *,
    n: int,
    n_predict: int,
    sampling: Sampling,
) -> list[Sample]:
    """n samples with and without the changes, of seeds that follow one another."""
    from dataclasses import replace

    seeds = [sampling.seed + i for i in range(n)]
    results = model.run(
        [
            Request(prompt, e, logits=None, n_predict=n_predict, sampling=replace(sampling, seed=s))
            for s in seeds
            for e in ((), changes)
        ]
    )
    texts = [model.text(r.tokens) for r in results]
    return [Sample(s, texts[2 * i], texts[2 * i + 1]) for i, s in enumerate(seeds)]
