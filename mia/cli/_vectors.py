"""What the commands about vectors share: options, vectors by file or expression, lists of numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli._output import notice
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.cli._options import OutputOptions
    from mia.model import Model
    from mia.vectors import Vector

BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Put the BOS token in front of each text; default: what the model asks for.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]


def load_vector(
    text: str, model: Model | None = None, output: OutputOptions | None = None
) -> Vector:
    """A vector file, or arithmetic with several: "french.gguf - 0.5*formal.gguf".

    With a model, a notice where it was made on another one.
    """
    from mia.vectors import load
    from mia.vectors.expression import combine

    if Path(text).exists() or not any(c in text for c in "+-*/() "):
        vector = load(text)
    else:
        vector = combine(text, lambda name: load(name).renamed(Path(name).stem))
    if model is not None and output is not None:
        say_other_model(vector.sources, text, model, output)
    return vector


def say_other_model(
    sources: Iterable[Mapping[str, str]], shown: str, model: Model, output: OutputOptions
) -> None:
    """A notice about each other model that a vector was made on."""
    others = [
        s.get("model", "unknown")
        for s in sources
        if s.get("model_sha256", model.file_hash) != model.file_hash
    ]
    for name in dict.fromkeys(others):
        notice(f"{shown} was made on another model, {name}", output)


def say_where_from(
    vector: Vector, shown: str, data: Path, items: Sequence[int], m: Model, output: OutputOptions
) -> None:
    """Notices about a vector of another model, or one learned from items that it is tried on."""
    from mia.io.files import file_sha256

    say_other_model(vector.sources, shown, m, output)
    sha, overlaps = file_sha256(data), []
    for made in vector.sources:
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", str(made.get("items")))
        if ends and sha in str(made.get("data_sha256")).split():
            both = [i for i in items if int(ends[1]) <= i <= int(ends[2])]
            overlaps += [span(both)] if both else []
    for shared in dict.fromkeys(overlaps):
        notice(
            f"{shown} was made from items {shared} of this {data.name}, which are asked again; give "
            "other --items",
            output,
        )


def made_of(vector: Vector, paths: Sequence[Path], items: Sequence[int]) -> Vector:
    """With the data files' names and hashes, and which of their items it was learned from."""
    from mia.datasets.shipped import file_facts

    return replace(vector, metadata={**vector.metadata, **file_facts(paths), "items": span(items)})


def span(items: Sequence[int]) -> str:
    """Items as `item_range` reads them."""
    return f"{items[0]}..{items[-1]}"


def steered_layers(
    vector: Vector, text: str | None, model: Model, what: str, output: OutputOptions
) -> list[int]:
    """Those of the vector's layers that an option allows; a notice names the ones it has not."""
    if text is None:
        return vector.layers
    wanted = layer_list(text, model, ())
    found = vector.at(wanted).layers
    missing = sorted(set(wanted) - set(found))
    if missing:
        names = ", ".join(map(str, missing))
        many = "s" if len(missing) > 1 else ""
        notice(f"{what} has no layer{many} {names}: it is not steered there", output)
    return found


def described(text: str, vector: Vector, layers: Sequence[int]) -> dict[str, Any]:
    """A vector that steers, as a document has it."""
    return {"vector": text, "site": vector.site, "layers": list(layers)}


def numbers(text: str, what: str) -> list[float]:
    """`1`, `0.5,1,2`, `-2,2`. Raises `UsageError`."""
    try:
        out = [float(x) for x in text.split(",")]
    except ValueError:
        raise UsageError(f"{what} {text!r} is not a number or a list like 0.5,1,2") from None
    if not all(abs(x) < float("inf") for x in out):
        raise UsageError(f"{what} {text!r} has a number that is not finite")
    return list(dict.fromkeys(out))


def layer_list(text: str | None, model: Model, default: Sequence[int]) -> list[int]:
    """The layers of `--layers`, or what there is by default."""
    from mia.sites import parse_layers

    return list(default) if text is None else parse_layers(text, model.n_layer, f"--layers {text}")


def item_range(text: str | None, items: Sequence[Any]) -> list[Any]:
    """`0..39`, `40..`, `..39`: both ends included. Raises `UsageError` naming the valid range."""
    if text is None:
        return list(items)
    first, dots, last = text.partition("..")
    try:
        a = int(first) if first else 0
        b = (int(last) if last else len(items) - 1) if dots else a
    except ValueError:
        raise UsageError(f"--items {text!r} is not a range like 0..39") from None
    if not 0 <= a <= b < len(items):
        raise UsageError(f"--items {text!r} is out of range; there are items 0 to {len(items) - 1}")
    return list(items[a : b + 1])


def check_vector_file(out: str, site: str = "resid_post") -> None:
    """Sees before any work that a vector of this site can be written there. Raises `UsageError`,
    or `FileError` where the file cannot be written."""
    from mia.io.files import check_writable
    from mia.vectors import check_suffix

    check_writable(out)
    check_suffix(out, site)


def in_file(vector: Vector, out: str, layer_zero: bool) -> Vector:
    """What `save_vector` wrote of it: a GGUF has no layer 0 by default."""
    if layer_zero or not out.endswith(".gguf"):
        return vector
    return vector.at([i for i in vector.layers if i])


def save_vector(vector: Vector, path: str, output: Any, *, layer_zero: bool = False) -> None:
    """Writes it, and says what llama.cpp's format leaves out."""
    left_out = vector.save(path, layer_zero=layer_zero)
    if left_out:
        notice(
            "layer 0 is left out: llama.cpp's control vectors have none (--layer-zero keeps it, "
            "for mia and repeng only)",
            output,
        )
    notice(f"wrote {path}", output)


def rounded(x: Any, digits: int = 6) -> Any:
    """Numbers of a document, shortened; lists and arrays alike."""
    import numpy as np

    return np.round(np.asarray(x, np.float64), digits).tolist()
