"""Bake: an edit becomes a file that llama.cpp's own programs run.

    bake(model, "love.gguf", "without.gguf", strength=1.0)

Source: weight orthogonalization, Arditi et al. 2024 (arXiv 2406.11717, section 4): W' = W - r rᵀ W for every
matrix that writes to the residual stream.

| paper                   | here                                                              |
|-------------------------|-------------------------------------------------------------------|
| r̂                       | the vector's direction of a layer, or of one for all              |
| W_out                   | attention's and the MLP's output matrices, on request the embedding |
| eq. 5, W' = W - r̂r̂ᵀW    | `project_out` at attn_out and mlp_out, strength 1                 |

Three kinds of files:

- "lora": ΔW = -s·r(rᵀW) as an adapter of rank one for each matrix (`mia.bake.changes` has the table). It stands
  beside the model, its scale is chosen when it runs.
- "model": the model's file with the changed matrices, requantized to each one's type; biases too.
- "control-vector": additions at the ends of blocks.

Where we deviate: strengths other than 1; a direction per layer; norms behind the matrices. Every file is
tested as it is made (`mia.bake.checks`), and one that does not do what the edit does is not written.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.bake.changes import REMOVE, WRITTEN, Baked, Removal
from mia.bake.checks import NOISES, SHARE, Check, check, edit_kl, neutral_texts
from mia.bake.files import TYPES, room_for_check, write_check, write_lora, write_model
from mia.edits import Edit
from mia.errors import ModelError, UsageError
from mia.io.files import check_writable, write_whole
from mia.io.runs import aside, writes_nothing
from mia.llama.gguf_file import is_file
from mia.methods.bake_reports import BakeReport, Kind
from mia.notices import notice
from mia.progress import step
from mia.ranges import Ranges, compact, parse_layers
from mia.show.text import visible
from mia.sites import Site, parse
from mia.steering import Steering
from mia.values import number
from mia.vectors import Vector
from mia.vectors.expression import named

if TYPE_CHECKING:
    from mia.model import Model

KINDS: tuple[Kind, ...] = ("lora", "model", "control-vector")
#: sites of the residual stream, to which attention and MLP write
_STREAM = ("resid_pre", "resid_mid", "resid_post")
#: strengths of a removal, and coefficients of an addition, that a KL budget chooses from
STRENGTHS = tuple(round(0.1 * i, 1) for i in range(1, 11))
COEFFS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)

#: a vector (or its file, or arithmetic), or edits as they are run
Source = Vector | str | Steering | Edit | Sequence[Steering | Edit]


def bake(
    model: Model,
    source: Source,
    path: str | Path,
    *,
    kind: Kind = "lora",
    layers: Ranges | None = None,
    direction_layer: int | None = None,
    strength: float | Sequence[float] = 1.0,
    embedding: bool = False,
    prompts: Sequence[str | Sequence[int]] = (),
    kl_budget: float | None = None,
    weight_type: str | None = None,
) -> BakeReport:
    """Writes a file that does what an edit does, for llama.cpp's own programs.

    Args:
        source: a vector, a file or arithmetic: its directions are removed from what attention and MLP
            of its layers add (of an `attn_out` or `mlp_out` vector: from that alone), or, for a
            control vector, it is added. Or a `Steering` or edits as `Model.run` takes them, at all tokens.
        kind: "lora", "model" or "control-vector".
        layers: where (`mia.ranges`); by default the vector's layers, all with `direction_layer`.
        direction_layer: the layer whose direction is used in all layers.
        strength: how much of the direction is removed: 1 all, 0.5 half, -1 doubles it; of a control
            vector the coefficient. Several are what a budget chooses from.
        embedding: also remove it from the token embeddings.
        prompts: of the user's, for a second check and for the budget.
        kl_budget: choose the largest strength whose KL(plain || edit) is at most this, in nats per
            token, on the prompts or else on neutral text.
        weight_type: of kind "model": "f32", "f16", "bf16" or "q8_0" for the changed matrices, not
            their own types.

    Raises:
        UsageError: what cannot be baked, and why; no strength within the budget.
        ModelError: what was baked does not do what the edit does. Nothing is written.
        FileError: the file cannot be written.
    """
    path = check_writable(path)
    _check_arguments(path, kind, weight_type)
    _check_not_read(path, model, source)
    if model.standing_edits:
        raise UsageError("the model is steered; bake the steering itself, with none on the model")
    texts = {"neutral": neutral_texts(model)}
    if prompts:
        texts["prompts"] = [model.ids(p) for p in prompts]
    plan = _plan(model, source, kind, layers, direction_layer, embedding)
    if isinstance(source, (Vector, str)):
        kl: dict[float, float] = {}
        if kl_budget is not None:
            candidates = _candidates(plan, strength)
            own = texts.get("prompts") or texts["neutral"]
            tried = edit_kl(model, own, [plan.edits(s) for s in candidates])
            kl = dict(zip(candidates, tried, strict=True))
            strength = _within(kl, kl_budget)
        plan = replace(plan, strength=_one(strength))
    elif kl_budget is not None or _one(strength) != 1.0 or layers is not None:
        raise UsageError("strength, layers and a KL budget are for vectors; edits have their own")
    else:
        kl = {}
    return _write(model, plan, path, kind, texts, kl, weight_type)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is baked: directions at sites with a strength, or edits."""

    rows: list[tuple[Site, Any]]
    op: str
    strength: float
    given: list[Edit]
    name: str
    metadata: dict[str, str]

    def edits(self, strength: float | None = None) -> list[Edit]:
        if self.given:
            return self.given
        s = self.strength if strength is None else strength
        if self.op == "add":
            return [Edit(site, "add", v, coeff=s) for site, v in self.rows]
        if s == 1:
            return [Edit(site, "project_out", v) for site, v in self.rows]
        return [Edit(site, Removal(v, s)) for site, v in self.rows]


def _check_arguments(path: Path, kind: str, weight_type: str | None) -> None:
    if kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if path.suffix != ".gguf":
        raise UsageError(f"{path}: what is baked ends in .gguf")
    if weight_type is not None and kind != "model":
        raise UsageError(f"a type of weights is for kind model, not {kind}")
    if weight_type is not None and weight_type not in TYPES:
        raise UsageError(f"unknown type {weight_type!r}; known: {', '.join(TYPES)}")


def _check_not_read(path: Path, model: Model, source: Source) -> None:
    """Raises `UsageError` if the file to write is the model's or the vector's own."""
    read = [model.path, *([Path(source)] if isinstance(source, str) else [])]
    if is_file(path) and any(is_file(p) and p.samefile(path) for p in read):
        raise UsageError(f"{path} is what is baked; give another file to write")


def _one(strength: float | Sequence[float]) -> float:
    values = [strength] if isinstance(strength, (int, float)) else list(strength)
    if len(values) != 1:
        raise UsageError(f"{len(values)} strengths are for a KL budget to choose from; give one")
    if number(values[0], "strength") == 0:
        raise UsageError("strength 0 changes nothing")
    return float(values[0])


def source_of(model: Model, vector: str | None, heads: str | None) -> Source:
    """What to bake of a vector's file or arithmetic, or of heads to ablate (`mia.ranges`)."""
    if (vector is None) == (heads is None):
        raise UsageError("give a vector, or heads to ablate")
    if vector is not None:
        return vector
    assert heads is not None
    from mia.methods.changes import Changes

    return Changes(ablate=heads).edits(model, [0])


def _plan(
    model: Model,
    source: Source,
    kind: Kind,
    layers: Ranges | None,
    direction_layer: int | None,
    embedding: bool,
) -> _Plan:
    if not isinstance(source, (Vector, str)):
        if embedding or direction_layer is not None:
            raise UsageError("the embedding and a layer's direction are for vectors, not for edits")
        return _of_edits(source)
    vector, name = named(source, model.facts)
    model.check_vector(vector, name)
    _check_tuned(vector, name, kind)
    if direction_layer is None:
        chosen = vector.layers_among(layers, model.n_layer, name)
        directions = {i: vector[i] for i in chosen}
    else:
        one = vector[parse_layers(direction_layer, model.n_layer)[0]]
        where = range(model.n_layer) if layers is None else parse_layers(layers, model.n_layer)
        directions = dict.fromkeys(where, one)
    if kind == "control-vector":
        if embedding or vector.site != "resid_post":
            raise UsageError("a control vector is added at resid_post, at the ends of blocks")
        rows, op = [(Site("resid_post", i), v) for i, v in directions.items()], "add"
    else:
        if vector.site not in (*_STREAM, *WRITTEN):
            raise UsageError(
                f"{name} belongs to {vector.site}; what is removed from weights is a direction of "
                f"{', '.join((*_STREAM, *WRITTEN))}"
            )
        sites = WRITTEN if vector.site in _STREAM else (vector.site,)
        rows, op = [(Site(s, i), v) for i, v in directions.items() for s in sites], "remove"
        rows = _written(model, rows)
        if embedding:
            rows.insert(0, (Site("resid_pre", 0), directions[min(directions)]))
    metadata = {k: v for k, v in vector.metadata.items() if k != "sources"}
    return _Plan(rows, op, 1.0, [], name, metadata)


def _check_tuned(vector: Vector, name: str, kind: Kind) -> None:
    """A notice if a search found the vector for another edit than what is baked of it."""
    operator = vector.metadata.get("tuned_operator")
    if operator is None:
        return
    if kind == "control-vector":
        same = operator == "add"
        does = "is added at the ends of blocks"
    else:
        same = operator in ("project_out", REMOVE) and vector.site in WRITTEN
        does = "is removed from what attention and MLP write"
    if not same or vector.metadata.get("tuned_normalize") == "true":
        notice(
            f"{visible(name)} was tuned for {visible(operator)} at {vector.site}; here it {does}, which "
            "is another edit: the search's score and KL are not those of this file"
        )


def _written(model: Model, rows: list[tuple[Site, Any]]) -> list[tuple[Site, Any]]:
    """The rows at sites that the model has. A notice names the layers in which something else writes
    to the residual, which is left as it is. Raises `UsageError` if the model has none."""
    topology = model.topology
    there = [row for row in rows if row[0] in topology.sites]
    if not there:
        raise UsageError(f"{model.name} cannot be baked: {topology.absence(rows[0][0])}")
    layers = {site.layer for site, _ in rows if site.layer is not None}
    others = {
        site.layer for site, _ in rows if site not in topology.sites and site.layer is not None
    }
    if others := others | (topology.mixed | topology.followed) & layers:
        notice(
            f"in layers {compact(sorted(others))} something else writes too, which is not changed"
        )
    return there


def _of_edits(source: Steering | Edit | Sequence[Steering | Edit]) -> _Plan:
    items = [source] if isinstance(source, (Steering, Edit)) else list(source)
    edits: list[Edit] = []
    for item in items:
        if not isinstance(item, (Steering, Edit)):
            raise UsageError(f"what is baked is a vector, a Steering or edits, not {item!r:.60}")
        edits += item.edits() if isinstance(item, Steering) else [item]
    if not edits:
        raise UsageError("there is no edit to bake")
    return _Plan([], "", 1.0, edits, "edits", {})


# -- how much --------------------------------------------------------------------------------


def _candidates(plan: _Plan, strength: float | Sequence[float]) -> list[float]:
    """Several strengths as they are given, else the usual ones."""
    if isinstance(strength, (int, float)) or len(strength) < 2:
        return list(COEFFS if plan.op == "add" else STRENGTHS)
    return [_one(s) for s in strength]


def _within(kl: dict[float, float], budget: float) -> float:
    """The strength of largest size within a budget."""
    if not budget > 0:
        raise UsageError(f"a KL budget of {budget} is not positive")
    within = [s for s, k in kl.items() if k <= budget]
    if not within:
        least = min(kl, key=lambda s: kl[s])
        raise UsageError(
            f"no strength stays within a mean KL of {budget:g}: {least:g} gives {kl[least]:.3g}, the least"
        )
    best = max(within, key=lambda s: (abs(s), -kl[s]))
    notice(f"strength {best:g}: KL(plain || edit) {kl[best]:.3g}")
    return best


# -- writing and testing ---------------------------------------------------------------------


def _write(
    model: Model,
    plan: _Plan,
    path: Path,
    kind: Kind,
    texts: dict[str, list[list[int]]],
    kl: dict[float, float],
    weight_type: str | None,
) -> BakeReport:
    edits = plan.edits()
    described = [_described(e, model.n_layer) for e in edits]
    baked = None if kind == "control-vector" else Baked(model, edits)
    metadata: dict[str, Any] = {
        "general.name": plan.name,
        **{f"mia.{k}": v for k, v in model.file_metadata(vector=plan.metadata).items()},
        "mia.bake.kind": kind,
        "mia.bake.edits": json.dumps(_short(described)),
        **room_for_check(),
    }
    checks: list[Check] = []
    size = 0

    def write(temporary: Path) -> None:
        nonlocal size
        if kind == "lora":
            assert baked is not None
            write_lora(temporary, model, baked, metadata)
        elif kind == "model":
            assert baked is not None
            del metadata["general.name"]
            write_model(temporary, model, baked, metadata, weight_type)
        else:
            _write_control_vector(temporary, model, edits, metadata)
        checks.extend(_checks(model, temporary, edits, kind, texts))
        write_check(temporary, {c.texts: c.document() for c in checks})
        size = temporary.stat().st_size

    if writes_nothing():  # a replay makes the numbers again, and no file
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "baked.gguf")
    else:
        write_whole(path, write)
    ranks = [] if baked is None else [c.rank for c in baked.changes.values() if c.left]
    return BakeReport(
        model.facts,
        str(path),
        kind,
        described,
        None if plan.given else plan.strength,
        len(ranks),
        max(ranks, default=0),
        size,
        checks,
        [] if baked is None else list(baked.notes),
        kl,
    )


def _checks(
    model: Model, file: Path, edits: Sequence[Edit], kind: Kind, texts: dict[str, list[list[int]]]
) -> list[Check]:
    """Raises `ModelError` if the file does not do what the edits do."""
    with aside(), step("testing what was baked") as bar:
        if kind == "control-vector":
            from mia.vectors import load

            added = load(file).edits()
            checks = [
                check(
                    model,
                    lambda rs: model.run([replace(r, edits=added) for r in rs]),
                    edits,
                    *t,
                    bar,
                )
                for t in texts.items()
            ]
        else:
            with _opened(model, file, kind) as b:
                checks = [check(model, b.run, edits, *t, bar) for t in texts.items()]
    for c in checks:
        if not c.passed:
            raise ModelError(
                f"the {kind} does not do what the edit does, and is not written: on {c.texts} text "
                f"KL(edit || baked) is {c.edit_baked:.3g} nats per token, more than {SHARE:g} of what "
                f"the edit does ({c.plain_edit:.3g}) and {NOISES:g} times the noise ({c.noise:.3g})"
                + (_ROUNDED if kind == "model" else "")
            )
        if c.says_nothing:
            notice(
                f"on {c.texts} text the edit moves the model by {c.plain_edit:.2g} nats per token, "
                f"less than {NOISES:g} times its noise ({c.noise:.2g}): the test says little"
            )
    return checks


def _opened(model: Model, file: Path, kind: Kind) -> Model:
    """Raises `ModelError` if llama.cpp refuses what was baked."""
    if kind == "lora":
        return model.reopened(lora={file: 1.0})
    try:
        return model.reopened(file, as_type=None)
    except ModelError as err:
        if "wrong number of tensors" not in str(err):
            raise
        raise ModelError(
            f"{model.architecture} has no unembedding of its own: llama.cpp always uses the embedding, "
            "which cannot be changed by itself"
        ) from err


_ROUNDED = "; matrices that are stored in a wider type (weight_type) are rounded less"


def _write_control_vector(
    path: Path, model: Model, edits: Sequence[Edit], metadata: dict[str, Any]
) -> None:
    from mia.engine.control_vector import directions, is_control_vector
    from mia.llama.gguf_write import write_gguf

    sited = [(e, parse(e.site, model.n_layer)) for e in edits]
    for edit, site in sited:
        if not is_control_vector(edit, site) or site.layer not in model.site_checks.vectors:
            layers = compact(model.site_checks.vectors)
            raise UsageError(
                f"{edit.op} at {site} is no control vector: those are additions at all tokens at "
                f"resid_post of layers {layers}"
            )
    rows = directions(sited, n_layer=model.n_layer, n_embd=model.n_embd)
    used = {site.layer for _, site in sited if site.layer is not None}
    facts = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": model.architecture,
        "controlvector.layer_count": len(used),
        **metadata,
    }
    write_gguf(path, facts, {f"direction.{i}": rows[i - 1] for i in sorted(used)}, own=True)


def _described(edit: Edit, n_layer: int) -> dict[str, Any]:
    op, strength = edit.op, edit.coeff
    if isinstance(op, Removal):
        return {
            "site": str(parse(edit.site, n_layer)),
            "operator": "remove",
            "strength": op.strength,
        }
    name = op if isinstance(op, str) else getattr(op, "__name__", "function")
    entry = {"site": str(parse(edit.site, n_layer)), "operator": name, "strength": strength}
    return {**entry, "heads": edit.heads} if edit.heads is not None else entry


def _short(described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Edits that differ in their site alone, as one with several sites."""
    groups: dict[str, dict[str, Any]] = {}
    for d in described:
        key = json.dumps({k: v for k, v in d.items() if k != "site"}, default=str)
        groups.setdefault(key, {**d, "site": []})["site"].append(d["site"])
    return list(groups.values())
