"""The parts of a page about a text: each is one run, or none, and what is read of it.

`explore` reads all of them of a whole text, a server one at a time, as its page asks for them. Tokens are
those of a text of which the first `n_prompt` are the prompt: edits of a prompt are made for the whole text
by `edits_on`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mia.arrays import Array, Floats, IntArray
from mia.edits import Edit
from mia.engine.generation import best_tokens
from mia.errors import ModelError
from mia.lenses.followed import Followed, follow
from mia.measure.losses import log_probs, log_softmax
from mia.measure.noise import nudge
from mia.methods.attention import maps_of, maps_request
from mia.methods.attribution import Attribution, attribution_request, shares_of
from mia.methods.explore_reports import Alternatives
from mia.request import Capture, Request, RowMetric
from mia.sites import Site
from mia.sweeps.axes import Place
from mia.sweeps.changes import BlockKeys

if TYPE_CHECKING:
    from mia.model import Model

#: runs with a change too small to matter, which measure the noise
N_NUDGES = 5


def edits_on(edits: Sequence[Edit], n_prompt: int, n_tokens: int) -> list[Edit]:
    """Edits of a prompt for the first `n_tokens` tokens of a text that was generated after it."""
    return [edit.on_text(n_prompt, n_tokens) for edit in edits]


# -- what an architecture lacks ----------------------------------------------------------


def missing_parts(model: Model) -> dict[str, str]:
    """The parts that this architecture does not have, and why."""
    requests = {
        "attention": maps_request(model, [0]),
        "attribution": attribution_request(model, [0], [0]),
    }
    missing = {part: lacking(model, request) for part, request in requests.items()}
    missing["blocking"] = cannot_block(model)
    try:
        _ = model.lens
    except ModelError as err:
        missing["lens"] = str(err)
    return {part: why for part, why in missing.items() if why is not None}


def lacking(model: Model, request: Request) -> str | None:
    """Why this model cannot run a request's captures, None if it can."""
    topology = model.unfused_topology
    for capture in request.captures:
        assert isinstance(capture.sites, list)
        for site in capture.sites:
            if site not in topology.sites:
                return _no_site(model, site)
    return None


def cannot_block(model: Model) -> str | None:
    """Why keys cannot be blocked, and the noise of it measured; None if they can."""
    for site in (Site("resid_pre", 0), *(Site("attn_scores", i) for i in range(model.n_layer))):
        if site not in model.unfused_topology.sites:
            return _no_site(model, site)
    return None


def _no_site(model: Model, site: Site) -> str:
    why = model.unfused_topology.missing.get(site)
    return f"{model.name} has no site {site}" + (f" ({why})" if why else "")


# -- what follows each token ---------------------------------------------------------------


class _After(NamedTuple):
    ids: IntArray
    logprobs: Floats
    own: float
    rank: int


class BestAfter(RowMetric):
    """A metric: the best k tokens after each position, and where the text's own next one stands."""

    def __init__(self, following: Sequence[int | None], k: int):
        """`following`: the text's own next token after each position, None for none."""
        self._following, self._k = following, k

    def row(self, i: int, logits: Array) -> _After:
        own, rank = np.nan, 0
        best = np.array(best_tokens(logits, self._k))
        logprobs = log_softmax(logits[None])[0]
        token = self._following[i]
        if token is not None:
            own, rank = float(logprobs[token]), 1 + int((logits > logits[token]).sum())
        return _After(best, logprobs[best], own, rank)

    @staticmethod
    def gathered(rows: Sequence[_After]) -> Alternatives:
        ids, logprobs, own, ranks = (np.array(x) for x in zip(*rows, strict=True))
        return Alternatives(ids.astype(np.intp), logprobs, own, ranks.astype(np.intp))


class LossAfter(RowMetric):
    """A metric: the negative log-probability of a token after each position, in nats."""

    def __init__(self, following: Sequence[int]):
        self._following = following

    def row(self, i: int, logits: Array) -> float:
        return -float(log_probs(logits[None], self._following[i : i + 1])[0])


def columns_request(
    model: Model,
    tokens: Sequence[int],
    columns: Sequence[int],
    k: int,
    edits: Sequence[Edit] = (),
) -> Request:
    """The residuals and the best next tokens at some tokens; `tokens` and `edits` are of all up to the
    last of them."""
    n = max(columns) + 1
    following = [tokens[i + 1] if i + 1 < len(tokens) else None for i in columns]
    residual = Capture([Site("resid_post", i) for i in range(model.n_layer)], list(columns))
    metric = BestAfter(following, k)
    return Request(tokens[:n], edits, [residual], logits=list(columns), metric=metric)


def residuals(model: Model, captures: dict[Site, Array]) -> Array:
    """(n_layer, n, n_embd) of a `columns_request`."""
    return np.stack([captures[Site("resid_post", i)] for i in range(model.n_layer)])


def read_lens(model: Model, rows: Array, k: int) -> tuple[IntArray, Array]:
    """The best tokens of residuals (n_layer, n, n_embd): ids and probabilities (n_layer, n, k)."""
    read = model.lens.read(rows.reshape(-1, rows.shape[-1]), k)
    return read.ids.reshape(*rows.shape[:2], -1), read.probs.reshape(*rows.shape[:2], -1)


def columns(
    model: Model,
    tokens: Sequence[int],
    chosen: Sequence[int],
    k: int,
    *,
    edits: Sequence[Edit] = (),
    n_prompt: int,
) -> tuple[IntArray, Array, Alternatives]:
    """What each layer, and the model, would say after some tokens of a text.

    Returns:
        ids and probabilities of the lens, (n_layer, len(chosen), k), and the alternatives.
    """
    own = edits_on(edits, n_prompt, max(chosen) + 1)
    result = model.run([columns_request(model, tokens, chosen, k, own)])[0]
    ids, probs = read_lens(model, residuals(model, result.captures), k)
    return ids, probs, BestAfter.gathered(result.value)


def followed(
    model: Model,
    tokens: Sequence[int],
    at: int,
    ids: Sequence[int],
    *,
    edits: Sequence[Edit] = (),
    n_prompt: int,
) -> Followed:
    """Some tokens followed through the layers after token `at`: (n_layer, len(ids)) each."""
    residual = Capture([Site("resid_post", i) for i in range(model.n_layer)], [at])
    own = edits_on(edits, n_prompt, at + 1)
    result = model.run([Request(tokens[: at + 1], own, [residual], logits=None)])[0]
    rows = residuals(model, result.captures)[:, 0]
    return follow(model.lens, rows, np.tile(np.array(ids, np.intp), (model.n_layer, 1)))


# -- where heads look, and what made a token -----------------------------------------------


def attention_of(
    model: Model,
    tokens: Sequence[int],
    query: int,
    *,
    edits: Sequence[Edit] = (),
    n_prompt: int,
) -> Array:
    """Where each head of a token looks: (n_layer, n_head, query + 1)."""
    own = edits_on(edits, n_prompt, query + 1)
    request = maps_request(model, tokens[: query + 1], edits=own, queries=[query])
    return maps_of(model, request, model.run([request])[0]).weights[:, :, 0]


def attribution_of(
    model: Model,
    tokens: Sequence[int],
    at: int,
    *,
    edits: Sequence[Edit] = (),
    n_prompt: int,
) -> Attribution | ModelError:
    """The shares of the logit of token `at`, or why they do not add up."""
    own = edits_on(edits, n_prompt, at)
    request = attribution_request(model, tokens[:at], [at - 1], edits=own)
    shares = shares_of(model, request, model.run([request])[0], [[tokens[at]]])[0]
    return shares if isinstance(shares, ModelError) else shares[0]


def blocking_of(
    model: Model,
    tokens: Sequence[int],
    at: int,
    *,
    edits: Sequence[Edit] = (),
    n_prompt: int,
) -> tuple[Floats, float]:
    """How much less probable token `at` becomes if those after a key may not attend to it.

    Returns:
        (at - 1,) nats for keys 0 to at - 2, and the noise of them.
    """
    own = edits_on(edits, n_prompt, at)
    metric = LossAfter([tokens[at]])

    def changed(more: Sequence[Edit]) -> Request:
        return Request(tokens[:at], [*own, *more], metric=metric)

    requests = [changed([]), *(changed([nudged(i)]) for i in range(N_NUDGES))]
    requests += [changed(blocked(model, range(key, at), key)) for key in range(at - 1)]
    losses = np.array([float(r.value[0]) for r in model.run(requests)], np.float64)
    clean, noise, drop = losses[0], losses[1 : N_NUDGES + 1], losses[N_NUDGES + 1 :]
    return drop - clean, float(np.abs(noise - clean).max())


def nudged(seed: int) -> Edit:
    """A change too small to matter."""
    return Edit(Site("resid_pre", 0), nudge(seed))


def blocked(model: Model, queries: Sequence[int], key: int) -> list[Edit]:
    """Queries that may not attend to a key, in all layers and heads."""
    place = Place("attn_scores", tuple(range(model.n_layer)), (key,))
    return BlockKeys(model, queries).edits(place)
