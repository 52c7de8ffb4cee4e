"""Whether a vector and a sweep of one file hold on another, beside the oracle of both."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import run
from lora_file import write_lora
from mixed_gguf import of_layer, perturbed
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.errors import FileError, UsageError
from mia.methods.diff import diff
from mia.methods.transfer import Made, sweep_on_other, vector_on_both
from mia.model import Model
from mia.notices import MiaWarning
from mia.vectors import Vector

PROMPT = "The capital of France is the capital"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    folder = tmp_path_factory.mktemp("transfer")
    base = write_tiny(folder / "a.gguf", "llama")
    other = perturbed(base, folder / "b.gguf", of_layer(0), size=0.2)
    with Model(base, threads=1) as a, Model(other, threads=1) as b:
        yield a, b


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_a_vector_on_both(two: tuple[Model, Model]) -> None:
    a, b = two
    rng = np.random.default_rng(2)
    vector = Vector({i: rng.standard_normal(48).astype(np.float32) for i in (0, 1, 2)})
    ids, at = a.tokenize(PROMPT), [3, 5]
    r = vector_on_both(a, b, ids, at, vector, coeff=0.5, layers="1..2")
    changes, tops = [], []
    for model, got in ((a, r.a), (b, r.b)):
        oracle = Oracle(model.path)
        sites = oracle.run(ids)
        edits = {
            f"resid_post.{i}": lambda h, v=vector[i]: h + 0.5 * v.astype(np.float64) for i in (1, 2)
        }
        plain, steered = (log_softmax(oracle.run(ids, e)["logits"][at]) for e in ({}, edits))
        assert got.kl == pytest.approx((np.exp(plain) * (plain - steered)).sum(-1).mean(), rel=1e-3)
        ratios = [
            0.5 * np.linalg.norm(vector[i]) / np.linalg.norm(sites[f"resid_post.{i}"][at], axis=-1)
            for i in (1, 2)
        ]
        assert got.norm == pytest.approx(np.mean(ratios), rel=1e-4)
        assert got.floor < 1e-6
        changes.append(steered - plain)
        tops.append(steered.argmax(-1))
    want = [np.corrcoef(x, y)[0, 1] for x, y in zip(*changes, strict=True)]
    assert r.correlation == pytest.approx(np.mean(want), abs=1e-4) and np.mean(want) < 0.9999
    assert r.same_top == (tops[0] == tops[1]).mean()
    assert (r.layers, r.coeff) == ([1, 2], 0.5)
    none = vector_on_both(a, b, ids, at, vector, coeff=0)
    assert (none.correlation, none.a.kl) == (None, 0)
    with pytest.raises(UsageError, match="48"):
        vector_on_both(a, b, ids, at, Vector({1: np.ones(47, np.float32)}))


def _sweep(model: Model, *words: str) -> None:
    run("sweep", "-m", str(model.path), "-p", PROMPT, "--zero", "--answer", " Paris", "--over",
        "layer", "--null", "2", "-o", "s.json", *words)  # fmt: skip


def test_a_sweep_on_the_other(
    two: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = two
    _sweep(a, "--token-idx", "2..5")
    r = sweep_on_other(a, b, "s.json")
    run("sweep", "-m", str(b.path), "-p", PROMPT, "--zero", "--answer", " Paris", "--over", "layer",
        "--null", "2", "--token-idx", "2..5", "-o", "t.json")  # fmt: skip
    saved, other = (json.loads(Path(f).read_text()) for f in ("s.json", "t.json"))
    x, y = (np.array(d["values"]) - d["unchanged"] for d in (saved, other))
    assert r.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
    assert (r.n, r.floor_a) == (3, saved["noise_floor"])
    assert r.floor_b == pytest.approx(other["noise_floor"], abs=1e-6)
    above, above_b = np.abs(x) > saved["noise_floor"], np.abs(y) > other["noise_floor"]
    assert r.n_above == above.sum() > 0
    assert r.n_kept == (above & above_b & (np.sign(x) == np.sign(y))).sum()
    again = sweep_on_other(a, a, "s.json")
    assert again.correlation == pytest.approx(1, abs=1e-6) and again.n_kept == again.n_above
    with pytest.warns(MiaWarning, match=r"s\.json was made on another model than b"):
        sweep_on_other(b, a, "s.json")


def test_a_sweep_on_a_model_with_an_adapter_and_from_its_rows(
    two: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (a, _), tokens = two, ("--token-idx", "2..5")
    _sweep(a, *tokens)
    _sweep(a, *tokens, "-o", "rows.jsonl")
    adapter = write_lora(tmp_path / "l.gguf", Oracle(a.path))
    with a.reopened(lora={adapter: 0.5}) as b:
        r, of_rows = sweep_on_other(a, b, "s.json"), sweep_on_other(a, b, "rows.jsonl")
        _sweep(a, *tokens, "--lora", "l.gguf=0.5", "-o", "t.json")
        with pytest.warns(MiaWarning, match=r"s\.json was made on another model than a"):
            sweep_on_other(b, a, "s.json")
    x, y = (
        np.array(d["values"]) - d["unchanged"]
        for d in (json.loads(Path(f).read_text()) for f in ("s.json", "t.json"))
    )
    assert r.correlation == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1], abs=1e-5)
    assert r.correlation is not None and r.correlation < 0.9999
    assert of_rows.correlation == pytest.approx(r.correlation, abs=1e-5)
    lines = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("rows.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(FileError, match=r"rows\.jsonl has not all cells of its sweep"):
        sweep_on_other(a, a, "rows.jsonl")


def test_what_is_no_sweep(
    two: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = two
    run("tokens", "-m", str(a.path), "-p", PROMPT, "-o", "t.json")
    with pytest.raises(FileError, match=r"t\.json is no result of mia sweep, but of mia tokens"):
        sweep_on_other(a, b, "t.json")
    _sweep(a)
    document = json.loads(Path("s.json").read_text())
    for change in ({"values": "many"}, {"values": [1.0]}):
        Path("s.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(FileError, match=r"s\.json"):
            sweep_on_other(a, b, "s.json")
    Path("s.json").write_text("{}")
    with pytest.raises(FileError, match=r"s\.json cannot be replayed"):
        sweep_on_other(a, b, "s.json")


def test_a_comparison_says_whether_they_hold(
    two: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = two
    Vector({1: np.ones(48, np.float32)}).save("v.safetensors")
    _sweep(a)
    r = diff(a, b, PROMPT, blame_tokens=0, made=Made(steer="v.safetensors", sweep="s.json"))
    assert r.steered is not None and r.steered.layers == [1] and r.swept is not None
    document = r.document()
    assert document["steered"]["vector"] == "v.safetensors" and document["swept"]["n"] == 3
    assert "steered by 1 * v.safetensors" in r.plain() and "sweep s.json, 3 cells" in r.plain()
    assert "steered" not in diff(a, b, PROMPT, blame_tokens=0).document()
