"""The report of a comparison of two files: tensors, layers, ends and blame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.measure.divergence import Divergence, Mean
from mia.ranges import compact
from mia.show.report import Report
from mia.show.text import columns, rounded, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.generation import Token
    from mia.io.provenance import ModelFacts
    from mia.methods.blame import Blame, Blamed
    from mia.methods.transfer import SweepTransfer, VectorTransfer
    from mia.models.tensor_diff import TensorPair

#: places that the text lists by blame
LISTED = 10


@dataclass(frozen=True, kw_only=True)
class LayerDiff:
    """How far the models' residuals behind a block are apart, over the scored tokens.

    Attributes:
        cosine, cosine_worst: of both models' rows, the mean and the smallest.
        error, error_worst: |b - a| / |a|, the mean and the largest.
        lens_kl: KL(a ‖ b) of the logit lens, in nats; lens_same: the share of tokens whose best lens
            token is the same. None if the lens was not read.
    """

    layer: int
    cosine: float
    cosine_worst: float
    error: float
    error_worst: float
    lens_kl: float | None
    lens_same: float | None

    def document(self) -> dict[str, Any]:
        values = asdict(self)
        layer = values.pop("layer")
        return {
            "layer": layer,
            **{k: None if v is None else rounded(v, 8) for k, v in values.items()},
        }


@dataclass(frozen=True, eq=False)
class DiffReport(Report):
    """Two files of one model.

    Attributes:
        facts, other: of the base a, and of b.
        tokens: of the text.
        window, n_windows: tokens of a window, and how many were read.
        whole: whether all tokens were scored, not the second half of each window.
        n_lens: tokens at which the lens was read.
        end: what llama.cpp's tool says of the predictions.
        layers: one for each block.
        tensors: every tensor of both files.
        blame: where the difference comes in; None if it was not asked.
        steered, swept: whether a vector and a sweep of the base hold on b; None if there are none.
        k: how many places the text lists.
    """

    facts: ModelFacts
    other: ModelFacts
    tokens: Sequence[Token]
    window: int
    n_windows: int
    whole: bool
    n_lens: int
    end: Divergence
    layers: list[LayerDiff]
    tensors: list[TensorPair]
    blame: Blame | None
    steered: VectorTransfer | None
    swept: SweepTransfer | None
    k: int = LISTED

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "other": self.other.document(),
            "tokens": [t.document() for t in self.tokens],
            "window": self.window,
            "n_windows": self.n_windows,
            "scored": "all" if self.whole else "second half of each window",
            "end": self.end.document(),
            "n_lens": self.n_lens,
            "layers": [layer.document() for layer in self.layers],
            "tensors": {
                "n": len(self.tensors),
                "n_same": sum(t.same is True for t in self.tensors),
                "bytes_a": sum(t.bytes_a for t in self.tensors),
                "bytes_b": sum(t.bytes_b for t in self.tensors),
                "list": [t.document() for t in self.tensors],
            },
            "blame": None if self.blame is None else self.blame.document(),
            **{
                name: made.document()
                for name, made in (("steered", self.steered), ("swept", self.swept))
                if made is not None
            },
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record for each layer, with its blame if there is one."""
        blamed = {} if self.blame is None else {b.layer: b for b in self.blame.rows}
        out = []
        for layer in self.layers:
            row: dict[str, Any] = asdict(layer)
            if (b := blamed.get(layer.layer)) is not None:
                row |= {k: v for k, v in asdict(b).items() if k not in ("place", "layer")}
            out.append(row)
        return out

    # -- text ----------------------------------------------------------------------

    def plain(self) -> str:
        parts = [
            self._summary(),
            self._tensor_summary(),
            *_tensor_lines(self.tensors),
            "",
            self._layer_title(),
            columns(_LAYER_TITLES, [_layer_cells(x) for x in self.layers]),
        ]
        if self.blame is not None:
            shown = self.blame.ranked()[: self.k]
            parts += ["", self._blame_title(self.blame)]
            cells = [_blame_cells(x, self.blame) for x in shown]
            parts += [columns(_BLAME_TITLES, cells)]
            parts += _blame_notes(self.blame)
        made = self._made_lines()
        parts += ["", *made] if made else []
        return "\n".join(parts)

    def table(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        lines = [self._summary(), self._tensor_summary(), *_tensor_lines(self.tensors)]
        parts: list[RenderableType] = [
            Text("\n".join(lines)),
            _rich_table(self._layer_title(), _LAYER_TITLES, map(_layer_cells, self.layers)),
        ]
        if self.blame is not None:
            shown = self.blame.ranked()[: self.k]
            title = self._blame_title(self.blame)
            cells = [_blame_cells(x, self.blame) for x in shown]
            parts.append(_rich_table(title, _BLAME_TITLES, cells))
            parts += [Text(line) for line in _blame_notes(self.blame)]
        parts += [Text(line) for line in self._made_lines()]
        return Group(*parts)

    def plot(self, path: str | Path) -> None:
        """Draws the residual's error and the lens's KL by layer, and the blame as bars."""
        from mia.show import plots
        from mia.show.plots import Line, Panel

        x = [layer.layer for layer in self.layers]
        errors = [
            Line(name="residual, mean", x=x, y=[layer.error for layer in self.layers]),
            Line(name="residual, worst token", x=x, y=[layer.error_worst for layer in self.layers]),
        ]
        shown = [Panel(lines=errors, y_label="|B - A| / |A|", log=True)]
        if self.n_lens:
            kl = [layer.lens_kl for layer in self.layers]
            lens = Line(name="logit lens", x=x, y=np.array(kl, np.float64))
            shown.append(Panel(lines=[lens], y_label="KL(A ‖ B), nats", log=True))
        if self.blame is not None:
            rows = [r for r in self.blame.rows if r.layer is not None]
            alone = np.array([r.alone for r in rows], np.float64)
            bars = Line(name="B's block alone in A", x=x, y=alone)
            shown.append(Panel(lines=[bars], y_label="KL, nats", bars=True))
        names = f"A: {_named(self.facts)} · B: {_named(self.other)}"
        plots.save(plots.panels(shown, title=names, x_label="layer"), path)

    def _made_lines(self) -> list[str]:
        made = (self.steered, self.swept)
        return [line for transfer in made if transfer is not None for line in transfer.lines()]

    def _summary(self) -> str:
        n, end = len(self.end.positions.kl), self.end
        windows = f"{self.n_windows} windows of {self.window} tokens, the second half of each"
        if self.whole:
            windows = f"{_count(len(self.tokens), 'token')}, all of them (fewer than two windows)"
        lines = [
            f"A: {_named(self.facts)}   B: {_named(self.other)}",
            f"{windows} scored: {_count(n, 'position')}",
            f"KL(A ‖ B)   {end.kl} nats, at most {end.largest:.6f}",
            f"same top    {_percent(end.same_top)}",
        ]
        p_a, p_b, ratio, change = end.base_perplexity, end.perplexity, end.log_ratio, end.p_change
        if p_a is not None and p_b is not None and ratio is not None and change is not None:
            rms = end.p_change_rms or 0.0
            lines += [
                f"perplexity  A {p_a}, B {p_b}; ln(B / A) {ratio}",
                f"Δp          {_percent(change)}, root mean square {100 * rms:.3f} %",
            ]
        return "\n".join(lines)

    def _tensor_summary(self) -> str:
        size_a, size_b = (sum(getattr(t, f"bytes_{x}") for t in self.tensors) for x in "ab")
        same = sum(t.same is True for t in self.tensors)
        unread = sum(t.same is None for t in self.tensors)
        text = f"{len(self.tensors)} tensors, {size_a / 1e6:,.1f} and {size_b / 1e6:,.1f} MB: "
        text += f"{same} are the same to the bit"
        text += f", {unread} of the same type were not read" if unread else ""
        adapted = self.facts.lora or self.other.lora
        return text + ("; of the files, without adapters" if adapted else "")

    def _layer_title(self) -> str:
        n = len(self.end.positions.kl)
        lens = f"; the lens at {self.n_lens} of them" if self.n_lens else ""
        return f"residual behind each block, over {_count(n, 'token')}{lens}"

    def _blame_title(self, blame: Blame) -> str:
        text = (
            f"where the difference comes in: KL {blame.kl:.3g} nats over {blame.n_scored} of the "
        )
        text += f"first {blame.n_tokens} tokens"
        text += f"; noise floor {blame.floor_a:.2g} (alone)"
        if np.isnan(blame.floor_b):
            return text
        return f"{text}, {blame.floor_own:.2g} (own error), {blame.floor_b:.2g} (share, attn, mlp)"


_LAYER_TITLES = ["layer", "|B-A|/|A|", "worst", "cosine", "worst", "lens KL", "lens top"]
_BLAME_TITLES = ["place", "alone", "own error", "patched", "share", "attn", "mlp"]


def _layer_cells(x: LayerDiff) -> list[str]:
    return [
        str(x.layer),
        f"{x.error:.2e}",
        f"{x.error_worst:.2e}",
        f"{x.cosine:.6f}",
        f"{x.cosine_worst:.6f}",
        "-" if x.lens_kl is None else f"{x.lens_kl:.2e}",
        "-" if x.lens_same is None else f"{100 * x.lens_same:.1f} %",
    ]


def _blame_cells(x: Blamed, blame: Blame) -> list[str]:
    """Cells of numbers within the noise floor are blank."""
    floor = float(np.nan_to_num(blame.floor_b))

    def signed(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:+.2e}" if abs(value) > floor else ""

    alone = "-"
    if x.alone is not None:
        alone = f"{x.alone:.2e}" if x.alone > blame.floor_a else ""
    own = "-"
    if x.own_error is not None:
        own = f"{x.own_error:.2e}" if x.own_error > np.nan_to_num(blame.floor_own) else ""
    return [
        x.place,
        alone,
        own,
        "-" if x.patched is None else f"{x.patched:.2e}",
        *map(signed, (x.share, x.attn, x.mlp)),
    ]


def _blame_notes(blame: Blame) -> list[str]:
    """Which place is named first, and what may be said against it."""
    first = blame.ranked()[0]
    if (first.alone or 0.0) <= blame.floor_a:
        return ["no block alone moves the predictions by more than the noise floor"]
    notes = [f"first: {first.place}, {first.alone:.2e} nats alone"]
    coarsest = blame.coarsest()
    if coarsest is not None and coarsest.place != first.place:
        notes.append(f"largest error of its own: {coarsest.place}, {coarsest.own_error:.2e}")
    return notes


def _tensor_lines(tensors: Sequence[TensorPair]) -> list[str]:
    """The tensors that differ, those of one role and one pair of types together."""
    groups: dict[tuple[str, str, str], list[TensorPair]] = {}
    for t in tensors:
        if t.differs:
            groups.setdefault((t.role, t.type_a, t.type_b), []).append(t)
    if not groups:
        return []
    cells = []
    for (role, type_a, type_b), group in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1:])):
        layers = [t.layer for t in group if t.layer is not None]
        errors = [t.error for t in group if t.error is not None]
        sizes = (sum(getattr(t, f"bytes_{x}") for t in group) / 1e6 for x in "ab")
        types = " -> ".join(t or "none" for t in (type_a, type_b))
        cells.append(
            [
                visible(role),
                compact(sorted(layers)) if layers else "-",
                type_a if type_a == type_b else types,
                " -> ".join(f"{size:.2f}" for size in sizes),
                f"{max(errors):.1e}" if errors else "-",
            ]
        )
    return [columns(["tensor", "layers", "type", "MB", "|B-A|/|A| at most"], cells)]


def _named(facts: ModelFacts) -> str:
    """A model's name, and the adapters that were added to it."""
    scales = (f"{a.scale:g} * " * (a.scale != 1) + a.name for a in facts.lora)
    return visible(" + ".join([facts.name, *scales]))


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _percent(mean: Mean) -> str:
    error = "" if mean.error is None else f" ± {100 * mean.error:.3f}"
    return f"{100 * mean.value:.3f} %{error}"


def _rich_table(title: str, titles: Sequence[str], rows: Any) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, header_style="bold")
    for i, name in enumerate(titles):
        table.add_column(Text(name), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
