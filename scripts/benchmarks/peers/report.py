"""The tables of `scripts/bench peers`, as Markdown that docs/performance.md takes as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.peers.rounds import Table, Timing, spread


@dataclass(frozen=True)
class Process:
    """A whole process, from start to exit, per round."""

    job: str
    name: str
    wall: list[float]
    cpu: list[float]
    megabytes: list[float]


def markdown(
    conditions: Mapping[str, Any], tables: Sequence[Table], processes: Sequence[Process]
) -> str:
    parts = [header(conditions), summary(tables)]
    parts += [detail(table) for table in tables]
    if processes:
        parts.append(of_processes(processes))
    return "\n\n".join(parts)


#: what `put_into` writes between
BEGIN, END = "<!-- scripts/bench peers -->", "<!-- end of scripts/bench peers -->"


def put_into(page: str, tables: str) -> str:
    """A page of the docs with the tables between its two marks.

    Raises `SystemExit` if it has none."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"bench peers: the page needs the lines {BEGIN} and {END}, once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def header(conditions: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in sorted(conditions["versions"].items()))
    return (
        f"{conditions['model']} on {conditions['machine']} ({conditions['cores']} cores, "
        f"{conditions['instructions']}), one thread each, {conditions['rounds']} rounds. "
        f"{versions}. Load of the machine at the start: {conditions['load']:.1f}; the run took "
        f"{conditions['minutes']:.0f} minutes."
    )


def summary(tables: Sequence[Table]) -> str:
    """Jobs against contestants: their CPU time over mia's, medians. The expert beside each type
    of mia, the libraries beside the given file and F16."""
    types: dict[str, str] = {}
    for t in (t for table in tables for t in table.timings if t.library == "mia"):
        types.setdefault(t.type, t.name.removeprefix("mia "))
    experts, libraries = list[_Column](), list[_Column]()
    everyone = dict.fromkeys((t.name, t.library) for table in tables for t in table.timings)
    for name, library in everyone:
        if library == "expert":
            experts += [(f"{name} / {types[k]}", name, k) for k in types]
        elif library not in ("mia", "llama.cpp"):
            libraries += [(f"{name} / {types[k]}", name, k) for k in types if k in _BESIDE]
    return "\n\n".join(_grid(tables, columns) for columns in (experts, libraries) if columns)


#: types of mia that the libraries stand beside in the summary
_BESIDE = ("given", "f16")
#: heading, contestant, type of mia
_Column = tuple[str, str, str]


def _grid(tables: Sequence[Table], columns: Sequence[_Column]) -> str:
    lines = [_row(["job", *(heading for heading, *_ in columns)]), _rule(1 + len(columns))]
    for table in tables:
        cells = []
        for _, name, kind in columns:
            them = next((t for t in table.timings if t.name == name), None)
            us = next((t for t in table.mias if t.type == kind), None)
            if them is None:
                cells.append("–")
            elif them.error:
                cells.append("wrong" if them.error.startswith("wrong") else "failed")
            elif us is None:
                cells.append("–")
            else:
                cells.append(_bold(median(table.ratios(them, us))))
        lines.append(_row([table.job.title, *cells]))
    return "\n".join(lines)


def detail(table: Table) -> str:
    """Each contestant of a job: seconds, ratios with their spread, and how right it is."""
    mias = table.mias
    part = "" if table.part == 1 else f" 1/{table.part:g} of it done, scaled up."
    lines = [
        f"**{table.job.title}.**{part} Bound by {table.job.bound}.",
        "",
        _row(
            [
                "",
                "CPU s",
                "wall s",
                *(f"/ {m.name}" for m in mias),
                "difference, agreement",
                "part done",
            ]
        ),
        _rule(5 + len(mias)),
    ]
    for t in table.timings:
        right = "" if t.check is None else str(t.check)
        if t.error:
            cells = ["", "", *("" for _ in mias), t.error, ""]
        else:
            ratios = [spread(table.ratios(t, m)) if t is not m else "1" for m in mias]
            part = "" if t.scale == 1 else f"1/{t.scale:.3g}"
            cells = [_seconds(t.cpu), _seconds(t.wall), *ratios, right, part]
        lines.append(_row([t.name, *cells]))
    return "\n".join(lines)


def of_processes(processes: Sequence[Process]) -> str:
    lines = ["**Whole processes**, from start to exit.", ""]
    lines += [_row(["", "wall s", "CPU s", "peak MB"]), _rule(4)]
    for p in processes:
        cells = [_seconds(p.wall), _seconds(p.cpu), f"{median(p.megabytes):.0f}"]
        lines.append(_row([f"{p.job}: {p.name}", *cells]))
    return "\n".join(lines)


def document(
    conditions: Mapping[str, Any], tables: Sequence[Table], processes: Sequence[Process]
) -> dict[str, Any]:
    """All of it as JSON."""
    return {
        **conditions,
        "jobs": [
            {
                "name": table.job.name,
                "title": table.job.title,
                "part": table.part,
                "contestants": [_timing(t) for t in table.timings],
            }
            for table in tables
        ],
        "processes": [asdict(p) for p in processes],
    }


def _timing(t: Timing) -> dict[str, Any]:
    return asdict(t)


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.3g}"


def _bold(ratio: float) -> str:
    """Below 1 mia is behind: bold."""
    text = f"{ratio:.3g}" if ratio >= 0.995 else f"{ratio:.2f}"
    return text if ratio >= 0.995 else f"**{text}**"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(n: int) -> str:
    return "|" + "|".join(["---"] + ["---:"] * (n - 1)) + "|"
