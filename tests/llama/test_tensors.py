"""Tensors of graphs, on the host and off it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import check
from tiny import Tiny
from tiny_gguf import write_tiny

from mia.edits import Edit
from mia.errors import EngineError
from mia.llama import (
    describe,
    read_array,
    rows_of,
    tensors,
)
from mia.request import Capture, Request


def test_a_tensor_is_described_and_read(llama: Tiny, reopen: Callable[..., Tiny]) -> None:
    t = reopen(llama).model.topology  # an older model's graph may lie elsewhere by now
    product = next(n for n in t.nodes if n.op == "MUL_MAT")
    again = describe(product.addr)
    assert (again.name, again.op, again.src) == (product.name, product.op, product.src)
    weight = t.node(product.src[0])
    assert (weight.op, weight.type) == ("NONE", "f32")
    assert weight.shape == tuple(weight.ne[1::-1])
    stored = llama.oracle.weights[weight.name]
    np.testing.assert_array_equal(read_array(weight.addr)[0, 0], stored.astype(np.float32))
    copy = read_array(weight.addr)
    copy[:] = 0
    np.testing.assert_array_equal(read_array(weight.addr)[0, 0], stored.astype(np.float32))
    norm = next(n for n in t.nodes if n.op == "RMS_NORM")
    assert norm.param_f32(0) == np.float32(1e-5)


def test_a_tensor_off_the_host_is_copied_and_sent_back(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: every edit and capture by way of ggml's get and set."""
    prompt, v = llama.prompt(), llama.vector()
    q = llama.vector("q.1")[:16]
    edits = [Edit("mlp_out.0", "add", v, tokens=[2, 5]), Edit("q.1", "replace", q, heads=[1, 4])]
    everything = Capture(list(llama.model.topology.sites))
    request = Request(
        prompt, [*edits, Edit("attn_pattern.2", "zero", heads=[0])], [everything], "all"
    )
    monkeypatch.setattr(tensors, "_is_host", lambda t: False)
    check(llama.model.run([request, Request(prompt)])[0], request, llama.oracle)


def test_quantized_tensors_are_not_read_as_floats(tmp_path: Path, reopen: Any) -> None:
    path = write_tiny(tmp_path / "q.gguf", "llama", qtype="Q8_0")
    t = reopen(Tiny("q", path, None)).model.topology  # type: ignore[arg-type]
    weight = next(n.src[0] for n in t.nodes if n.op == "MUL_MAT")
    with pytest.raises(EngineError, match="is not of a float type"):
        read_array(weight)
    with pytest.raises(EngineError, match="is not of a float type"), rows_of(weight, write=False):
        pass
