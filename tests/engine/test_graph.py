"""Where sites lie in llama.cpp's graphs, and which nodes need not run."""

from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.engine.graph import Topology
from mia.llama import Node
from mia.request import Capture, Request
from mia.sites import Site

#: what llama.cpp calls the nodes that are found by structure, in layer 1
ATTN_OUT = {"llama": "attn_out-1", "gemma2": "attn_post_norm-1"}
RESID_MID = {"gemma2": "sa_out-1"}
EMBED = {"gemma2": "inp_scaled", "gpt2": "inpL"}


def test_every_site_of_every_layer_is_there(case: Tiny) -> None:
    sites = {str(site) for site in case.model.topology.sites}
    assert sites == set(case.oracle.run(case.prompt())) and len(sites) > 13 * case.model.n_layer


def test_shapes(case: Tiny) -> None:
    t, sites, o = case.model.topology, case.model.topology.sites, case.oracle
    for i in range(o.n_layer):
        assert sites[Site("q", i)].shape == (o.n_head, o.head_dim)
        assert sites[Site("k", i)].shape == sites[Site("v", i)].shape == (o.n_head_kv, o.head_dim)
        assert sites[Site("head_out", i)].shape == (o.n_head, o.head_dim)
        assert sites[Site("attn_pattern", i)].shape == (o.n_head,)
        assert sites[Site("resid_post", i)].shape == (o.n_embd,)
    assert sites[Site("logits")].shape == (o.n_vocab,)
    assert case.model.head_dim == o.head_dim
    # in the last block the rows of outputs are picked after attention
    picked = {s for s, at in sites.items() if at.outputs_only}
    last = o.n_layer - 1
    after = {Site(x, last) for x in ("resid_mid", "mlp_norm", "mlp_out", "resid_post")}
    if o.arch == "gemma2":  # before the norm that belongs to what attention adds
        after.add(Site("attn_out", last))
    assert picked == after | {Site("final_norm"), Site("logits")}
    assert t.nodes[sites[Site("resid_post", last)].index].name == f"l_out-{last}"


def test_sites_without_a_name_are_found(case: Tiny) -> None:
    t = case.model.topology
    arch = case.oracle.arch
    for site, names in (("attn_out", ATTN_OUT), ("resid_mid", RESID_MID)):
        node = t.nodes[t.sites[Site(site, 1)].index]
        if arch in names:
            assert node.name == names[arch]
        assert node.op in ("ADD", "MUL", "MUL_MAT")
    assert t.sites[Site("resid_pre", 1)].index == t.sites[Site("resid_post", 0)].index
    first = t.nodes[t.sites[Site("resid_pre", 0)].index]
    if arch in EMBED:
        assert first.name == EMBED[arch]
        assert t.sites[Site("embed")].index < t.sites[Site("resid_pre", 0)].index
    else:
        assert t.sites[Site("embed")].index == t.sites[Site("resid_pre", 0)].index


def test_of_nodes_with_one_name_the_last_is_meant(llama: Tiny) -> None:
    """Qcur is named after the product, after the reshape and after the rotation."""
    t = llama.model.topology
    same = [i for i, n in enumerate(t.nodes) if n.name == "Qcur-1"]
    assert len(same) > 1
    assert t.sites[Site("q", 1)].index == same[-1]
    assert t.nodes[same[-1]].op == "ROPE"


def test_what_attention_and_mlp_add_makes_the_residual(case: Tiny) -> None:
    parts = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    result = case.model.run([Request(case.prompt(), captures=[Capture(parts)], logits="all")])[0]
    for i in range(case.model.n_layer):
        pre, attn, mid, mlp, post = (result[f"{p}.{i}"] for p in parts)
        np.testing.assert_allclose(pre + attn, mid, rtol=0, atol=1e-6)
        np.testing.assert_allclose(mid + mlp, post, rtol=0, atol=1e-6)


# -- what need not run ------------------------------------------------------------------------


def _reads(t: Topology, i: int) -> set[int]:
    """Indices of the nodes that node i reads, directly or through others."""
    index = {n.addr: j for j, n in enumerate(t.nodes)}
    out: set[int] = set()
    stack = [i]
    while stack:
        for s in t.nodes[stack.pop()].src:
            if s in index and index[s] not in out:
                out.add(index[s])
                stack.append(index[s])
    return out


@pytest.mark.parametrize("layer", [1, 2])
def test_skippable_nodes_are_those_that_only_make_what_is_known(case: Tiny, layer: int) -> None:
    t = case.model.topology
    known = t.sites[Site("resid_post", layer - 1)].index
    skip = set(t.skippable_below(layer))
    assert known in skip and max(skip) == known
    for i in range(layer):  # the products, the rotation, the stores of keys and values
        for site in ("attn_norm", "q", "k", "v", "head_out", "attn_out", "mlp_norm", "mlp_out"):
            assert t.sites[Site(site, i)].index in skip
    for i in range(layer):
        stores = [j for j, n in enumerate(t.nodes) if n.name.startswith(f"cache_k_l{i} ")]
        assert stores and all(t.nodes[j].op != "SET_ROWS" or j in skip for j in stores)
    for i in range(known + 1, len(t.nodes)):  # nothing that runs reads what did not
        direct = {j for j, n in enumerate(t.nodes) if n.addr in t.nodes[i].src}
        assert direct & skip <= {known}


def test_the_unembedding_alone_is_skipped_where_no_logits_are_wanted(case: Tiny) -> None:
    t = case.model.topology
    tail = t.skippable_tail
    assert t.sites[Site("logits")].index in tail
    assert t.sites[Site("final_norm")].index == tail[0] - 1
    assert tail[-1] == len(t.nodes) - 1


def test_cells_are_read_where_keys_are_stored(case: Tiny) -> None:
    t = case.model.topology
    assert sorted(t.cell_inputs) == [0, 1, 2]
    inputs = {cells for _, cells in t.cell_inputs.values()}
    assert len(inputs) == (2 if case.oracle.arch == "gemma2" else 1)  # a cache for windows
    for layer, (index, _) in t.cell_inputs.items():
        assert t.nodes[index].op == "SET_ROWS"
        assert f"_l{layer}" in t.nodes[index].name


# -- graphs again ------------------------------------------------------------------------------


def test_the_same_graph_elsewhere_is_the_same(llama: Tiny, tiny: Any) -> None:
    t = llama.model.topology
    assert t.same_as([Node(n.addr + 64, *_rest(n)) for n in t.nodes])
    assert not t.same_as(t.nodes[:-1])
    assert not t.same_as(tiny("gpt2").model.topology.nodes)
    renamed = [*t.nodes]
    renamed[3] = Node(renamed[3].addr, "another", *_rest(renamed[3])[1:])
    assert not t.same_as(renamed)


def _rest(n: Node) -> tuple[Any, ...]:
    return (n.name, n.op, n.type, n.ne, n.nb, n.src, n.view_src, n.params)


# -- architectures that the tiny models are not -----------------------------------------------


class Graph:
    """Nodes made by hand: `g("MUL_MAT", "name", ne, src…)` gives an address."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.leaves: dict[int, Node] = {}

    def leaf(self, name: str, type: str = "f32") -> int:
        addr = 10_000 + 16 * len(self.leaves)
        self.leaves[addr] = Node(addr, name, "NONE", type, (8, 8, 1, 1), (), (), 0, b"")
        return addr

    def __call__(self, op: str, name: str, *src: int, ne: tuple[int, ...] = (8, 2, 1, 1)) -> int:
        addr = 16 * (len(self.nodes) + 1)
        self.nodes.append(Node(addr, name, op, "f32", ne, (), src, 0, bytes(64)))
        return addr

    def topology(self, monkeypatch: pytest.MonkeyPatch, n_layer: int = 1) -> Topology:
        monkeypatch.setattr("mia.engine.graph.describe", self.leaves.__getitem__)
        return Topology(self.nodes, n_layer=n_layer, n_head=2)

    def sites(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """The name of the node at each site."""
        t = self.topology(monkeypatch)
        return {str(s): t.nodes[at.index].name for s, at in t.sites.items()}

    def start(self) -> int:
        return self("GET_ROWS", "embd", self.leaf("token_embd.weight"), self.leaf("tokens", "i32"))

    def norm(self, name: str, x: int) -> int:
        return self("MUL", name, self("RMS_NORM", "norm-0", x), self.leaf("w"))

    def attention(self, x: int) -> int:
        q = self("MUL_MAT", "Qcur-0", self.leaf("wq"), x)
        heads = self("MUL_MAT", "kqv_out-0", q, q)
        return self("MUL_MAT", "wo", self.leaf("wo"), heads)

    def mlp(self, x: int) -> int:
        return self("MUL_MAT", "ffn_out-0", self.leaf("down"), x)


def test_a_block_whose_attention_and_mlp_are_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J's form: both read the same norm, and there is no residual between them."""
    g = Graph()
    x = g.start()
    a = g.norm("attn_norm-0", x)
    o, f = g.attention(a), g.mlp(a)
    g("ADD", "l_out-0", g("ADD", "sum", f, o), x)
    sites = g.sites(monkeypatch)
    assert sites["attn_out.0"] == "wo"
    assert sites["mlp_out.0"] == "ffn_out-0"
    assert sites["resid_post.0"] == "l_out-0"
    assert "resid_mid.0" not in sites


def test_bias_norm_and_scale_belong_to_what_attention_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    x = g.start()
    o = g.attention(g.norm("attn_norm-0", x))
    o = g("ADD", "bias", o, g.leaf("bo"))
    o = g("MUL", "post", g("RMS_NORM", "n", o), g.leaf("wp"))
    o = g("SCALE", "scaled", o)
    mid = g("ADD", "ffn_inp-0", o, x)
    f = g.mlp(g.norm("ffn_norm-0", mid))
    g("ADD", "l_out-0", f, mid)
    sites = g.sites(monkeypatch)
    assert sites["attn_out.0"] == "scaled"
    assert sites["resid_mid.0"] == "ffn_inp-0"
    assert sites["mlp_out.0"] == "ffn_out-0"


def test_a_control_vector_at_the_end_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    x = g.start()
    mid = g("ADD", "ffn_inp-0", g.attention(g.norm("attn_norm-0", x)), x)
    mlp = g("MUL_MAT", "without a name of its own", g.leaf("w"), g.norm("ffn_norm-0", mid))
    g("ADD", "l_out-0", g("ADD", "sum", mlp, mid), g.leaf("control"))
    sites = g.sites(monkeypatch)
    assert sites["mlp_out.0"] == "without a name of its own"
    assert sites["resid_post.0"] == "l_out-0"


def test_what_a_later_block_reads_of_an_earlier_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n's form: the last blocks attend with the keys of an earlier one."""
    g = Graph()
    x = g.start()
    a = g.norm("attn_norm-0", x)
    k = g("MUL_MAT", "Kcur-0", g.leaf("wk"), a)
    turned = g("ROPE", "k_rope-0", k)
    only_here = g("MUL_MAT", "kqv_out-0", turned, a)
    y = g("ADD", "l_out-0", g("MUL_MAT", "wo-0", g.leaf("wo"), only_here), x)
    q = g("MUL_MAT", "Qcur-1", g.leaf("wq"), g.norm("attn_norm-1", y))
    z = g("MUL_MAT", "wo-1", g.leaf("wo"), g("MUL_MAT", "kqv_out-1", turned, q))
    g("ADD", "l_out-1", z, y)
    t = g.topology(monkeypatch, n_layer=2)
    skipped = [t.nodes[i].name for i in t.skippable_below(1)]
    assert skipped == ["kqv_out-0", "wo-0", "l_out-0"]


def test_what_a_graph_does_not_name_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    x = g.start()
    mid = g("ADD", "something", g("MUL_MAT", "attn_out-0", g.leaf("w"), x), x)
    g("ADD", "result_norm", mid, g.leaf("b"))
    sites = g.sites(monkeypatch)
    assert sites == {
        "embed": "embd",
        "resid_pre.0": "embd",
        "attn_out.0": "attn_out-0",
        "final_norm": "result_norm",
    }


def test_heads_side_by_side_are_told_apart_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph without rotation may name q before it is reshaped into heads."""
    g = Graph()
    g.attention(g.norm("attn_norm-0", g.start()))
    sites = g.topology(monkeypatch).sites
    for name in ("q", "head_out"):
        node = sites[Site(name, 0)]
        assert (node.shape, node.layout) == ((2, 4), "rows")
