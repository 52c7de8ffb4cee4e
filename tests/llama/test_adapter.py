"""LoRA adapters: every site is what it is with the merged weights, and what is no adapter of the
model is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import in_child
from lora_file import EMBEDDING, merged, metadata, names, write_lora
from tiny import Tiny, logits

from mia.edits import Edit
from mia.errors import ModelError, UsageError
from mia.llama.gguf_write import RawTensor, write_gguf
from mia.model import Model
from mia.request import Capture, Request, TokenLogits

EVERY = ("llama", "llama-tied", "qwen2", "gemma2", "gpt2", "mixtral", "qwen2moe", "dots1")


@pytest.fixture(params=EVERY)
def adapted(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> Any:
    """A tiny model with two adapters of all its matrices, and its oracle."""
    t = tiny(request.param)
    files = [
        (write_lora(tmp_path / "a.gguf", t.oracle, seed=1), 0.5),
        (write_lora(tmp_path / "b.gguf", t.oracle, seed=2, rank=1, alpha=0.0), -0.75),
    ]
    with Model(t.path, threads=1, lora=dict(files)) as m:
        yield t, m, merged(t.path, files)


def test_every_site_is_that_of_the_merged_weights(adapted: Any) -> None:
    t, m, oracle = adapted
    plain, checks = t.model.site_checks, m.site_checks
    assert not checks.refused and checks.untested == plain.untested
    assert {(c.site, c.claim) for c in checks.checks} == {(c.site, c.claim) for c in plain.checks}
    sites = list(m.unfused_topology.sites)
    assert set(sites) == set(t.model.unfused_topology.sites)
    assert m.unfused_topology.notes == t.model.unfused_topology.notes
    result = m.run([Request(t.prompt(), captures=[Capture(sites)], logits="all")])[0]
    truth = oracle.run(t.prompt())
    for site in sites:
        expected = truth[str(site)].reshape(len(t.prompt()), -1)
        got = result.captures[site].reshape(len(t.prompt()), -1)
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=str(site))
    without = logits(t.model.run([Request(t.prompt(), logits="all")])[0])
    assert np.abs(logits(result) - without).max() > 0.1


def test_edits_and_reads_of_weights_know_the_adapters(adapted: Any) -> None:
    t, m, oracle = adapted
    prompt, v = t.prompt(), t.vector("attn_out.1")
    request = Request(prompt, [Edit("attn_out.1", "project_out", v)], logits="all")
    unit = v.astype(np.float64) / np.linalg.norm(v.astype(np.float64))
    truth = oracle.run(prompt, {"attn_out.1": lambda h: h - np.outer(h @ unit, unit)})
    np.testing.assert_allclose(logits(m.run([request])[0]), truth["logits"], atol=1e-4)
    for name in names(oracle):
        rows = oracle.weights[name].reshape(-1, oracle.weights[name].shape[-1])
        start, stop = len(rows) // 3, 2 * len(rows) // 3  # across experts
        got = m.weights.rows(name, start, stop)
        np.testing.assert_allclose(got, rows[start:stop], atol=1e-6)
    rows = m.look(prompt, "resid_post.1")["resid_post.1"]
    np.testing.assert_allclose(m.lens.logits(rows), oracle.lens(rows), atol=1e-3)
    few = m.run([Request(prompt, metric=TokenLogits([5, 9]))])[0].value
    whole = logits(m.run([Request(prompt)])[0])[-1, [5, 9]]
    np.testing.assert_allclose(np.ravel(few), whole, atol=1e-4)


def test_a_scale_of_zero_is_the_plain_model(llama: Tiny, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a.gguf", llama.oracle)
    request = Request(llama.prompt(), logits="all")
    with Model(llama.path, threads=1, lora=f"{file}=0") as m:
        assert (logits(m.run([request])[0]) == logits(llama.model.run([request])[0])).all()
        assert (
            m.weights.rows("output.weight", 0, 4) == llama.oracle.weights["output.weight"][:4]
        ).all()


def test_results_name_the_adapters(llama: Tiny, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a.gguf", llama.oracle)
    with Model(llama.path, threads=1, lora=[f"{file}=0.5"]) as m:
        [entry] = m.facts.document()["lora"]
        assert entry["file"] == "a.gguf" and entry["scale"] == 0.5 and len(entry["sha256"]) == 64
        assert json.loads(m.facts.metadata()["lora"]) == [entry]
    assert "lora" not in llama.model.facts.document()


def test_what_is_remembered_of_sites_is_of_the_adapters_too(llama: Tiny, tmp_path: Path) -> None:
    from mia.models.algebra import file_key

    file = write_lora(tmp_path / "a.gguf", llama.oracle)
    keys = {file_key(llama.model)}
    for scale in (1.0, 0.5):
        with Model(llama.path, threads=1, lora={file: scale}) as m:
            keys.add(file_key(m))
    write_lora(file, llama.oracle, seed=7)
    with Model(llama.path, threads=1, lora=file) as m:
        keys.add(file_key(m))
    assert len(keys) == 4


def test_matrices_that_llama_cpp_leaves_out_are_named(tiny: Any, tmp_path: Path) -> None:
    t = tiny("gpt2")
    shape = t.oracle.weights["position_embd.weight"].shape
    tensors = {
        "position_embd.weight.lora_a": np.ones((1, shape[1]), np.float32),
        "position_embd.weight.lora_b": np.ones((shape[0], 1), np.float32),
    }
    write_gguf(tmp_path / "p.gguf", metadata("gpt2"), tensors)
    with Model(t.path, threads=1, lora=tmp_path / "p.gguf") as m:
        with pytest.warns(match="p.gguf has matrices that llama.cpp does not add .* position_embd"):
            _ = m.site_checks
        own = t.oracle.weights["position_embd.weight"]
        assert (m.weights.rows("position_embd.weight", 0, 2) == own[:2]).all()


def _tensors(t: Tiny, name: str = "blk.0.attn_output.weight", **shapes: tuple[int, ...]) -> Any:
    n_out, n_in = t.oracle.weights[name].shape
    full = {"a": (2, n_in), "b": (n_out, 2), **shapes}
    return {f"{name}.lora_{p}": np.ones(s, np.float32) for p, s in full.items() if s}


def _named(name: str) -> Callable[[Tiny], Any]:
    return lambda t: ({}, {f"{name}.lora_a": np.ones((2, 48)), f"{name}.lora_b": np.ones((48, 2))})


def _whole_numbers(t: Tiny) -> Any:
    tensors = _tensors(t)
    first = next(iter(tensors))
    shape = tensors[first].shape
    return {}, {**tensors, first: RawTensor(26, shape, bytes(4 * shape[0] * shape[1]))}


#: (what is written: changes of the metadata, tensors) -> what the error says
BROKEN: list[tuple[Callable[[Tiny], Any], str]] = [
    (
        lambda t: ({"general.architecture": "qwen2"}, _tensors(t)),
        "for qwen2 models, and llama is a llama",
    ),
    (lambda t: ({"general.type": "model"}, _tensors(t)), "a LoRA adapter is needed"),
    (lambda t: ({"adapter.type": "dora"}, _tensors(t)), "its adapter.type is 'dora'"),
    (lambda t: ({"adapter.type": 3}, _tensors(t)), "adapter.type is of another type"),
    (lambda t: ({"adapter.lora.alpha": 2}, _tensors(t)), "alpha is of another type"),
    (lambda t: ({"adapter.lora.alpha": float("nan")}, _tensors(t)), "alpha is nan"),
    (lambda t: ({"adapter.alora.invocation_tokens": [1, 2]}, _tensors(t)), "activated LoRA"),
    (lambda t: ({}, {}), "it has no tensors"),
    (lambda t: ({}, {"blk.0.attn_output.weight": np.ones((2, 2))}), "it has a tensor blk.0"),
    (lambda t: ({}, _tensors(t, a=())), "lora_a is missing"),
    (lambda t: ({}, _tensors(t, b=())), "lora_b is missing"),
    (lambda t: ({}, _tensors(t, a=(2, 47))), "it has 2 x 47 and 48 x 2"),
    (
        lambda t: ({}, _tensors(t, a=(3, 48))),
        "another model: for blk.0.attn_output.weight of 48 x 48",
    ),
    (lambda t: ({}, _tensors(t, b=(2, 48))), "it has 2 x 48 and 2 x 48"),
    (lambda t: ({}, _tensors(t, a=(3, 2, 48))), "another model"),
    (_named("blk.9.attn_output.weight"), "llama has no tensor blk.9.attn_output.weight"),
    (_whole_numbers, "of a type that no product takes: 26"),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: b[1])
def test_what_is_no_adapter_of_the_model_is_refused(
    broken: tuple[Callable[[Tiny], Any], str], llama: Tiny, tmp_path: Path
) -> None:
    more, tensors = broken[0](llama)
    write_gguf(tmp_path / "x.gguf", metadata("llama", **more), tensors)
    with pytest.raises(ModelError) as err:
        Model(llama.path, threads=1, lora=tmp_path / "x.gguf")
    assert broken[1] in str(err.value) and "\n" not in str(err.value)


def test_an_embedding_that_unembeds_too_is_refused(tiny: Any, tmp_path: Path) -> None:
    """llama.cpp would end the process when it builds its graph."""
    t = tiny("llama-tied")
    n_out, n_in = t.oracle.weights[EMBEDDING].shape
    tensors = {
        f"{EMBEDDING}.lora_a": np.ones((n_out, 1)),
        f"{EMBEDDING}.lora_b": np.ones((n_in, 1)),
    }
    write_gguf(tmp_path / "x.gguf", metadata("llama"), tensors)
    with pytest.raises(ModelError, match="uses as its unembedding as well"):
        Model(t.path, threads=1, lora=tmp_path / "x.gguf")


def test_files_and_scales_as_they_are_named(llama: Tiny, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "a=1.gguf", llama.oracle)
    for lora, scale in ((str(file), 1.0), (f"{file}=-2", -2.0), ({str(file): 3}, 3.0), (file, 1.0)):
        with Model(llama.path, threads=1, lora=lora) as m:
            assert [(a.path, a.scale) for a in m.adapters] == [(file, scale)]
    for bad, why in (
        (f"{file}=much", "'much', not a number"),
        (f"{file}=inf", "not a finite number"),
        ({file: True}, "not a finite number"),
        ([str(file), f"{file}=2"], "given twice"),
        (3, "lora is a file, several"),
    ):
        with pytest.raises(UsageError, match=why):
            Model(llama.path, threads=1, lora=bad)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no such file"):
        Model(llama.path, threads=1, lora=tmp_path / "none.gguf")
    with pytest.raises(ModelError, match=r"is a model .*; a LoRA adapter is needed here"):
        Model(llama.path, threads=1, lora=llama.path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_damaged_files_are_refused_or_run(llama: Tiny, tmp_path: Path) -> None:
    """A sample of bytes changed and files cut: an error of mia's or a run, never a death."""
    raw = write_lora(
        tmp_path / "a.gguf", llama.oracle, only=lambda n: ".0.attn_o" in n
    ).read_bytes()
    end = raw.rindex(b".lora_b") + 40
    fates = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        changed = bytearray(raw)
        changed[int(rng.integers(end if seed % 2 else len(raw)))] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.gguf").write_bytes(
            changed if seed % 4 else raw[: int(rng.integers(len(raw)))]
        )
        fates.add(in_child(lambda: _use(llama.path, tmp_path / "x.gguf")).partition(":")[0])
    assert fates <= {"runs", "ModelError", "NotFiniteError"} and len(fates) > 1


def _use(path: Path, lora: Path) -> str:
    with Model(path, threads=1, lora=lora) as m:
        m.run([Request([5, 6], captures=[Capture("attn_out.0")])])
    return "runs"
