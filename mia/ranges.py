"""Layers, tokens, items, heads, experts and numbers, as a person writes them: one grammar everywhere.

| text            | means                                                       |
|-----------------|-------------------------------------------------------------|
| `3`, `-1`       | number 3; the last                                          |
| `3..7`          | 3 to 7, both ends included; `3-7` and `3:7` are the same    |
| `3..`, `..7`    | 3 and all after it; all up to 7                             |
| `1,4,7..9`      | a list of these                                             |
| `*`, `all`      | all of them                                                 |
| `3.5`, `7.*`    | head 5 of layer 3; every head of layer 7                    |
| `3..7.0..4`     | heads 0 to 4 of layers 3 to 7; experts are written as heads |

In Python a number, numbers and `Head`s do as well: `3`, `[1, 4, 7]`, `[Head(3, 5)]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mia.errors import RangeError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Head(NamedTuple):
    """One attention head; `str(Head(3, 5))` is "3.5"."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"

    def document(self, **values: Any) -> dict[str, Any]:
        """A head as JSON has it, with values that belong to it."""
        return {"layer": self.layer, "head": self.head, **values}


class Expert(NamedTuple):
    """One expert of a mixture; `str(Expert(3, 5))` is "3.5"."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}"


#: layers, tokens or items: a text in the grammar above, a number, or several numbers
Ranges = str | int | Sequence[int]
#: heads: a text in the grammar above, one head, or several of either
Heads = str | Head | Sequence[Head | str]
#: experts: a text in the grammar above, one expert, or several of either
Experts = str | Expert | Sequence[Expert | str]


def as_text(given: Ranges) -> str:
    """Numbers in the grammar above; a text as it is."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return str(given)
    return ",".join(map(str, given))


def _heads_as_text(given: Heads | Experts) -> str:
    if isinstance(given, (str, Head, Expert)) or not isinstance(given, Iterable):
        return str(given)
    # (3, 5) is as good as Head(3, 5)
    return ",".join(
        str(Head(*h)) if isinstance(h, tuple) and len(h) == 2 else str(h) for h in given
    )


# -- indices ---------------------------------------------------------------------------


def indices(given: Ranges, n: int, what: str = "", *, kind: str = "index") -> list[int]:
    """Indices from 0 to n - 1 in the order written, repeated where the text repeats them.

    Args:
        what: what they were given for, to begin an error message with.
        kind: the word for one of them: "layer", "token index", "item".

    Raises:
        RangeError: not the grammar above, or out of range; the message names the valid range.
    """
    text = as_text(given)
    return indices_in(text, n, f"{what} {text!r}".strip(), kind)


def indices_in(text: str, n: int, where: str, kind: str) -> list[int]:
    """`indices`, with the whole beginning of an error message."""
    out: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        if part in ("*", "all"):
            out.extend(range(n))
            continue
        m = re.fullmatch(r"(-?\d+)?(\.\.|-|:)?(-?\d+)?", part)
        if m is None or (m[1] is None and m[3] is None) or (m[2] is None and m[3] is not None):
            raise RangeError(
                f"{where}: {part!r} is not {_a(kind)}, a range like 3..7 or a list like 1,4"
            )
        if m[2] in ("-", ":") and (m[1] is None or m[3] is None):
            raise RangeError(f"{where}: {part!r} is half a range; write 3.. or ..7")
        first = 0 if m[1] is None else index_in(int(m[1]), n, where, kind)
        if m[2] is None:
            last = first
        else:
            last = n - 1 if m[3] is None else index_in(int(m[3]), n, where, kind)
        if last < first:
            raise RangeError(f"{where}: the range {part} runs backwards")
        out.extend(range(first, last + 1))
    return out


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def index_in(i: int, n: int, where: str, kind: str) -> int:
    """An index from 0 to n - 1; negative ones count from the end. Raises `RangeError`."""
    if not -n <= i < n:
        raise RangeError(f"{where}: {kind} {i} is out of range; there are 0 to {n - 1}")
    return i % n


def parse_layers(given: Ranges, n_layer: int, what: str = "layers") -> list[int]:
    """Layers, each once, in the order written. Raises `RangeError`."""
    return list(dict.fromkeys(indices(given, n_layer, what, kind="layer")))


def parse_tokens(given: Ranges, n_tokens: int, what: str = "tokens") -> list[int]:
    """Token indices of a prompt. Raises `RangeError`."""
    return indices(given, n_tokens, what, kind="token index")


def parse_token(given: Ranges, n_tokens: int, what: str = "token") -> int:
    """One token index of a prompt. Raises `RangeError`, or `UsageError` where it is several."""
    tokens = parse_tokens(given, n_tokens, what)
    if len(tokens) != 1:
        raise UsageError(f"{what} {as_text(given)!r} is {len(tokens)} tokens, not one")
    return tokens[0]


def parse_items(given: Ranges | None, n_items: int, what: str = "items") -> list[int]:
    """Items of a data set, each once; None is all. Raises `RangeError`."""
    if given is None:
        return list(range(n_items))
    return list(dict.fromkeys(indices(given, n_items, what, kind="item")))


def compact(numbers: Sequence[int]) -> str:
    """Indices in the grammar above: `[1, 2, 3, 7]` is "1..3,7"."""
    parts: list[str] = []
    for i, n in enumerate(numbers):
        if i == 0 or n != numbers[i - 1] + 1:
            start = n
        if i == len(numbers) - 1 or numbers[i + 1] != n + 1:
            parts.append(str(start) if start == n else f"{start}..{n}")
    return ",".join(parts)


# -- heads -----------------------------------------------------------------------------


# the last dot that is not part of `..`: 3.5, 3..7.0..4
_LAYER_HEAD = re.compile(r"((?:[^.]|\.\.)+)\.((?:[^.]|\.\.)+)")


def names_heads(text: str) -> bool:
    """Whether a text is of heads, not of layers."""
    return any(_LAYER_HEAD.fullmatch(part.strip()) for part in text.split(","))


def parse_heads(given: Heads, n_layer: int, n_head: int, what: str = "heads") -> list[Head]:
    """Heads, each once, by layer and head. Raises `UsageError` or `RangeError`."""
    text = _heads_as_text(given)
    where = f"{what} {text!r}"
    heads: set[Head] = set()
    for part in (p.strip() for p in text.split(",")):
        m = _LAYER_HEAD.fullmatch(part)
        if m is None or not re.fullmatch(r"\*|all|[-\d.:]+", m[2]):
            raise UsageError(f"{where}: {part!r} is not LAYER.HEAD, like 3.5 or 7.*")
        layers = indices_in(m[1], n_layer, where, "layer")
        chosen = indices_in(m[2], n_head, where, "head")
        heads |= {Head(i, h) for i in layers for h in chosen}
    return sorted(heads)


def parse_experts(
    given: Experts, n_layer: int, n_expert: Mapping[int, int], what: str = "experts"
) -> list[Expert]:
    """Experts, each once, by layer and number.

    Args:
        n_expert: layer -> how many it has, for layers with experts. `*` is all of these.

    Raises:
        UsageError: not the grammar above.
        RangeError: no such layer or expert, or a layer without experts.
    """
    text = _heads_as_text(given)
    where = f"{what} {text!r}"
    experts: set[Expert] = set()
    for part in (p.strip() for p in text.split(",")):
        m = _LAYER_HEAD.fullmatch(part)
        if m is None or not re.fullmatch(r"\*|all|[-\d.:]+", m[2]):
            raise UsageError(f"{where}: {part!r} is not LAYER.EXPERT, like 3.5 or 7.0-3")
        every = m[1] in ("*", "all")
        for layer in n_expert if every else indices_in(m[1], n_layer, where, "layer"):
            if layer not in n_expert:
                have = compact(sorted(n_expert))
                raise RangeError(f"{where}: layer {layer} has no experts; layers {have} have")
            chosen = indices_in(m[2], n_expert[layer], where, "expert")
            experts |= {Expert(layer, e) for e in chosen}
    return sorted(experts)


def every_head(n_layer: int, n_head: int) -> list[Head]:
    return [Head(i, h) for i in range(n_layer) for h in range(n_head)]


def other_heads(heads: Iterable[Head], n_head: int) -> list[Head]:
    """The heads that are not among these, of the layers that these are in."""
    kept = set(heads)
    layers = sorted({h.layer for h in kept})
    return [Head(i, h) for i in layers for h in range(n_head) if Head(i, h) not in kept]


def by_layer(heads: Iterable[Head] | Iterable[Expert]) -> dict[int, list[int]]:
    """layer -> its heads or experts, in the order given."""
    out: dict[int, list[int]] = {}
    for layer, head in heads:
        out.setdefault(layer, []).append(head)
    return out


def top_heads(
    values: npt.NDArray[np.floating[Any]], k: int, *, by_size: bool = False
) -> list[Head]:
    """At most k heads of the largest values (n_layer, n_head), largest first; ties by layer and
    head; heads whose value is NaN are left out.

    Args:
        by_size: by absolute value.

    Raises:
        RangeError: k is less than 1.
    """
    import numpy as np

    if k < 1:
        raise RangeError(f"k must be at least 1, got {k}")
    sizes = np.abs(values) if by_size else values
    order = np.argsort(-sizes, axis=None, kind="stable")  # NaN last
    order = order[np.isfinite(sizes.ravel()[order])][:k]
    layers, heads = np.unravel_index(order, values.shape)
    return [Head(*pair) for pair in zip(layers.tolist(), heads.tolist(), strict=True)]


def check_n_heads(n: int, n_layer: int, n_head: int) -> None:
    """Raises `RangeError` if n is not between 1 and the model's number of heads."""
    if not 1 <= n <= n_layer * n_head:
        raise RangeError(f"n_heads must be 1 to {n_layer * n_head}, got {n}")


# -- numbers ---------------------------------------------------------------------------


def parse_numbers(text: str, what: str, *, repeats: bool = False) -> list[float]:
    """`1`, `0.5,1,2`, `-2,2`: finite numbers, each once unless `repeats`. Raises
    `UsageError`."""
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        raise UsageError(f"{what} {text!r} is not a number or a list like 0.5,1,2") from None
    if not all(abs(x) < float("inf") for x in numbers):
        raise UsageError(f"{what} {text!r} has a number that is not finite")
    return numbers if repeats else list(dict.fromkeys(numbers))


def parse_counts(text: str, what: str, most: int) -> list[int]:
    """`5,10,20`: whole numbers from 1 to `most`. Raises `UsageError`."""
    counts = []
    for part in text.split(","):
        if not part.strip().isdigit() or not 1 <= int(part) <= most:
            raise UsageError(f"{what} {text!r}: {part!r} is not a whole number from 1 to {most}")
        counts.append(int(part))
    return counts
