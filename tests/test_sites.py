"""Names of sites: three spellings, ranges and lists, and what is no site."""

import pytest

from mia.errors import RangeError, SiteError
from mia.sites import (
    BY_KEY,
    HEADED,
    LAYERED,
    NAMES,
    RESIDUAL,
    Site,
    parse,
    parse_layers,
    parse_many,
    reads_as_attn_out,
)

#: canonical, llama.cpp, TransformerLens; all of layer 2 where there are layers
SPELLINGS = [
    ("embed", "inp_embd", "hook_embed"),
    ("resid_pre.2", None, "blocks.2.hook_resid_pre"),
    ("attn_norm.2", "attn_norm-2", "blocks.2.ln1.hook_normalized"),
    ("q.2", "Qcur-2", "blocks.2.attn.hook_q"),
    ("k.2", "Kcur-2", "blocks.2.attn.hook_k"),
    ("v.2", "Vcur-2", "blocks.2.attn.hook_v"),
    ("attn_scores.2", "kq-2", "blocks.2.attn.hook_attn_scores"),
    ("attn_pattern.2", "kq_soft_max-2", "blocks.2.attn.hook_pattern"),
    ("head_out.2", "kqv_out-2", "blocks.2.attn.hook_z"),
    ("attn_out.2", "attn_out-2", "blocks.2.hook_attn_out"),
    ("resid_mid.2", "ffn_inp-2", "blocks.2.hook_resid_mid"),
    ("mlp_norm.2", "ffn_norm-2", "blocks.2.ln2.hook_normalized"),
    ("mlp_out.2", "ffn_out-2", "blocks.2.hook_mlp_out"),
    ("resid_post.2", "l_out-2", "blocks.2.hook_resid_post"),
    ("final_norm", "result_norm", "ln_final.hook_normalized"),
    ("logits", "result_output", None),
]


@pytest.mark.parametrize("spellings", SPELLINGS, ids=lambda s: s[0])
def test_three_spellings_are_one_site(spellings: tuple[str, str | None, str | None]) -> None:
    name, _, layer = spellings[0].partition(".")
    site = Site(name, int(layer) if layer else None)
    for text in filter(None, spellings):
        assert parse(text, 4) == site
        assert parse(f"  {text} ", 4) == site
    assert str(site) == spellings[0]
    assert site.llama == (spellings[1] or spellings[0].replace(".", "-"))
    assert parse(site, 4) == site


def test_every_name_is_tried() -> None:
    assert [s[0].split(".")[0] for s in SPELLINGS] == list(NAMES)
    assert {*LAYERED, "embed", "final_norm", "logits"} == set(NAMES)
    assert set(RESIDUAL) < set(NAMES)
    assert set(BY_KEY) < set(HEADED) < set(NAMES)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("l_out", [0, 1, 2, 3, 4]),
        ("l_out-1..3", [1, 2, 3]),
        ("l_out-1-3", [1, 2, 3]),
        ("resid_post.1:3", [1, 2, 3]),
        ("resid_post.3,0", [3, 0]),
        ("l_out-3, 0..1", [3, 0, 1]),
        ("resid_post.-1", [4]),
        ("l_out--1", [4]),
        ("resid_post.-3..-1", [2, 3, 4]),
        ("resid_post.0,-5,0", [0]),
        ("resid_post.*", [0, 1, 2, 3, 4]),
        ("l_out-all", [0, 1, 2, 3, 4]),
        ("blocks.1..2.hook_resid_post", [1, 2]),
        ("blocks.3,1.hook_resid_post", [3, 1]),
        ("blocks.*.hook_resid_post", [0, 1, 2, 3, 4]),
        ("blocks.-1.hook_resid_post", [4]),
    ],
)
def test_ranges_and_lists(text: str, layers: list[int]) -> None:
    assert parse_many(text, 5) == [Site("resid_post", i) for i in layers]


def test_several_are_kept_in_order_and_once() -> None:
    texts = ["l_out-2", Site("q", -1), "embed", "blocks.2.hook_resid_post", "q.0..2"]
    assert parse_many(texts, 3) == [
        Site("resid_post", 2),
        Site("q", 2),
        Site("embed"),
        Site("q", 0),
        Site("q", 1),
    ]
    assert parse_many([], 3) == []


def test_a_bare_name_is_one_site_in_a_model_of_one_block() -> None:
    assert parse("l_out", 1) == Site("resid_post", 0)
    with pytest.raises(SiteError, match="'l_out' means 2 sites where one is needed; add a layer"):
        parse("l_out", 2)
    with pytest.raises(SiteError, match=r"'q\.0\.\.1' means 2 sites"):
        parse("q.0..1", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l_outt-3", "unknown site 'l_outt-3'; did you mean l_out"),
        ("resid_pst.3", r"did you mean resid_post or resid_pre"),
        ("blocks.3.hook_mlp_outt", r"did you mean blocks\.3\.hook_mlp_out"),
        ("blocks.9.hook_q", r"did you mean blocks\.9\.attn\.hook_q"),
        ("l_out-x", "did you mean l_out"),
        ("", "unknown site ''; known: embed, resid_pre, attn_norm"),
        ("zzz", "unknown site 'zzz'; known: embed, resid_pre"),
        ("embed.0", r"'embed\.0': embed has no layers"),
        ("result_norm-1", "'result_norm-1': final_norm has no layers"),
        ("Blocks.1.hook_q", "unknown site"),
        (Site("resid_post"), r"needs a layer: resid_post\.0 to resid_post\.4"),
        (Site("logits", 0), "logits has no layers"),
        (Site("nope", 0), "unknown site 'nope.0'"),
    ],
)
def test_unknown_sites_name_near_ones(text: str | Site, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        parse(text, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l_out-5", "'l_out-5': layer 5 is out of range; this model has 0 to 4"),
        ("resid_post.-6", "layer -6 is out of range"),
        ("blocks.9.attn.hook_q", "layer 9 is out of range; this model has 0 to 4"),
        ("l_out-3..1", r"'l_out-3\.\.1': the range 3\.\.1 runs backwards"),
        ("l_out-1,,2", "'' is not a layer, a range like 10..20 or a list like 3,7"),
        ("q.3.5", r"'q\.3\.5': '3\.5' is not a layer"),
        (Site("q", 5), r"'q\.5': layer 5 is out of range"),
    ],
)
def test_layers_out_of_range_name_the_range(text: str | Site, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        parse_many(text, 5)


def test_layers_alone() -> None:
    assert parse_layers("10..12,3,-1", 30) == [10, 11, 12, 3, 29]
    with pytest.raises(RangeError, match="'31': layer 31 is out of range"):
        parse_layers("31", 30)


def test_the_old_sense_of_kqv_out() -> None:
    assert [reads_as_attn_out(t) for t in ("kqv_out", "kqv_out-3", " kqv_out-1..2")] == [True] * 3
    assert not any(
        map(reads_as_attn_out, ("head_out.3", "kqv_outs", "l_out", "blocks.1.attn.hook_z"))
    )
