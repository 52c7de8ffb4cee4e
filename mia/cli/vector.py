"""vector: train, show, combine and convert directions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import ModelOptions, OutputOptions, command
from mia.cli._output import finish, model_facts, notice, progress, visible
from mia.cli._vectors import (
    BosOption,
    check_vector_file,
    in_file,
    layer_list,
    load_vector,
    made_of,
    save_vector,
)
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.model import Model
    from mia.vectors import Vector

FileOption = Annotated[
    str, typer.Option("-o", "--out", help="The vector file to write: .gguf or .safetensors.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No notices on stderr.")]
_SHOWN = ("name", "model", "aggregator", "read", "method", "n_pairs", "n_items", "data", "items")
LayerZeroOption = Annotated[
    bool, typer.Option("--layer-zero", help="Keep layer 0 in a GGUF, which llama.cpp refuses.")
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Directions: train, show, combine, convert.")
    command(group, name="train")(train)
    command(group, name="show")(show)
    command(group, name="combine")(combine)
    command(group, name="convert")(convert)
    app.add_typer(group, name="vector")


def train(
    model: ModelOptions,
    data: Annotated[
        list[str],
        typer.Argument(
            help="Pairs: JSONL, JSON or CSV with positive and negative, or two text files."
        ),
    ],
    out: FileOption,
    site: Annotated[
        str, typer.Option("--site", help="resid_post, attn_out, mlp_out, attn_norm, mlp_norm …")
    ] = "resid_post",
    method: Annotated[
        str, typer.Option("--method", help="mean, pca, logistic, or your module:function.")
    ] = "mean",
    read: Annotated[
        str,
        typer.Option(
            "--read", help="Which token: last, -2, before:MARKER; or mean, mean:3..7 of several."
        ),
    ] = "last",
    layers: Annotated[str | None, typer.Option("--layers", help="Default: all.")] = None,
    bos: BosOption = None,
    layer_zero: LayerZeroOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find a direction from pairs of texts that differ in one thing."""
    from mia.datasets.shipped import find_text
    from mia.methods import contrast
    from mia.sites import parse_layers

    output = OutputOptions(json=json, quiet=quiet)
    name, site_layers = _site(site, output)
    if site_layers is not None and layers is not None:
        raise UsageError(f"--site {site!r} names layers, and so does --layers; give one of them")
    check_vector_file(out, name)
    contrast.aggregator(method)
    pairs = contrast.load_pairs(*data)
    with _work.open_model(model) as m:
        if site_layers is None:
            chosen = layer_list(layers, m, range(m.n_layer))
        else:
            chosen = parse_layers(site_layers, m.n_layer, site)
        _warn_bos(m, bos, output)
        with progress("reading", output) as bar:
            vector = contrast.train(
                m,
                pairs,
                site=name,
                layers=chosen,
                read=read,
                method=method,
                bos=bos,
                progress=bar,
            ).renamed(Path(out).stem)
        vector = made_of(vector, [find_text(d) for d in data], range(len(pairs)))
        save_vector(vector, out, output, layer_zero=layer_zero)
        written = in_file(vector, out, layer_zero)
        document = {"model": model_facts(m), "file": out, **facts(written)}
        finish(document, output, lambda: _print_norms(written))


def _site(text: str, output: OutputOptions) -> tuple[str, str | None]:
    """The site's name, and its layers as they were typed, or None."""
    from mia.sites import BY_KEY, LAYERED, split_spelling

    name, layers = split_spelling(_work.edit_site(text, output).strip())
    if name not in LAYERED or name in BY_KEY:
        raise UsageError(f"--site {text!r}: a vector is of a site with layers and one row a token")
    return name, layers


def _warn_bos(m: Model, bos: bool | None, output: OutputOptions) -> None:
    if not m.wants_bos(bos) and m.bos_token >= 0:
        notice(
            "texts are read without a BOS, where a model's first token says little; --bos puts "
            f"{m.piece(m.bos_token)} in front",
            output,
        )


def show(
    model: ModelOptions,
    output: OutputOptions,
    file: Annotated[str, typer.Argument(help="A vector file, or arithmetic with several.")],
    top_k: Annotated[
        int, typer.Option("-k", "--top-k", help="Tokens per layer; 0 needs no model.", min=0)
    ] = 6,
) -> None:
    """Norms per layer, and the tokens that each direction points to (through the lens)."""
    from mia.methods.steering import check_fits
    from mia.sites import RESIDUAL

    vector = load_vector(file)
    document: dict[str, Any] = facts(vector)
    if top_k and vector.site in RESIDUAL:
        with _work.open_model(model) as m:
            check_fits(m, vector, file)
            document["model"] = model_facts(m)
            for row, up, down in zip(document["layers"], *_nearest(m, vector, top_k), strict=True):
                row["toward"], row["away"] = up, down

    def human() -> None:
        for key, value in vector.metadata.items():
            if key in _SHOWN:
                print(f"{key}: {value}")
        print(f"site: {vector.site}")
        for row in document["layers"]:
            tokens = ""
            if "toward" in row:
                tokens = "  + " + " ".join(visible(t) or "''" for t in row["toward"])
                tokens += "   - " + " ".join(visible(t) or "''" for t in row["away"])
            print(f"{row['layer']:3d}  |v| {row['norm']:9.3f}{tokens}")

    finish(document, output, human)


def _nearest(m: Model, vector: Vector, k: int) -> tuple[list[list[str]], list[list[str]]]:
    """The tokens whose lens scores each direction raises and lowers most."""
    import numpy as np

    rows = np.stack([vector[i] for i in vector.layers])  # (n_layers, n_embd)
    found = [m.lens.read(x, k).ids for x in (rows, -rows)]
    up, down = ([[m.piece(int(t)) for t in line] for line in ids] for ids in found)
    return up, down


def combine(
    expression: Annotated[str, typer.Argument(help='"a.gguf - b.gguf + 0.5*c.gguf"')],
    out: FileOption,
    unit: Annotated[bool, typer.Option("--unit", help="Bring each layer to length 1.")] = False,
    layer_zero: LayerZeroOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Arithmetic with vectors: + - * / and brackets; file names with other signs in quotes."""
    vector = load_vector(expression)
    _write(
        vector.unit() if unit else vector, out, layer_zero, OutputOptions(json=json, quiet=quiet)
    )


def convert(
    file: Annotated[str, typer.Argument(help="A .gguf, .safetensors or .npy vector.")],
    out: FileOption,
    layer_zero: LayerZeroOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a vector in another format."""
    from mia.vectors import load

    _write(load(file), out, layer_zero, OutputOptions(json=json, quiet=quiet))


def _write(vector: Vector, out: str, layer_zero: bool, output: OutputOptions) -> None:
    check_vector_file(out, vector.site)
    save_vector(vector, out, output, layer_zero=layer_zero)
    written = in_file(vector, out, layer_zero)
    finish({"file": out, **facts(written)}, output, lambda: _print_norms(written))


def facts(vector: Vector) -> dict[str, Any]:
    """A vector in a document."""
    norms = vector.norms
    return {
        "name": vector.name,
        "site": vector.site,
        "width": vector.width,
        "layers": [{"layer": i, "norm": round(norms[i], 6)} for i in vector.layers],
        "metadata": dict(vector.metadata),
    }


def _print_norms(vector: Vector) -> None:
    for layer, norm in vector.norms.items():
        print(f"{layer:3d}  |v| {norm:9.3f}")
