"""Where sites lie in llama.cpp's graphs, and which nodes need not run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.engine.graph import Topology
from mia.llama import Node
from mia.request import Capture, Request
from mia.sites import OF_EXPERTS, Site

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


def test_fused_attention_with_an_f32_cache(case: Tiny, reopen: Callable[..., Tiny]) -> None:
    """llama.cpp rounds the keys and values with casts, which name themselves as a source."""
    fused = reopen(case, flash=True)
    assert any(n.addr in n.src for n in fused.model.topology.nodes)
    prompt, truth = case.prompt(), case.oracle.run(case.prompt())
    sites = ["resid_post", "q", "head_out", "attn_out", "mlp_out"]
    got = fused.model.run([Request(prompt, captures=[Capture(sites)], logits="all")])[0]
    for site, rows in got.captures.items():
        np.testing.assert_allclose(rows, truth[str(site)], atol=0.02, err_msg=str(site))
    assert set(map(str, fused.model.topology.sites)) == {
        s for s in truth if not s.startswith(("attn_pattern", "attn_scores"))
    }


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
    caches = 2 if case.oracle.arch == "gemma2" else 1  # one for windows
    assert caches <= len(inputs) <= caches * max(1, len(case.model.rpc))  # copies on each device
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
        monkeypatch.setattr("mia.engine.nodes.describe", self.leaves.__getitem__)
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
        scores = self("MUL_MAT", "kq-0", self.leaf("keys"), q)
        pattern = self("SOFT_MAX", "kq_soft_max-0", scores)
        heads = self("MUL_MAT", "kqv_out-0", self.leaf("values"), pattern)
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


def test_what_an_adapter_adds_is_no_end_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nemotron-H's form: l_out names what the MLP adds, which with an adapter is a sum."""
    g = Graph()
    x = g.start()
    mid = g("ADD", "ffn_inp-0", g.attention(g.norm("attn_norm-0", x)), x)
    hidden = g("MUL_MAT", "up", g.leaf("up"), g.norm("ffn_norm-0", mid))
    low = g("MUL_MAT", "A", g.leaf("down.lora_a"), hidden)
    part = g("SCALE", "part", g("MUL_MAT", "B", g.leaf("down.lora_b"), low))
    mlp = g("ADD", "l_out-0", g("MUL_MAT", "down", g.leaf("down"), hidden), part)
    end = g("ADD", "block_out-0", mlp, mid)
    g("MUL", "result_norm", g("RMS_NORM", "norm", end), g.leaf("w"))
    sites = g.sites(monkeypatch)
    assert sites["resid_post.0"] == "block_out-0"
    assert sites["mlp_out.0"] == "l_out-0" and sites["mlp_norm.0"] == "ffn_norm-0"


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
    assert sites == {"embed": "embd", "final_norm": "result_norm"}


def test_what_the_mlp_adds_is_not_its_sum_with_the_residual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPT-NeoX's parallel form: two nodes are called ffn_out, the last of them a sum."""
    g = Graph()
    x = g.start()
    o = g.attention(g.norm("attn_norm-0", x))
    f = g("MUL_MAT", "down", g.leaf("down"), g.norm("ffn_norm-0", x))
    g("ADD", "l_out-0", g("ADD", "ffn_out-0", f, x), o)
    sites = g.sites(monkeypatch)
    assert sites["mlp_out.0"] == "down"
    assert sites["mlp_norm.0"] == "ffn_norm-0"


def test_shared_experts_belong_to_what_the_mlp_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    x = g.start()
    mid = g("ADD", "after attention", g.attention(g.norm("attn_norm-0", x)), x)
    n = g.norm("a norm with a name of its own", mid)
    experts = g("MUL_MAT_ID", "ffn_moe_down-0", g.leaf("experts"), n, g.leaf("ids", "i32"))
    routed = g("ADD", "ffn_moe_out-0", g("VIEW", "e0", experts), g("VIEW", "e1", experts))
    both = g("ADD", "ffn_out-0", routed, g("MUL_MAT", "shared", g.leaf("shared"), n))
    g("ADD", "l_out-0", both, mid)
    sites = g.sites(monkeypatch)
    assert sites["mlp_out.0"] == "ffn_out-0"
    assert sites["mlp_norm.0"] == "a norm with a name of its own"
    assert sites["resid_mid.0"] == "after attention"


def test_norms_are_what_attention_and_mlp_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon 40B's form: attn_norm is the name of what the MLP reads."""
    g = Graph()
    x = g.start()
    m, a = g.norm("attn_norm-0", x), g.norm("attn_norm_2-0", x)
    o, f = g.attention(a), g.mlp(m)
    g("ADD", "l_out-0", g("ADD", "sum", f, o), x)
    sites = g.sites(monkeypatch)
    assert sites["attn_norm.0"] == "attn_norm_2-0"
    assert sites["mlp_norm.0"] == "attn_norm-0"


def test_experts_that_read_the_residual_before_attention_are_no_mlp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arctic's form: a dense MLP, and beside it experts that do not read what attention added."""
    g = Graph()
    x = g.start()
    mid = g("ADD", "ffn_inp-0", g.attention(g.norm("attn_norm-0", x)), x)
    dense = g("ADD", "ffn_out-0", g.mlp(g.norm("ffn_norm-0", mid)), mid)
    experts = g("MUL_MAT", "ffn_moe_out-0", g.leaf("experts"), g.norm("ffn_norm_exps-0", x))
    g("ADD", "l_out-0", experts, dense)
    t = g.topology(monkeypatch)
    site = Site("mlp_out", 0)
    assert t.nodes[t.sites[site].index].op == "MUL_MAT" and t.followed == {0}
    assert t.notes[site] == "something else is added behind it"
    assert t.nodes[t.sites[Site("resid_mid", 0)].index].name == "ffn_inp-0"


def test_an_mlp_of_two_parts_is_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Graph()
    x = g.start()
    mid = g("ADD", "ffn_inp-0", g.attention(g.norm("attn_norm-0", x)), x)
    n = g.norm("ffn_norm-0", mid)
    one, other = (g("MUL_MAT", name, g.leaf(name), n) for name in ("dense", "experts"))
    g("ADD", "l_out-0", g("ADD", "sum", one, mid), other)
    t = g.topology(monkeypatch)
    assert "2 terms, added one by one" in t.missing[Site("mlp_out", 0)]


def test_what_is_added_behind_the_mlp_is_not_the_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n and 4: embeddings of each layer are added at the end."""
    g = Graph()
    x = g.start()
    mid = g("ADD", "attn_sum", g.attention(g.norm("attn_norm-0", x)), x)
    both = g("ADD", "mlp_sum", g.mlp(g.norm("ffn_norm-0", mid)), mid)
    gate = g("MUL", "gated", g("MUL_MAT", "gate", g.leaf("gate"), both), g("VIEW", "per layer", x))
    g("ADD", "l_out-0", g("MUL_MAT", "proj", g.leaf("proj"), gate), both)
    sites = g.sites(monkeypatch)
    assert sites["resid_mid.0"] == "attn_sum" and sites["mlp_out.0"] == "ffn_out-0"
    assert sites["attn_out.0"] == "wo"


def test_a_sum_that_is_scaled_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4: a weight scales the output of each block."""
    g = Graph()
    x = g.start()
    mid = g("ADD", "ffn_inp-0", g.attention(g.norm("attn_norm-0", x)), x)
    both = g("ADD", "sum", g.mlp(g.norm("ffn_norm-0", mid)), mid)
    g("MUL", "l_out-0", both, g.leaf("blk.0.layer_output_scale.weight"))
    t = g.topology(monkeypatch)
    sites = {str(s): t.nodes[at.index].name for s, at in t.sites.items()}
    assert sites["resid_post.0"] == "l_out-0" and sites["mlp_out.0"] == "ffn_out-0"
    assert t.factors == {0: ["blk.0.layer_output_scale.weight"]}


def test_the_end_of_a_block_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the norm of the next block reads; a block is never begun at the embeddings because
    the end of the one before has no name."""
    g = Graph()
    x = g.start()
    mid = g("ADD", "ffn_inp-0", g.attention(g.norm("attn_norm-0", x)), x)
    end = g("ADD", "no name", g.mlp(g.norm("ffn_norm-0", mid)), mid)
    n = g("MUL", "attn_norm-1", g("RMS_NORM", "norm-1", end), g.leaf("w"))
    g("ADD", "l_out-1", g("MUL_MAT", "ffn_out-1", g.leaf("down"), n), end)
    t = g.topology(monkeypatch, n_layer=2)
    names = {str(s): t.nodes[at.index].name for s, at in t.sites.items()}
    assert names["resid_post.0"] == names["resid_pre.1"] == "no name"
    g.nodes[-4] = Node(*_rest_with(g.nodes[-4], "another"))
    lost = g.topology(monkeypatch, n_layer=2)
    assert "resid_pre.1" not in {str(s) for s in lost.sites}


def test_keys_that_another_block_has_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n and 4: the last blocks attend to the keys of an earlier one, in its cells."""
    g = Graph()
    x = g.start()
    q = g("MUL_MAT", "Qcur-0", g.leaf("wq"), g.norm("attn_norm-0", x))
    scores = g("MUL_MAT", "kq-0", g("VIEW", "a view", g.leaf("cache_k_l3")), q)
    pattern = g("SOFT_MAX", "kq_soft_max-0", scores)
    heads = g("MUL_MAT", "kqv_out-0", g.leaf("cache_v_l3"), pattern)
    g("ADD", "l_out-0", g("MUL_MAT", "wo", g.leaf("wo"), heads), x)
    t = g.topology(monkeypatch)
    assert t.cache_layers == {0: 3}
    assert t.missing[Site("k", 0)] == "this block reads the keys of another block"


def _rest_with(n: Node, name: str) -> tuple[Any, ...]:
    return (n.addr, name, *_rest(n)[1:])


def test_heads_side_by_side_are_told_apart_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph without rotation may name q before it is reshaped into heads."""
    g = Graph()
    g.attention(g.norm("attn_norm-0", g.start()))
    sites = g.topology(monkeypatch).sites
    for name in ("q", "head_out"):
        node = sites[Site(name, 0)]
        assert (node.shape, node.layout) == ((2, 4), "rows")


# -- mixtures of experts that the tiny models are not ----------------------------------------


class Mixture(Graph):
    """One layer of experts behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_out = self.norm("ffn_norm-0", self.start())

    def logits(self, name: str = "ffn_moe_logits-0") -> int:
        return self("MUL_MAT", name, self.leaf("gate"), self.norm_out, ne=(8, 2, 1, 1))

    def choose(self, compared: int, op: str = "ARGSORT") -> int:
        order = self(op, "ffn_moe_argsort-0", compared)
        return self("VIEW", "ffn_moe_topk-0", order, ne=(2, 2, 1, 1))

    def weigh(self, scores: int, ids: int) -> int:
        flat = self("RESHAPE", "flat", scores, ne=(1, 8, 2, 1))
        return self("GET_ROWS", "ffn_moe_weights-0", flat, ids, ne=(1, 2, 2, 1))

    def use(self, weights: int, ids: int) -> None:
        out = self("MUL_MAT_ID", "ffn_moe_down-0", self.leaf("down"), self.norm_out, ids)
        self("MUL", "ffn_moe_weighted-0", out, self("RESHAPE", "weights", weights))


def test_a_softmax_over_the_chosen_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss: llama.cpp calls the logits ffn_moe_probs, for they are what is compared."""
    g = Mixture()
    logits = g("ADD", "ffn_moe_probs-0", g.logits("product"), g.leaf("bias"), ne=(8, 2, 1, 1))
    ids = g.choose(logits)
    weights = g("SOFT_MAX", "softmax", g("RESHAPE", "row", g.weigh(logits, ids)))
    g.use(weights, ids)
    sites = g.sites(monkeypatch)
    assert sites["router.0"] == "ffn_moe_probs-0" and sites["experts.0"] == "ffn_moe_topk-0"
    assert sites["expert_weights.0"] == "softmax" and "router_choice.0" not in sites


def test_scores_of_a_root_of_a_softplus(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Mixture()
    logits = g.logits()
    scores = g("SQRT", "ffn_moe_probs-0", g("SOFTPLUS", "softplus", logits))
    biased = g("ADD", "ffn_moe_probs_biased-0", scores, g.leaf("bias"))
    ids = g.choose(biased)
    g.use(g("SCALE", "scaled", g.weigh(scores, ids)), ids)
    sites = g.sites(monkeypatch)
    assert sites["router.0"] == "ffn_moe_logits-0" and sites["expert_weights.0"] == "scaled"
    assert sites["router_choice.0"] == "ffn_moe_probs_biased-0"
    assert g.topology(monkeypatch).gate(0) == "sqrt_softplus"


def test_experts_that_a_table_chooses_have_no_router(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Mixture()
    scores = g("SOFT_MAX", "ffn_moe_probs-0", g.logits())
    row = g("GET_ROWS", "row", g.leaf("table", "i32"), g.leaf("tokens", "i32"))
    ids = g.choose(row, op="CPY")
    g.use(g.weigh(scores, ids), ids)
    t = g.topology(monkeypatch)
    assert not {s.name for s in t.sites} & set(OF_EXPERTS)
    assert "mia cannot read how this layer chooses" in t.absence(Site("router", 0))


def test_a_layer_that_chooses_twice_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    g = Mixture()
    for _ in range(2):
        scores = g("SOFT_MAX", "ffn_moe_probs-0", g.logits())
        ids = g.choose(scores)
        g.use(g.weigh(scores, ids), ids)
    assert not {s.name for s in g.topology(monkeypatch).sites} & set(OF_EXPERTS)
