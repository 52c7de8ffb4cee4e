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
and blocks each token's keys. On a quantized file the second differs from the first by rounding, as
any other layout does, so a generated token need not be the most probable one of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, IntArray
from mia.edits import Edit
from mia.errors import ModelError, UsageError
from mia.lenses.followed import follow
from mia.measure.losses import TokenLoss, log_softmax
from mia.measure.noise import nudge
from mia.methods.attention import AttentionMaps, maps_of, maps_request
from mia.methods.attribution import Attribution, attribution_request, shares_of
from mia.methods.explore_reports import Alternatives, Blocking, Branch, Explored, Lens
from mia.methods.explore_words import words_of
from mia.progress import Progress, step
from mia.request import Capture, Request, Result, Sampling
from mia.sites import Site
from mia.sweeps.axes import Place
from mia.sweeps.changes import BlockKeys

if TYPE_CHECKING:
    from mia.model import Model

#: runs with a change too small to matter, which measure the noise
N_NUDGES = 5
#: attention weights of one page, 2 bytes each: more than this and a browser is slow
_MOST_WEIGHTS = 12_000_000
#: tokens after an alternative, beside the alternative itself
_BRANCH = 16


def explore(
    model: Model,
    prompt: str | Sequence[int],
    *,
    n_predict: int = 32,
    k: int = 5,
    branches: int = 3,
    sampling: Sampling | None = None,
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
    _check_length(model, len(ids) + n_predict)
    with step("generating") as bar:
        request = Request(ids, logits=None, n_predict=n_predict, sampling=sampling)
        written = model.run([request], progress=bar)[0].tokens
    if not written:
        raise UsageError(f"{model.name} wrote nothing after this prompt")
    whole = [*ids, *written]
    with step("reading") as bar:
        reading = _Reading(model, whole, bar)
    alternatives = reading.alternatives(k)
    starts = _branch_starts(whole, len(ids), alternatives, branches)
    with step("changing") as bar:
        grown, blocking = _changed(
            model, whole, starts, n_predict=n_predict, n_prompt=len(ids), sampling=sampling, bar=bar
        )
    if isinstance(blocking, str):
        reading.missing["blocking"] = blocking
    lens = reading.lens(k, alternatives)
    named = {*whole, *lens.ids.ravel().tolist(), *alternatives.ids.ravel().tolist()}
    named |= {t for branch in grown for t in branch.tokens}
    return Explored(
        facts=model.facts,
        tokens=model.token_rows(whole),
        n_prompt=len(ids),
        alternatives=alternatives,
        lens=lens,
        attention=reading.attention,
        attribution=reading.attribution(),
        blocking=None if isinstance(blocking, str) else blocking,
        branches=grown,
        missing=reading.missing,
        pieces={t: model.described(t) for t in named},
        words=words_of(
            model,
            whole,
            alternatives,
            n_predict=n_predict,
            k=k,
            branches=branches,
            sampling=sampling,
        ),
    )


def _check_length(model: Model, n: int) -> None:
    """Raises `UsageError` where the attention of so many tokens is too much for a page."""
    heads = model.n_layer * model.n_head
    if heads * n * (n + 1) // 2 <= _MOST_WEIGHTS:
        return
    most = int((2 * _MOST_WEIGHTS / heads) ** 0.5)
    raise UsageError(
        f"{n} tokens with {heads} heads are too many for one page; {model.name} has room for {most}"
    )


class _Reading:
    """What one run of the whole text gave.

    Attributes:
        attention: None where the architecture has no patterns.
        missing: part -> why it is left out.
    """

    def __init__(self, model: Model, tokens: Sequence[int], bar: Progress | None):
        self.model, self.tokens = model, tokens
        self.missing: dict[str, str] = {}
        every = range(len(tokens))
        residual = Capture([Site("resid_post", i) for i in range(model.n_layer)])
        requests = {
            "lens": Request(tokens, captures=[residual], logits="all"),
            "attention": maps_request(model, tokens),
            # of the token before each token, which predicts it
            "attribution": attribution_request(model, tokens, every[:-1]),
        }
        for part in ("attention", "attribution"):
            if (why := _lacking(model, requests[part])) is not None:
                self.missing[part] = why
        chosen = {p: r for p, r in requests.items() if p not in self.missing}
        results = model.run(list(chosen.values()), progress=bar)
        self._results = dict(zip(chosen, results, strict=True))
        self.attention: AttentionMaps | None = None
        if "attention" in chosen:
            self.attention = maps_of(model, chosen["attention"], self._results["attention"])

    def alternatives(self, k: int) -> Alternatives:
        """The best tokens after each token, and where the text's own next one stands."""
        result, n = self._results["lens"], len(self.tokens)
        assert result.logits is not None
        k = min(k, result.logits.shape[1])
        ids, logprobs = np.empty((n, k), np.intp), np.empty((n, k))
        own, ranks = np.full(n, np.nan), np.zeros(n, np.intp)
        for i, logits in enumerate(result.logits):
            all_of_them = log_softmax(logits[None])[0]
            ids[i] = _best(logits, k)
            logprobs[i] = all_of_them[ids[i]]
            if i + 1 < n:
                own[i] = all_of_them[self.tokens[i + 1]]
                ranks[i] = 1 + int((logits > logits[self.tokens[i + 1]]).sum())
        return Alternatives(ids, logprobs, own, ranks)

    def lens(self, k: int, alternatives: Alternatives) -> Lens:
        """What each layer says after each token, and all of it followed through the layers."""
        model, n = self.model, len(self.tokens)
        captures = self._results["lens"].captures
        rows = np.stack([captures[Site("resid_post", i)] for i in range(model.n_layer)])
        read = model.lens.read(rows.reshape(-1, rows.shape[-1]), k)
        ids = read.ids.reshape(model.n_layer, n, -1)
        followed: list[IntArray] = []
        for i in range(n):
            listed = [*self.tokens[i + 1 : i + 2], *alternatives.ids[i].tolist()]
            listed += ids[:, i].ravel().tolist()
            followed.append(np.array(list(dict.fromkeys(listed)), np.intp))
        logprobs, ranks = self._follow(rows, followed)
        probs = read.probs.reshape(ids.shape)
        return Lens(ids, probs, followed, logprobs, ranks)

    def _follow(
        self, rows: Array, followed: Sequence[IntArray]
    ) -> tuple[list[Array], list[IntArray]]:
        """(n_layer, m) for the m tokens that are followed at each token of the text."""
        n_layer, n, _ = rows.shape
        most = max(map(len, followed))
        # one rectangle: the rows' lists are filled up with their first token
        padded = np.stack([np.pad(f, (0, most - len(f)), mode="edge") for f in followed])
        every = follow(
            self.model.lens, rows.reshape(n_layer * n, -1), np.tile(padded, (n_layer, 1))
        )
        logprobs = every.logprobs.reshape(n_layer, n, most)
        ranks = every.ranks.reshape(n_layer, n, most)
        sizes = [len(f) for f in followed]
        return (
            [logprobs[:, i, :m] for i, m in enumerate(sizes)],
            [ranks[:, i, :m] for i, m in enumerate(sizes)],
        )

    def attribution(self) -> list[Attribution | None] | None:
        """The shares of each token's logit, of all but the first; None for one whose parts do not
        add up."""
        if "attribution" in self.missing:
            return None
        answers = [[t] for t in self.tokens[1:]]
        shares = shares_of(self.model, self._results["attribution"], answers)
        errors = [s for s in shares if isinstance(s, ModelError)]
        if len(errors) == len(shares):
            self.missing["attribution"] = str(errors[0])
            return None
        return [None if isinstance(s, ModelError) else s[0] for s in shares]


def _lacking(model: Model, request: Request) -> str | None:
    """Why this model cannot run a request's captures, None if it can."""
    topology = model.unfused_topology
    for capture in request.captures:
        assert isinstance(capture.sites, list)
        for site in capture.sites:
            if site not in topology.sites:
                return _no_site(model, site)
    return None


def _no_site(model: Model, site: Site) -> str:
    why = model.unfused_topology.missing.get(site)
    return f"{model.name} has no site {site}" + (f" ({why})" if why else "")


def _best(logits: Array, k: int) -> IntArray:
    """The k largest, the largest first; of equal ones the smaller index."""
    ids = np.argpartition(-logits, k - 1)[:k]
    return ids[np.lexsort((ids, -logits[ids]))]


# -- changed runs ----------------------------------------------------------------------


def _branch_starts(
    whole: Sequence[int], n_prompt: int, alternatives: Alternatives, branches: int
) -> list[tuple[int, int]]:
    """(index of a generated token, the token that takes its place) of each branch."""
    starts = []
    for t in range(n_prompt, len(whole)):
        others = [i for i in alternatives.ids[t - 1].tolist() if i != whole[t]]
        starts += [(t, other) for other in others[:branches]]
    return starts


def _changed(
    model: Model,
    whole: Sequence[int],
    starts: Sequence[tuple[int, int]],
    *,
    n_predict: int,
    n_prompt: int,
    sampling: Sampling,
    bar: Progress | None,
) -> tuple[list[Branch], Blocking | str]:
    """The continuations of alternatives, and the text with each token's keys blocked: one run."""
    requests = []
    for t, other in starts:
        n = min(n_prompt + n_predict - t - 1, _BRANCH)
        request = Request([*whole[:t], other], logits=None, n_predict=n, logprobs=True)
        requests.append(replace(request, sampling=sampling))
    blocks: list[Request] | str = _blocks(model, whole)
    if isinstance(blocks, str):
        results = model.run(requests, progress=bar) if requests else []
        return _branches(starts, results), blocks
    results = model.run([*requests, *blocks], progress=bar)
    return _branches(starts, results), _blocking(whole, results[len(requests) :])


def _branches(starts: Sequence[tuple[int, int]], results: Sequence[Result]) -> list[Branch]:
    return [
        Branch(t, other, r.tokens, r.logprobs)
        for (t, other), r in zip(starts, results, strict=False)
    ]


def _blocks(model: Model, whole: Sequence[int]) -> list[Request] | str:
    """The text unchanged, with nudges, and with each token but the last two hidden from those
    after it; or why that cannot be run."""
    n = len(whole)
    every = tuple(range(model.n_layer))
    for site in (Site("resid_pre", 0), *(Site("attn_scores", i) for i in every)):
        if site not in model.unfused_topology.sites:
            return _no_site(model, site)
    read, base = range(n - 1), Request(whole[:-1], metric=TokenLoss(whole[1:]), logits=range(n - 1))
    requests = [base]
    for seed in range(N_NUDGES):
        requests.append(replace(base, edits=[Edit(Site("resid_pre", 0), nudge(seed))]))
    for key in range(n - 2):
        edits = BlockKeys(model, read[key:]).edits(Place("attn_scores", every, (key,)))
        # what stands before the key's first query is unchanged
        requests.append(
            Request(whole[:-1], edits, logits=read[key + 1 :], metric=TokenLoss(whole[key + 2 :]))
        )
    return requests


def _blocking(whole: Sequence[int], results: Sequence[Result]) -> Blocking:
    losses = [np.asarray(r.value, np.float64) for r in results]
    clean, nudged, blocked = losses[0], losses[1 : N_NUDGES + 1], losses[N_NUDGES + 1 :]
    n = len(whole)
    drop = np.full((n, n), np.nan)
    for key, loss in enumerate(blocked):
        drop[key + 2 :, key] = loss - clean[key + 1 :]
    floor = np.full(n, np.nan)
    floor[1:] = np.abs(np.stack(nudged) - clean).max(0)
    return Blocking(drop, floor)
