"""Changes to a run, as text describes them: patches, ablations, experts, blocked attention, steering.

    changes = Changes(ablate="3.5,4.*", block=["5->0"], steer=["love.gguf"])
    model.generate(prompt, edits=changes.edits(model, model.ids(prompt)))

This is what the commands' options `patch`, `ablate`, `block`, `steer` … make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mia.edits import Edit, Tokens
from mia.errors import UsageError
from mia.ranges import Expert, Experts, Head, Heads, Ranges, other_heads, parse_experts, parse_heads

if TYPE_CHECKING:
    from mia.methods.patching import Mode
    from mia.model import Model

#: what ablated heads give: the words, and how many files each takes
ABLATIONS = {"zero": 0, "mean": 1, "resample": 0, "resample-from": 1}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is changed while a prompt runs.

    Attributes:
        patch: (site, file, from tokens, to tokens) of each patch.
        patch_mode: as in `mia.methods.patching`.
        ablate, select: heads to ablate; heads to keep, the others of their layers ablated.
        ablate_with: what ablated heads give instead: ("zero",), ("mean", file), ("resample",)
            or ("resample-from", file).
        ablate_attention: ablate at the attention weights instead of at head_out.
        ablate_seed: of resampling.
        ablate_experts: experts that the router may not choose; it chooses others.
        zero_experts: experts that are chosen as before, but add nothing.
        force_experts: experts that every token chooses.
        block: "QUERIES->KEYS" of each blocked attention.
        steer: vector files or arithmetic with them, steered by `steer_coeff` at `steer_layers`.
    """

    patch: Sequence[Sequence[str]] = ()
    patch_mode: Mode = "replace"
    ablate: Heads | None = None
    select: Heads | None = None
    ablate_with: str | Sequence[str] | None = None
    ablate_attention: bool = False
    ablate_seed: int = 0
    ablate_experts: Experts | None = None
    zero_experts: Experts | None = None
    force_experts: Experts | None = None
    block: str | Sequence[str] = ()
    steer: str | Sequence[str] = ()
    steer_coeff: float | None = None
    steer_layers: Ranges | None = None

    def __post_init__(self) -> None:
        # one by itself is a list of one
        for name in ("ablate_with", "block", "steer"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, (value,))
        if self.patch and isinstance(self.patch[0], str):
            object.__setattr__(self, "patch", (self.patch,))

    def edits(self, model: Model, tokens: Sequence[int]) -> list[Edit]:
        """All edits, for a prompt of these token ids. Raises `UsageError`."""
        return [*self.prompt_edits(model, tokens), *self.steering(model)[0]]

    def prompt_edits(self, model: Model, tokens: Sequence[int]) -> list[Edit]:
        """The edits of patches, ablations, experts and blocks."""
        from mia.methods.knockout import block_edits, parse_block
        from mia.methods.patching import patch_edits, warn_of_first_tokens

        n = len(tokens)
        edits = []
        for site, file, from_tokens, to_tokens in self.patch:
            edits += patch_edits(
                model,
                site,
                [file],
                n,
                from_tokens=from_tokens,
                to_tokens=to_tokens,
                mode=self.patch_mode,
            )
        warn_of_first_tokens(model, tokens, edits)
        edits += self._ablation_edits(model, tokens)
        edits += self._expert_edits(model)
        for text in self.block:
            edits += block_edits(model, parse_block(text, n, model.n_layer, model.n_head))
        return edits

    def _ablation_edits(self, model: Model, tokens: Sequence[int]) -> list[Edit]:
        sizes = (model.n_layer, model.n_head)
        heads: set[Head] = set()
        if self.ablate is not None:
            heads.update(parse_heads(self.ablate, *sizes, "heads to ablate"))
        if self.select is not None:
            heads.update(other_heads(parse_heads(self.select, *sizes, "heads to keep"), sizes[1]))
        if heads:
            return self.head_ablation(model, tokens, sorted({h.layer for h in heads}))(
                sorted(heads)
            )
        if self.ablate_with is not None or self.ablate_attention:
            raise UsageError("no heads to ablate: set ablate or select")
        return []

    def _expert_edits(self, model: Model) -> list[Edit]:
        if (self.ablate_experts, self.zero_experts, self.force_experts) == (None, None, None):
            return []
        from mia.methods.expert_ablation import expert_counts, expert_edits

        counts = expert_counts(model)

        def experts(given: Experts | None, what: str) -> list[Expert]:
            return [] if given is None else parse_experts(given, model.n_layer, counts, what)

        return expert_edits(
            model,
            exclude=experts(self.ablate_experts, "experts to ablate"),
            silence=experts(self.zero_experts, "experts to zero"),
            force=experts(self.force_experts, "experts to force"),
        )

    def head_ablation(
        self,
        model: Model,
        tokens: Sequence[int],
        layers: Sequence[int],
        positions: Tokens = None,
    ) -> Callable[[Sequence[Head]], list[Edit]]:
        """From heads to the edits that ablate them as `ablate_with` and `ablate_attention` say.

        Args:
            layers: those of all heads that will be asked for.
            positions: the tokens where heads are ablated; None for all.
        """
        import numpy as np

        from mia.io.activations import load
        from mia.methods import head_ablation
        from mia.sites import Site

        how, *files = list(self.ablate_with or ("zero",))
        if ABLATIONS.get(how) != len(files):
            known = ", ".join(f"{k} FILE" if n else k for k, n in ABLATIONS.items())
            raise UsageError(f"ablation with {how!r} is not known; known: {known}")
        if self.ablate_attention:
            if how != "zero":
                raise UsageError(f"attention weights are ablated by zeroing them, not by {how}")
            return lambda heads: head_ablation.pattern_edits(heads, tokens=positions)
        source = None
        if files:
            activations = load(files[0])
            model.check_activations(activations)
            source = {layer: activations.at(Site("head_out", layer)) for layer in layers}
        elif how == "resample":
            source = head_ablation.head_outputs(model, tokens, layers)
        rng = np.random.default_rng(self.ablate_seed)
        return lambda heads: head_ablation.head_edits(
            model,
            heads,
            how=how.removesuffix("-from"),
            source=source,
            tokens=positions,
            n_tokens=len(tokens),
            rng=rng,
        )

    def without_ablation_method(self) -> Changes:
        """The same changes without how heads are ablated."""
        return replace(self, ablate_with=None, ablate_attention=False)

    def steering(self, model: Model) -> tuple[list[Edit], dict[str, Any]]:
        """The edits of `steer`, and what a document says of them."""
        from mia.vectors.expression import read

        if not self.steer:
            if self.steer_coeff is not None or self.steer_layers is not None:
                raise UsageError("steer_coeff and steer_layers need steer")
            return [], {}
        coeff = 1.0 if self.steer_coeff is None else self.steer_coeff
        edits, described = [], []
        for text in self.steer:
            vector = read(text, model.facts)
            model.check_vector(vector, text)
            layers = vector.layers_among(self.steer_layers, model.n_layer, text)
            edits += vector.edits(coeff=coeff, layers=layers)
            described.append({"vector": text, "site": vector.site, "layers": layers})
        return edits, {"steer": described, "coeff": coeff}
