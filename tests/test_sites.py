"""Names of sites: three spellings, ranges and lists, what is no site, and the table of them."""

import json
import re
from pathlib import Path

import pytest
from extended import run_extended
from tiny import Tiny

from mia.errors import RangeError, SiteError
from mia.sites import (
    BY_KEY,
    HEADED,
    LAYERED,
    LENS_READS,
    NAMES,
    RESIDUAL,
    Site,
    first_block,
    parse,
    parse_many,
    reads_as_attn_out,
)


def _spellings() -> list[list[str]]:
    """The README's table: canonical, llama.cpp, TransformerLens, with layer 2 for i."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- sites -->\n")[1].split("\n<!-- /sites -->")[0].splitlines()[2:]
    return [[re.sub(r"\bi\b", "2", x.strip(" `")) for x in row.split("|")[1:4]] for row in table]


SPELLINGS = _spellings()


@pytest.mark.parametrize("spellings", SPELLINGS, ids=lambda s: s[0])
def test_three_spellings_are_one_site(spellings: list[str]) -> None:
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
    assert ["attn_pattern.2", "kq_soft_max-2", "blocks.2.attn.hook_pattern"] in SPELLINGS
    assert ["resid_pre.2", "", "blocks.2.hook_resid_pre"] in SPELLINGS
    assert set(LAYERED) < set(NAMES) and set(RESIDUAL) < set(LENS_READS) < set(NAMES)
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
        ("blocks.3...hook_resid_post", [3, 4]),
        ("blocks...1.hook_resid_post", [0, 1]),
        ("blocks.0,3..4.hook_resid_post", [0, 3, 4]),
        ("resid_post...1", [0, 1]),
        ("l_out-..1", [0, 1]),
        ("l_out-3..", [3, 4]),
        ("blocks.3,1.hook_resid_post", [3, 1]),
        ("blocks.*.hook_resid_post", [0, 1, 2, 3, 4]),
        ("blocks.-1.hook_resid_post", [4]),
    ],
)
def test_ranges_and_lists(text: str, layers: list[int]) -> None:
    assert parse_many(text, 5) == [Site("resid_post", i) for i in layers]


def test_several_are_kept_in_order_and_once() -> None:
    texts: list[str | Site] = [
        "l_out-2",
        Site("q", -1),
        "embed",
        "blocks.2.hook_resid_post",
        "q.0..2",
    ]
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
        ("l_outt-3", "unknown site 'l_outt-3', did you mean l_out"),
        ("resid_pst.3", r"did you mean resid_post or resid_pre"),
        ("blocks.3.hook_mlp_outt", r"did you mean blocks\.3\.hook_mlp_out"),
        ("blocks.9.hook_q", r"did you mean blocks\.9\.attn\.hook_q"),
        ("l_out-x", r"'x' is not a layer, a range like l_out-3\.\.7 or a list like l_out-1,4"),
        ("resid_post.", r"'' is not a layer, a range like resid_post\.3\.\.7"),
        ("Resid_Post.3", r"did you mean resid_post"),
        ("MLP_OUT", r"did you mean mlp_out"),
        ("blocks.3.hook_resid", r"did you mean blocks\.3\.hook_resid_\w+ or blocks\.3\.hook"),
        ("kq_softmax", "did you mean kq_soft_max"),
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


@pytest.mark.parametrize("text", ["l_out-x", "embed-x", "blocks.1.hook_q", "Qcur-y", "q", "norm"])
def test_what_was_typed_is_never_suggested(text: str) -> None:
    typed = {text, text.split("-")[0], text.rpartition(".")[2]}
    try:
        parse_many(text, 5)
    except SiteError as err:
        assert not typed & {*str(err).partition("did you mean ")[2].strip("?").split(" or ")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l_out-5", "'l_out-5': layer 5 is out of range; there are 0 to 4"),
        ("resid_post.-6", "layer -6 is out of range"),
        ("blocks.9.attn.hook_q", "layer 9 is out of range; there are 0 to 4"),
        ("l_out-3..1", r"'l_out-3\.\.1': the range 3\.\.1 runs backwards"),
        ("l_out-1,,2", "'' is not a layer, a range like 3..7 or a list like 1,4"),
        ("q.3.5", r"'q\.3\.5': '3\.5' is not a layer"),
        (Site("q", 5), r"'q\.5': layer 5 is out of range"),
    ],
)
def test_layers_out_of_range_name_the_range(text: str | Site, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        parse_many(text, 5)


def test_the_old_sense_of_kqv_out() -> None:
    assert [reads_as_attn_out(t) for t in ("kqv_out", "kqv_out-3", " kqv_out-1..2")] == [True] * 3
    assert not any(
        map(reads_as_attn_out, ("head_out.3", "kqv_outs", "l_out", "blocks.1.attn.hook_z"))
    )


# -- the table ---------------------------------------------------------------------------


def test_the_first_block_that_an_edit_or_capture_needs() -> None:
    assert first_block(Site("embed"), 3) == 0
    assert first_block(Site("logits"), 3) == first_block(Site("final_norm"), 3) == 2
    assert [first_block(Site("resid_pre", i), 3) for i in range(3)] == [0, 1, 2]
    assert [first_block(Site("head_out", i), 3) for i in range(3)] == [0, 1, 2]
    assert [first_block(Site("resid_post", i), 3) for i in range(3)] == [1, 2, 2]


ADDED = """
import json, sys
import numpy as np
from typer.testing import CliRunner
from mia import Capture, Edit, Model, Request, Site
from mia.cli import app
from mia.sites import parse

spellings = ["added.1", "ffn_gate-1", "blocks.1.mlp.hook_pre"]
assert {parse(s, 3) for s in spellings} == {Site("added", 1)}
with Model(sys.argv[1], threads=1) as model:
    sites = Capture(["mlp_norm.1", "added.1", "mlp_out"])
    changed = Request([5, 6, 7], [Edit("ffn_gate-1", "zero", tokens=1)], [sites])
    plain, edited = model.run([Request([5, 6, 7], captures=[sites]), changed])
    gate = plain["mlp_norm.1"] @ model.weights.matrix("blk.1.ffn_gate.weight").T
    np.testing.assert_allclose(plain["added.1"], gate, atol=1e-5)
assert not edited["mlp_out.1"][1].any() and plain["mlp_out.1"][1].all()
np.testing.assert_array_equal(edited["mlp_out.1"][0], plain["mlp_out.1"][0])
np.testing.assert_array_equal(edited["mlp_out.0"], plain["mlp_out.0"])
print(CliRunner().invoke(app, ["sites", "--json", "-m", sys.argv[1]]).stdout)
"""


def test_a_site_is_added_by_its_row_alone(tmp_path: Path, llama: Tiny) -> None:
    row = """    SiteKind("added", "mlp.hook_pre", ("ffn_gate",), ("n_ff",), about="before the SiLU"),"""
    printed = run_extended(tmp_path, "sites.py", "SITES = (", row, ADDED, str(llama.path))
    (gate,) = (s for s in json.loads(printed)["sites"] if s["site"] == "added")
    n_ff = llama.oracle.weights["blk.0.ffn_gate.weight"].shape[0]
    assert gate == {
        "site": "added",
        "llama.cpp": "ffn_gate",
        "transformer_lens": "blocks.N.mlp.hook_pre",
        "shape": [n_ff],
        "layers": [0, 2],
        "node": "ffn_gate-0",
        "about": "before the SiLU",
        "found": "structure",
        "in": "0-2",
        "checked": "nothing about it could be tested in layers 0..2",
        "note": "",
    }
