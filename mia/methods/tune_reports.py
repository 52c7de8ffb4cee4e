"""The report of a search: the settings that were tried, the front, the best, and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.errors import UsageError
from mia.show.report import Report
from mia.show.text import columns, rounded
from mia.steering import Steering
from mia.tuning.pareto import front, hypervolume
from mia.tuning.settings import Trial
from mia.vectors import Vector

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.io.provenance import ModelFacts


@dataclass(frozen=True, eq=False)
class Tuned(Report):
    """Settings of an intervention, their score and their KL.

    Attributes:
        vector: what was tried.
        about: what the document says of the search.
        score_name, unit: what the score is.
        sign: -1 where less of it is better.
        unchanged: the plain model's score, as those of `trials` larger if better.
        score_floor, kl_floor: what changes by 1e-5 moved at most: smaller differences say nothing.
        budget: the KL budget, in nats per token.
        n_settings: how many could have been tried.
    """

    facts: ModelFacts
    vector: Vector
    about: dict[str, Any]
    score_name: str
    unit: str
    sign: int
    unchanged: float
    score_floor: float
    kl_floor: float
    budget: float
    n_settings: int
    trials: list[Trial]

    @cached_property
    def front(self) -> list[Trial]:
        """The trials within the budget that no other is better than, by their KL, as far as they
        are better than the plain model by more than the noise floor."""
        least = self.unchanged + self.score_floor
        return [t for t in front(self.trials) if t.kl <= self.budget and t.score > least]

    @property
    def best(self) -> Trial | None:
        """The last of the front: the best score within the budget; None if there is no front."""
        return self.front[-1] if self.front else None

    @property
    def hypervolume(self) -> float:
        """The area of the front, in units of the score times nats."""
        return hypervolume(self.trials, budget=self.budget, plain=self.unchanged)

    @property
    def failed(self) -> bool:
        return self.best is None

    # -- use -----------------------------------------------------------------------

    def steering(self) -> Steering:
        """The best setting, for `Model.steered`. Raises `UsageError` if there is none."""
        if self.best is None:
            raise UsageError(self._why_none())
        return self.best.setting.steering(self.vector, keep_norm=self.about["normalize"])

    def tuned_vector(self) -> Vector:
        """The vector at the layers of the best setting: times the coefficient if it is added, as it is
        for the other operators. Raises `UsageError` if there is none."""
        steering = self.steering()
        assert self.best is not None
        setting = self.best.setting
        vector = self.vector.at(setting.layers)
        if setting.operator == "add":
            vector = (steering.coeff * vector).renamed(vector.name)
        return vector.with_metadata(
            tuned_operator=setting.operator,
            tuned_coeff=f"{setting.coeff:g}",
            tuned_normalize=str(steering.keep_norm).lower(),
            tuned_score=self.score_name,
            tuned_kl=f"{self.best.kl:.6g}",
            tuned_kl_budget=f"{self.budget:g}",
        )

    def write_best(self, path: str | Path) -> None:
        """Writes `tuned_vector`, layer 0 too, which llama.cpp refuses in a GGUF.

        Raises `UsageError` if there is none, `FileError` if it cannot be written."""
        self.tuned_vector().save(path, layer_zero=True)

    # -- as text, table, document --------------------------------------------------

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            **self.about,
            "unit": self.unit,
            "plain": rounded(self.sign * self.unchanged),
            "noise_floor": {"score": rounded(self.score_floor), "kl": rounded(self.kl_floor)},
            "hypervolume": rounded(self.hypervolume),
            "best": None if self.best is None else self._record(self.best),
            "front": [self._record(t) for t in self.front],
            "trials": [self._record(t) for t in self.trials],
        }

    def _record(self, trial: Trial) -> dict[str, Any]:
        score = self.sign * trial.score
        return {
            **trial.setting.document(),
            "score": rounded(score),
            "change": rounded(score - self.sign * self.unchanged),
            "kl": rounded(trial.kl),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Each trial in the order of the search."""
        on_front = set(map(id, self.front))
        return [
            {
                **self._record(t),
                "within_budget": t.kl <= self.budget,
                "front": id(t) in on_front,
                "best": t is self.best,
            }
            for t in self.trials
        ]

    def plain(self) -> str:
        head, rows = self._front_table()
        return "\n".join([self._title(), columns(head, rows), *self._notes()])

    def table(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        from mia.show.text import safe

        head, rows = self._front_table()
        table = Table(box=None, pad_edge=False)
        for i, title in enumerate(head):
            table.add_column(title, justify="left" if i in (0, len(head) - 1) else "right")
        for row in rows:
            style = "bold" if row[-1] == "best" else None
            table.add_row(*(Text(safe(cell)) for cell in row), style=style)
        return Group(Text(self._title()), table, Text("\n".join(self._notes())))

    def _title(self) -> str:
        unit = f" ({self.unit})" if self.unit else ""
        better = "" if self.sign > 0 else ", less is better"
        return f"{self.score_name}{unit}{better}: plain {self.sign * self.unchanged:.4f}"

    def _front_table(self) -> tuple[list[str], list[list[str]]]:
        """The front as cells."""
        rows = []
        for t in self.front:
            change = t.score - self.unchanged
            rows.append(
                [
                    str(t.setting),
                    f"{self.sign * t.score:.4f}",
                    f"{self.sign * change:+.4f}",
                    f"{t.kl:.4f}",
                    "best" if t is self.best else "",
                ]
            )
        return ["setting", "score", "change", "KL", ""], rows

    def _notes(self) -> list[str]:
        neutral = self.about["neutral"]
        lines = [] if self.best is not None else [self._why_none()]
        lines.append(
            f"{len(self.trials)} of {self.n_settings} settings tried, {len(self.front)} on the "
            f"front within a KL of {self.budget:g}; hypervolume {self.hypervolume:.4g}"
        )
        broken = sum(not t.finite for t in self.trials)
        if broken:
            lines.append(f"{broken} gave numbers that are not finite")
        lines.append(
            f"noise floor: score {self.score_floor:.2g}, KL {self.kl_floor:.2g} "
            f"({neutral['tokens']} tokens of {neutral['text']})"
        )
        return lines

    def _why_none(self) -> str:
        """Why there is no best setting."""
        finite = [t for t in self.trials if t.finite]
        if not finite:
            return "no setting that was tried gives finite numbers"
        least = min(finite, key=lambda t: t.kl)
        if least.kl > self.budget:
            return (
                f"no setting that was tried stays within a KL of {self.budget:g}: "
                f"{least.setting} gives {least.kl:.3g}, the least"
            )
        return (
            f"no setting that was tried within a KL of {self.budget:g} is better than the plain "
            "model by more than the noise floor"
        )

    # -- as a picture --------------------------------------------------------------

    def plot(self, path: str | Path) -> None:
        """Draws score against KL: all that was tried, the front, the budget, the plain model."""
        from mia.show import plots

        finite = [t for t in self.trials if t.finite]
        if not finite:
            raise UsageError(self._why_none())
        unit = f" ({self.unit})" if self.unit else ""
        heights = [self.unchanged, *(t.score for t in self.front)]
        heights.append(heights[-1])
        figure = plots.trade_off(
            {
                name: ([t.kl for t in group], [self.sign * t.score for t in group])
                for name, group in self._groups(finite).items()
            },
            front=(
                [0.0, *(t.kl for t in self.front), self.budget],
                [self.sign * y for y in heights],
            ),
            limit=self.budget,
            marked=None
            if self.best is None
            else (self.best.kl, self.sign * self.best.score, str(self.best.setting)),
            title=f"{self.facts.name} · {self.about['vector']['name']} · "
            f"{len(self.trials)} of {self.n_settings} settings tried",
            x_label=f"mean KL from the plain model on {self.about['neutral']['text']} "
            "(nats per token)",
            y_label=f"{self.score_name}{unit}",
        )
        plots.save(figure, path)

    @staticmethod
    def _groups(trials: list[Trial]) -> dict[str, list[Trial]]:
        """The trials of each operator and width."""
        groups: dict[str, list[Trial]] = {}
        for t in trials:
            n = len(t.setting.layers)
            many = "s" if n > 1 else ""
            groups.setdefault(f"{t.setting.operator}, {n} layer{many}", []).append(t)
        return dict(sorted(groups.items()))
