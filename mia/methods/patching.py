"""Activation patching: rows of one run put into another, by token index.

Source: Meng et al. 2022 (arXiv 2202.05262), Wang et al. 2022 (arXiv 2211.00593): a state of one
run takes the place of another run's state at the same site. `average` and `subtract` are of
llama.mia, the first of these tools for llama.cpp.

| mode       | a row h of the run becomes, with the patched row p           |
|------------|--------------------------------------------------------------|
| `replace`  | p                                                            |
| `add`      | h + p                                                        |
| `subtract` | h - p                                                        |
| `average`  | (h + p) / 2; of several files the mean of their rows         |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from mia.edits import Edit
from mia.errors import UsageError
from mia.notices import MissingBos, notice
from mia.ranges import Ranges, parse_tokens
from mia.sites import BY_KEY, RESIDUAL, parse_many, reads_as_attn_out

if TYPE_CHECKING:
    from pathlib import Path

    from mia.io.activations import Activations
    from mia.model import Model

Mode = Literal["replace", "add", "subtract", "average"]
#: mode -> operator and coefficient
_EDITS = {
    "replace": ("replace", 1.0),
    "add": ("add", 1.0),
    "subtract": ("add", -1.0),
    "average": ("blend", 0.5),
}


def today(site: str) -> str:
    """A site with `kqv_out` read as the first llama.cpp tools had it: what attention adds to the
    residual. A notice says so."""
    if not reads_as_attn_out(site):
        return site
    notice(
        "kqv_out is read as attn_out, what attention adds to the residual; heads are at head_out"
    )
    return re.sub("kqv_out", "attn_out", site, count=1)


def patches(
    model: Model,
    tokens: Sequence[int],
    site: str,
    sources: Sequence[Activations | str | Path] = (),
    *,
    from_tokens: str = "-1",
    to_tokens: str = "-1",
    mode: Mode = "replace",
    subtract_tokens: Sequence[str] = (),
) -> list[Edit]:
    """Edits of a prompt: activations of other runs put in (`patch_edits`), then the directions of
    tokens projected out (`token_removal_edits`).

    A notice says if they change the start of a prompt without a BOS.

    Args:
        tokens: (n_tokens,) the prompt's token ids.
        site, sources, from_tokens, to_tokens, mode: as of `patch_edits`.
        subtract_tokens: texts that are one token each.

    Raises `UsageError` if there is neither a source nor a token, and what those two raise.
    """
    if not sources and not subtract_tokens:
        raise UsageError("nothing to patch: give activations or tokens to subtract")
    n = len(tokens)
    edits = []
    if sources:
        edits += patch_edits(
            model, site, sources, n, from_tokens=from_tokens, to_tokens=to_tokens, mode=mode
        )
    edits += token_removal_edits(model, site, subtract_tokens, n, tokens=to_tokens)
    warn_of_first_tokens(model, tokens, edits)
    return edits


def patch_edits(
    model: Model,
    site: str,
    sources: Sequence[Activations | str | Path],
    n_tokens: int,
    *,
    from_tokens: Ranges = "-1",
    to_tokens: Ranges = "-1",
    mode: Mode = "replace",
) -> list[Edit]:
    """Edits that put activations of other runs into a prompt of `n_tokens` tokens.

    Args:
        site: one or several, in any spelling.
        sources: activations or files of them.
        from_tokens, to_tokens: which tokens of the sources go to which of the prompt, as
            `mia.ranges` reads them; one token may go to many.

    Raises:
        UsageError: an unknown mode, several sources for a mode that takes one, activations of
            another kind of model, or as many tokens as do not go together.
    """
    from mia.io.activations import Activations, load

    if mode not in _EDITS:
        raise UsageError(f"unknown mode {mode!r}; known: {', '.join(_EDITS)}")
    if len(sources) > 1 and mode != "average":
        raise UsageError(f"got {len(sources)} files; only the mode average takes several")
    activations = [s if isinstance(s, Activations) else load(s) for s in sources]
    for a in activations:
        model.check_activations(a)
    positions = parse_tokens(to_tokens, n_tokens, "tokens to patch")
    op, coeff = _EDITS[mode] if len(sources) == 1 else ("replace", 1.0)
    edits = []
    for s in parse_many(today(site), model.n_layer):
        if s.name in BY_KEY:
            raise UsageError(f"{s} cannot be patched from a file; its keys are those of one prompt")
        rows = []
        for a in activations:
            every = a.at(s)
            taken = every[parse_tokens(from_tokens, len(every), f"tokens of {a.source}")]
            if len(taken) not in (1, len(positions)):
                raise UsageError(
                    f"{len(taken)} tokens are taken from {a.source}, but {len(positions)} are to "
                    "be changed"
                )
            rows.append(np.broadcast_to(taken, (len(positions), taken.shape[-1])))
        value = np.mean(rows, axis=0, dtype=np.float32)
        edits.append(Edit(s, op, value, tokens=positions, coeff=coeff))
    return edits


def token_removal_edits(
    model: Model, site: str, words: Sequence[str], n_tokens: int, *, tokens: Ranges = "-1"
) -> list[Edit]:
    """Edits that project out the directions in which the lens reads these tokens.

    Raises `UsageError` where a word is not one token, or the site is no residual."""
    positions = parse_tokens(tokens, n_tokens, "tokens to patch")
    edits = []
    for word in words:
        direction = model.lens.direction(model.token_id(word))
        for s in parse_many(today(site), model.n_layer):
            if s.name not in RESIDUAL:
                raise UsageError(
                    f"a token is removed from residuals ({', '.join(RESIDUAL)}), not from {s}"
                )
            edits.append(Edit(s, "project_out", direction, tokens=positions))
    return edits


def warn_of_first_tokens(model: Model, tokens: Sequence[int], edits: Sequence[Edit]) -> None:
    """A notice where edits touch the start of a prompt without a BOS: models treat it as an
    attention sink."""
    touched = [i for e in edits for i in e.positions(len(tokens))]
    if model.bos_token >= 0 and not model.has_bos(tokens) and any(i < 2 for i in touched):
        notice(
            f"token {min(touched)} is at the start of a prompt without a BOS, where models "
            f"treat the first token as an attention sink; put {model.piece(model.bos_token)} in front",
            MissingBos,
        )
