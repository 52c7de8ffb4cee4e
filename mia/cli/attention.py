"""The command `attention`: what each head looks at, as a picture, a page, numbers or coloured cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import (
    OUTPUT,
    ChangeOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
)
from mia.cli._output import console, finish, model_facts, notice, on_terminal, token_list, visible
from mia.errors import UsageError
from mia.sites import parse_layers

if TYPE_CHECKING:
    from rich.text import Text

    from mia.methods.attention import AttentionMaps
    from mia.model import Model

#: maps that a terminal shows one below the other
_FEW = 12


def register(app: typer.Typer) -> None:
    command(app, name="attention")(attention)


def attention(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Only these: 3,7 or 10..20.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option("--heads", help="Only these, as LAYER.HEAD: 3.5,7.* (large maps).")
    ] = None,
    token_idx: Annotated[
        str, typer.Option("--token-idx", help="The query whose strongest keys are listed.")
    ] = "-1",
    top_k: Annotated[int, typer.Option("-k", "--top-k", help="Keys to list.", min=1)] = 5,
    value_weighted: Annotated[
        bool,
        typer.Option("--value-weighted", help="Each weight times the norm of the value it moves."),
    ] = False,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw",
            help="Draw all maps, layers down, heads across: .png, .svg, .pdf, or .html to hover and click.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """What each head looks at, by token. -o FILE.safetensors gives (n_layer, n_head, n_query, n_key).

    Reading patterns needs flash attention off, which this command and --block and
    --ablate-attention see to; everywhere else it is on where the model's cache allows.
    """
    from mia.io.files import check_writable
    from mia.methods.attention import attention_maps
    from mia.show import plots

    if draw is not None:
        plots.check_picture(draw, [".html"])
    if output.out is not None:
        check_writable(output.out)
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        (query,) = _one(_work.token_indices(token_idx, len(ids), "--token-idx"), token_idx)
        rows, columns, chosen = _chosen(m, layers, heads)
        edits = _work.change_edits(m, changes, ids, output)
        maps = attention_maps(m, ids, layers=rows, edits=edits, value_weighted=value_weighted)
        weights = maps.weights[:, columns]
        pieces = [m.piece(t) for t in ids]
        if draw is not None:
            _draw(m, draw, maps, columns, chosen if heads is not None else [], pieces)
            notice(f"wrote {draw}", output)
        document: dict[str, Any] = {
            "model": model_facts(m),
            "tokens": token_list(m, ids),
            "value_weighted": value_weighted,
            "layers": rows,
            "heads": columns,
        }
        if output.out is not None and output.out.endswith(".safetensors"):
            _write_tensor(m, output.out, maps, columns)
            notice(f"wrote {output.out}", output)
            output.out = None
            if not output.json:
                return
        if output.json or output.out is not None:
            document["weights"] = _rounded(weights)
        elif draw is not None:
            return
        finish(
            document, output, lambda: _print(maps, chosen, pieces, query, top_k, heads is not None)
        )


def _one(found: list[int], text: str) -> list[int]:
    if len(found) != 1:
        raise UsageError(
            f"--token-idx {text!r} is {len(found)} tokens; one query is listed at a time"
        )
    return found


def _chosen(
    m: Model, layers: str | None, heads: str | None
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Layers and heads of the smallest grid with all that is asked for, and its (layer, head)s."""
    from mia.methods.ablation import parse_heads

    rows = sorted(parse_layers(layers or "*", m.n_layer, f"--layers {layers}"))
    if heads is None:
        every = list(range(m.n_head))
        return rows, every, [(i, h) for i in rows for h in every]
    wanted = parse_heads(heads, m.n_layer, m.n_head, "--heads")
    chosen = [(i, h) for i in wanted if i in rows for h in wanted[i]]
    if not chosen:
        raise UsageError(f"no head of --heads {heads} is in --layers {layers}")
    return sorted({i for i, _ in chosen}), sorted({h for _, h in chosen}), chosen


def _rounded(weights: Any) -> Any:
    return weights.astype("float64").round(6).tolist()


def _write_tensor(m: Model, file: str, maps: AttentionMaps, columns: list[int]) -> None:
    from mia.io.activations import Activations
    from mia.io.provenance import file_metadata

    name = "value_weighted" if maps.value_weighted else "attention"
    facts = file_metadata(m, tokens=maps.tokens, layers=maps.layers, heads=columns)
    Activations({name: maps.weights[:, columns]}, facts).save(file)


def _draw(
    m: Model,
    file: str,
    maps: AttentionMaps,
    columns: list[int],
    chosen: list[tuple[int, int]],
    pieces: list[str],
) -> None:
    import numpy as np

    from mia.show import plots
    from mia.show.html import attention_page, write_page

    title = f"{m.name} · attention over {len(pieces)} tokens"
    bar = "weight × norm of the value" if maps.value_weighted else "attention weight"
    weights, rows = maps.weights[:, columns], maps.layers
    if file.lower().endswith(".html"):
        about = "".join(visible(p) for p in pieces)
        shown = [visible(p) for p in pieces]
        page = attention_page(
            weights, layers=rows, heads=columns, pieces=shown, title=title, about=about, bar=bar
        )
        write_page(file, page)
    elif 0 < len(chosen) <= _FEW:
        names = [f"layer {i} · head {h}" for i, h in chosen]
        few = np.stack([maps[pair] for pair in chosen])
        plots.save(plots.large_maps(few, names=names, pieces=pieces, title=title, bar=bar), file)
    else:
        grid = plots.attention_grid(
            weights, layers=rows, heads=columns, pieces=pieces, title=title, bar=bar
        )
        plots.save(grid, file)


def _print(
    maps: AttentionMaps,
    chosen: list[tuple[int, int]],
    pieces: list[str],
    query: int,
    top_k: int,
    large: bool,
) -> None:
    """Whole maps of a few heads where a person looks; else each head's strongest keys."""
    if on_terminal() and large and len(chosen) <= _FEW:
        screen = console()
        for layer, head in chosen:
            a = maps[layer, head]
            if 2 * len(pieces) + 16 > screen.width:
                raise UsageError(
                    f"a map of {len(pieces)} tokens is wider than this terminal; --draw FILE.html shows it"
                )
            screen.print(f"layer {layer} · head {head} (most: {a.max():.3g})", style="bold")
            screen.print(cells(a, pieces))
        return
    print(f"query {query}: {visible(pieces[query])}")
    for layer, head in chosen:
        row = maps[layer, head][query]
        best = row.argsort()[::-1][:top_k]
        found = "|".join(f"{k}:{visible(pieces[k])} {row[k]:.2f}" for k in best if row[k] > 0)
        print(f"{layer}.{head}: {found}")


def cells(a: Any, pieces: list[str]) -> Text:
    """A map (n_query, n_key) as coloured cells, two letters each; queries down, by name."""
    from rich.text import Text

    text = Text()
    top = float(a.max()) or 1.0
    for q, piece in enumerate(pieces):
        text.append(f"{visible(piece)[:11]:>11s} {q:3d} ", style="dim")
        for k in range(len(pieces)):
            text.append("  ", style=inferno(a[q, k] / top) if k <= q else "")
        text.append("\n")
    return text.append(
        " " * 16 + "".join(f"{k:<4d}" for k in range(0, len(pieces), 2)), style="dim"
    )


def inferno(share: float) -> str:
    """A background of inferno."""
    from mia.show.plots import INFERNO

    x = min(max(float(share), 0.0), 1.0) * (len(INFERNO) - 1)
    i = min(int(x), len(INFERNO) - 2)
    r, g, b = (
        round(u + (x - i) * (v - u)) for u, v in zip(INFERNO[i], INFERNO[i + 1], strict=True)
    )
    return f"on rgb({r},{g},{b})"
