"""The checks of a block's algebra: true sites pass, each false one is refused, and is remembered."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.edits import Edit
from mia.engine import run
from mia.engine.blocks import Block, Part
from mia.engine.graph import SiteNode, Topology
from mia.errors import SiteError
from mia.io.files import cache_folder
from mia.llama import give_back_memory
from mia.model import Model
from mia.models import algebra as module, claims
from mia.models.claims import Algebra, check
from mia.notices import MiaWarning
from mia.request import Capture, Request, Result
from mia.sites import Site

#: sites that some claim is about in every tiny model with attention
TESTED = {
    "embed", "resid_pre", "attn_norm", "mlp_norm", "q", "k", "v", "attn_scores", "attn_pattern",
    "head_out", "attn_out", "resid_mid", "mlp_out", "resid_post", "final_norm", "logits",
}  # fmt: skip


def test_every_site_of_a_sound_model_is_verified(case: Tiny) -> None:
    found = check(case.model, case.model._engine)
    assert (found.refused, found.untested) == ({}, {})
    assert found.verified(case.model.unfused_topology.sites) == TESTED
    assert all(np.isfinite(c.error) and c.error <= c.tolerance for c in found.checks)


def test_a_recurrent_model_has_fewer_claims(tiny: Callable[[str], Tiny]) -> None:
    model = tiny("mamba").model
    found = check(model, model._engine)
    assert found.refused == {}
    assert found.verified(model.unfused_topology.sites) == {
        "embed",
        "resid_pre",
        "attn_norm",
        "resid_post",
        "final_norm",
        "logits",
    }


def _node(of: Callable[[Block], int | None]) -> Callable[[Block], Part]:
    return lambda block: Part(of(block))


def _before_rope(block: Block) -> int | None:
    part = _true["q"](block)
    assert part.index is not None
    graph = block._graph
    return graph.index[graph.nodes[part.index].src[0]]


_true = {
    name: getattr(Block, name)
    for name in ("q", "k", "v", "attn_norm", "mlp_norm", "attn_out", "mlp_out", "resid_post",
                 "head_out", "attn_pattern", "attn_scores")
}  # fmt: skip

#: a site, and the node that a wrong search would take for it
WRONG: dict[str, tuple[str, Callable[[Block], Part]]] = {
    "q before its rotation": ("q", _node(_before_rope)),
    "mlp_out with the residual": ("mlp_out", _node(lambda b: b._end)),
    "mlp_out that is the norm": ("mlp_out", lambda b: _true["mlp_norm"](b)),
    "attn_out that is the MLP's": ("attn_out", lambda b: _true["mlp_out"](b)),
    "attn_norm that the MLP reads": ("attn_norm", lambda b: _true["mlp_norm"](b)),
    "mlp_norm that is what attention adds": ("mlp_norm", lambda b: _true["attn_out"](b)),
    "keys for values": ("v", lambda b: _true["k"](b)),
    "values for keys": ("k", lambda b: _true["v"](b)),
    "scores that are a pattern": ("attn_scores", lambda b: _true["attn_pattern"](b)),
    "a pattern that is scores": ("attn_pattern", lambda b: _true["attn_scores"](b)),
    "heads that are what attention adds": ("head_out", lambda b: _true["attn_out"](b)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_site_that_is_not_what_it_says_is_refused(
    fault: str, llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wrong = WRONG[fault]
    monkeypatch.setitem(_sites_of_block(), name, wrong)
    with Model(llama.path, threads=1) as model:
        refused = check(model, model._engine).refused
    layers = range(3)
    partner = {"q": "k", "k": "q"}.get(name, name)  # which of the two is wrong is not told apart
    assert {s.split(".")[0] for s in refused} <= {name, partner}, refused
    assert {f"{name}.{i}" for i in layers} <= set(refused), refused
    assert all("does not hold" in why or "out of bounds" in why for why in refused.values())


def _sites_of_block() -> dict[str, Callable[[Block], Part]]:
    from mia.engine import graph

    return graph._OF_BLOCK


def test_scores_of_another_scale_are_refused(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        _sites_of_block(), "attn_scores", lambda b: replace(_true["attn_scores"](b), scale=1.0)
    )
    with Model(llama.path, threads=1) as model:
        refused = check(model, model._engine).refused
    assert {f"attn_scores.{i}" for i in range(3)} <= set(refused)


def test_embeddings_that_are_scaled_are_refused(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny("gemma2")
    monkeypatch.setattr(
        Topology,
        "_embedding",
        lambda self: Part(self.graph.named["inp_scaled"]),
    )
    with Model(case.path, threads=1) as model:
        found = check(model, model._engine)
    assert "embed" in found.refused


# -- what a model does with it -----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder() / "sites"


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_sites_of_block(), "mlp_out", _node(lambda b: b._end))


@pytest.mark.usefixtures("sabotaged", "cache")
def test_a_refused_site_is_not_offered_and_says_why(llama: Tiny) -> None:
    with Model(llama.path, threads=1) as model:
        request = Request([5, 6, 7], captures=[Capture("resid_post.1")])
        with pytest.warns(MiaWarning, match=r"mlp_out\.0, .* not offered .*does not hold"):
            assert np.isfinite(model.run([request])[0]["resid_post.1"]).all()
        with pytest.raises(SiteError, match=r"no site mlp_out\.1 \(.*resid_mid \+ mlp_out"):
            model.run([Request([5, 6, 7], captures=[Capture("mlp_out.1")])])
        assert Site("mlp_out", 1) not in model.topology.sites
        assert Site("mlp_out", 1) not in model.unfused_topology.sites


def test_a_site_that_is_missing_says_why(tiny: Callable[[str], Tiny]) -> None:
    with pytest.raises(SiteError, match=r"no site attn_out\.0 \(this block has no softmax"):
        tiny("mamba").model.run([Request([5, 6], captures=[Capture("attn_out.0")])])


def test_what_was_found_is_remembered_for_the_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "a.gguf", "llama")
    with Model(path, threads=1) as model:
        first = model.site_checks
    assert len(list(cache.iterdir())) == 1
    times: list[int] = []

    def counted(*_: object) -> Algebra:
        times.append(1)
        return first

    monkeypatch.setattr(module, "check", counted)
    with Model(path, threads=1) as model:
        assert model.site_checks == first
    assert times == []
    write_tiny(path, "llama", seed=1, n_layer=4)
    with Model(path, threads=1) as model:
        _ = model.site_checks
    assert times == [1]


def test_a_file_that_is_gone_is_checked_too(cache: Path, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.gguf", "llama")
    with Model(path, threads=1) as model:
        path.unlink()
        assert model.site_checks.verified(model.unfused_topology.sites) == TESTED


UNKNOWN = (
    '{"checks": [], "refused": {"bogus.99": "x"}, "untested": {}, "unproved": {}, "vectors": []}'
)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"checks": 3}', '{"checks": [{"a": 1}]}', UNKNOWN]
)
def test_a_damaged_memory_is_asked_anew(cache: Path, tmp_path: Path, text: str) -> None:
    path = write_tiny(tmp_path / "a.gguf", "llama")
    with Model(path, threads=1) as model:
        first = model.site_checks
    (file,) = cache.iterdir()
    file.write_text(text, encoding="utf-8")
    with Model(path, threads=1) as model:
        assert model.site_checks == first
    assert json.loads(file.read_text(encoding="utf-8"))["refused"] == {}


def test_sites_are_checked_only_where_they_are_used(llama: Tiny) -> None:
    with Model(llama.path, threads=1) as model:
        model.run([Request([5, 6, 7])])
        assert "site_checks" not in vars(model)
        model.run([Request([5, 6, 7], captures=[Capture("resid_post.1")])])
        assert "site_checks" in vars(model)


def test_a_site_that_cannot_be_read_is_refused(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is a quantized tensor, say; the others are checked without it."""
    place = Topology._place

    def wrong(self: Topology, kind: object, layer: int | None, part: Part) -> None:
        place(self, kind, layer, part)  # type: ignore[arg-type]
        site = Site("v", layer)
        if getattr(kind, "name", "") == "v":
            at = self.sites[site]
            self.sites[site] = SiteNode(at.index, at.layout, at.outputs_only, (7, 3))

    monkeypatch.setattr(Topology, "_place", wrong)
    with Model(llama.path, threads=1) as model:
        found = check(model, model._engine)
    assert set(found.refused) == {"v.0", "v.1", "v.2"} or "v" in found.untested
    assert {c.site for c in found.checks} > {"mlp_out"}


def test_only_so_many_files_are_remembered(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REMEMBERED", 2)
    for seed in range(4):
        path = write_tiny(tmp_path / f"{seed}.gguf", "llama", seed=seed)
        with Model(path, threads=1) as model:
            _ = model.site_checks
    assert len(list(cache.iterdir())) == 2


def test_where_llama_cpp_leaves_the_control_vector_out_an_edit_steers(
    reopen: Callable[..., Tiny], llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in nemotron-h, whose attention blocks do not have it and do not end with `l_out-i`."""
    model = reopen(llama).model
    ids = llama.prompt()
    edit = Edit("resid_post.1", "add", llama.vector("resid_post.1"))
    steered = logits(model.run([Request(ids, [edit])])[0])
    assert model.site_checks.vectors == [1, 2]

    monkeypatch.setattr(
        run, "directions", lambda *_, n_layer, n_embd: np.zeros((n_layer - 1, n_embd))
    )
    for node in model.topology.nodes:
        if node.name == "l_out-1":
            object.__setattr__(node, "name", "block_out-1")
    found = check(model, model._engine)
    assert found.vectors == [2]
    model._engine.blocks_with_vector = found.vectors
    np.testing.assert_allclose(logits(model.run([Request(ids, [edit])])[0]), steered, atol=1e-4)


def test_the_checks_read_what_they_compare(case: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sites of eight runs would be 700 MB of an 8B model."""
    model, engine, sizes = case.model, case.model._engine, list[list[int]]()
    run_all = engine.run

    def run(requests: list[Request], **named: object) -> list[Result]:
        results = run_all(requests)
        sizes.append([sum(a.size for a in r.captures.values()) for r in results])
        return results

    monkeypatch.setattr(engine, "run", run)
    whole = check(model, engine)
    (plain,), zeroed, *fused = sizes
    assert sum(zeroed) < 3 * plain
    assert len(fused) == 1
    sizes.clear()
    monkeypatch.setattr(claims, "_TOGETHER", plain // 4)
    assert check(model, engine) == whole
    fused = sizes[2:]
    assert len(fused) >= 4 and max(map(sum, fused)) <= plain // 4


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way to give memory back")
def test_memory_that_was_freed_goes_back_to_the_system() -> None:
    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])  # KB

    small = [np.ones(12_000, np.float64) for _ in range(1000)]  # 96 KB each, from the heap
    last = np.ones(12_000, np.float64)  # keeps the heap from shrinking by itself
    before = held()
    del small
    give_back_memory()
    assert before - held() > 50_000 and last.all()
