"""Commands that only look: tokens, sites, logit-lens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import ChangeOptions, ModelOptions, OutputOptions, PromptOptions, command
from mia.cli._output import console, finish, model_facts, notice, on_terminal, token_list, visible
from mia.errors import UsageError
from mia.sites import (
    _GLOBAL,
    _LAYERED,
    BY_KEY,
    HEADED,
    RESIDUAL,
    Site,
    parse_layers,
    parse_many,
    reads_as_attn_out,
)

if TYPE_CHECKING:
    from mia.engine.graph import Topology
    from mia.lenses import Readout
    from mia.model import Model

#: what a lens makes sense of: residuals, what is added to them, and their norms
_READABLE = (*RESIDUAL, "attn_norm", "mlp_norm")


def register(app: typer.Typer) -> None:
    command(app, name="tokens")(tokens)
    command(app, name="sites")(sites)
    command(app, name="logit-lens")(logit_lens)


def tokens(model: ModelOptions, prompt: PromptOptions, output: OutputOptions) -> None:
    """Index, id and text of every token of a prompt, and whether a BOS stands in front."""
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        has_bos = m.bos_token >= 0 and ids[0] == m.bos_token
        document = {"model": model_facts(m), "tokens": token_list(m, ids), "bos": has_bos}

        def human() -> None:
            for i, t in enumerate(ids):
                print(f"{i:4d} {t:7d}  {visible(m.piece(t))}")
            if not has_bos and m.bos_token >= 0:
                notice(f"no BOS in front; --bos puts {m.piece(m.bos_token)} there", output)

        finish(document, output, human)


def sites(
    model: ModelOptions,
    output: OutputOptions,
    graph: Annotated[
        bool, typer.Option("--graph", help="Every node of the graph instead.")
    ] = False,
) -> None:
    """Every site that this model has: names, shape of one token's row, layers, node of the graph."""
    with _work.open_model(model) as m:
        document: dict[str, Any] = {"model": model_facts(m)}
        if graph:
            document["nodes"] = _nodes(m)
            finish(document, output, lambda: _print_nodes(document["nodes"]))
        else:
            document["sites"] = _sites(m)
            finish(document, output, lambda: _print_sites(document["sites"]))


def _sites(m: Model) -> list[dict[str, Any]]:
    topology = m.unfused_topology
    out: list[dict[str, Any]] = []
    for name in dict.fromkeys(s.name for s in topology.sites):
        found = {s: at for s, at in topology.sites.items() if s.name == name}
        layers = [s.layer for s in found if s.layer is not None]
        first, at = next(iter(found.items()))
        names, hook = (_LAYERED | _GLOBAL)[name]
        shape: list[int | str] = [*at.shape, "n_keys"] if name in BY_KEY else list(at.shape)
        out.append(
            {
                "site": name,
                "llama.cpp": names[0] if names else None,
                "transformer_lens": hook if first.layer is None else f"blocks.N.{hook}",
                "shape": shape,
                "layers": [min(layers), max(layers)] if layers else None,
                "node": topology.nodes[at.index].name,
                "about": _about(topology, name),
            }
        )
    return out


def _about(topology: Topology, name: str) -> str:
    """What a site of heads is in this model; empty for the others."""
    first = {s.name: at for s, at in reversed(topology.sites.items())}
    if name not in (*HEADED, "attn_out") or not {"q", "k", "head_out"} <= first.keys():
        return ""
    n_head, width = first["head_out"].shape
    n_kv = first["k"].shape[0] if first["k"].layout == "heads" else n_head
    shared = f", each read by {n_head // n_kv} query heads" if n_kv < n_head else ""
    return {
        "q": f"{n_head} query heads of {width}, after rotation where the model has it",
        "k": f"{n_kv} key heads of {width}{shared}",
        "v": f"{n_kv} value heads of {width}{shared}",
        "attn_scores": f"{n_head} heads, before mask and softmax; not with flash attention",
        "attn_pattern": f"{n_head} heads, rows sum to 1; not with flash attention",
        "head_out": f"{n_head} heads of {width} side by side, before W_O",
        "attn_out": "all heads after W_O, its bias and a norm behind it where there is one",
    }[name]


def _print_sites(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    screen = _wide_console()
    # what does not fit is left out whole, from the right
    titles = ["site", "llama.cpp", "one token's row", "layers", "TransformerLens", "node", ""]
    n = next((n for n, width in ((7, 160), (6, 100), (5, 88)) if screen.width >= width), 4)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles[:n]:
        table.add_column(title, no_wrap=True)
    for r in rows:
        layers = "" if r["layers"] is None else "{}-{}".format(*r["layers"])
        shape = " × ".join(map(str, r["shape"]))
        cells = [
            r["site"],
            r["llama.cpp"] or "",
            shape,
            layers,
            r["transformer_lens"],
            r["node"],
            r["about"],
        ]
        table.add_row(*cells[:n])
    screen.print(table)


def _wide_console() -> Any:
    c = console()
    if not on_terminal():
        c.width = 240
    return c


def _nodes(m: Model) -> list[dict[str, Any]]:
    topology = m.unfused_topology
    at: dict[int, list[str]] = {}
    for site, node in topology.sites.items():
        at.setdefault(node.index, []).append(str(site))
    return [
        {
            "index": i,
            "name": n.name,
            "op": n.op,
            "type": n.type,
            "shape": list(n.shape),
            "sources": [topology.node(s).name for s in n.src],
            "sites": at.get(i, []),
        }
        for i, n in enumerate(topology.nodes)
    ]


def _print_nodes(nodes: list[dict[str, Any]]) -> None:
    for n in nodes:
        shape = "×".join(map(str, n["shape"]))
        print(
            f"{n['index']:5d} {n['op']:<16s} {n['type']:<5s} {shape:<16s} {n['name']:<28s} {', '.join(n['sources'])}"
            + (f"  = {', '.join(n['sites'])}" if n["sites"] else "")
        )


def logit_lens(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    sites: Annotated[
        list[str] | None,
        typer.Argument(
            help="Sites to read: l_out (default), kqv_out-10..20, resid_mid, …, or all."
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("-k", "--top-k", help="Tokens to show.", min=1)] = 5,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Only these: 3,7 or 10..20.")
    ] = None,
    token_idx: Annotated[
        str | None, typer.Option("--token-idx", help="Only these tokens: -1, 3..7, 1,4.")
    ] = None,
    norm: Annotated[
        bool,
        typer.Option(
            "--norm/--no-norm",
            help="--no-norm leaves out the division by the RMS, as the first tool did.",
        ),
    ] = True,
) -> None:
    """What each layer would say next: final norm and unembedding applied to any residual (nostalgebraist 2020)."""
    import numpy as np

    from mia.request import Capture, Request

    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        wanted = _lens_sites(m, sites or ["l_out"], layers, output)
        at = _work.token_indices("*" if token_idx is None else token_idx, len(ids), "--token-idx")
        edits = _work.change_edits(m, changes, ids, output)
        request = Request(ids, edits, [Capture([s for _, s in wanted], at)], logits=None)
        result = m.run([request])[0]
        rows = np.concatenate([result.captures[s] for _, s in wanted])
        read = m.lens.read(rows, top_k, norm=norm)
        lens = _lens_rows(m, wanted, at, read)
        document = {"model": model_facts(m), "tokens": token_list(m, ids), "lens": lens}
        finish(document, output, lambda: _print_lens(m, ids, lens, len(at)))


def _lens_sites(
    m: Model, texts: list[str], layers: str | None, output: OutputOptions
) -> list[tuple[str, Site]]:
    """(label, site) in the order asked for."""
    out: dict[Site, str] = {}
    allowed = None if layers is None else set(parse_layers(layers, m.n_layer, f"--layers {layers}"))
    for text in texts:
        if text == "all":
            names = ["embed", "attn_out", "resid_mid", "mlp_out", "resid_post"]
            found = [s for s in m.topology.sites if s.name in names]
        else:
            found = parse_many(_work.edit_site(text, output), m.n_layer)
        for s in found:
            if s.name not in _READABLE:
                raise UsageError(f"a lens does not read {s}; it reads {', '.join(_READABLE)}")
            if allowed is None or s.layer is None or s.layer in allowed:
                out[s] = f"kqv_out-{s.layer}" if reads_as_attn_out(text) else s.llama
    if not out:
        raise UsageError(f"no site is left of {' '.join(texts)} at --layers {layers}")
    return [(label, s) for s, label in out.items()]


def _lens_rows(
    m: Model, wanted: list[tuple[str, Site]], at: list[int], read: Readout
) -> list[dict[str, Any]]:
    pieces: dict[int, str] = {int(t): m.piece(int(t)) for t in set(read.ids.ravel().tolist())}
    out = []
    places = [(label, site, i) for label, site in wanted for i in at]
    for n, (label, site, i) in enumerate(places):
        top = [
            {"id": t, "text": pieces[t], "logit": round(z, 4), "prob": round(p, 6)}
            for t, z, p in zip(
                read.ids[n].tolist(), read.logits[n].tolist(), read.probs[n].tolist(), strict=True
            )
        ]
        out.append({"site": label, "layer": site.layer, "token_index": i, "top": top})
    return out


def _print_lens(m: Model, ids: list[int], lens: list[dict[str, Any]], n_tokens: int) -> None:
    if on_terminal():
        from mia.cli._tables import lens_table

        console().print(
            lens_table(lens, [visible(m.piece(t)) for t in ids], n_tokens, console().width)
        )
        return
    for n, row in enumerate(lens):
        if n % n_tokens == 0:
            head = "" if row["layer"] is None else f"Layer #{row['layer']} "
            print(f"{head}{row['site']}:")
        cells = "|".join(f"{visible(t['text'])} {t['prob']:.2f}" for t in row["top"])
        print(f"{row['token_index']}: {cells}")
