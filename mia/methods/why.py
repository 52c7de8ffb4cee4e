"""Why this answer: which spans of a prompt and which components of the model made it.

Sources: attention knockout, Geva et al. 2023 (arXiv 2304.14767), sec. 4; causal tracing, Meng et al.
2022 (2202.05262), sec. 2.1; direct logit attribution, Wang et al. 2022 (2211.00593), sec. 3; the logit
lens, nostalgebraist 2020. Removing parts of a context and seeing what the answer loses: Cohen-Wang et
al. 2024, "ContextCite" (2409.00729).

| in the papers                        | here                                                     |
|--------------------------------------|----------------------------------------------------------|
| M[r, c] = -inf for all r behind c    | `SpanEffect.blocked`: nobody behind a span attends to it |
| the context without all other parts  | `SpanEffect.alone`: a prompt of this span and the asking |
| corrupted run, restoring h_i^l       | `CausalMap`: noise on the best span's embeddings         |
| direct logit attribution             | `Component.share`                                        |

A span's `score` is the mean of two numbers in nats: what the answer loses if the span is blocked in the
whole prompt, and what it gains if the span is all that the prompt has besides what asks. The first
misses a reason that stands there twice; the second misses one that needs another span. If all spans
were players of a game, these are the last and the first term of the span's Shapley value.

An attention sink (mostly the BOS) is apart: without it all tokens attend otherwise, which says
nothing about the answer. So is the span that asks, the last: nothing stands behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.losses import AnswerLogProb
from mia.measure.noise import nudge
from mia.measure.prompts import SINK, check_answer
from mia.methods.knockout import Block, block_edits
from mia.methods.why_findings import Apart, Measured, Prompted, SpanEffect
from mia.methods.why_parts import causal_map, components, lens_at_end
from mia.methods.why_reports import Why
from mia.progress import step
from mia.request import Capture, Request
from mia.sites import Site
from mia.spans import Span, spans_of
from mia.values import wholes

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

#: changes too small to matter, which measure the noise floor
NULL = 6
#: the longest answer that is read off what the model says
_LONGEST = 8


def why(
    model: Model,
    prompt: str | Sequence[int],
    *,
    answer: str | Sequence[int] = "",
    spans: str = "auto",
    parts: bool = True,
    null: int = NULL,
    k: int = 5,
    seed: int = 0,
) -> Why:
    """Which spans of a prompt, and which parts of the model, made it give an answer.

    Args:
        prompt: a text or token ids.
        answer: a text or token ids; by default the first word that the model says, greedily.
        spans: how the prompt is cut (`mia.spans`).
        parts: also the causal map, the heads and MLPs, and the lens; else the spans alone.
        null: how many changes by 1e-5 measure the noise floor.
        k: how many heads and MLPs are listed.
        seed: of the noise.

    Raises:
        UsageError: an unknown way to cut, or the prompt is one span: nothing to compare.
        RangeError: no such token.
    """
    ids = model.ids(prompt)
    how, cut = spans_of(model, ids, spans)
    said, sinks = _first_look(model, ids, greedy=not len(answer))
    answered = said
    if isinstance(answer, str) and answer:
        answered = model.continuation(model.piece(ids[-1]), answer)
        check_answer(model, ids, answer)
    elif len(answer):
        answered = wholes(answer, "an answer that is no text")
    if not answered:
        raise UsageError("the model says nothing after this prompt: give an answer")
    asked = _prompted(ids, answered, cut, sinks, how)
    with step("blocking spans") as bar:
        measured = span_effects(model, asked, null=null, progress=bar)
    found = Why(
        facts=model.facts,
        tokens=model.token_rows(ids),
        answer=model.token_rows(answered),
        said=not len(answer),
        how=how,
        spans=measured.spans,
        asking=asked.asking,
        apart=measured.apart,
        clean=measured.clean,
        bare=measured.bare,
        floor=measured.floor,
        n_null=null,
        token_forwards=measured.token_forwards,
    )
    if not parts:
        return found
    top = found.ranked[0]
    return replace(
        found,
        map=causal_map(model, asked, top.span, labels=[t.label for t in found.tokens], seed=seed),
        components=components(model, asked, asked.spans, k=k),
        lens=lens_at_end(model, asked),
    )


def _first_look(
    model: Model, ids: Sequence[int], *, greedy: bool
) -> tuple[list[int], frozenset[int]]:
    """The first word that the model says, and the prompt's attention sinks: the BOS, and tokens
    whose residual in the middle layer is 10 times as long as the median."""
    site = Site("resid_post", model.n_layer // 2)
    here = site in model.topology.sites
    request = Request(
        ids,
        captures=[Capture(site)] if here else [],
        logits=None,
        n_predict=_LONGEST if greedy else 0,
    )
    result = model.run([request])[0]
    sinks = {0} if model.has_bos(ids) else set()
    if here:
        length = np.linalg.norm(result.captures[site].astype(np.float64), axis=1)
        sinks |= set(np.flatnonzero(length > SINK * np.median(length)).tolist())
    return first_word(model, result.tokens), frozenset(sinks)


def first_word(model: Model, tokens: Sequence[int]) -> list[int]:
    """The tokens of the first word: up to what is no letter or digit. Punctuation, a line end or the
    end of the text are words of one token."""
    for n in range(1, len(tokens)):
        word = b"".join(model.token_bytes(t) for t in tokens[:n])
        try:
            last = word.decode().strip()[-1:]
        except UnicodeDecodeError:  # half a character
            continue
        new = model.piece(tokens[n])
        inside = new[:1].isalnum() or (new[:1] in "'’-" and new[1:2].isalnum())
        if last and not (last.isalnum() and inside):
            return list(tokens[:n])
    return list(tokens)


def _prompted(
    ids: Sequence[int], answer: Sequence[int], cut: Sequence[Span], sinks: frozenset[int], how: str
) -> Prompted:
    """Raises `UsageError` where there is nothing to compare."""
    last = cut[-1]
    if last.end < len(ids):  # ranges: what stands behind the last
        spans, asking = list(cut), range(last.end, len(ids))
    else:
        spans, asking = list(cut[:-1]), last.positions
    spans = [s for s in spans if any(i not in sinks for i in s.positions)]
    if not spans:
        what = f"run of {how} tokens" if how.isdigit() else how.removesuffix("s")
        raise UsageError(
            f"the prompt is one {what}, which asks: there is no other span that could be the reason; "
            "cut it into smaller ones"
        )
    return Prompted(list(ids), list(answer), spans, asking, sinks)


def span_effects(
    model: Model, asked: Prompted, *, null: int = NULL, progress: Progress | None = None
) -> Measured:
    """Every span blocked, and alone, in one run."""
    whole, n = asked.whole, len(asked.whole)
    metric = AnswerLogProb(asked.answer)

    def measured(tokens: Sequence[int], edits: Sequence[Edit] = ()) -> Request:
        positions = range(len(tokens) - len(asked.answer), len(tokens))
        return Request(tokens, edits, logits=positions, metric=metric)

    def behind(span: Span) -> range:
        return range(span.end, n)

    kept = [asked.without_sinks(s) for s in asked.spans]
    blocks = [
        block_edits(model, Block(list(behind(s)), keys))
        for s, keys in zip(asked.spans, kept, strict=True)
    ]
    sinks = sorted(asked.sinks)
    sinks = [s for s in sinks if s + 1 < n]
    site = Site("resid_pre", 0)
    if site not in model.topology.sites:
        site = Site("embed")
    chosen = [asked.spans[i * len(asked.spans) // null] for i in range(null)]
    requests = [measured(whole)]
    requests += [measured(whole, edits) for edits in blocks]
    requests += [measured(asked.only(keys)) for keys in kept]
    requests.append(measured(asked.only([])))
    requests += [
        measured(whole, block_edits(model, Block(list(range(s + 1, n)), [s]))) for s in sinks
    ]
    requests += [
        measured(whole, [Edit(site, nudge(i), tokens=list(behind(s)))])
        for i, s in enumerate(chosen)
    ]
    values = [float(r.value) for r in model.run(requests, progress=progress)]
    m = len(asked.spans)
    clean, bare = values[0], values[1 + 2 * m]
    effects = [
        SpanEffect(s, blocked=values[1 + i] - clean, alone=values[1 + m + i] - bare)
        for i, s in enumerate(asked.spans)
    ]
    rest = values[2 + 2 * m :]
    apart = [Apart(s, rest[i] - clean) for i, s in enumerate(sinks)]
    nulls = rest[len(sinks) :]
    floor = max((abs(v - clean) for v in nulls), default=float("nan"))
    plain = [whole, *(asked.only(keys) for keys in (*kept, []))]
    rows = len(
        {tuple(t[:i]) for t in plain for i in range(1, len(t) + 1)}
    )  # shared beginnings once
    rows += sum(n - s.end for s in (*asked.spans, *chosen)) + sum(n - 1 - s for s in sinks)
    return Measured(effects, apart, clean, bare, floor, rows)
