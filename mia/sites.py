"""Sites: named places in the forward pass, in three spellings.

| canonical        | llama.cpp         | TransformerLens                  | shape of one token's row |
|------------------|-------------------|----------------------------------|--------------------------|
| `embed`          | `inp_embd`        | `hook_embed`                     | n_embd                   |
| `resid_pre.i`    |                   | `blocks.i.hook_resid_pre`        | n_embd                   |
| `attn_norm.i`    | `attn_norm-i`     | `blocks.i.ln1.hook_normalized`   | n_embd                   |
| `q.i`            | `Qcur-i`          | `blocks.i.attn.hook_q`           | n_head × head_dim        |
| `k.i`, `v.i`     | `Kcur-i`, `Vcur-i`| `blocks.i.attn.hook_k`, `…_v`    | n_head_kv × head_dim     |
| `attn_scores.i`  | `kq-i` **         | `blocks.i.attn.hook_attn_scores` | n_head × n_key           |
| `attn_pattern.i` | `kq_soft_max-i`   | `blocks.i.attn.hook_pattern`     | n_head × n_key           |
| `head_out.i`     | `kqv_out-i` *     | `blocks.i.attn.hook_z`           | n_head × head_dim        |
| `attn_out.i`     | `attn_out-i`      | `blocks.i.hook_attn_out`         | n_embd                   |
| `resid_mid.i`    | `ffn_inp-i`       | `blocks.i.hook_resid_mid`        | n_embd                   |
| `mlp_norm.i`     | `ffn_norm-i`      | `blocks.i.ln2.hook_normalized`   | n_embd                   |
| `mlp_out.i`      | `ffn_out-i`       | `blocks.i.hook_mlp_out`          | n_embd                   |
| `resid_post.i`   | `l_out-i`         | `blocks.i.hook_resid_post`       | n_embd                   |
| `final_norm`     | `result_norm`     | `ln_final.hook_normalized`       | n_embd                   |
| `logits`         | `result_output`   |                                  | n_vocab                  |

Layers count from zero; `resid_post.i` is the output of block i. `q` and `k` are
taken after the rotary embedding; `attn_norm` and `mlp_norm` with their weight (and
bias) applied; `attn_scores` are what the softmax, behind the mask, turns into
`attn_pattern`. (**) llama.cpp's `kq` has not been scaled yet, nor soft-capped in models
that do that; ours are both. (*) In today's llama.cpp `kqv_out` is the concatenated heads
before W_O, in the first tools it was what attention adds to the residual;
`READS_AS` says where a command reads it in the old sense.

A bare name means every layer; `l_out-10..20` and `l_out-3,7` are ranges and lists.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mia.errors import RangeError, SiteError

#: canonical name -> (llama.cpp's names, TransformerLens' name after "blocks.i.")
_LAYERED: dict[str, tuple[tuple[str, ...], str]] = {
    "resid_pre": ((), "hook_resid_pre"),
    "attn_norm": (("attn_norm",), "ln1.hook_normalized"),
    "q": (("Qcur",), "attn.hook_q"),
    "k": (("Kcur",), "attn.hook_k"),
    "v": (("Vcur",), "attn.hook_v"),
    "attn_scores": (("kq",), "attn.hook_attn_scores"),
    "attn_pattern": (("kq_soft_max",), "attn.hook_pattern"),
    "head_out": (("kqv_out",), "attn.hook_z"),
    "attn_out": (("attn_out",), "hook_attn_out"),
    "resid_mid": (("ffn_inp",), "hook_resid_mid"),
    "mlp_norm": (("ffn_norm",), "ln2.hook_normalized"),
    "mlp_out": (("ffn_out",), "hook_mlp_out"),
    "resid_post": (("l_out",), "hook_resid_post"),
}
_GLOBAL: dict[str, tuple[tuple[str, ...], str]] = {
    "embed": (("inp_embd",), "hook_embed"),
    "final_norm": (("result_norm",), "ln_final.hook_normalized"),
    "logits": (("result_output",), "hook_logits"),
}

LAYERED = tuple(_LAYERED)
NAMES = ("embed", *LAYERED, "final_norm", "logits")
#: sites whose row is one residual vector of width n_embd: what a lens can read
RESIDUAL = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
#: sites made of heads, with the axis of heads in front
HEADED = ("q", "k", "v", "attn_scores", "attn_pattern", "head_out")
#: sites with a number for each query and key; they exist where flash attention is off
BY_KEY = ("attn_scores", "attn_pattern")

_LLAMA = {n: name for name, (names, _) in (_LAYERED | _GLOBAL).items() for n in names}
_TL = {tl: name for name, (_, tl) in (_LAYERED | _GLOBAL).items()}


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """One place: a canonical name, and a layer where the name has layers."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}.{self.layer}"

    @property
    def llama(self) -> str:
        """llama.cpp's name of this place: `l_out-14`."""
        names = (_LAYERED | _GLOBAL)[self.name][0]
        base = names[0] if names else self.name
        return base if self.layer is None else f"{base}-{self.layer}"


def parse(text: str | Site, n_layer: int) -> Site:
    """Reads exactly one site. Raises `SiteError` or `RangeError`."""
    if isinstance(text, Site):
        return _checked(text.name, text.layer, n_layer, str(text))
    found = parse_many(text, n_layer)
    if len(found) != 1:
        raise SiteError(f"{text!r} means {len(found)} sites where one is needed; add a layer")
    return found[0]


def parse_many(text: str | Site | Iterable[str | Site], n_layer: int) -> list[Site]:
    """Reads a spelling, or several, into sites in the order given, each once.

    Raises:
        SiteError: no such site; the message names near matches.
        RangeError: a layer that the model does not have.
    """
    if isinstance(text, Site):
        return [parse(text, n_layer)]
    if not isinstance(text, str):
        return list(dict.fromkeys(s for part in text for s in parse_many(part, n_layer)))
    name, layers = split_spelling(text.strip())
    if name in _GLOBAL:
        if layers is not None:
            raise SiteError(f"site {text!r}: {name} has no layers")
        return [Site(name)]
    if layers is None:
        return [Site(name, i) for i in range(n_layer)]
    return [_checked(name, i, n_layer, text) for i in parse_layers(layers, n_layer, text)]


def parse_layers(text: str, n_layer: int, shown: str | None = None) -> list[int]:
    """`"3"`, `"10..20"` or `"10-20"` (both ends included), `"3,7"`, `"-1"`, `"*"`; sorted as given."""
    shown = text if shown is None else shown
    out: list[int] = []
    for part in text.split(","):
        part = part.strip()
        if part in ("*", "all"):
            out.extend(range(n_layer))
            continue
        m = re.fullmatch(r"(-?\d+)(?:(?:\.\.|-|:)(-?\d+))?", part)
        if m is None:
            raise RangeError(
                f"{shown!r}: {part!r} is not a layer, a range like 10..20 or a list like 3,7"
            )
        first = _layer(int(m[1]), n_layer, shown)
        last = first if m[2] is None else _layer(int(m[2]), n_layer, shown)
        if last < first:
            raise RangeError(f"{shown!r}: the range {part} runs backwards")
        out.extend(range(first, last + 1))
    return list(dict.fromkeys(out))


def reads_as_attn_out(text: str) -> bool:
    """True for the old sense of `kqv_out` (see the module's table)."""
    return re.split(r"[-.]", text.strip(), maxsplit=1)[0] == "kqv_out"


def _layer(i: int, n_layer: int, shown: str) -> int:
    if not -n_layer <= i < n_layer:
        raise RangeError(f"{shown!r}: layer {i} is out of range; this model has 0 to {n_layer - 1}")
    return i % n_layer


def _checked(name: str, layer: int | None, n_layer: int, shown: str) -> Site:
    if name in _GLOBAL:
        if layer is not None:
            raise SiteError(f"site {shown!r}: {name} has no layers")
        return Site(name)
    if name not in _LAYERED:
        raise _unknown(shown)
    if layer is None:
        raise SiteError(f"site {shown!r} needs a layer: {name}.0 to {name}.{n_layer - 1}")
    return Site(name, _layer(layer, n_layer, shown))


def split_spelling(text: str) -> tuple[str, str | None]:
    """Canonical name, and the text of the layers or None."""
    m = re.fullmatch(r"blocks\.([^.]+(?:\.\.[^.]+)?)\.(.+)", text)
    if m is not None and m[2] in _TL:
        return _TL[m[2]], m[1]
    if text in _TL:
        return _TL[text], None
    for spelling in (r"(.+?)\.((?:-?\d|\*|all).*)", r"(.+?)-((?:-?\d|\*|all).*)"):
        m = re.fullmatch(spelling, text)
        if m is not None and (m[1] in NAMES or m[1] in _LLAMA):
            return _LLAMA.get(m[1], m[1]), m[2]
    # canonical names win: attn_norm and attn_out are spelled alike in both
    if text in NAMES:
        return text, None
    if text in _LLAMA:
        return _LLAMA[text], None
    raise _unknown(text)


def _unknown(text: str) -> SiteError:
    block = re.fullmatch(r"(blocks\.[^.]+\.)(.+)", text)
    if block is None:
        prefix, base, known = "", re.split(r"[-.]\d", text, maxsplit=1)[0], [*NAMES, *_LLAMA]
    else:
        prefix, base, known = block[1], block[2], [tl for _, tl in _LAYERED.values()]
    near = difflib.get_close_matches(base, known, n=3, cutoff=0.5)
    if near:
        return SiteError(
            f"unknown site {text!r}; did you mean {' or '.join(prefix + n for n in near)}?"
        )
    return SiteError(f"unknown site {text!r}; known: {', '.join(NAMES)}")
