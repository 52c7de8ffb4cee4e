"""A prompt continued under steering, beside the unsteered run.

    print(steer(Model("smollm2"), "The film was", "love.gguf", coeffs=[1, 2], n_predict=12))

`steer` shows the continuations, `explain` says which path each edit takes. Sources: see
`mia.steering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mia.edits import WITHOUT_COEFF, Edit, Tokens
from mia.errors import UsageError
from mia.generation import Generation, Token
from mia.methods import steering
from mia.methods.steering import CANDIDATES, CoefficientChoice, choose_coefficient
from mia.notices import notice
from mia.progress import Progress, step
from mia.ranges import Ranges, as_text, parse_tokens
from mia.request import Request, Result, Sampling
from mia.show.report import Report
from mia.steering import Steering, SteeringFunction
from mia.vectors import Vector
from mia.vectors.expression import named

if TYPE_CHECKING:
    from mia.io.provenance import ModelFacts
    from mia.model import Model

#: vector files, arithmetic with them ("a.gguf - 0.5*b.gguf"), or vectors; several are added up
Vectors = Vector | str | Sequence[Vector | str]


@dataclass(frozen=True, kw_only=True)
class SteeringOptions:
    """How vectors steer a prompt.

    Attributes:
        operator: as `Steering.op`.
        layers: some of the vectors' layers (`mia.ranges`); None for all.
        where: the whole text, only the prompt, or only the generated tokens.
        tokens: some tokens of the prompt (`mia.ranges`); None for all.
        keep_norm: keep the norm of each row.
    """

    operator: str | SteeringFunction = "add"
    layers: Ranges | None = None
    where: Literal["all", "prompt", "generated"] = "all"
    tokens: Ranges | None = None
    keep_norm: bool = False

    def positions(self, n_tokens: int) -> tuple[Tokens, bool]:
        """Which tokens of a prompt of this length, and whether generated ones too."""
        if self.where == "generated":
            if self.tokens is not None:
                raise UsageError("tokens cannot be combined with where='generated'")
            return (), True
        tokens = None if self.tokens is None else parse_tokens(self.tokens, n_tokens)
        return tokens, self.where == "all"


@dataclass(frozen=True, eq=False)
class SteeredPrompt:
    """A prompt, how it is steered, and what a document says of both.

    Attributes:
        steerings: one per vector, at coefficient 1.
    """

    facts: ModelFacts
    ids: list[int]
    tokens: Sequence[Token]
    steerings: list[Steering]
    described: dict[str, Any]

    def edits(self, coeff: float) -> list[Edit]:
        return [e for s in self.steerings for e in replace(s, coeff=coeff).edits()]

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.tokens],
            "steering": self.described,
        }


def steered_prompt(
    model: Model, prompt: str | Sequence[int], vectors: Vectors, how: SteeringOptions
) -> SteeredPrompt:
    ids = model.ids(prompt)
    tokens, generated = how.positions(len(ids))
    steerings, described = [], []
    for source in [vectors] if isinstance(vectors, (str, Vector)) else vectors:
        vector, name = named(source, model.facts)
        model.check_vector(vector, name)
        layers = vector.layers_among(how.layers, model.n_layer, name)
        described.append({"vector": name, "site": vector.site, "layers": layers})
        steerings.append(
            Steering(vector, how.operator, 1.0, layers, tokens, generated, keep_norm=how.keep_norm)
        )
    if not steerings:
        raise UsageError("there is no vector to steer with")
    about = {
        "vectors": described,
        "operator": _operator_name(how.operator),
        "tokens": how.where,
        "token_idx": None if how.tokens is None else as_text(how.tokens),
        "normalize": how.keep_norm,
    }
    return SteeredPrompt(model.facts, ids, model.token_rows(ids), steerings, about)


def _operator_name(operator: str | SteeringFunction) -> str:
    return operator if isinstance(operator, str) else getattr(operator, "__name__", "function")


def check_coeffs(operator: str | SteeringFunction, coeffs: Sequence[float] | None) -> list[float]:
    """The coefficients, 1 by default. Raises `UsageError` if the operator takes none."""
    if coeffs is not None and operator in WITHOUT_COEFF:
        raise UsageError(f"operator {operator!r} takes no coefficient")
    if coeffs is not None and not coeffs:
        raise UsageError("no coefficient is given")
    return [1.0] if coeffs is None else [float(c) for c in coeffs]


# -- side by side ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SteeredRun:
    """One continuation, steered with a coefficient."""

    coeff: float
    generation: Generation

    def document(self) -> dict[str, Any]:
        return {"coeff": self.coeff, **self.generation.output()}


@dataclass(frozen=True, eq=False)
class SteeredRuns(Report):
    """Continuations of a prompt, one per coefficient, and the unsteered one.

    Attributes:
        choice: the coefficients tried, if a KL budget chose one.
    """

    prompt: SteeredPrompt
    runs: list[SteeredRun]
    baseline: Generation | None = None
    choice: CoefficientChoice | None = None

    def document(self) -> dict[str, Any]:
        document = self.prompt.document()
        if self.choice is not None:
            document["kl"] = [{"coeff": c, "kl": round(k, 6)} for c, k in self.choice.kl.items()]
            document["coeff"] = self.choice.coeff
        document |= self.runs[0].generation.output()
        if self.baseline is not None:
            document["baseline"] = self.baseline.text
        document["steered"] = [run.document() for run in self.runs]
        return document

    def rows(self) -> list[dict[str, Any]]:
        rows = [{"coeff": r.coeff, "output": r.generation.text} for r in self.runs]
        if self.baseline is None:
            return rows
        return [{"coeff": 0.0, "output": self.baseline.text}, *rows]

    def plain(self) -> str:
        lines = [(f"{r.coeff:g}:", r.generation.text) for r in self.runs]
        if self.baseline is not None:
            lines.insert(0, ("baseline:", self.baseline.text))
        return "\n".join(f"{name:<10s} {text}" for name, text in lines)


def steer(
    model: Model,
    prompt: str | Sequence[int],
    vectors: Vectors,
    *,
    coeffs: Sequence[float] | None = None,
    how: SteeringOptions | None = None,
    kl_budget: float | None = None,
    n_predict: int = 32,
    sampling: Sampling | None = None,
    baseline: bool = True,
) -> SteeredRuns:
    """Continues a prompt while vectors change what the model computes.

    One coefficient runs by itself, so that llama.cpp's control vector can do it; several run as
    sequences of one batch, with the unsteered run among them.

    Args:
        vectors: files, arithmetic or vectors, all at once.
        coeffs: how much of them, one continuation each; 1 by default.
        kl_budget: choose the coefficient of largest size whose mean KL from the unsteered run is
            at most this (nats per token), among `coeffs` or a default list.
        baseline: also the unsteered continuation.

    Raises:
        UsageError: a vector that does not fit the model, an unknown operator, or no coefficient
            within the budget.
    """
    how = how or SteeringOptions()
    candidates = check_coeffs(how.operator, coeffs)
    if kl_budget is not None and how.operator in WITHOUT_COEFF:
        raise UsageError(
            f"operator {how.operator!r} takes no coefficient that a budget could choose"
        )
    steered = steered_prompt(model, prompt, vectors, how)
    choice = None
    if kl_budget is not None:
        choice = choose_coefficient(
            model,
            [steered.ids],
            steered.steerings,
            kl_budget,
            candidates=CANDIDATES if coeffs is None else candidates,
        )
        candidates = [choice.coeff]
        notice(f"coefficient {choice.coeff:g}: mean KL {choice.kl[choice.coeff]:.3f}")
    request = Request(
        steered.ids,
        logits=None,
        n_predict=n_predict,
        sampling=sampling or Sampling(),
        logprobs=True,
    )
    requests = [replace(request, edits=steered.edits(c)) for c in candidates]
    with step("running") as bar:
        results, plain = _run(model, requests, request if baseline else None, bar)
    runs = [
        SteeredRun(c, model.generation(steered.ids, r))
        for c, r in zip(candidates, results, strict=True)
    ]
    unsteered = None if plain is None else model.generation(steered.ids, plain)
    return SteeredRuns(steered, runs, unsteered, choice)


def _run(
    model: Model, requests: list[Request], plain: Request | None, bar: Progress | None
) -> tuple[list[Result], Result | None]:
    """The results of the requests, and of the unsteered one."""
    if plain is None:
        return model.run(requests, progress=bar), None
    if len(requests) == 1:
        # a control vector steers all requests of a run alike
        unsteered = model.run([plain])[0]
        return model.run(requests, progress=bar), unsteered
    *results, unsteered = model.run([*requests, plain], progress=bar)
    return results, unsteered


# -- which path ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SteeringPaths(Report):
    """Which path each edit takes: {site, operator, path, why}."""

    prompt: SteeredPrompt
    paths: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        return {**self.prompt.document(), "explain": self.paths}

    def rows(self) -> list[dict[str, Any]]:
        return self.paths

    def plain(self) -> str:
        return "\n".join(
            f"{row['site']:<16s} {row['operator']:<16s} {row['path']}"
            + (f"  ({row['why']})" if row["why"] else "")
            for row in self.paths
        )


def explain(
    model: Model,
    prompt: str | Sequence[int],
    vectors: Vectors,
    *,
    coeffs: Sequence[float] | None = None,
    how: SteeringOptions | None = None,
) -> SteeringPaths:
    """Which path each edit of `steer` takes, and why it is not the control vector; runs nothing.

    Args:
        coeffs: as for `steer`; several run side by side.
    """
    how = how or SteeringOptions()
    coefficients = check_coeffs(how.operator, coeffs)
    steered = steered_prompt(model, prompt, vectors, how)
    edits = steered.edits(coefficients[0])
    return SteeringPaths(steered, steering.explain(model, edits, alone=len(coefficients) == 1))
