"""One text, explored: what each layer would say, what else each token could have been, where the
heads look, and what made each token.

    report = explore(Model("smollm2"), "The capital of France is", n_predict=12)
    report.save("page.html")      # a page that needs nothing else

| part              | source                                        | here                         |
|-------------------|-----------------------------------------------|------------------------------|
| lens, followed    | nostalgebraist 2020                           | `Model.lens`, `lenses.follow`|
| attention         | Vaswani et al. 2017                           | `methods.attention`          |
| attribution       | Elhage et al. 2021                            | `methods.attribution`        |
| blocking          | Geva et al. 2023 (arXiv 2304.14767), sec. 4   | `sweeps.changes.BlockKeys`   |
| alternatives      | -                                             | the model's own logits       |

Three runs: one generates, one reads the whole text at once, one continues from the alternatives
and blocks each token's keys (`explore_text.py`). With changes the last two are made of the unchanged text and
of the changed one. On a quantized file the second differs from the first by rounding, as
any other layout does, so a generated token need not be the most probable one of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mia.edits import Edit
from mia.errors import UsageError
from mia.methods.changes import Changes
from mia.methods.explore_changes import NOTHING, Said, said_of
from mia.methods.explore_reports import Explored
from mia.methods.explore_text import Settings, explore_text
from mia.progress import step
from mia.request import Request, Sampling, one_or_more

if TYPE_CHECKING:
    from mia.model import Model

#: attention weights of one page, 2 bytes each: more than this and a browser is slow
_MOST_WEIGHTS = 12_000_000


def explore(
    model: Model,
    prompt: str | Sequence[int],
    *,
    n_predict: int = 32,
    k: int = 5,
    branches: int = 3,
    sampling: Sampling | None = None,
    changes: Changes | None = None,
    edits: Edit | Sequence[Edit] = (),
    baseline: bool = True,
    written: Sequence[Sequence[int]] | None = None,
) -> Explored:
    """Continues a prompt and reads all that a page needs to explore the text.

    What an architecture does not have (attention patterns of a recurrent one, say) is left out,
    and the report says why.

    Args:
        prompt: a text or token ids.
        n_predict: tokens to generate at most, at least 1.
        k: how many tokens each layer, and each list of alternatives, shows.
        branches: alternatives of each generated token whose continuations are computed.
        sampling: how tokens are chosen; greedy by default.
        changes, edits: what is changed while the prompt runs. The page says the former as options of a
            command and in Python, the latter only by their number.
        baseline: explore the unchanged text too, if something is changed; then the report is of that, and
            its `changed` of the other.
        written: token ids instead of generated ones: of each text that is explored.

    Raises:
        UsageError: the prompt is empty, nothing is to be generated, or the text is too long for
            one page.
        ModelError: the lens does not give the model's own logits.
    """
    if n_predict < 1:
        raise UsageError(
            f"n_predict is {n_predict}; a text to explore has at least 1 generated token"
        )
    if k < 1 or branches < 0:
        raise UsageError(f"k is {k} and branches {branches}; they are at least 1 and 0")
    ids, sampling = model.ids(prompt), sampling or Sampling()
    own = list(one_or_more(edits, Edit))
    words = Said(f"{len(own)} edit{'s'[: len(own) > 1]}", None, "") if own else NOTHING
    if changes is not None and (made := changes.edits(model, ids)):
        words = said_of(changes, model, ids) if not own else words
        own = [*made, *own]
    both: list[list[Edit]] = [own] if not (own and baseline) else [[], own]
    if written is None:
        check_length(model, len(ids) + n_predict, len(both))
        with step("generating") as bar:
            request = Request(ids, logits=None, n_predict=n_predict, sampling=sampling)
            results = model.run([replace(request, edits=e) for e in both], progress=bar)
        written = [r.tokens for r in results]
        if not all(written):
            raise UsageError(f"{model.name} wrote nothing after this prompt")
    elif len(written) != len(both) or not all(len(tokens) for tokens in written):
        raise UsageError(f"written has the tokens of {len(both)} texts, at least one of each")
    else:
        n_predict = max(map(len, written))
        check_length(model, len(ids) + n_predict, len(both))
    how = Settings(n_predict, k, branches, sampling)
    return explored(model, ids, written, how, edits=own, said=words)


def explored(
    model: Model,
    ids: Sequence[int],
    written: Sequence[Sequence[int]],
    how: Settings,
    *,
    edits: Sequence[Edit],
    said: Said,
) -> Explored:
    """What is there of one text or of two: of the unchanged one and, behind it, the changed one."""
    if not edits:
        return explore_text(model, ids, written[0], how)
    changed = explore_text(model, ids, written[-1], how, edits=edits, label="changed", said=said)
    if len(written) == 1:
        return changed
    plain = explore_text(model, ids, written[0], how, label="unchanged")
    return replace(plain, changed=changed)


def check_length(model: Model, n: int, n_texts: int = 1) -> None:
    """Raises `UsageError` where the attention of so many tokens is too much for a page."""
    heads = model.n_layer * model.n_head
    if n_texts * heads * n * (n + 1) // 2 <= _MOST_WEIGHTS:
        return
    most = int((2 * _MOST_WEIGHTS / heads / n_texts) ** 0.5)
    twice = " of two texts" if n_texts > 1 else ""
    raise UsageError(
        f"{n} tokens{twice} with {heads} heads are too many for one page; {model.name} has room for "
        f"{most}"
    )
