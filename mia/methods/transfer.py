"""Does what was made on one file of a model hold on another: a vector, a sweep.

A vector: Turner et al. 2023 (arXiv 2308.10248) for what steering is, measured as
`mia.methods.steering` does, by KL(unsteered ‖ steered). A sweep (`mia.methods.sweep`) is run again on the
other file, and both maps are correlated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.arrays import Array, norms
from mia.edits import Edit
from mia.errors import FileError
from mia.measure.divergence import KlTo
from mia.measure.losses import log_softmax
from mia.measure.noise import nudge
from mia.notices import notice
from mia.progress import step
from mia.request import Capture, Request
from mia.show.text import rounded, visible
from mia.sites import Site
from mia.steering import Steering

if TYPE_CHECKING:
    from mia.io.runs import Run
    from mia.model import Model
    from mia.ranges import Ranges
    from mia.vectors import Vector


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was made on the base, to be tried on both.

    Attributes:
        steer: a vector, a file of one, or arithmetic with several.
        coeff, layers: how much of it, and at which of its layers; all by default.
        sweep: a document that the command `sweep` wrote, or its file of rows.
    """

    steer: Vector | str | None = None
    coeff: float = 1.0
    layers: Ranges | None = None
    sweep: str | Path | None = None


@dataclass(frozen=True)
class Steered:
    """What a vector does to one model, means over the scored tokens.

    Attributes:
        kl: KL(unsteered ‖ steered), in nats.
        floor: the KL of a change by 1e-5 at the vector's first layer.
        norm: |c·v| over the length of the rows that it is added to, the mean over its layers too.
    """

    kl: float
    floor: float
    norm: float

    def document(self) -> dict[str, Any]:
        return {
            "kl": rounded(self.kl, 8),
            "noise_floor": rounded(self.floor, 10),
            "norm": rounded(self.norm, 8),
        }


@dataclass(frozen=True, eq=False)
class VectorTransfer:
    """What a vector does to both models.

    Attributes:
        name, coeff, layers: of the vector.
        correlation: of the changes of all log-probabilities in a with those in b, the mean over tokens;
            None if there are none.
        same_top: the share of tokens after which both steered models say the same.
    """

    name: str
    coeff: float
    layers: list[int]
    a: Steered
    b: Steered
    correlation: float | None
    same_top: float

    def document(self) -> dict[str, Any]:
        return {
            "vector": self.name,
            "coeff": self.coeff,
            "layers": self.layers,
            "a": self.a.document(),
            "b": self.b.document(),
            "correlation": None if self.correlation is None else rounded(self.correlation),
            "same_top": rounded(self.same_top),
        }

    def lines(self) -> list[str]:
        text = "-" if self.correlation is None else f"{self.correlation:.4f}"
        return [
            f"steered by {self.coeff:g} * {visible(self.name)}: "
            f"KL from the unsteered A {self.a.kl:.4g} nats, B {self.b.kl:.4g} "
            f"(noise floor {self.a.floor:.1g}, {self.b.floor:.1g})",
            f"its length over the residual's: A {self.a.norm:.3f}, B {self.b.norm:.3f}",
            f"correlation of what changes {text}; same top token in {100 * self.same_top:.1f} %",
        ]


def vector_on_both(
    a: Model,
    b: Model,
    tokens: Sequence[int],
    positions: Sequence[int],
    vector: Vector | str,
    *,
    coeff: float = 1.0,
    layers: Ranges | None = None,
) -> VectorTransfer:
    """What adding a vector does to both models.

    Args:
        tokens: token ids of a text.
        positions: those whose next-token distributions are compared.
        vector: a `Vector`, a file or arithmetic with several.
        coeff, layers: how much of it, and at which of its layers.

    Raises:
        UsageError: the vector fits neither model, or has none of the layers.
    """
    from mia.vectors.expression import named

    chosen, name = named(vector, a.facts)
    for model in (a, b):
        model.check_vector(chosen, name)
    used = chosen.layers_among(layers, a.n_layer, name)
    steering = Steering(chosen, coeff=coeff, layers=used)
    with step("steering both models"):
        (one, changes, top), (other, changes_b, top_b) = (
            _steered(model, tokens, positions, steering) for model in (a, b)
        )
    both = [(x, y) for x, y in zip(changes, changes_b, strict=True) if x.any() and y.any()]
    pairs = [np.corrcoef(x, y)[0, 1] for x, y in both]
    return VectorTransfer(
        name,
        coeff,
        used,
        one,
        other,
        float(np.mean(pairs)) if pairs else None,
        float((top == top_b).mean()),
    )


def _steered(
    model: Model, tokens: Sequence[int], positions: Sequence[int], steering: Steering
) -> tuple[Steered, Array, Array]:
    """The numbers, the changes of log-probabilities (n_positions, n_vocab), the steered best tokens."""
    edits = steering.edits()
    sites = [Site(e.site.name, e.site.layer) for e in edits if isinstance(e.site, Site)]
    plain, steered, nudged = model.run(
        [
            Request(tokens, (), [Capture(sites, positions)], logits=positions),
            Request(tokens, edits, logits=positions),
            Request(tokens, [Edit(sites[0], nudge(0))], logits=positions),
        ]
    )
    assert plain.logits is not None and steered.logits is not None and nudged.logits is not None
    kl = KlTo(plain.logits)
    added = [float(norms(e.value)) * abs(steering.coeff) for e in edits]
    ratios = [v / norms(plain.captures[s]) for v, s in zip(added, sites, strict=True)]
    numbers = Steered(
        float(kl(steered.logits).mean()),
        abs(float(kl(nudged.logits).mean())),
        float(np.mean(ratios)),
    )
    change = log_softmax(steered.logits) - log_softmax(plain.logits)
    return numbers, change.astype(np.float32), steered.logits.argmax(-1)


# -- sweeps ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SweepTransfer:
    """A saved sweep, and the same on another model.

    Attributes:
        file, metric: of the sweep.
        n: its cells.
        correlation: of the effects in all cells; None if those of one model are all the same.
        floor_a, floor_b: noise floors; NaN if one was not measured.
        n_above: cells above the floor in the saved sweep, and n_kept: those of them that are above the
            floor with the same sign on the other model.
    """

    file: str
    metric: str
    n: int
    correlation: float | None
    floor_a: float
    floor_b: float
    n_above: int
    n_kept: int

    def document(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "metric": self.metric,
            "n": self.n,
            "correlation": None if self.correlation is None else rounded(self.correlation),
            "noise_floor_a": rounded(self.floor_a),
            "noise_floor_b": rounded(self.floor_b),
            "n_above": self.n_above,
            "n_kept": self.n_kept,
        }

    def lines(self) -> list[str]:
        text = "-" if self.correlation is None else f"{self.correlation:.4f}"
        return [
            f"sweep {visible(self.file)}, {self.n} cells: correlation of the effects {text}; noise "
            f"floor A {self.floor_a:.2g}, B {self.floor_b:.2g}",
            f"{self.n_kept} of A's {self.n_above} cells above the floor are above it in B, with the "
            "same sign",
        ]


def _saved_sweep(file: str | Path) -> tuple[dict[str, Any], Run]:
    """A sweep's document and the run that made it."""
    from mia.io.runs import parse_run
    from mia.methods.replay import read_result
    from mia.methods.sweep import load
    from mia.sweeps.manifest import read_manifest

    if not str(file).lower().endswith(".jsonl"):
        return read_result(file)
    try:
        return load(file).document(), parse_run(read_manifest(file).get("run"))
    except FileError as err:
        raise FileError(f"{file} cannot be replayed: {err}") from err


def sweep_on_other(a: Model, b: Model, file: str | Path) -> SweepTransfer:
    """Runs a saved sweep of `a` on `b` and compares the maps. The sweep opens `b`'s file once more, with
    its adapters.

    Args:
        file: a document that the command `sweep` wrote, or its file of rows.

    Raises:
        FileError: no result of a sweep, one that is not finished, or one that cannot be run again.
        UsageError: it does not fit `b`.
    """
    from mia.io.runs import Replay, Run
    from mia.methods.rerun import command_line, rerun
    from mia.methods.sweep_reports import Sweep

    saved, run = _saved_sweep(file)
    if run.command != "sweep":
        raise FileError(f"{file} is no result of mia sweep, but of mia {visible(run.command)}")
    made_by = {k: (run.model or {}).get(k) for k in ("sha256", "lora")}
    if made_by != {"sha256": a.facts.sha256, "lora": a.facts.document().get("lora")}:
        notice(f"{visible(str(file))} was made on another model than {a.name}")
    try:
        values = np.array(saved["values"], np.float64) - float(saved["unchanged"])
        floor = saved["noise_floor"]
        metric = str(saved["metric"])
    except (KeyError, TypeError, ValueError) as err:
        raise FileError(f"{file} is no whole result of mia sweep: {err!r:.60}") from err
    if not np.isfinite(values).all():
        raise FileError(f"{file} has not all cells of its sweep: finish it, or merge its shards")
    adapters = [f"{adapter.path}={adapter.scale}" for adapter in b.adapters]
    read = Run(files=dict(run.files))
    for adapter in b.adapters:
        read.reads(adapter.path)
    run = replace(run, arguments={**run.arguments, "lora": adapters or None}, files=read.files)
    again = rerun(command_line(run, str(b.path)), Replay(of=run, any_model=True))
    assert isinstance(again, Sweep)
    if values.shape != again.effect.shape:
        raise FileError(f"{file} has {values.shape} cells, and {again.effect.shape} on {b.name}")
    x, y = values.ravel(), again.effect.ravel()
    floor_a = float("nan") if floor is None else float(floor)
    above, above_b = np.abs(x) > np.nan_to_num(floor_a), again.above_floor.ravel()
    varied = bool(np.ptp(x) and np.ptp(y))
    return SweepTransfer(
        str(file),
        metric,
        x.size,
        float(np.corrcoef(x, y)[0, 1]) if varied else None,
        floor_a,
        again.floor,
        int(above.sum()),
        int((above & above_b & (np.sign(x) == np.sign(y))).sum()),
    )
