"""What there is: the tokens of a prompt, the sites of a model, the nodes of its graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mia.show.report import Report
from mia.show.text import visible
from mia.sites import KINDS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.model import Model


@dataclass(frozen=True, eq=False)
class Tokens(Report):
    """The tokens of a prompt, and whether it starts with a BOS."""

    facts: ModelFacts
    tokens: Sequence[Token]
    bos: bool

    def document(self) -> dict[str, Any]:
        return {"model": self.facts.document(), "tokens": self.rows(), "bos": self.bos}

    def rows(self) -> list[dict[str, Any]]:
        return [t.document() for t in self.tokens]

    def plain(self) -> str:
        return "\n".join(f"{t.index:4d} {t.id:7d}  {visible(t.text)}" for t in self.tokens)


def tokens(model: Model, prompt: str | Sequence[int], *, bos: bool | None = None) -> Tokens:
    """Index, id and text of every token of a prompt."""
    ids = model.ids(prompt, bos=bos)
    return Tokens(model.facts, model.token_rows(ids), model.has_bos(ids))


# -- sites -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sites(Report):
    """Every kind of site that a model has: names, shape of one token's row, layers, node."""

    facts: ModelFacts
    sites: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        return {"model": self.facts.document(), "sites": self.sites}

    def rows(self) -> list[dict[str, Any]]:
        return self.sites

    def plain(self) -> str:
        return _rendered(self.table(240), 240)

    def table(self, width: int) -> RenderableType:
        from rich.table import Table

        # what does not fit is left out whole, from the right
        titles = ["site", "llama.cpp", "one token's row", "layers", "TransformerLens", "node", ""]
        n = next((n for n, least in ((7, 160), (6, 100), (5, 88)) if width >= least), 4)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in titles[:n]:
            table.add_column(title, no_wrap=True)
        for r in self.sites:
            cells = [
                r["site"],
                r["llama.cpp"] or "",
                " × ".join(map(str, r["shape"])),
                "" if r["layers"] is None else "{}-{}".format(*r["layers"]),
                r["transformer_lens"],
                r["node"],
                r["about"],
            ]
            table.add_row(*cells[:n])
        return table


def sites(model: Model) -> Sites:
    """Every kind of site that a model has."""
    topology = model.unfused_topology
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(s.name for s in topology.sites):
        nodes = {s: node for s, node in topology.sites.items() if s.name == name}
        layers = [s.layer for s in nodes if s.layer is not None]
        node = next(iter(nodes.values()))
        kind = KINDS[name]
        shape: list[int | str] = [*node.shape, "n_keys"] if kind.by_key else list(node.shape)
        rows.append(
            {
                "site": name,
                "llama.cpp": kind.llama[0] if kind.llama else None,
                "transformer_lens": kind.spellings("N")[2],
                "shape": shape,
                "layers": [min(layers), max(layers)] if layers else None,
                "node": topology.nodes[node.index].name,
                "about": topology.about(name),
            }
        )
    return Sites(model.facts, rows)


# -- nodes -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Nodes(Report):
    """Every node of a model's graph, in the order of computation."""

    facts: ModelFacts
    nodes: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        return {"model": self.facts.document(), "nodes": self.nodes}

    def rows(self) -> list[dict[str, Any]]:
        return self.nodes

    def plain(self) -> str:
        lines = []
        for n in self.nodes:
            shape = "×".join(map(str, n["shape"]))
            line = (
                f"{n['index']:5d} {n['op']:<16s} {n['type']:<5s} {shape:<16s} {n['name']:<28s} "
                f"{', '.join(n['sources'])}"
            )
            lines.append(line + (f"  = {', '.join(n['sites'])}" if n["sites"] else ""))
        return "\n".join(lines)


def graph(model: Model) -> Nodes:
    """Every node of a model's graph, with flash attention off."""
    topology = model.unfused_topology
    names: dict[int, list[str]] = {}
    for site, node in topology.sites.items():
        names.setdefault(node.index, []).append(str(site))
    nodes = [
        {
            "index": i,
            "name": n.name,
            "op": n.op,
            "type": n.type,
            "shape": list(n.shape),
            "sources": [topology.node(s).name for s in n.src],
            "sites": names.get(i, []),
        }
        for i, n in enumerate(topology.nodes)
    ]
    return Nodes(model.facts, nodes)


def _rendered(table: RenderableType, width: int) -> str:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False).print(table)
    return out.getvalue().rstrip("\n")
