"""Names of Hugging Face's modules, as a fourth spelling of sites: a module's name stands for its
output.

    model.layers.3.input_layernorm     attn_norm.3
    transformer.h.3.mlp                mlp_out.3
    gpt_neox.layers.3                  resid_post.3

Ranges and lists of layers are read as in other spellings. A module whose output is no site of mia,
or another one from model to model, is refused with the reason.
"""

from __future__ import annotations

import re

from mia.errors import SiteError, did_you_mean
from mia.notices import notice

_WITH_POST_NORM = "; in models with a norm behind it (Gemma 2, OLMo 2) that norm is in it"
#: what one reads of a site whose module can differ from it
_CAVEATS = {
    "attn_out": f"what attention adds to the residual{_WITH_POST_NORM}",
    "mlp_out": f"what the MLP adds to the residual{_WITH_POST_NORM}",
    "logits": "the logits after scaling and soft-capping, in models that have them",
}
#: modules of a block -> site
_OF_BLOCK = {
    "": "resid_post",
    **dict.fromkeys(("input_layernorm", "ln_1", "ln_attn"), "attn_norm"),
    **dict.fromkeys(("pre_feedforward_layernorm", "ln_2", "ln_mlp"), "mlp_norm"),
    **dict.fromkeys(("self_attn.v_proj", "v_proj"), "v"),
    **dict.fromkeys(("self_attn", "self_attn.o_proj", "o_proj", "attn", "attn.c_proj"), "attn_out"),
    **dict.fromkeys(("attention", "attention.dense"), "attn_out"),
    **dict.fromkeys(("self_attention", "self_attention.dense"), "attn_out"),
    **dict.fromkeys(
        ("mlp", "mlp.down_proj", "down_proj", "mlp.c_proj", "mlp.dense_4h_to_h"), "mlp_out"
    ),
    **dict.fromkeys(("block_sparse_moe", "post_feedforward_layernorm"), "mlp_out"),
}
#: modules outside the blocks -> site
_OF_MODEL = {
    **dict.fromkeys(("embed_tokens", "wte", "embed_in", "word_embeddings"), "embed"),
    **dict.fromkeys(("norm", "ln_f", "final_layer_norm"), "final_norm"),
    **dict.fromkeys(("lm_head", "embed_out"), "logits"),
}
_ROTATED = (
    "gives {0} before its rotation; mia's {0} is what attention reads, behind rotation and norm"
)
_JOINED = "gives queries, keys and values side by side; mia has them as q, k and v"
#: modules without a site -> why, and what there is
_REFUSED = {
    **{
        f"{before}{x}_{after}": _ROTATED.format(x)
        for x in "qk"
        for before in ("self_attn.", "attn.", "")
        for after in ("proj", "norm")
    },
    **dict.fromkeys(("attn.c_attn", "self_attn.qkv_proj"), _JOINED),
    **dict.fromkeys(("attention.query_key_value", "self_attention.query_key_value"), _JOINED),
    "post_attention_layernorm": "is the norm before the MLP in Llama, Mistral and Qwen (mlp_norm), "
    "but the norm behind attention in Gemma 2 and OLMo 2 (part of attn_out)",
    **dict.fromkeys(
        ("mlp.gate_proj", "mlp.up_proj", "mlp.act_fn", "mlp.act", "mlp.c_fc", "mlp.dense_h_to_4h"),
        "is inside the MLP, where mia has no site; there are mlp_norm before it and mlp_out behind",
    ),
}
#: names of modules inside a block that are sites
NAMES = tuple(name for name in _OF_BLOCK if name)
_LAYERS = r"(?:[^.]|\.\.)+"
_PATH = re.compile(rf"((?:[a-z_]+\.)*?)(layers|h)\.({_LAYERS})(?:\.([a-z]\w*(?:\.[a-z]\w*)*))?")
_OUTSIDE = re.compile(r"((?:[a-z_]+\.)*)([a-z_]+)")
_BARE = re.compile(r"([a-z_]+\d?(?:\.[a-z]\w*)?)(?:[.-]((?:-?\d|\.\.|\*|all).*))?")


def module_site(text: str) -> tuple[str, str | None] | None:
    """mia's name of the site that a module's output is, and the text of the layers or None; None
    if no module is called so. A notice says what the site is where that can differ.

    Raises `SiteError` for a module whose output is no site."""
    if m := _PATH.fullmatch(text):
        return _in_block(text, m[4] or "", m[3], m[2] == "h" or m[1] == "gpt_neox.")
    if (m := _OUTSIDE.fullmatch(text)) and m[2] in _OF_MODEL and (m[1] or m[2] != "norm"):
        return _told(text, _OF_MODEL[m[2]], None)
    if (m := _BARE.fullmatch(text)) and m[1] in {*NAMES, *_REFUSED}:
        return _in_block(text, m[1], m[2], False)
    return None


def _in_block(text: str, name: str, layers: str | None, norm_first: bool) -> tuple[str, str | None]:
    """`norm_first`: the second norm of a block is before the MLP in all models with such paths."""
    if name == "post_attention_layernorm" and norm_first:
        return "mlp_norm", layers
    if name in _REFUSED:
        raise SiteError(f"{text!r} is no site: {name} {_REFUSED[name]}")
    if name not in _OF_BLOCK:
        raise SiteError(f"unknown module {text!r}{did_you_mean(name, NAMES)}")
    return _told(text, _OF_BLOCK[name], layers)


def _told(text: str, site: str, layers: str | None) -> tuple[str, str | None]:
    if site in _CAVEATS:
        notice(f"{text} is read as {site}: {_CAVEATS[site]}")
    return site, layers
