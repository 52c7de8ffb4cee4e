"""Baked edits against the oracle with edited weights, and against the edits themselves."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from oracle import Oracle
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.bake import checks
from mia.bake.changes import Removal, remove
from mia.bake.files import CHECK, write_lora
from mia.edits import Edit
from mia.errors import ModelError, UsageError
from mia.llama import type_name
from mia.llama.gguf_file import kv_spans, read_header
from mia.methods.bake import bake
from mia.model import Model
from mia.request import Capture, Request
from mia.steering import Steering
from mia.vectors import Vector

pytestmark = pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of a bake reads little, for speed."""
    monkeypatch.setattr(checks, "_TEXTS", 2)
    monkeypatch.setattr(checks, "_TOKENS", 12)


#: what writes to the residual in a block
ENDINGS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
#: models whose matrices have neither biases nor norms behind them
EXACT = ("llama", "llama-tied", "qwen2", "mixtral", "qwen2moe", "dots1")


def vector(t: Tiny, site: str = "resid_post") -> Vector:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((t.model.n_layer, t.model.n_embd)).astype(np.float32)
    return Vector(dict(enumerate(rows)), site)


def edited(t: Tiny, strength: float, *, embedding: bool = False) -> Oracle:
    """W - s·r(rᵀW) for every matrix that writes, with the direction of its layer."""
    oracle, v = Oracle(t.path), vector(t)
    units = {i: (u := v[i].astype(np.float64)) / np.linalg.norm(u) for i in v.layers}
    for name, w in oracle.weights.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[2] in ENDINGS and w.ndim > 1:
            r = units[int(parts[1])]
            along = np.einsum("o,...oi->...i", r, w)
            oracle.weights[name] = w - strength * r[:, None] * along[..., None, :]
    if embedding:
        e = oracle.weights["token_embd.weight"]
        oracle.weights.setdefault("output.weight", e)
        oracle.weights["token_embd.weight"] = e - strength * np.outer(e @ units[0], units[0])
    return oracle


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("lora", name) for name in EXACT),
        *(("model", name) for name in ("llama-tied", "qwen2moe")),
    ],
)
def test_a_baked_removal_is_the_edit(tiny: Any, tmp_path: Path, name: str, kind: Any) -> None:
    t, path, strength = tiny(name), tmp_path / "b.gguf", 0.7
    embedding = kind == "model" or name != "llama-tied"
    report = bake(t.model, vector(t), path, kind=kind, strength=strength, embedding=embedding)
    [check] = report.checks
    assert check.edit_baked < 1e-9 and check.plain_edit > 0.01 and not report.notes
    expected = edited(t, strength, embedding=embedding).run(t.prompt())
    options = {"lora": path} if kind == "lora" else {"model": path}
    with t.model.reopened(**options) as m:
        sites = [s for s in m.topology.sites if str(s) in expected]
        result = m.run([Request(t.prompt(), captures=[Capture(sites)], logits="all")])[0]
    for site in sites:
        got = result.captures[site].reshape(len(t.prompt()), -1)
        truth = expected[str(site)].reshape(len(t.prompt()), -1)
        np.testing.assert_allclose(got, truth, atol=1e-4, err_msg=str(site))
    np.testing.assert_allclose(logits(result), expected["logits"], atol=1e-4)


def test_biases_are_changed_in_a_model_and_refused_in_a_lora(tiny: Any, tmp_path: Path) -> None:
    t, path = tiny("gpt2"), tmp_path / "b.gguf"
    with pytest.raises(UsageError, match=r"attn_output.bias writes along the direction too"):
        bake(t.model, vector(t), path)
    with pytest.raises(UsageError, match=r"position_embd.weight is a table"):
        bake(t.model, [Edit("resid_pre.0", "project_out", vector(t)[0])], path)
    report = bake(t.model, vector(t), path, kind="model")
    assert report.checks[0].edit_baked < 1e-9 and report.tensors == 4 * t.model.n_layer
    expected = edited(t, 1.0)
    for name, b in expected.weights.items():
        if name.endswith(("attn_output.bias", "ffn_down.bias")):
            r = vector(t)[int(name.split(".")[1])].astype(np.float64)
            expected.weights[name] = b - (b @ r) * r / (r @ r)
    with Model(path, threads=1) as m:
        got = logits(m.run([Request(t.prompt(), logits="all")])[0])
    np.testing.assert_allclose(got, expected.run(t.prompt())["logits"], atol=1e-4)


def test_behind_a_norm_the_direction_is_gone_and_the_rest_is_scaled(
    tiny: Any, tmp_path: Path
) -> None:
    """gemma2's norms behind attention and MLP: what is exact, and what is not."""
    t, path = tiny("gemma2"), tmp_path / "b.gguf"
    report = bake(t.model, vector(t), path)
    [check] = report.checks
    assert len(report.notes) == 2 and "the whole row is scaled" in report.notes[0]
    assert 1e-9 < check.edit_baked < 0.05 * check.plain_edit
    sites = ["attn_out.0", "mlp_out.0"]
    with t.model.reopened(lora=path) as m:
        rows = m.run([Request(t.prompt(), captures=[Capture("attn_out.0")])])[0]["attn_out.0"]
        later = m.run([Request(t.prompt(), captures=[Capture(sites)])])[0]
    r = vector(t)[0] / np.linalg.norm(vector(t)[0])
    assert all(np.abs(later[s] @ r).max() < 1e-5 for s in sites)
    edit = Edit("attn_out.0", "project_out", r)
    of_edit = t.model.run([Request(t.prompt(), [edit], [Capture("attn_out.0")])])[0]["attn_out.0"]
    factors = rows / of_edit
    np.testing.assert_allclose(factors, factors[:, :1].repeat(factors.shape[1], 1), rtol=1e-3)
    assert np.abs(factors[:, 0] - 1).max() > 1e-3
    with pytest.raises(UsageError, match=r"ends llama.cpp's process"):
        bake(t.model, vector(t), path, embedding=True)
    with pytest.raises(ModelError, match="gemma2 has no unembedding of its own"):
        bake(t.model, vector(t), path, kind="model", embedding=True)


@pytest.mark.parametrize("kind", ["lora", "model"])
def test_edits_one_after_the_other(tiny: Any, tmp_path: Path, kind: Any) -> None:
    """Two directions that are not orthogonal, heads that are scaled, and both at one matrix."""
    t, path = tiny("mixtral"), tmp_path / "b.gguf"
    v, w = vector(t)[0], vector(t)[1]
    edits = [
        Edit("mlp_out.1", "project_out", v),
        Edit("mlp_out.1", Removal(v + w, 0.5)),
        Edit("head_out.0", "scale", coeff=-0.5, heads=[1, 3]),
        Edit("attn_out.0", "project_out", w),
        Edit("head_out.0", "zero", heads=4),
    ]
    if kind == "model" or "output.weight" in t.oracle.weights:
        edits += [Edit("embed", "project_out", v), Edit("resid_pre.0", Removal(v + w, 2.0))]
    report = bake(t.model, edits, path, kind=kind)
    assert report.checks[0].edit_baked < 1e-9 and report.checks[0].plain_edit > 0.01
    assert report.strength is None and [e["site"] for e in report.edits][2] == "head_out.0"
    assert report.edits[2]["heads"] == [1, 3]


def test_steering_that_removes_a_part(llama: Tiny, tmp_path: Path) -> None:
    """`remove` is an operator of steering as it is."""
    v = vector(llama, "attn_out")
    steering = Steering(v, "mia.bake.changes:remove", 0.25)
    report = bake(llama.model, v, tmp_path / "a.gguf", strength=0.25)
    with llama.model.reopened(lora=tmp_path / "a.gguf") as m:
        got = logits(m.run([Request(llama.prompt())])[0])
    expected = logits(llama.model.run([Request(llama.prompt(), steering.edits())])[0])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert report.tensors == 3
    h = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    assert np.abs(remove(h, h[0], 1.0) @ h[0]).max() < 1e-5
    whole = bake(llama.model, Steering(v, "project_out"), tmp_path / "b.gguf")
    assert whole.strength is None and whole.checks[0].edit_baked < 1e-9


def test_a_control_vector_is_what_llama_cpp_adds(llama: Tiny, tmp_path: Path) -> None:
    v, path = vector(llama), tmp_path / "c.gguf"
    report = bake(llama.model, v, path, kind="control-vector", layers="1..", strength=0.5)
    assert report.checks[0].edit_baked < 1e-9 and report.checks[0].plain_edit > 0.01
    tensors = {x.name: x.data for x in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == {"direction.1", "direction.2"}
    np.testing.assert_allclose(tensors["direction.2"], 0.5 * v[2])
    with pytest.raises(UsageError, match=r"add at resid_post.0 is no control vector"):
        bake(llama.model, v, path, kind="control-vector")


@pytest.mark.parametrize("qtype", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_model_keeps_all_other_bytes(tmp_path: Path, qtype: str) -> None:
    source, path = write_tiny(tmp_path / "m.gguf", "llama", qtype=qtype), tmp_path / "b.gguf"
    with Model(source, threads=1) as m:
        v = np.random.default_rng(0).standard_normal(m.n_embd).astype(np.float32)
        wide = "f32" if qtype == "Q4_1" else None  # its own type would round the change away
        bake(m, [Edit("mlp_out.1", "project_out", v)], path, kind="model", weight_type=wide)
    with source.open("rb") as a, path.open("rb") as b:
        old, new = read_header(a.fileno(), source), read_header(b.fileno(), path)
        raw, other = source.read_bytes(), path.read_bytes()
        spans = {k: other[i:j] for k, i, j in kv_spans(b.fileno())}
        kept = {k: raw[i:j] for k, i, j in kv_spans(a.fileno())}
    assert kept.items() <= spans.items() and all(k.startswith("mia.") for k in spans.keys() - kept)
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    readers = [{t.name: t for t in gguf.GGUFReader(p).tensors} for p in (source, path)]
    for name, t in readers[0].items():
        same = bytes(t.data.tobytes()) == bytes(readers[1][name].data.tobytes())
        assert same == (name != "blk.1.ffn_down.weight"), name
    stored = next(t for t in new.tensors if t.name == "blk.1.ffn_down.weight").type
    assert type_name(stored) == (wide or qtype.lower())


def test_a_file_says_what_it_is(llama: Tiny, tmp_path: Path) -> None:
    report = bake(llama.model, vector(llama), tmp_path / "a.gguf", prompts=[llama.prompt()])
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    values = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert values["general.type"] == "adapter" and values["adapter.lora.alpha"] == 1.0
    assert values["mia.model_sha256"] == llama.model.file_hash and values["mia.bake.kind"] == "lora"
    assert '"operator": "project_out"' in values["mia.bake.edits"]
    assert f'"edit_baked": {report.checks[1].document()["edit_baked"]}' in values[CHECK]


def test_what_does_something_else_is_refused(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bake with a wrong sign, and nothing is left of it."""
    plain = write_lora

    def wrong(path: Path, model: Model, baked: Any, metadata: Any) -> None:
        for change in baked.changes.values():
            change.left = [-x for x in change.left]
        plain(path, model, baked, metadata)

    monkeypatch.setattr("mia.methods.bake.write_lora", wrong)
    with pytest.raises(ModelError, match="does not do what the edit does, and is not written"):
        bake(llama.model, vector(llama), tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


V = np.ones(48, np.float32)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Edit("attn_out.0", "clamp", V), "clamp at attn_out.0 .* a matrix is linear"),
        (Edit("attn_out.0", "add", V), "adds a constant, which is a bias"),
        (Edit("attn_out.0", lambda h: h), "it may be anything"),
        (Edit("attn_out.0", "project_out", V, tokens=-1), "of some tokens only"),
        (Edit("attn_out.0", "project_out", V, generated=False), "of some tokens only"),
        (Edit("attn_out.0", "project_out", V, keep_norm=True), "keeps norms"),
        (Edit("attn_out.0", "project_out", V[:2], dims=[1, 2]), "some dimensions only"),
        (Edit("resid_post.1", "project_out", V), "is not written by matrices of its own"),
        (Edit("head_out.0", "mean", V), "mean at head_out.0 has no form in weights"),
        (Edit("head_out.0", "zero", dims=1), "some dimensions only"),
    ],
)
def test_what_has_no_form_in_weights_says_why(
    llama: Tiny, tmp_path: Path, edit: Edit, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        bake(llama.model, edit, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_with_adapters_is_refused(llama: Tiny, tmp_path: Path) -> None:
    bake(llama.model, vector(llama), tmp_path / "a.gguf")
    with (
        llama.model.reopened(lora=tmp_path / "a.gguf") as m,
        pytest.raises(UsageError, match="open with LoRA adapters"),
    ):
        bake(m, vector(llama), tmp_path / "b.gguf")


def test_a_steered_model_is_refused(llama: Tiny, tmp_path: Path) -> None:
    with (
        llama.model.steered(vector(llama)),
        pytest.raises(UsageError, match="the model is steered"),
    ):
        bake(llama.model, vector(llama), tmp_path / "a.gguf")


def test_a_model_without_such_sites_is_refused(tiny: Any, tmp_path: Path) -> None:
    t = tiny("mamba")
    v = Vector({0: np.ones(t.model.n_embd, np.float32)})
    with pytest.raises(UsageError, match=r"mamba cannot be baked: this model has no site attn_out"):
        bake(t.model, v, tmp_path / "a.gguf")
