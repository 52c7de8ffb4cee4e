"""What there is: tokens, sites, nodes."""

from collections.abc import Callable

from rich.console import Group
from rich.table import Table
from tiny import Tiny

from mia.methods import overview
from mia.sites import Site


def test_tokens_of_a_text_and_of_ids(llama: Tiny) -> None:
    m = llama.model
    report = overview.tokens(m, "The capital\n", bos=True)
    ids = m.tokenize("The capital\n", bos=True)
    assert report.bos and [t.id for t in report.tokens] == ids
    assert report.document()["tokens"] == report.rows()
    assert report.rows()[1] == {"index": 1, "id": m.token_id("The"), "text": "The"}
    lines = report.plain().splitlines()
    assert lines[0] == "   0       0  <|endoftext|>" and lines[-1].endswith("\\n")
    again = overview.tokens(m, ids[1:])
    assert not again.bos and [t.id for t in again.tokens] == ids[1:]


def test_sites_have_the_shapes_of_their_rows(case: Tiny) -> None:
    o = case.oracle
    sites = {s["site"]: s for s in overview.sites(case.model).rows()}
    arrays = o.run(case.prompt(2))
    for name, s in sites.items():
        layers = s["layers"]
        key = name if layers is None else f"{name}.{layers[-1]}"
        if key in arrays and "n_keys" not in s["shape"]:
            width = 1
            for n in s["shape"]:
                width *= n
            assert arrays[key].shape[-1] == width, name
        if layers is not None:
            assert layers == [0, o.n_layer - 1]
    assert sites["k"]["shape"] == [o.n_head_kv, o.head_dim]
    assert sites["attn_pattern"]["shape"] == [o.n_head, "n_keys"]
    assert sites["resid_post"]["transformer_lens"] == "blocks.N.hook_resid_post"
    assert sites["head_out"]["about"].startswith(f"{o.n_head} heads of {o.head_dim} side by side")


def test_grouped_queries_are_told(tiny: Callable[[str], Tiny]) -> None:
    about = {s["site"]: s["about"] for s in overview.sites(tiny("llama").model).rows()}
    assert about["v"] == "2 value heads of 8, each read by 3 query heads"
    gpt2 = {s["site"]: s["about"] for s in overview.sites(tiny("gpt2").model).rows()}
    assert "each read by" not in gpt2["v"]


def test_the_table_of_sites_leaves_out_what_does_not_fit(llama: Tiny) -> None:
    report = overview.sites(llama.model)
    assert report.plain().splitlines()[0].split()[:3] == ["site", "llama.cpp", "one"]
    assert len(report.plain().splitlines()) == 2 + len(report.rows())
    groups = [report.table(width) for width in (80, 100, 112, 172)]
    tables = [g.renderables[0] for g in groups if isinstance(g, Group)]
    assert [len(t.columns) for t in tables if isinstance(t, Table)] == [5, 6, 7, 8]


def test_sites_say_whether_they_are_verified_and_why_others_are_missing(
    llama: Tiny, tiny: Callable[[str], Tiny]
) -> None:
    report = overview.sites(llama.model)
    assert {s["checked"] for s in report.sites} == {"verified"}
    assert {m["why"] for m in report.missing} == {"this model has no experts"}
    assert report.plain().endswith(
        "no router, router_choice, experts, expert_weights: this model has no experts"
    )
    mamba = overview.sites(tiny("mamba").model)
    why = {m["site"]: (m["layers"], m["why"]) for m in mamba.missing}
    assert why["attn_out"] == (None, "this block has no softmax attention")
    assert "head_out, attn_out: this block has no softmax attention" in mamba.plain()
    gemma = overview.sites(tiny("gemma2").model)
    notes = {s["site"]: s["note"] for s in gemma.sites}
    assert notes["attn_out"] == "after the norm behind it"
    assert "attn_out: after the norm behind it" in gemma.plain()


def test_the_graph_names_sites_and_sources(llama: Tiny) -> None:
    report = overview.graph(llama.model)
    nodes = report.rows()
    assert [n["index"] for n in nodes] == list(range(len(nodes)))
    last = nodes[-1]
    assert (last["name"], last["op"]) == ("result_output", "MUL_MAT")
    assert last["sources"] == ["output.weight", "result_norm"] and "logits" in last["sites"]
    topology = llama.model.unfused_topology
    index = topology.sites[Site("head_out", 1)].index
    assert nodes[index]["sites"] == ["head_out.1"]
    assert report.plain().splitlines()[index].endswith("= head_out.1")
