"""Activation addition: Turner et al. 2023 (arXiv 2308.10248), algorithm 1.

    print(add(Model("smollm2"), "I hate you because", [Addition("Love", "Hate", 3, layer=6)]))

| paper      | here                                                            |
|------------|-----------------------------------------------------------------|
| p+, p-     | `Addition.plus`, `.minus`, padded by spaces to equal length      |
| l          | `Addition.layer`: `resid_pre` of block l                         |
| c          | `Addition.coeff`                                                 |
| h+, h-     | activations of all tokens of both, (n_tokens, n_embd)            |
| h_A        | `difference`, (n_tokens, n_embd)                                 |
| a = 1      | front-aligned: row i is added at token i of the prompt           |

Where we deviate: both texts start with a BOS only if the prompt has one (GPT-2 in
the paper always has it; its row of h_A is zero either way); an addition longer than the
prompt is refused, as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mia.arrays import Array
from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.generation import Generation, Token
from mia.methods.patching import warn_of_first_tokens
from mia.progress import Progress, step
from mia.ranges import Ranges, indices
from mia.request import Capture, Request, Sampling
from mia.show.report import Report
from mia.show.text import safe
from mia.sites import Site

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.io.provenance import ModelFacts
    from mia.model import Model


@dataclass(frozen=True, slots=True)
class Addition:
    """One contrast and how much of it: coeff · (plus - minus) at `resid_pre.layer`."""

    plus: str
    minus: str
    coeff: float = 1.0
    layer: int = 6


def padded(model: Model, plus: str, minus: str, *, bos: bool | None = None) -> list[list[int]]:
    """Token ids of both, the shorter with space tokens on its right.

    Raises `UsageError` if both are empty, or the vocabulary has no token for a space."""
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


# -- experiments ---------------------------------------------------------------------


def additions(
    model: Model,
    plus: Sequence[str],
    minus: Sequence[str] = (),
    *,
    coeffs: Sequence[float] = (1.0,),
    layers: Ranges = "6",
) -> list[Addition]:
    """One addition per text of `plus`.

    Args:
        minus: what each is contrasted with; a space by default.
        coeffs: one for all, or one each.
        layers: one for all, or one each (`mia.ranges`).

    Raises:
        UsageError: numbers of texts, coefficients and layers that do not go together.
        RangeError: a layer out of range.
    """
    n = len(plus)
    minus = list(minus) or [" "] * n
    numbers = indices(layers, model.n_layer, "layers", kind="layer")
    if len(minus) != n:
        raise UsageError(f"got {_texts(n, 'plus')} but {_texts(len(minus), 'minus')}")
    for what, values in (("coefficients", coeffs), ("layers", numbers)):
        if len(values) not in (1, n):
            raise UsageError(f"got {_texts(n, 'plus')} but {len(values)} {what}")
    coeffs = list(coeffs) * (n if len(coeffs) == 1 else 1)
    numbers *= n if len(numbers) == 1 else 1
    return [Addition(*a) for a in zip(plus, minus, coeffs, numbers, strict=True)]


def _texts(n: int, what: str) -> str:
    return f"{n} {what} text{'' if n == 1 else 's'}"


def add(
    model: Model,
    prompt: str | Sequence[int],
    changes: Sequence[Addition],
    *,
    n_predict: int = 32,
    sampling: Sampling | None = None,
    baseline: bool = True,
) -> Generation:
    """Continues a prompt with additions at its first tokens; the document has the tokens of both
    texts of each. Raises `UsageError` or `RangeError`."""
    ids = model.ids(prompt)
    added, about = _added(model, ids, changes)
    generation = model.generate(ids, n_predict, edits=added, sampling=sampling, baseline=baseline)
    return replace(generation, about={"additions": about})


def _added(
    model: Model, ids: Sequence[int], changes: Sequence[Addition]
) -> tuple[list[Edit], list[dict[str, Any]]]:
    """The edits, and what a document says of them."""
    bos = model.has_bos(ids)  # the contrast gets a BOS if the prompt has one
    added = edits(model, changes, len(ids), bos=bos)
    warn_of_first_tokens(model, ids, added)
    about = []
    for a in changes:
        plus, minus = padded(model, a.plus, a.minus, bos=bos)
        tokens = {
            "plus_tokens": [t.document() for t in model.token_rows(plus)],
            "minus_tokens": [t.document() for t in model.token_rows(minus)],
        }
        about.append(
            {"plus": a.plus, "minus": a.minus, "coeff": a.coeff, "layer": a.layer, **tokens}
        )
    return added, about


@dataclass(frozen=True, slots=True)
class SamplePair:
    """Texts of one seed, unsteered and steered."""

    seed: int
    baseline: str
    output: str

    def document(self) -> dict[str, Any]:
        return {"seed": self.seed, "baseline": self.baseline, "output": self.output}


@dataclass(frozen=True, eq=False)
class AdditionSamples(Report):
    """Samples with and without additions, beside each other.

    Attributes:
        additions: what was added, as the document has it.
    """

    facts: ModelFacts
    tokens: Sequence[Token]
    additions: list[dict[str, Any]]
    samples: list[SamplePair]

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "additions": self.additions,
            "samples": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        return [s.document() for s in self.samples]

    def plain(self) -> str:
        return "\n".join(
            f"{s.seed} unsteered: {s.baseline!r}\n{s.seed} steered:   {s.output!r}"
            for s in self.samples
        )

    def table(self, width: int) -> RenderableType:
        from rich.table import Table

        table = Table("seed", "unsteered", "steered", show_lines=True)
        for s in self.samples:
            table.add_row(str(s.seed), safe(s.baseline, "\n"), safe(s.output, "\n"))
        return table


def compare(
    model: Model,
    prompt: str | Sequence[int],
    changes: Sequence[Addition],
    *,
    n: int,
    n_predict: int = 32,
    sampling: Sampling | None = None,
) -> AdditionSamples:
    """n samples with and without additions, with seeds that follow `sampling.seed`.

    Args:
        sampling: temperature 1 by default.

    Raises:
        UsageError: samples that would all be the same.
    """
    sampling = sampling or Sampling(temperature=1.0)
    if sampling.temperature == 0:
        raise UsageError(
            "samples at temperature 0 are all the same; give a temperature (1 is the model's own)"
        )
    ids = model.ids(prompt)
    added, about = _added(model, ids, changes)
    with step("sampling") as bar:
        samples = sample_pairs(
            model, ids, added, n=n, n_predict=n_predict, sampling=sampling, progress=bar
        )
    return AdditionSamples(model.facts, model.token_rows(ids), about, samples)


def sample_pairs(
    model: Model,
    prompt: Sequence[int],
    changes: Sequence[Edit],
    *,
    n: int,
    n_predict: int,
    sampling: Sampling,
    progress: Progress | None = None,
) -> list[SamplePair]:
    """n samples with and without the changes, with seeds that follow one another."""
    seeds = [sampling.seed + i for i in range(n)]
    results = model.run(
        [
            Request(prompt, e, logits=None, n_predict=n_predict, sampling=replace(sampling, seed=s))
            for s in seeds
            for e in ((), changes)
        ],
        progress=progress,
    )
    texts = [model.text(r.tokens) for r in results]
    return [SamplePair(s, texts[2 * i], texts[2 * i + 1]) for i, s in enumerate(seeds)]
