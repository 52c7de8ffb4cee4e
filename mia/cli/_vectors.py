"""What the commands about vectors share: options, vectors by file or expression, lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence
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

    With a model, a notice about each file that was made on another one.
    """
    from mia.vector_expression import combine
    from mia.vectors import load

    def read(name: str) -> Vector:
        vector = load(name)
        made_on = vector.metadata.get("model_sha256")
        if model is not None and output is not None and made_on not in (None, model.file_hash):
            known = vector.metadata.get("model", "unknown")
            notice(f"{name} was made on another model, {known}", output)
        return vector

    if Path(text).exists() or not any(c in text for c in "+-*/() "):
        return read(text)
    return combine(text, lambda name: read(name).renamed(Path(name).stem))


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
