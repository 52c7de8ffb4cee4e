"""The steps between two sites: which they are, and that they compute what the model computes."""

import numpy as np
import pytest
from tiny import Tiny

from mia.errors import ModelError
from mia.lenses import walk as walk_module
from mia.lenses.walk import ByColumn, Plus, Product, Step, Times, walk
from mia.request import Capture, Request
from mia.sites import Site


def steps_between(t: Tiny, begin: Site, end: Site) -> list[Step]:
    m = t.model
    return walk(m.topology, m.weights, begin, end, architecture=m.architecture)


UNEMBEDDING = {
    "llama": "Norm Times Product",
    "qwen2": "Norm Times Product",
    "gemma2": "Norm Times Product Scale Tanh Scale",
    "gpt2": "Norm Times Plus Product",
}
W_O = {
    "llama": "Product",
    "qwen2": "Product",
    "gemma2": "Product Norm Times",
    "gpt2": "Product Plus",
}


def test_the_steps_of_each_architecture(case: Tiny) -> None:
    last = case.model.n_layer - 1
    for begin, end, names in (
        (Site("resid_post", last), Site("logits"), UNEMBEDDING),
        (Site("head_out", 1), Site("attn_out", 1), W_O),
    ):
        steps = steps_between(case, begin, end)
        assert " ".join(type(step).__name__ for step in steps) == names[case.oracle.arch]


def test_the_steps_compute_what_the_model_computes(case: Tiny) -> None:
    last = case.model.n_layer - 1
    pairs = [(Site("resid_post", last), Site("logits"))]
    pairs += [(Site("head_out", i), Site("attn_out", i)) for i in range(last)]
    sites = [site for pair in pairs for site in pair]
    result = case.model.run([Request(case.prompt(), captures=[Capture(sites)], logits="all")])[0]
    for begin, end in pairs:
        x = result.captures[begin]
        for step in steps_between(case, begin, end):
            x = step(x)
        np.testing.assert_allclose(x, result.captures[end], atol=1e-5, err_msg=str(end))


def test_steps_of_some_columns(case: Tiny) -> None:
    last = Site("resid_post", case.model.n_layer - 1)
    rows = np.random.default_rng(0).standard_normal((2, 30)).astype(np.float32)
    for step in steps_between(case, last, Site("logits")):
        if isinstance(step, ByColumn):
            width = len(step.vector) if isinstance(step, (Times, Plus)) else 30
            wide = np.resize(rows, (2, width))
            np.testing.assert_array_equal(step.columns(3, 9)(wide[:, 3:9]), step(wide)[:, 3:9])


def test_what_cannot_be_walked_is_named(llama: Tiny) -> None:
    with pytest.raises(ModelError, match=r"ADD between resid_pre\.0 and resid_post\.0 of llama"):
        steps_between(llama, Site("resid_pre", 0), Site("resid_post", 0))
    with pytest.raises(
        ModelError, match=r"embed of llama is not computed from resid_post\.1 alone"
    ):
        steps_between(llama, Site("resid_post", 1), Site("embed"))
    with pytest.raises(ModelError, match=r"llama has no resid_post\.9 to read"):
        steps_between(llama, Site("resid_post", 9), Site("logits"))


def test_a_product_reads_its_matrix_in_blocks(case: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.model
    (product,) = (
        s
        for s in steps_between(case, Site("head_out", 1), Site("attn_out", 1))
        if isinstance(s, Product)
    )
    x = np.random.default_rng(0).normal(size=(2, model.weights.shape(product.name)[1]))
    expected, sizes = x @ model.weights.matrix(product.name).T.astype(x.dtype), list[int]()
    read = model.weights.rows

    def rows(name: str, start: int, stop: int) -> np.ndarray:
        sizes.append(stop - start)
        return read(name, start, stop)

    monkeypatch.setattr(walk_module, "_BLOCK", 7 * x.shape[1])
    monkeypatch.setattr(model.weights, "rows", rows)
    np.testing.assert_allclose(product(x), expected, rtol=1e-12)
    assert max(sizes) == 7
