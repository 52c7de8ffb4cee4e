"""Contrastive activation addition: Rimsky et al. 2023 (arXiv 2312.06681).

| paper                     | here                                                        |
|---------------------------|-------------------------------------------------------------|
| D, (p, c_p, c_n)          | `Item`: question, matching letter, other letter             |
| a_L(p, c)                 | `resid_post.L` at the answer's letter                       |
| v_MD (eq. 1)              | `train`: the mean of a_L(p, c_p) - a_L(p, c_n)              |
| multiplier                | `multipliers`                                               |
| normalized across behaviours (app. C) | `equal_norms`                                   |
| answer-matching probability | `Table.p`: P(matching) / (P(A) + P(B)), next after "("    |

Where we deviate: the vector is added at every token after the user's message (in the
paper's Llama 2 template that is after `[/INST]`); "(" and the letter are tokenized each as
what follows the text before it, so that the letter is one token; a model without a chat
template reads the question, a blank line and "Answer: (". "(" has a space in front but
where a template ends in a line end or a space. `by_text` reads and scores the answers
themselves instead of their letters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mia.datasets.shipped import read_text
from mia.edits import Edit
from mia.errors import FileError, UsageError
from mia.io.provenance import file_metadata
from mia.measure.estimates import Estimate, bootstrap
from mia.measure.losses import MeanLoss
from mia.methods.contrast import PairActivations, aggregate
from mia.methods.steering import Steering, check_fits
from mia.request import Capture, Request
from mia.sites import Site
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Item:
    """A question with two choices; the letters of the answer that shows the behaviour, and of
    the other."""

    question: str
    matching: str
    other: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """tokens: up to and with "(", or by text up to the answer; steered: the first token after the
    user's message."""

    tokens: list[int]
    steered: int
    by_letter: bool = True


# -- data ----------------------------------------------------------------------------


def shipped() -> list[str]:
    """Names of the A/B sets that come with mia."""
    folder = resources.files("mia") / "data" / "ab"
    return sorted(
        f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")
    )


def find_items(source: str | Path) -> Path:
    """A shipped set by name, or a file. Raises `FileError` where it is neither."""
    if str(source) in shipped():
        return Path(str(resources.files("mia"))) / "data" / "ab" / f"{source}.json"
    if not Path(source).is_file():
        raise FileError(
            f"there is no file {source}, nor a shipped set; shipped: {', '.join(shipped())}"
        )
    return Path(source)


def load_items(source: str | Path) -> list[Item]:
    """Items of a JSON file as the CAA repository has them, or of a shipped set by name.

    Raises:
        FileError: no such file, not such JSON, or no items in it.
    """
    try:
        rows = json.loads(read_text(find_items(source)))
    except ValueError as err:
        raise FileError(f"{source} is not JSON: {err}") from err
    if not isinstance(rows, list) or not rows:
        raise FileError(f"{source} is empty; a list of questions is needed")
    return [_item(row, f"{source}, item {i}") for i, row in enumerate(rows)]


def _item(row: object, where: str) -> Item:
    values = []
    for key in ("question", "answer_matching_behavior", "answer_not_matching_behavior"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise FileError(f"{where}: there is no text {key!r}")
        values.append(value)
    letters = [v.strip().strip("()").strip() for v in values[1:]]
    if any(len(x) != 1 for x in letters) or letters[0] == letters[1]:
        raise FileError(
            f"{where}: the answers are {values[1]!r} and {values[2]!r}, not two letters like (A)"
        )
    return Item(values[0], *letters)


# -- prompts -------------------------------------------------------------------------


def prompt(model: Model, item: Item, *, bos: bool | None = None, by_text: bool = False) -> Prompt:
    """The question as a user's message, with the answer begun; by text without the choices, and
    the answer not begun."""
    question = choices(item)[0] if by_text else item.question
    try:
        text = model.chat(question)
    except UsageError:
        text = f"{question}\n\nAnswer:"
    end = text.rfind(question.strip()) + len(question.strip())
    tokens = model.tokenize(text, bos=bos)
    n_user = len(tokens)
    lead = len(model.detokenize(tokens)) - len(text)  # a BOS in front
    while n_user > 1 and len(model.detokenize(tokens[: n_user - 1])) - lead >= end:
        n_user -= 1
    if by_text:
        return Prompt(tokens, n_user, by_letter=False)
    return Prompt([*tokens, *answer_tokens(model, tokens, "(")], n_user)


def choices(item: Item) -> tuple[str, str, str]:
    """The question without its choices, and the texts of the matching and the other one.

    Raises `UsageError` where the question does not list them.
    """
    head, _, listed = item.question.partition("\n\nChoices:")
    texts = {}
    for line in listed.splitlines():
        letter, _, text = line.strip().partition(")")
        texts[letter.strip("( ")] = text.strip()
    if not texts.get(item.matching) or not texts.get(item.other):
        raise UsageError(
            f"an item lists no choices ({item.matching}) and ({item.other}): {head[:60]!r}"
        )
    return head, texts[item.matching], texts[item.other]


def answer_tokens(model: Model, begun: Sequence[int], answer: str) -> list[int]:
    """An answer, or its "(", after "A:" begins with a space, after a template's line end it does
    not."""
    before = model.piece(begun[-1])
    glue = "" if before.endswith(("\n", " ")) else " "
    return model.continuation(before, glue + answer.strip())


def _answers(
    model: Model, item: Item, *, bos: bool | None, by_text: bool
) -> tuple[Prompt, list[int], list[int]]:
    """The prompt, and the tokens of the matching and of the other answer."""
    begun = prompt(model, item, bos=bos, by_text=by_text)
    if not by_text:
        return begun, _letter(model, item.matching), _letter(model, item.other)
    _, *texts = choices(item)
    matching, other = (answer_tokens(model, begun.tokens, t) for t in texts)
    return begun, matching, other


def _letter(model: Model, letter: str) -> list[int]:
    """A letter after "(": alone, a SentencePiece vocabulary would put a space in front."""
    tokens = model.continuation("(", letter)
    if len(tokens) != 1:
        raise UsageError(f"the letter {letter!r} after '(' is {len(tokens)} tokens, not one")
    return tokens


# -- the vector ----------------------------------------------------------------------


def train(
    model: Model,
    items: Sequence[Item],
    *,
    layers: Sequence[int] | None = None,
    bos: bool | None = None,
    name: str = "caa",
    by_text: bool = False,
    progress: Progress | None = None,
) -> Vector:
    """The mean difference at the answer's letter, for every layer (eq. 1).

    Args:
        by_text: at the answer itself, the mean over its tokens, with no choices listed: for
            models that do not know what a letter stands for.

    Raises `UsageError` where there are no items.
    """
    if not items:
        raise UsageError("there are no items to learn from")
    sites = [Site("resid_post", i) for i in (range(model.n_layer) if layers is None else layers)]
    requests = []
    for item in items:
        begun, *answers = _answers(model, item, bos=bos, by_text=by_text)
        for answer in answers:
            capture = Capture(sites, tokens=slice(len(begun.tokens), None))
            requests.append(Request([*begun.tokens, *answer], captures=[capture], logits=None))
    results = model.run(requests, progress=progress)

    def rows(first: int) -> dict[int, Array]:
        return {
            s.layer: np.stack(
                [r.captures[s].mean(0) for r in results[first::2]]
            )  # (n_items, n_embd)
            for s in sites
            if s.layer is not None
        }

    facts = file_metadata(
        model,
        method="caa",
        name=name,
        n_items=str(len(items)),
        read="the answer's tokens" if by_text else "the answer's letter",
        bos=model.wants_bos(bos),
    )
    return aggregate(PairActivations(rows(0), rows(1), "resid_post", facts), "mean")


def equal_norms(vectors: Sequence[Vector]) -> list[Vector]:
    """Vectors of several behaviours, each scaled at each layer to the mean of their norms there,
    so that one multiplier means the same for all. Raises `UsageError` where their layers differ."""
    layers = vectors[0].layers
    if any(v.layers != layers for v in vectors):
        raise UsageError("vectors of unequal layers cannot be brought to equal norms")
    mean = {i: float(np.mean([v.norms[i] for v in vectors])) for i in layers}
    out = []
    for v in vectors:
        scaled = {i: v[i] * np.float32(mean[i] / (v.norms[i] or 1)) for i in layers}
        out.append(Vector(scaled, v.site, {**v.metadata, "norms": "equal across behaviours"}))
    return out


# -- evaluation ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """How probable the behaviour's answer is, of the two.

    Attributes:
        layers, multipliers: the axes.
        p: (n_layers, n_multipliers, n_items).
        plain: (n_items,) without steering.
    """

    layers: list[int]
    multipliers: list[float]
    p: Array
    plain: Array

    def change(self, layer: int, multiplier: float, rng: np.random.Generator) -> Estimate:
        """The mean change from the unsteered run, with its 95 % interval over items."""
        i, j = self.layers.index(layer), self.multipliers.index(multiplier)
        return bootstrap(self.p[i, j] - self.plain, rng)

    @property
    def means(self) -> Array:
        """(n_layers, n_multipliers)"""
        return self.p.mean(-1)


def _asked(begun: Prompt, answers: list[list[int]], edits: Sequence[Edit]) -> list[Request]:
    """One request that gives p by letter, or one for each answer's mean loss."""
    if begun.by_letter:
        return [Request(begun.tokens, edits, metric=_Matching(answers[0][0], answers[1][0]))]
    n = len(begun.tokens)
    return [
        Request(
            [*begun.tokens, *a],
            edits,
            logits=slice(n - 1, n + len(a) - 1),
            metric=MeanLoss(a, np.float32),
        )
        for a in answers
    ]


class _Matching:
    """A metric: the share of the matching letter in the probability of both."""

    def __init__(self, matching: int, other: int):
        self.ids = [matching, other]

    def __call__(self, logits: Array) -> float:
        a, b = (float(x) for x in logits[-1, self.ids])
        return float(1 / (1 + np.exp(b - a)))


def evaluate(
    model: Model,
    vector: Vector,
    items: Sequence[Item],
    *,
    layers: Sequence[int],
    multipliers: Sequence[float],
    bos: bool | None = None,
    together: bool = False,
    by_text: bool = False,
    progress: Progress | None = None,
) -> Table:
    """Steers at each layer by each multiplier, and asks each item.

    Args:
        by_text: compares the answers' texts by their mean log-probability per token, p being
            the share of the matching one in the sum of both exponentials; no choices are listed.
        together: at all the layers at once instead of one after the other; the table has
            one row, of the first layer.

    Raises:
        UsageError: no items, or a vector that does not fit.
    """
    if not items:
        raise UsageError("there are no items to ask")
    check_fits(model, vector)
    groups = [list(layers)] if together else [[i] for i in layers]
    requests = []
    for item in items:
        begun, *answers = _answers(model, item, bos=bos, by_text=by_text)
        at = slice(begun.steered, None)
        changes: list[Sequence[Edit]] = [()]
        for group in groups:
            for m in multipliers:
                changes.append(Steering(vector, coeff=m, layers=group, tokens=at).edits())
        for e in changes:
            requests += _asked(begun, answers, e)
    found = [r.value for r in model.run(requests, progress=progress)]
    values = np.array(found, np.float32)
    if by_text:  # of each pair of losses
        values = 1 / (1 + np.exp(values[0::2] - values[1::2]))
    values = values.reshape(len(items), -1).T  # (1 + n_layers * n_multipliers, n_items)
    p_all = values[1:].reshape(len(groups), len(multipliers), len(items))
    return Table([g[0] for g in groups], list(multipliers), p_all, values[0])
