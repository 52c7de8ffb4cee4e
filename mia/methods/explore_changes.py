"""How a page says what was changed: in words, as options of commands, in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mia.ranges import as_text, parse_tokens
from mia.show.text import visible

if TYPE_CHECKING:
    from mia.methods.changes import Changes
    from mia.model import Model


@dataclass(frozen=True)
class Said:
    """Changes of a prompt, said.

    Attributes:
        text: in words; "" for none.
        options: (how many tokens a prompt has at least for it to make sense, words of a command), for
            each change; None if no command says it.
        python: a `Changes(…)`; "" if none says it.
    """

    text: str
    options: Sequence[tuple[int, Sequence[str]]] | None
    python: str


#: nothing is changed
NOTHING = Said("", (), "")
#: field of `Changes` that lists heads or experts -> what it does in words
_LISTS = {
    "ablate": "heads {} ablated",
    "select": "of their layers, only heads {} kept",
    "ablate_experts": "experts {} ablated",
    "zero_experts": "experts {} zeroed",
    "force_experts": "experts {} forced",
}


def _option(field: str) -> str:
    """The commands call their options as `Changes` calls its fields."""
    return "--" + field.replace("_", "-")


def said_of(changes: Changes | None, model: Model, prompt: Sequence[int]) -> Said:
    """How changes of a prompt are said, its tokens counted from the start. None stands for some that no
    command can make."""
    if changes is None:
        return Said("changes that no command makes", None, "")
    options: list[tuple[int, list[str]]] = []
    words: list[str] = []
    patches, blocks = [], []
    for site, file, source, target in changes.patch:
        to = parse_tokens(target, len(prompt))
        patches.append((site, file, source, _ranges(to)))
        options.append((max(to) + 1, [_option("patch"), site, file, source, _ranges(to)]))
        words.append(f"{site} at token {_ranges(to)} from token {source} of {file}")
    if changes.patch and changes.patch_mode != "replace":
        options.append((0, [_option("patch_mode"), changes.patch_mode]))
    for name, text in _LISTS.items():
        if (value := getattr(changes, name)) is not None:
            options.append((0, [_option(name), _listed(value)]))
            words.append(text.format(_listed(value)))
    if changes.ablate_with is not None:
        options.append((0, [_option("ablate_with"), *changes.ablate_with]))
        words.append(f"by {' '.join(changes.ablate_with)}")
    if changes.ablate_attention:
        options.append((0, [_option("ablate_attention")]))
        words.append("at their attention weights")
    if changes.ablate_seed:
        options.append((0, [_option("ablate_seed"), str(changes.ablate_seed)]))
    for block in changes.block:
        text, least = _block(block, model, len(prompt))
        blocks.append(text)
        options.append((least, [_option("block"), text]))
        words.append(f"attention {text} blocked")
    options += [(0, [f"{_option('steer')}={vector}"]) for vector in changes.steer]
    if changes.steer_coeff is not None:
        options.append((0, [_option("steer_coeff"), str(changes.steer_coeff)]))
    if changes.steer_layers is not None:
        options.append((0, [_option("steer_layers"), as_text(changes.steer_layers)]))
    words += [_steered(changes, vector) for vector in changes.steer]
    return Said("; ".join(words), options, _python(changes, patches, blocks))


def _listed(value: Any) -> str:
    """Heads or experts as a command takes them."""
    several = [value] if isinstance(value, (str, tuple)) else value
    return ",".join(x if isinstance(x, str) else ".".join(map(str, x)) for x in several)


def _steered(changes: Changes, vector: str) -> str:
    times = "" if changes.steer_coeff is None else f" × {changes.steer_coeff:g}"
    layers = "" if changes.steer_layers is None else f" at layers {as_text(changes.steer_layers)}"
    return f"steered by {visible(vector)}{times}{layers}"


def _block(text: str, model: Model, n: int) -> tuple[str, int]:
    """A block with its tokens counted from the start, and how many of them it needs."""
    from mia.methods.knockout import parse_block

    block = parse_block(text, n, model.n_layer, model.n_head)
    queries, keys = sorted(block.queries), sorted(block.keys)
    _, at, where = text.partition("@")
    spelled, last = _ranges(queries), queries[-1]
    if block.generated:  # and all that come after them
        *others, end = spelled.split(",")
        last = int(end.partition("..")[0])
        spelled = ",".join([*others, f"{last}.."])
    least = max(last, keys[-1]) + 1
    return f"{spelled}->{_ranges(keys)}{at}{where}", least


def _ranges(numbers: Sequence[int]) -> str:
    """3..7,9: in the order in which they are given."""
    runs: list[list[int]] = []
    for i in numbers:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _python(changes: Changes, patches: Sequence[tuple[str, ...]], blocks: Sequence[str]) -> str:
    """`Changes(…)` with what is not at its default."""
    words = []
    for f in fields(changes):
        value = getattr(changes, f.name)
        if f.name in ("patch", "block"):
            value = list(patches) if f.name == "patch" else list(blocks)
        if value == f.default or (value is not None and not value and not f.default):
            continue
        if f.name in _LISTS:
            value = _listed(value)
        elif isinstance(value, (list, tuple)):
            value = list(value)
        words.append(f"{f.name}={value!r}")
    return f"Changes({', '.join(words)})"
