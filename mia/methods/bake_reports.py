"""What `mia bake` reports: what was written, and how it was tested."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mia.bake.checks import Check
from mia.show.report import Report
from mia.show.text import visible

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts

Kind = Literal["lora", "model", "control-vector"]


@dataclass(frozen=True, eq=False)
class BakeReport(Report):
    """What was written, and how it was tested.

    Attributes:
        file, kind: what was written.
        edits: what it does: {site, operator, strength} each.
        strength: of the vector; None for edits.
        tensors: the changed tensors, and the largest rank of a change; 0 for a control vector.
        n_bytes: the file's size.
        checks: on neutral text, and on the prompts.
        notes: what is not exact.
        kl: KL(plain || edit) of each strength, if a budget chose one.
    """

    facts: ModelFacts
    file: str
    kind: Kind
    edits: list[dict[str, Any]]
    strength: float | None
    tensors: int
    rank: int
    n_bytes: int
    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    kl: dict[float, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "file": self.file,
            "kind": self.kind,
            "strength": self.strength,
            "edits": self.edits,
            "tensors": self.tensors,
            "rank": self.rank,
            "bytes": self.n_bytes,
            "checks": self.rows(),
            "notes": self.notes,
            **({"kl": [{"strength": s, "kl": round(k, 6)} for s, k in self.kl.items()]} if self.kl else {}),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        return [c.document() for c in self.checks]

    def plain(self) -> str:
        what = f"{self.tensors} tensors, rank {self.rank}, " if self.tensors else ""
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        lines = [f"{visible(self.file)}: {self.kind}{strength}, {what}{self.n_bytes / 1e3:.0f} kB"]
        for c in self.checks:
            lines += [
                f"{c.texts} ({c.n_texts} texts, {c.n_tokens} tokens), nats per token:",
                f"  KL(plain || edit)   {c.plain_edit:.3g}   what the edit does",
                f"  KL(edit || baked)   {c.edit_baked:.3g}   how far the file is from it",
                f"  KL(plain || baked)  {c.plain_baked:.3g}",
                f"  noise               {c.noise:.3g}   the edit with rows changed by 1e-5",
                f"  same likeliest token as the edit: {c.same_top:.1%}",
            ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
