"""Sites: named places in the forward pass, in three spellings.

`SITES` is the one table of them: everything that mia knows about a kind of site is read off
its row. A site that is a node with a llama.cpp name needs a row and nothing else; one that
has to be searched for in the graph also needs a function in `mia.engine.graph`.

    resid_post.14    l_out-14    blocks.14.hook_resid_post

A bare name means every layer; `l_out-10..20` and `l_out-3,7` are ranges and lists. Layers
count from zero; `resid_post.i` is the output of block i. Names of Hugging Face's modules are
read too (`mia.modules`).

Two llama.cpp names need care. `kqv_out` is the concatenated heads before W_O today, but was
what attention adds to the residual in the first llama.cpp tools; `reads_as_attn_out` tells
the commands that keep the old meaning. `kq` is neither scaled nor soft-capped yet; mia's
`attn_scores` are both, so that the softmax turns them (after the mask) into `attn_pattern`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

from mia import modules
from mia.errors import SiteError, did_you_mean
from mia.ranges import index_in, indices_in


@dataclass(frozen=True, slots=True)
class SiteKind:
    """One row of the table of sites.

    Attributes:
        name: mia's name.
        hook: TransformerLens' name, without `blocks.i.` in front; "" where it has none.
        llama: llama.cpp's names, without the layer; the first is the one that mia prints.
        shape: one token's row in symbols: `(width,)`, or heads first and then what each head
            has: numbers (`head_dim`), or one number per key (`n_keys`).
        layered: whether each block has one.
        block_end: whether the site lies behind everything that its block (the last block, if
            the site has no layers) computes.
        residual: a vector of the residual stream, or one that is added to it.
        lens: whether the logit lens reads it.
        read_only: it can be captured, not edited.
        about: one line for people; `{n_head}`, `{n_head_kv}`, `{head_dim}` and `{kv_shared}`
            stand for the model's.
    """

    name: str
    hook: str
    llama: tuple[str, ...] = ()
    shape: tuple[str, ...] = ("n_embd",)
    layered: bool = True
    block_end: bool = False
    residual: bool = False
    lens: bool = False
    read_only: bool = False
    about: str = ""

    @property
    def headed(self) -> bool:
        """Whether a row is made of heads; they are its first axis."""
        return len(self.shape) == 2

    @property
    def by_key(self) -> bool:
        """Whether a head has a number per key; such sites exist only without flash attention."""
        return self.shape[-1] == "n_keys"

    def spellings(self, layer: str = "i") -> tuple[str, str, str]:
        """mia's, llama.cpp's and TransformerLens' name with a layer; "" for none."""
        llama = self.llama[0] if self.llama else ""
        if not self.layered:
            return self.name, llama, self.hook
        return (
            f"{self.name}.{layer}",
            f"{llama}-{layer}" if llama else "",
            f"blocks.{layer}.{self.hook}" if self.hook else "",
        )


#: all kinds of sites; a site's place in the graph may be found from those above it
SITES = (
    SiteKind("embed", "hook_embed", ("inp_embd",), layered=False, residual=True, lens=True),
    SiteKind("resid_pre", "hook_resid_pre", residual=True, lens=True),
    SiteKind("attn_norm", "ln1.hook_normalized", ("attn_norm",), lens=True),
    SiteKind("mlp_norm", "ln2.hook_normalized", ("ffn_norm",), lens=True),
    SiteKind(
        "q",
        "attn.hook_q",
        ("Qcur",),
        ("n_head", "head_dim"),
        about="{n_head} query heads of {head_dim}, after rotation where the model has it",
    ),
    SiteKind(
        "k",
        "attn.hook_k",
        ("Kcur",),
        ("n_head_kv", "head_dim"),
        about="{n_head_kv} key heads of {head_dim}{kv_shared}",
    ),
    SiteKind(
        "v",
        "attn.hook_v",
        ("Vcur",),
        ("n_head_kv", "head_dim"),
        about="{n_head_kv} value heads of {head_dim}{kv_shared}",
    ),
    SiteKind(
        "attn_scores",
        "attn.hook_attn_scores",
        ("kq",),
        ("n_head", "n_keys"),
        about="{n_head} heads, before the softmax, 0 where the mask hides the key; not with flash attention",
    ),
    SiteKind(
        "attn_pattern",
        "attn.hook_pattern",
        ("kq_soft_max",),
        ("n_head", "n_keys"),
        about="{n_head} heads, rows sum to 1; not with flash attention",
    ),
    SiteKind(
        "head_out",
        "attn.hook_z",
        ("kqv_out",),
        ("n_head", "head_dim"),
        about="{n_head} heads of {head_dim} side by side, before W_O",
    ),
    SiteKind(
        "attn_out",
        "hook_attn_out",
        ("attn_out",),
        residual=True,
        lens=True,
        about="all heads after W_O, its bias and a norm behind it where there is one",
    ),
    SiteKind("resid_mid", "hook_resid_mid", ("ffn_inp",), residual=True, lens=True),
    SiteKind(
        "router",
        "",
        ("ffn_moe_logits",),
        ("n_expert",),
        about="the router's logit of each expert, before the choice",
    ),
    SiteKind(
        "router_choice",
        "",
        ("ffn_moe_probs_biased",),
        ("n_expert",),
        about="the router's scores plus a bias that only the choice reads",
    ),
    SiteKind(
        "experts",
        "mlp.hook_expert_indices",
        ("ffn_moe_topk",),
        ("n_expert_used",),
        read_only=True,
        about="numbers of the experts chosen, the best first; read only",
    ),
    SiteKind(
        "expert_weights",
        "",
        ("ffn_moe_weights",),
        ("n_expert",),
        about="what each expert's output is multiplied by; 0 if it is not chosen",
    ),
    SiteKind("mlp_out", "hook_mlp_out", ("ffn_out",), residual=True, lens=True),
    SiteKind("resid_post", "hook_resid_post", ("l_out",), block_end=True, residual=True, lens=True),
    SiteKind(
        "final_norm", "ln_final.hook_normalized", ("result_norm",), layered=False, block_end=True
    ),
    SiteKind(
        "logits",
        "unembed.hook_out",
        ("result_output",),
        ("n_vocab",),
        layered=False,
        block_end=True,
    ),
)

KINDS = {kind.name: kind for kind in SITES}
NAMES = tuple(KINDS)
LAYERED = tuple(k.name for k in SITES if k.layered)
RESIDUAL = tuple(k.name for k in SITES if k.residual)
HEADED = tuple(k.name for k in SITES if k.headed)
BY_KEY = tuple(k.name for k in SITES if k.by_key)
#: what a lens reads: residuals, what is added to them, and their norms
LENS_READS = tuple(k.name for k in SITES if k.lens)
#: where experts are chosen, by numbers that may be -inf: such an expert is not chosen
ROUTERS = ("router", "router_choice")
#: sites of mixtures of experts
OF_EXPERTS = (*ROUTERS, "experts", "expert_weights")

_OF_LLAMA = {llama: k for k in SITES for llama in k.llama}
_OF_HOOK = {k.hook: k for k in SITES if k.hook}


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """One place: a name of `SITES`, and a layer if the site has layers."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}.{self.layer}"

    @property
    def kind(self) -> SiteKind:
        """The site's row of `SITES`."""
        return KINDS[self.name]

    @property
    def llama(self) -> str:
        """llama.cpp's name of this place: `l_out-14`."""
        base = self.kind.llama[0] if self.kind.llama else self.name
        return base if self.layer is None else f"{base}-{self.layer}"


def first_block(site: Site, n_layer: int) -> int:
    """The first block that must run for an edit or capture at `site` to be right."""
    last = n_layer - 1
    at_end = site.kind.block_end
    layer = site.layer if site.layer is not None else last if at_end else 0
    return min(layer + at_end, last)


# -- reading a spelling ------------------------------------------------------------------


def parse(text: str | Site, n_layer: int) -> Site:
    """Reads exactly one site. Raises `SiteError` or `RangeError`."""
    if isinstance(text, Site):
        return _checked(text, n_layer)
    sites = parse_many(text, n_layer)
    if len(sites) != 1:
        raise SiteError(f"{text!r} means {len(sites)} sites where one is needed; add a layer")
    return sites[0]


def parse_many(text: str | Site | Iterable[str | Site], n_layer: int) -> list[Site]:
    """Reads a spelling, or several, into sites in the order given, each once.

    Raises:
        SiteError: no such site; the message names near matches.
        RangeError: a layer that the model does not have.
    """
    if isinstance(text, Site):
        return [_checked(text, n_layer)]
    if not isinstance(text, (str, Iterable)):
        raise SiteError(f"a site is a name or a Site, not {text!r}")
    if not isinstance(text, str):
        return list(dict.fromkeys(s for part in text for s in parse_many(part, n_layer)))
    name, layers = split_spelling(text.strip())
    if not KINDS[name].layered:
        if layers is not None:
            raise SiteError(f"site {text!r}: {name} has no layers")
        return [Site(name)]
    if layers is None:
        return [Site(name, i) for i in range(n_layer)]
    return [Site(name, i) for i in dict.fromkeys(indices_in(layers, n_layer, repr(text), "layer"))]


def reads_as_attn_out(text: str) -> bool:
    """Whether a site is spelled `kqv_out`, which some commands read in its old sense."""
    return re.split(r"[-.]", text.strip(), maxsplit=1)[0] == "kqv_out"


def split_spelling(text: str) -> tuple[str, str | None]:
    """mia's name of a site, and the text of the layers or None. Raises `SiteError`."""
    m = re.fullmatch(r"blocks\.((?:[^.]|\.\.)+)\.(.+)", text)
    if m is not None and m[2] in _OF_HOOK:
        return _OF_HOOK[m[2]].name, m[1]
    if text in _OF_HOOK:
        return _OF_HOOK[text].name, None
    for spelling in (r"(.+?)\.((?:-?\d|\.\.|\*|all).*)", r"(.+?)-((?:-?\d|\.\.|\*|all).*)"):
        m = re.fullmatch(spelling, text)
        if m is not None and (kind := _kind(m[1])):
            return kind.name, m[2]
    if kind := _kind(text):
        return kind.name, None
    if module := modules.module_site(text):
        return module
    raise _unknown(text)


def _kind(name: str) -> SiteKind | None:
    # mia's name wins: a name may be spelled alike in llama.cpp
    return KINDS.get(name) or _OF_LLAMA.get(name)


def _checked(site: Site, n_layer: int) -> Site:
    """The site with its layer counted from zero. Raises `SiteError` or `RangeError`."""
    if site.name not in KINDS:
        raise _unknown(str(site))
    if not site.kind.layered:
        if site.layer is not None:
            raise SiteError(f"site {str(site)!r}: {site.name} has no layers")
        return site
    if isinstance(site.layer, bool) or not isinstance(site.layer, (int, type(None), Integral)):
        raise SiteError(f"site {site.name!r}: layer {site.layer!r} is not a whole number")
    if site.layer is None:
        raise SiteError(
            f"site {site.name!r} needs a layer: {site.name}.0 to {site.name}.{n_layer - 1}"
        )
    return Site(site.name, index_in(int(site.layer), n_layer, repr(str(site)), "layer"))


def _unknown(text: str) -> SiteError:
    base, mark, rest = re.match(r"([^-.]*)([-.]?)(.*)", text, re.S).groups()  # type: ignore[union-attr]
    if (kind := _kind(base)) and not kind.layered:
        return SiteError(f"site {text!r}: {kind.name} has no layers")
    if kind:
        return SiteError(
            f"unknown site {text!r}: {rest!r} is not a layer, a range like {base}{mark}3..7 or a "
            f"list like {base}{mark}1,4"
        )
    if block := re.fullmatch(r"(blocks\.[^.]+\.)(.+)", text):
        near = did_you_mean(block[2], [k.hook for k in SITES if k.layered and k.hook])
        near = re.sub(r"(did you mean| or) ", rf"\1 {block[1]}", near)
    else:
        base = re.split(r"[-.]-?\d", text, maxsplit=1)[0]
        near = did_you_mean(base, [*NAMES, *_OF_LLAMA, *modules.NAMES])
    return SiteError(f"unknown site {text!r}{near or '; known: ' + ', '.join(NAMES)}")
