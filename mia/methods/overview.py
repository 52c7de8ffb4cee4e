"""What there is: the tokens of a prompt, the sites of a model, the nodes of its graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mia.ranges import compact
from mia.show.report import Report
from mia.show.text import visible
from mia.sites import KINDS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.model import Model
    from mia.models.claims import Algebra
    from mia.sites import Site


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
        return "\n".join(f"{t.index:4d} {t.id:7d}  {visible(t.label)}" for t in self.tokens)


def tokens(model: Model, prompt: str | Sequence[int], *, bos: bool | None = None) -> Tokens:
    """Index, id and text of every token of a prompt."""
    ids = model.ids(prompt, bos=bos)
    return Tokens(model.facts, model.token_rows(ids), model.has_bos(ids))


# -- sites -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sites(Report):
    """Every kind of site that a model has, and those that it has not.

    Attributes:
        sites: names, shape of one token's row, layers, node; "checked" is "verified" where every
            claim about the site was tested on numbers and held (`mia.models.claims`), else what
            could not be tested; "note" is how the site differs from what its name says elsewhere.
        missing: {site, layers, why} each.
    """

    facts: ModelFacts
    sites: list[dict[str, Any]]
    missing: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        return {"model": self.facts.document(), "sites": self.sites, "missing": self.missing}

    def rows(self) -> list[dict[str, Any]]:
        return self.sites

    def plain(self) -> str:
        return _rendered(self.table(240), 240)

    def table(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        # what does not fit is left out whole, from the right
        titles = [
            "site", "llama.cpp", "one token's row", "layers", "checked", "TransformerLens", "node", "",
        ]  # fmt: skip
        n = next((n for n, least in ((8, 172), (7, 112), (6, 100)) if width >= least), 5)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in titles[:n]:
            table.add_column(title, no_wrap=True)
        for r in self.sites:
            verified = r["checked"] == "verified"
            cells = [
                r["site"],
                r["llama.cpp"] or "",
                " × ".join(map(str, r["shape"])),
                r["in"],
                Text("verified", style="green") if verified else Text("in part", style="yellow"),
                r["transformer_lens"],
                r["node"],
                r["about"],
            ]
            table.add_row(*cells[:n])
        lines = [f"{r['site']}: {r['note']}" for r in self.sites if r["note"]]
        lines += [
            f"{r['site']}: checked in part: {r['checked']}"
            for r in self.sites
            if r["checked"] != "verified"
        ]
        reasons: dict[tuple[str, str], list[str]] = {}
        for m in self.missing:
            reasons.setdefault((_in_layers(m["layers"]), m["why"]), []).append(m["site"])
        lines += [f"no {', '.join(names)}{where}: {why}" for (where, why), names in reasons.items()]
        return Group(table, *map(Text, lines)) if lines else table


def _in_layers(layers: Sequence[int] | None) -> str:
    return "" if layers is None else f" in layers {compact(layers)}"


def sites(model: Model) -> Sites:
    """Every kind of site that a model has, whether it was found to be what it says, and why there
    are no others."""
    topology, checks = model.unfused_topology, model.site_checks
    verified = checks.verified(topology.sites)
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(s.name for s in topology.sites):
        nodes = {s: node for s, node in topology.sites.items() if s.name == name}
        layers = [s.layer for s in nodes if s.layer is not None]
        node = next(iter(nodes.values()))
        kind = KINDS[name]
        shape: list[int | str] = [*node.shape, "n_keys"] if kind.by_key else list(node.shape)
        notes = dict.fromkeys(topology.notes[s] for s in nodes if s in topology.notes)
        rows.append(
            {
                "site": name,
                "llama.cpp": kind.llama[0] if kind.llama else None,
                "transformer_lens": kind.spellings("N")[2],
                "shape": shape,
                "layers": [min(layers), max(layers)] if layers else None,
                "in": compact(layers).replace("..", "-") if layers else "",
                "node": topology.nodes[node.index].name,
                "about": topology.about(name),
                "found": "name" if nodes.keys() & topology.by_name else "structure",
                "checked": "verified" if name in verified else _untested(checks, name, nodes),
                "note": "; ".join(notes),
            }
        )
    by_reason: dict[tuple[str, str], list[int | None]] = {}
    for site, why in topology.missing.items():
        by_reason.setdefault((site.name, why), []).append(site.layer)
    missing = [
        {
            "site": name,
            "layers": [i for i in layers if i is not None] if len(layers) < model.n_layer else None,
            "why": why,
        }
        for (name, why), layers in by_reason.items()
    ]
    return Sites(model.facts, rows, missing)


def _untested(checks: Algebra, name: str, sites: Iterable[Site]) -> str:
    """What was not tested of a kind of site."""
    if name in checks.untested:
        return checks.untested[name]
    layers = [s.layer for s in sites if s.layer is not None and not checks.is_verified(s)]
    where = _in_layers(layers) if layers else ""
    return f"nothing about it could be tested{where}"


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

    from mia.show.terminal import SafeConsole

    out = io.StringIO()
    SafeConsole(file=out, width=width).print(table)
    return out.getvalue().rstrip("\n")
