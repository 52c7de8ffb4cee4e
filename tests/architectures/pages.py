"""docs/models.md and docs/architectures.md, from the results of the last comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mia.sites import KINDS, NAMES, OF_EXPERTS

from .recipes import LEFT_OUT
from .results import CHECKS, OPERATORS, Cell, Row, load

DOCS = Path(__file__).parents[2] / "docs"
COMMAND = "scripts/make_architectures"
#: columns of the overview: what they sum up
_OVERVIEW = {
    "hidden states": ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm", "logits"),
    "parts": ("attn_norm", "mlp_norm", "attn_out", "mlp_out"),
    "heads": ("q", "k", "v", "head_out"),
    "patterns": ("attn_scores", "attn_pattern"),
}
_VERDICTS = {"missing": "is missing", "differs": "differs", "unseen": "is not compared"}
_VERBS = {"zero": "ablate", "add": "steer", "patch": "patch", "scale": "scale"}


def pages(rows: Sequence[Row]) -> dict[Path, str]:
    """Every page's text by its file."""
    return {DOCS / "models.md": _models(rows), DOCS / "architectures.md": _architectures(rows)}


def write() -> None:
    """Writes the pages from the last results."""
    for path, text in pages(load()).items():
        path.write_text(text, encoding="utf-8")


# -- docs/models.md ------------------------------------------------------------------------


def _models(rows: Sequence[Row]) -> str:
    wrong = [r for r in rows if r.wrong]
    columns = [*_OVERVIEW, *_VERBS.values(), *CHECKS]
    table = [
        [r.name, f"`{r.architecture}`"]
        + [_sum(r.sites[n] for n in names) for names in _OVERVIEW.values()]
        + [_sum([*r.operators[op].values(), *_no_residual(r)]) for op in OPERATORS]
        + [_together(r) if check == "together" else _mark(r.checks[check]) for check in CHECKS]
        for r in rows
    ]
    columns[-1] = "shared prefixes"
    state = (
        "Every number that mia gives in them is right."
        if not wrong
        else f"{len(wrong)} of them have a cell that is WRONG."
    )
    return "\n".join(
        [
            "# Which models work",
            "",
            "Any decoder that llama.cpp runs should work. These were tried: tiny random float32 models of "
            f"{len({r.architecture for r in rows})} of llama.cpp's architectures ({len(rows)} "
            "models), made by transformers' own classes, converted by llama.cpp's own converter, and "
            f"compared with transformers on the same weights. {state} "
            "[The numbers](architectures.md) stand on a page of their own.",
            "",
            f"`{COMMAND}` makes the models, compares them, and writes this page.",
            "",
            "A cell is **ok** if all that mia offers is right; **some** if mia does not offer "
            "everything that the reference has, or defines it otherwise, and what it offers is right; "
            "**–** if mia does not offer it; empty if the architecture has no such thing. What is "
            "missing, and why, is [said for each model](architectures.md#what-is-missing-or-different).",
            "",
            *_table(["model", "in llama.cpp", *columns], table),
            "",
            "**Parts** are the norms, and what attention and MLP add. **Shared prefixes**: requests "
            "together give what they give alone. “one by one” means that nothing is shared: a "
            "recurrent state cannot be cut at a token.",
            "",
            "## Left out",
            "",
            *[f"- {name}: {why}" for name, why in LEFT_OUT.items()],
            "",
        ]
    )


def _no_residual(row: Row) -> list[Cell]:
    """The residual at a block's end, if mia does not offer it: then it is not changed there either."""
    cell = row.sites["resid_post"]
    return [cell] if cell.status == "missing" else []


def _sum(cells: Iterable[Cell]) -> str:
    states = [c.status for c in cells if c.status not in ("none", "unseen")]
    if "WRONG" in states:
        return "WRONG"
    if not states:
        return ""
    if "ok" not in states:
        return "–"
    return "ok" if set(states) == {"ok"} else "some"


def _mark(cell: Cell) -> str:
    return {"ok": "ok", "WRONG": "WRONG", "none": ""}.get(cell.status, "–")


def _together(row: Row) -> str:
    cell = row.checks["together"]
    return "one by one" if cell.status == "ok" and "one by one" in cell.note else _mark(cell)


# -- docs/architectures.md -----------------------------------------------------------------


def _architectures(rows: Sequence[Row]) -> str:
    cells = [c for r in rows for c in r.cells().values()]
    count = {s: sum(c.status == s for c in cells) for s in ("ok", "differs", "missing", "WRONG")}
    out = [
        "# Architectures: every site and operator beside transformers",
        "",
        f"{len(rows)} tiny random float32 models of {len({r.architecture for r in rows})} of "
        "llama.cpp's architectures. Each has 4 blocks, norms and biases that are random too, fewer "
        "key heads than query heads and a head_dim of its own where the architecture allows it. The "
        "reference is transformers, on the same weights, in float32.",
        "",
        f"`{COMMAND}` makes the models, compares them and writes this page; "
        f"`{COMMAND} llama gptneox` compares two; CI runs all, and fails if a cell has "
        "changed its state. The recipes are in `tests/architectures/recipes.py`.",
        "",
        f"{count['ok']:,} numbers agree, {count['differs']} sites are something else by definition, "
        f"{count['missing']} are missing, **{count['WRONG']} are wrong**.",
        "",
        "A number is the largest error over tokens, dimensions and blocks, divided by the largest "
        "number of the reference where that is above 1. It may be 1e-4, and 2e-3 in models with "
        "GELU (marked g), which llama.cpp looks up in a table of half floats. “differs”, “–” (missing) "
        "and “?” (not compared) are explained [below](#what-is-missing-or-different); an empty cell is what the "
        "architecture does not have.",
        "",
        "## What is read",
        "",
        *_numbers(rows, [n for n in NAMES if _used(rows, n)], lambda r: r.sites),
        "",
        "## What an edit does",
        "",
        "The error of all logits after one edit at three tokens in the middle of the prompt, in the "
        "second block and in the last one that has the site.",
        "",
    ]
    for op in OPERATORS:
        text = {
            "zero": "the site is set to 0 (ablation)",
            "add": "a random vector is added (steering)",
            "patch": "the site is set to what it is for another prompt (activation patching)",
            "scale": "the site is halved",
        }[op]
        sites = [n for n in NAMES if any(n in r.operators.get(op, {}) for r in rows)]
        if not sites:
            continue
        out += [f"### {_VERBS[op].capitalize()}: {text}", ""]
        out += [*_numbers(rows, sites, lambda r, op=op: r.operators[op]), ""]
    out += [
        "## The rest",
        "",
        "- **lens**: the logit lens after every block, against transformers with that block's "
        "residual in place of the last block's.",
        "- **generation**: 8 greedy tokens; **steered generation**: with a vector added in the second "
        "block at every token. The number is how far apart the logits of two different tokens lie; 0 "
        "if all tokens are the same.",
        "- **attribution**: the shares of the last logit add up to it.",
        "- **together**: four requests with a common prefix, one with a late edit and one that "
        "generates, in one run and each alone.",
        "",
        *_numbers(rows, CHECKS, lambda r: r.checks),
        "",
        "## What is missing or different",
        "",
        *_reasons(rows),
        "",
    ]
    return "\n".join(out)


def _used(rows: Sequence[Row], name: str) -> bool:
    return any(r.sites.get(name, Cell("none")).status != "none" for r in rows)


def _numbers(rows: Sequence[Row], columns: Sequence[str], cells: object) -> list[str]:
    assert callable(cells)
    body = []
    for r in rows:
        own = cells(r)
        body.append(
            [r.name + (" (g)" if r.gelu else "")]
            + [_number(own.get(c, Cell("none"))) for c in columns]
        )
    return _table(["model", *(f"`{c}`" if c in KINDS else c for c in columns)], body)


def _number(cell: Cell) -> str:
    if cell.status == "ok":
        return "0" if not cell.error else f"{cell.error:.0e}".replace("e-0", "e-")
    return {"none": "", "missing": "–", "unseen": "?"}.get(cell.status, cell.status)


def _reasons(rows: Sequence[Row]) -> list[str]:
    """What is said of cells that are no numbers, and of sites that only some blocks have."""
    said: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        for name, cell in r.cells().items():
            shown = f"`{name}`" if name in KINDS else name
            if cell.status == "WRONG":
                said.setdefault((f"**{shown} is WRONG**", cell.note), []).append(r.name)
            elif cell.status in _VERDICTS:
                what = f"{shown} {_VERDICTS[cell.status]}"
                said.setdefault((what, cell.note), []).append(r.name)
            elif cell.status == "none" and cell.note and name not in OF_EXPERTS:
                said.setdefault((f"no {shown}", cell.note), []).append(r.name)
            elif cell.status == "ok" and cell.note and name in KINDS:
                said.setdefault((shown, cell.note), []).append(r.name)
    return [
        *(
            f"- {what}{': ' + note if note else ''} ({', '.join(names)})"
            for (what, note), names in sorted(said.items())
        ),
        *_places(rows),
    ]


def _places(rows: Sequence[Row]) -> list[str]:
    """The sites that only some blocks have."""
    sites: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        for name, cell in r.sites.items():
            if cell.layers:
                where = ", ".join(map(str, cell.layers))
                sites.setdefault((r.name, where), []).append(f"`{name}`")
    models: dict[tuple[str, str], list[str]] = {}
    for (model, where), names in sites.items():
        models.setdefault((where, ", ".join(names)), []).append(model)
    return [
        f"- only in block {where} of 0 to 3: {names} ({', '.join(of)})"
        for (where, names), of in sorted(models.items())
    ]


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(line)} |" for line in body),
    ]


if __name__ == "__main__":
    write()
