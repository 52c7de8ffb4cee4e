"""Directions from contrast pairs: activations, then one vector per layer.

Sources: mean difference, Marks & Tegmark 2023 (arXiv 2310.06824) and Rimsky et al. 2023
(2312.06681, eq. 1); principal component of the differences, Zou et al. 2023
(2310.01405, section 3.1); weights of a logistic regression, as the steering-vectors
library has them. "Paper" below is Rimsky's.

| paper                | here                                                          |
|----------------------|---------------------------------------------------------------|
| prompt p, c_p, c_n   | `Pair.positive`, `Pair.negative`: the whole texts             |
| a_L(p, c_p)          | `PairActivations.positive[L]`, one row per pair                   |
| v_MD                 | `mean(positive, negative)`                                    |

Where we deviate: principal components are of the differences and their negatives,
not centred (as steering-vectors; repeng centres), and their sign is fixed.
Layer i is the site's row in block i, all layers in one pass.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.datasets.shipped import find_text, read_lines, read_rows, read_text
from mia.edits import resolve_tokens
from mia.errors import FileError, MiaError, RangeError, UsageError
from mia.io.provenance import file_metadata
from mia.plugins import load_function
from mia.request import Capture, Request
from mia.sites import Site
from mia.vectors import Vector

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Array = npt.NDArray[np.float32]
#: (n, width) positive, (n, width) negative -> (width,)
Aggregator = Callable[[Array, Array], Array]

#: what is read of a pair by layer type, in the order of the steering-vectors library
SITES = ("resid_post", "attn_out", "mlp_out", "attn_norm", "mlp_norm")


# -- pairs ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that differ in what the direction shall mean.

    `read_positive`, `read_negative`: token indices where they differ from `read`'s.
    """

    positive: str
    negative: str
    read_positive: int | None = None
    read_negative: int | None = None


def load_pairs(*paths: str | Path) -> list[Pair]:
    """Pairs from a JSONL or CSV file or JSON array with `positive` and `negative`, from two text
    files, a line for each text, or of a shipped set by name (`sentiment`, `french`, `weddings`).

    Raises:
        FileError: a file that cannot be read, is empty, or lacks a field.
        UsageError: two files with unequal numbers of lines, or a line blank in one only.
    """
    if len(paths) == 2:
        return _line_pairs(*paths)
    if len(paths) != 1:
        raise UsageError(f"{len(paths)} files are given; pairs come from one file, or from two")
    path = find_text(paths[0])
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else read_rows(path)
    pairs = [_pair(row, f"{path}, {where}") for where, row in rows]
    if not pairs:
        raise FileError(f"{path} is empty; pairs have a positive and a negative text")
    return pairs


def _line_pairs(positive: str | Path, negative: str | Path) -> list[Pair]:
    """Line n of one file with line n of the other; where both are blank there is no pair."""
    ours, theirs = read_lines(positive), read_lines(negative)
    # a blank line that is dropped from one file alone would pair all later texts wrongly
    for n in sorted(ours.keys() ^ theirs.keys()):
        if n <= min(max(ours), max(theirs)):
            blank, other = (negative, positive) if n in ours else (positive, negative)
            raise UsageError(f"{blank}, line {n} is blank, and that of {other} is not")
    if ours.keys() != theirs.keys():
        raise UsageError(
            f"{positive} has {len(ours)} texts and {negative} has {len(theirs)}; "
            "pairs need as many of each"
        )
    return [Pair(text, theirs[n]) for n, text in ours.items()]


def _csv_rows(path: Path) -> list[tuple[str, Any]]:
    rows = []
    try:
        for n, row in enumerate(csv.DictReader(io.StringIO(read_text(path))), 1):
            if None in row:  # where the reader keeps what has no header
                raise FileError(f"{path}, row {n} has more fields than the header; quote commas")
            rows.append((f"row {n}", row))
    except csv.Error as err:
        raise FileError(f"{path} is not CSV that can be read: {err}") from err
    return rows


def _pair(row: Any, where: str) -> Pair:
    texts = []
    for key in ("positive", "negative"):
        text = row.get(key) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text:
            raise FileError(f"{where}: there is no text {key!r}")
        texts.append(text)
    reads = []
    for key in ("read_positive", "read_negative"):
        value = row.get(key)
        try:
            reads.append(None if value in (None, "") else int(value))
        except (TypeError, ValueError):
            raise FileError(f"{where}: {key} is {value!r}, not a token index") from None
    return Pair(texts[0], texts[1], *reads)


# -- where a text is read --------------------------------------------------------------


def read_positions(model: Model, tokens: Sequence[int], read: str) -> list[int]:
    """The tokens of a text whose activations are averaged.

    Args:
        read: `last`, an index (`-2`), `before:MARKER` (the token before the marker's last
            occurrence), `mean` (all but a BOS), or `mean:FROM..TO`, both ends included.

    Raises:
        UsageError: none of these, or a marker that is not in the text.
        RangeError: an index that the text does not have.
    """
    n = len(tokens)
    kind, _, rest = read.partition(":")
    if read == "last":
        return [n - 1]
    if kind == "before" and rest:
        return [_before(model, tokens, rest)]
    if read == "mean":
        first = int(n > 1 and tokens[0] == model.bos_token)
        return list(range(first, n))
    try:
        if kind == "mean":
            first, last = (int(x) for x in rest.split("..", 1))
            a, b = resolve_tokens([first, last], n)
            if b < a:
                raise RangeError(f"read {read!r}: the range runs backwards in a text of {n} tokens")
            return list(range(a, b + 1))
        return resolve_tokens(int(read), n)
    except MiaError:
        raise
    except ValueError:
        raise UsageError(
            f"read {read!r} is not known; known: last, an index like -2, before:MARKER, mean, mean:3..7"
        ) from None


def _before(model: Model, tokens: Sequence[int], marker: str) -> int:
    """The last token that ends at or before the marker begins."""
    text = model.detokenize(tokens)
    at = text.rfind(marker)
    if at < 0:
        raise UsageError(f"the marker {marker!r} is not in {text!r}")
    for i in range(len(tokens), 0, -1):
        if len(model.detokenize(tokens[:i])) <= at:
            return i - 1
    raise UsageError(f"no token stands before the marker {marker!r} in {text!r}")


# -- activations -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PairActivations:
    """What the model has at a site for both texts of each pair.

    Attributes:
        positive, negative: layer -> (n_pairs, width) float32.
        site: one of `SITES`, or another of width (width,).
        metadata: where they came from.
    """

    positive: dict[int, Array]
    negative: dict[int, Array]
    site: str = "resid_post"
    metadata: dict[str, str] = field(default_factory=dict)


def extract(
    model: Model,
    pairs: Sequence[Pair | tuple[str, str]],
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
    if not len(pairs):
        raise UsageError("there are no pairs to learn from")
    ready = [p if isinstance(p, Pair) else Pair(*p) for p in pairs]
    chosen = list(range(model.n_layer)) if layers is None else list(layers)
    sites = [Site(site, i) for i in chosen]
    requests = []
    seen = []  # what the model has read of each text by then
    for pair in ready:
        for text, own in ((pair.positive, pair.read_positive), (pair.negative, pair.read_negative)):
            tokens = model.tokenize(text, bos=bos)
            if not tokens:
                raise UsageError(f"the text {text!r} has no tokens")
            at = read_positions(model, tokens, read if own is None else str(own))
            requests.append(Request(tokens, captures=[Capture(sites, tokens=at)], logits=None))
            seen.append((tokens[: max(at) + 1], at))
    results = model.run(requests, progress=progress)
    for k in range(0, len(seen), 2):
        if seen[k] == seen[k + 1]:  # or rounding, on a GPU above all, would look like a difference
            results[k + 1] = results[k]

    def rows(first: int, s: Site) -> Array:
        return np.stack([r.captures[s].mean(0) for r in results[first::2]])  # (n_pairs, width)

    facts = file_metadata(
        model,
        site=site,
        read=read,
        n_pairs=str(len(ready)),
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
    return (w / np.linalg.norm(w)).astype(np.float32)


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
    """One direction per layer; zero at a layer where nothing differs yet, as at `attn_norm.0`
    of texts that end in the same token.

    Raises:
        UsageError: an unknown aggregator; unequal numbers of positives and negatives; texts
            that differ at no layer; a user's function that makes something else of (n, width)
            than (width,).
    """
    f = aggregator(method)
    ours = f in AGGREGATORS.values()  # a user's function may do without differences
    label = method if isinstance(method, str) else getattr(method, "__name__", "a function")
    directions = {}
    some_differ = False
    for layer, positive in activations.positive.items():
        negative = activations.negative[layer]
        if len(positive) != len(negative):
            raise UsageError(
                f"{len(positive)} positive and {len(negative)} negative activations are no pairs"
            )
        differs = _differs(positive, negative)
        some_differ |= differs
        if ours and not differs:
            directions[layer] = np.zeros(positive.shape[1:], np.float32)
            continue
        v = np.asarray(f(positive, negative), np.float32)
        if v.shape != positive.shape[1:]:
            raise UsageError(f"{label} made {v.shape} of pairs of {positive.shape}")
        directions[layer] = v
    if ours and directions and not some_differ:
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
    pairs: Sequence[Pair | tuple[str, str]],
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
    found = extract(model, pairs, site=site, layers=layers, read=read, bos=bos, progress=progress)
    vector = aggregate(found, f)
    label = method if isinstance(method, str) else vector.metadata["aggregator"]
    return Vector(vector.directions, vector.site, {**vector.metadata, "aggregator": label})
