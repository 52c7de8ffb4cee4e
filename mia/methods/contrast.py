"""Directions from contrast pairs: activations, then one vector per layer.

Sources: mean difference, Marks & Tegmark 2023 (arXiv 2310.06824) and Rimsky et al. 2023
(2312.06681, eq. 1); principal component of the differences, Zou et al. 2023
(2310.01405, section 3.1); weights of a logistic regression, as the steering-vectors
library has them. "Paper" below is Rimsky's.

| paper                | here                                                          |
|----------------------|---------------------------------------------------------------|
| prompt p, c_p, c_n   | `ContrastPair.positive`, `.negative`: the whole texts         |
| a_L(p, c_p)          | `PairActivations.positive[L]`, one row per pair               |
| v_MD                 | `mean(positive, negative)`                                    |

Where we deviate: principal components are of the differences and their negatives,
not centred (as steering-vectors; repeng centres), and their sign is fixed.
Layer i is the site's row in block i, all layers in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mia.arrays import Array, norms
from mia.datasets.pairs import ContrastPair, load_pairs, select_pairs
from mia.datasets.selection import Selection
from mia.edits import resolve_tokens
from mia.errors import RangeError, UsageError
from mia.methods.patching import today
from mia.notices import MissingBos, notice
from mia.plugins import load_function
from mia.progress import step
from mia.ranges import Ranges, parse_layers
from mia.request import Capture, Request
from mia.sites import BY_KEY, LAYERED, Site, split_spelling
from mia.vectors import Vector
from mia.vectors.report import VectorReport

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

#: (n, width) positive, (n, width) negative -> (width,)
Aggregator = Callable[[Array, Array], Array]

#: what is read of a pair by layer type, in the order of the steering-vectors library
SITES = ("resid_post", "attn_out", "mlp_out", "attn_norm", "mlp_norm")


# -- which tokens of a text are read --------------------------------------------------------------


def read_positions(model: Model, tokens: Sequence[int], read: str) -> list[int]:
    """The tokens of a text whose activations are averaged.

    Args:
        read: `last`, an index (`-2`), `before:MARKER` (the token before the marker's last
            occurrence), `mean` (all but a BOS), or `mean:FROM..TO`, both ends included.

    Raises:
        UsageError: none of these, or a marker that is not in the text.
        RangeError: an index that the text does not have.
    """
    check_read(read)
    n = len(tokens)
    kind, _, rest = read.partition(":")
    if read == "last":
        return [n - 1]
    if kind == "before" and rest:
        return [_before(model, tokens, rest)]
    if read == "mean":
        first = int(n > 1 and tokens[0] == model.bos_token)
        return list(range(first, n))
    if kind == "mean":
        first, last = (int(x) for x in rest.split("..", 1))
        a, b = resolve_tokens([first, last], n)
        if b < a:
            raise RangeError(f"read {read!r}: the range runs backwards in a text of {n} tokens")
        return list(range(a, b + 1))
    return resolve_tokens(int(read), n)


def check_read(read: str) -> None:
    """Raises `UsageError` if `read_positions` does not know this."""
    kind, _, rest = read.partition(":")
    if read in ("last", "mean") or (kind == "before" and rest):
        return
    try:
        if kind == "mean":
            _first, _last = (int(x) for x in rest.split("..", 1))
        else:
            int(read)
    except ValueError:
        raise UsageError(
            f"read {read!r} is not known; known: last, an index like -2, before:MARKER, mean, mean:3..7"
        ) from None


def _before(model: Model, tokens: Sequence[int], marker: str) -> int:
    """The last token that ends at or before the marker begins."""
    text = model.detokenize(tokens)
    start = text.rfind(marker)
    if start < 0:
        raise UsageError(f"the marker {marker!r} is not in {text!r}")
    for i in range(len(tokens), 0, -1):
        if len(model.detokenize(tokens[:i])) <= start:
            return i - 1
    raise UsageError(f"there is no token before the marker {marker!r} in {text!r}")


# -- activations -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PairActivations:
    """What the model has at a site for both texts of each pair.

    Attributes:
        positive, negative: layer -> (n_pairs, width) float32.
        site: one of `SITES`, or another of width (width,).
        metadata: provenance.
    """

    positive: dict[int, Array]
    negative: dict[int, Array]
    site: str = "resid_post"
    metadata: dict[str, str] = field(default_factory=dict)


def extract(
    model: Model,
    pairs: Sequence[ContrastPair | tuple[str, str]] | str | Path,
    *,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    read: str = "last",
    bos: bool | None = None,
    progress: Progress | None = None,
) -> PairActivations:
    """Reads a site at all layers for each text of each pair, in one call of the model.

    Args:
        read: see `read_positions`; a pair's own index comes before it.

    Raises:
        UsageError: no pairs, a site without layers, or a text without tokens.
    """
    pairs = load_pairs(pairs) if isinstance(pairs, (str, Path)) else pairs
    if not len(pairs):
        raise UsageError("there are no pairs to learn from")
    contrasts = [p if isinstance(p, ContrastPair) else ContrastPair(*p) for p in pairs]
    chosen = list(range(model.n_layer)) if layers is None else list(layers)
    sites = [Site(site, i) for i in chosen]
    requests = []
    contexts = []  # of each text the tokens up to the last one read, and which are read
    for pair in contrasts:
        for text, own in ((pair.positive, pair.read_positive), (pair.negative, pair.read_negative)):
            tokens = model.tokenize(text, bos=bos)
            if not tokens:
                raise UsageError(f"the text {text!r} has no tokens")
            positions = read_positions(model, tokens, read if own is None else str(own))
            requests.append(
                Request(tokens, captures=[Capture(sites, tokens=positions)], logits=None)
            )
            contexts.append((tokens[: max(positions) + 1], positions))
    results = model.run(requests, progress=progress)
    for k in range(0, len(contexts), 2):
        # else rounding, above all on a GPU, would look like a difference
        if contexts[k] == contexts[k + 1]:
            results[k + 1] = results[k]

    def rows(first: int, s: Site) -> Array:
        return np.stack([r.captures[s].mean(0) for r in results[first::2]])  # (n_pairs, width)

    facts = model.file_metadata(
        site=site,
        read=read,
        n_pairs=str(len(contrasts)),
        bos=model.wants_bos(bos),
    )
    return PairActivations(
        {s.layer: rows(0, s) for s in sites if s.layer is not None},
        {s.layer: rows(1, s) for s in sites if s.layer is not None},
        site,
        facts,
    )


# -- aggregators -------------------------------------------------------------------------


def mean(positive: Array, negative: Array) -> Array:
    """The mean of the differences."""
    return (positive - negative).mean(0)


def pca(positive: Array, negative: Array) -> Array:
    """The first principal component of the differences and their negatives, of length 1, its
    sign such that positives project higher on average."""
    deltas = (positive - negative).astype(np.float64)  # (n, width)
    v = np.linalg.svd(deltas, full_matrices=False)[2][0]
    return (v if (deltas @ v).mean() >= 0 else -v).astype(np.float32)


def logistic(positive: Array, negative: Array) -> Array:
    """The weights, at length 1, of a logistic regression without intercept that tells
    positives from negatives when each pair is centred on its own mean. Needs scikit-learn."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as err:
        raise UsageError(
            "the aggregator logistic needs scikit-learn: pip install 'mia[probes]'"
        ) from err
    half = (positive - negative) / 2  # (n, width): a positive minus the middle of its pair
    labels = np.repeat([1, -1], len(half))
    fit = LogisticRegression(fit_intercept=False, max_iter=1000)
    w = fit.fit(np.concatenate([half, -half]), labels).coef_[0]
    return (w / norms(w)).astype(np.float32)


AGGREGATORS: dict[str, Aggregator] = {"mean": mean, "pca": pca, "logistic": logistic}


def aggregator(name: str | Aggregator) -> Aggregator:
    """An aggregator by name, or a user's `module:function`. Raises `UsageError`."""
    if not isinstance(name, str):
        return name
    if name in AGGREGATORS:
        return AGGREGATORS[name]
    if ":" in name:
        return load_function(name)
    raise UsageError(
        f"unknown aggregator {name!r}; known: {', '.join(AGGREGATORS)}, or module:function"
    )


def aggregate(activations: PairActivations, method: str | Aggregator = "mean") -> Vector:
    """One direction per layer; zero at a layer at which nothing differs, like `attn_norm.0` of
    texts that end in the same token.

    Raises:
        UsageError: an unknown aggregator; unequal numbers of positives and negatives; texts
            that differ at no layer; a user's function that makes something else of (n, width)
            than (width,).
    """
    f = aggregator(method)
    builtin = f in AGGREGATORS.values()  # a user's function may do without differences
    label = method if isinstance(method, str) else getattr(method, "__name__", "a function")
    directions = {}
    any_differs = False
    for layer, positive in activations.positive.items():
        negative = activations.negative[layer]
        if len(positive) != len(negative):
            raise UsageError(
                f"activations must be pairs, got {len(positive)} positive and {len(negative)} negative"
            )
        differs = _differs(positive, negative)
        any_differs |= differs
        if builtin and not differs:
            directions[layer] = np.zeros(positive.shape[1:], np.float32)
            continue
        v = np.asarray(f(positive, negative), np.float32)
        if v.shape != positive.shape[1:]:
            raise UsageError(f"{label} made {v.shape} of pairs of {positive.shape}")
        directions[layer] = v
    if builtin and directions and not any_differs:
        read = activations.metadata.get("read", "last")
        raise UsageError(f"the texts do not differ at the token read ({read}); read another one")
    return Vector(directions, activations.site, {**activations.metadata, "aggregator": label})


def _differs(positive: Array, negative: Array) -> bool:
    """Whether any difference is more than rounding, which depends on the batch that a token is in."""
    scale = float(np.abs(positive).max(initial=0))
    # what is not a number counts, so that the vector made of it is refused
    return not float(np.abs(positive - negative).max(initial=0)) <= 1e-6 * scale


def train(
    model: Model,
    pairs: Sequence[ContrastPair | tuple[str, str]] | str | Path,
    *,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    read: str = "last",
    method: str | Aggregator = "mean",
    bos: bool | None = None,
    progress: Progress | None = None,
) -> Vector:
    """`extract`, then `aggregate`."""
    f = aggregator(method)
    activations = extract(
        model, pairs, site=site, layers=layers, read=read, bos=bos, progress=progress
    )
    vector = aggregate(activations, f)
    label = method if isinstance(method, str) else vector.metadata["aggregator"]
    return Vector(vector.directions, vector.site, {**vector.metadata, "aggregator": label})


# -- the experiment ------------------------------------------------------------------------


def learn(
    model: Model,
    pairs: Selection[ContrastPair] | str | Path,
    *,
    site: str = "resid_post",
    layers: Ranges | None = None,
    read: str = "last",
    method: str | Aggregator = "mean",
    bos: bool | None = None,
    name: str = "vector",
) -> VectorReport:
    """`train` on pairs of a file, with provenance; `VectorReport.write` saves the vector.

    Args:
        pairs: a shipped set by name, a file, or `mia.datasets.pairs.select_pairs("sentiment")`.
        site, layers: in any spelling; layers by the site (`l_out-10..16`) or by `layers`, all by
            default.
        name: what arithmetic calls the vector.

    Raises:
        UsageError: a site that has no vectors, or layers given twice.
    """
    pairs = pairs if isinstance(pairs, Selection) else select_pairs(pairs)
    kind, site_layers = split_spelling(today(site).strip())
    if kind not in LAYERED or kind in BY_KEY:
        raise UsageError(
            f"site {site!r}: a vector belongs to a site with layers and one row per token"
        )
    if site_layers is not None and layers is not None:
        raise UsageError(f"site {site!r} already names layers; leave out the argument layers")
    text, what = (layers, "layers") if site_layers is None else (site_layers, f"site {site!r}:")
    chosen = None if text is None else parse_layers(text, model.n_layer, what)
    if not model.wants_bos(bos) and model.bos_token >= 0:
        notice(
            "texts are read without a BOS, where models treat the first token as an "
            "attention sink; put "
            f"{model.piece(model.bos_token)} in front",
            MissingBos,
        )
    with step("reading") as bar:
        vector = train(
            model,
            pairs.items,
            site=kind,
            layers=chosen,
            read=read,
            method=method,
            bos=bos,
            progress=bar,
        )
    return VectorReport(vector.with_metadata(name=name, **pairs.metadata()), model.facts)
