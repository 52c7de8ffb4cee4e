"""vector: train, show, combine and convert directions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mia.cli._build import check_layer_zero, open_model
from mia.cli._command import command, refuse
from mia.cli._groups import (
    BosOption,
    LayersOption,
    LayerZeroOption,
    ModelOptions,
    VectorFileOption,
)
from mia.show.report import Report

PANEL = "Directions"


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Directions: train, show, combine, convert.")
    command(
        group,
        "train",
        examples=[
            "mia vector train sentiment -o love.gguf --bos",
            "mia vector train positive.txt negative.txt -o v.gguf --method pca --layers 10..20",
        ],
    )(train)
    command(
        group,
        "show",
        files=[".gguf", ".safetensors"],
        examples=["mia vector show love.gguf", "mia vector show 'love.gguf - v.gguf'"],
    )(show)
    command(
        group,
        "combine",
        examples=["mia vector combine '2*love.gguf - 0.5*formal.gguf' -o two.gguf"],
    )(combine)
    command(group, "convert", examples=["mia vector convert love.gguf -o love.safetensors"])(
        convert
    )
    app.add_typer(group, name="vector", rich_help_panel=PANEL)


def train(
    model: ModelOptions,
    data: Annotated[
        list[str],
        typer.Argument(
            help="Pairs: a shipped set (sentiment, french, weddings); JSONL, JSON or CSV with "
            "positive and negative; or two text files."
        ),
    ],
    out: VectorFileOption,
    site: Annotated[
        str, typer.Option("--site", help="resid_post, attn_out, mlp_out, attn_norm, mlp_norm …")
    ] = "resid_post",
    method: Annotated[
        str, typer.Option("--method", help="mean, pca, logistic, or your module:function.")
    ] = "mean",
    read: Annotated[
        str,
        typer.Option(
            "--read",
            help="The token to read: last, -2, before:MARKER; or the mean of several: mean, "
            "mean:3..7.",
        ),
    ] = "last",
    layers: LayersOption = None,
    bos: BosOption = None,
    layer_zero: LayerZeroOption = False,
) -> Report:
    """Find a direction from pairs of texts that differ in one thing."""
    from mia.datasets.pairs import select_pairs
    from mia.methods import contrast
    from mia.sites import split_spelling
    from mia.vectors import check_file

    check_layer_zero(layer_zero, out)
    check_file(out, split_spelling(site)[0])
    contrast.aggregator(method)
    contrast.check_read(read)
    pairs = select_pairs(*data)
    with open_model(model) as m:
        report = contrast.learn(
            m,
            pairs,
            site=site,
            layers=layers,
            read=read,
            method=method,
            bos=bos,
            name=Path(out).stem,
        )
        return report.write(out, layer_zero=layer_zero)


def show(
    model: ModelOptions,
    file: Annotated[str, typer.Argument(help="A vector file, or arithmetic with several.")],
    top_k: Annotated[
        int,
        typer.Option(
            "-k",
            "--top-k",
            help="How many of the best to list; default 6, 0 needs no model.",
            min=0,
        ),
    ] = 6,
) -> Report:
    """Norms per layer, and the tokens that each direction points to (through the lens)."""
    from mia.vectors.report import inspect

    if not top_k:
        refuse(("model", "gpu_layers", "rpc", "ctx", "lora"), "needs a model, and -k 0 opens none")
        return inspect(file)
    with open_model(model) as m:
        return inspect(file, m, k=top_k)


def combine(
    expression: Annotated[str, typer.Argument(help='"a.gguf - b.gguf + 0.5*c.gguf"')],
    out: VectorFileOption,
    unit: Annotated[bool, typer.Option("--unit", help="Bring each layer to length 1.")] = False,
    layer_zero: LayerZeroOption = False,
) -> Report:
    """Arithmetic with vectors: + - * / and brackets; file names with other signs in quotes."""
    from mia.vectors.expression import read
    from mia.vectors.report import VectorReport

    check_layer_zero(layer_zero, out)
    vector = read(expression)
    return VectorReport(vector.unit() if unit else vector).write(out, layer_zero=layer_zero)


def convert(
    file: Annotated[str, typer.Argument(help="A .gguf, .safetensors or .npy vector.")],
    out: VectorFileOption,
    layer_zero: LayerZeroOption = False,
) -> Report:
    """Write a vector in another format."""
    from mia.vectors import load
    from mia.vectors.report import VectorReport

    check_layer_zero(layer_zero, out)
    return VectorReport(load(file)).write(out, layer_zero=layer_zero)
