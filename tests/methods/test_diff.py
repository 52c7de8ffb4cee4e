"""Two files of one model, beside the float64 forward pass of both."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixed_gguf import mixed, of_layer, perturbed
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.errors import UsageError
from mia.methods.blame import Blame, blame
from mia.methods.diff import check_comparable, diff
from mia.methods.diff_reports import _tensor_lines
from mia.model import Model
from mia.models.reports import convert
from mia.models.tensor_diff import TensorPair, tensor_pairs

Two = tuple[Model, Model, Oracle, Oracle]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diff")


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[[Path], Model]]:
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(Model(path, threads=1))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def two(request: pytest.FixtureRequest, folder: Path, opened: Callable[[Path], Model]) -> Two:
    """A model, and the same with other weights everywhere."""
    arch: str = request.param
    base = write_tiny(folder / f"{arch}.gguf", arch)
    other = perturbed(base, folder / f"{arch}-b.gguf", lambda name: "norm" not in name, size=0.1)
    return opened(base), opened(other), Oracle(base), Oracle(other)


def ids_of(m: Model, n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, m.n_vocab, n).tolist()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    p, q = log_softmax(x), log_softmax(y)
    return (np.exp(p) * (p - q)).sum(-1)


# -- ends and layers -------------------------------------------------------------------


def test_layers_and_ends_of_a_prompt_are_those_of_the_oracle(two: Two) -> None:
    a, b, oracle_a, oracle_b = two
    ids = ids_of(a, 13)
    x, y = oracle_a.run(ids), oracle_b.run(ids)
    r = diff(a, b, ids, blame_tokens=0)
    assert (r.whole, r.n_windows, r.window, r.n_lens, r.blame) == (True, 1, 13, 13, None)
    for layer in r.layers:
        h, g = x[f"resid_post.{layer.layer}"], y[f"resid_post.{layer.layer}"]
        lengths = np.linalg.norm(h, axis=-1)
        error = np.linalg.norm(g - h, axis=-1) / lengths
        cosine = (h * g).sum(-1) / lengths / np.linalg.norm(g, axis=-1)
        got = (layer.error, layer.error_worst, layer.cosine, layer.cosine_worst)
        np.testing.assert_allclose(
            got, (error.mean(), error.max(), cosine.mean(), cosine.min()), rtol=2e-3, atol=1e-5
        )
    want = kl(x["logits"], y["logits"])
    assert r.layers[-1].lens_kl == pytest.approx(want.mean(), rel=2e-3)
    same = x["logits"].argmax(-1) == y["logits"].argmax(-1)
    assert r.layers[-1].lens_same == pytest.approx(same.mean())
    np.testing.assert_allclose(r.end.positions.kl, want, atol=1e-3)
    np.testing.assert_array_equal(r.end.positions.same_top, same)
    logp = log_softmax(y["logits"])[np.arange(12), ids[1:]]
    np.testing.assert_allclose(r.end.positions.nll, -logp, atol=1e-3)


def test_a_long_text_is_scored_in_the_second_half_of_each_window(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mia.methods import diff as module

    monkeypatch.setattr(module, "_ROWS", 3)  # logits come in blocks within a window
    a, b, oracle_a, oracle_b = two
    ids = [a.bos_token, *ids_of(a, 34)]
    r = diff(a, b, ids, window=10, blame_tokens=0, lens_tokens=5)
    windows = [[a.bos_token, *ids[i * 10 + 1 : i * 10 + 10]] for i in range(3)]
    want, layer, nll = [], [], []
    for w in windows:  # the BOS takes the place of a token, as in llama.cpp
        x, y = oracle_a.run(w), oracle_b.run(w)
        want.append(kl(x["logits"][5:9], y["logits"][5:9]))
        nll.append(-log_softmax(x["logits"])[range(5, 9), w[6:]])
        h, g = x["resid_post.1"][5:9], y["resid_post.1"][5:9]
        layer.append(np.linalg.norm(g - h, axis=-1) / np.linalg.norm(h, axis=-1))
    np.testing.assert_allclose(r.end.positions.kl, np.concatenate(want), atol=1e-3)
    np.testing.assert_allclose(r.end.positions.base_nll, np.concatenate(nll), atol=1e-3)
    assert r.layers[1].error == pytest.approx(np.concatenate(layer).mean(), rel=2e-3)
    assert (r.whole, r.n_windows, r.window, r.n_lens) == (False, 3, 10, 5)
    assert "3 windows of 10 tokens, the second half of each scored: 12 positions" in r.plain()
    plain = diff(a, b, ids[1:], window=10, blame_tokens=0)
    assert plain.end.kl.value != r.end.kl.value and len(plain.end.positions.kl) == 12


def test_a_text_longer_than_the_context_but_not_than_two_windows(two: Two) -> None:
    a, b, *_ = two
    r = diff(a, b, ids_of(a, a.n_ctx + 40), window=250, blame_tokens=0, lens_tokens=0)
    assert (r.whole, r.n_windows) == (True, 2) and len(r.end.positions.kl) == a.n_ctx + 40
    assert len(r.end.positions.nll) == a.n_ctx + 38
    assert r.layers[0].lens_kl is None and r.layers[0].document()["lens_kl"] is None


def test_a_single_token_has_no_perplexity(two: Two) -> None:
    a, b, *_ = two
    r = diff(a, b, [7])
    assert r.end.perplexity is None and "perplexity" not in r.plain()
    assert "1 token, all of them" in r.plain() and "scored: 1 position\n" in r.plain()
    assert r.blame is not None and r.blame.n_scored == 1


def test_models_that_cannot_be_compared(folder: Path, opened: Callable[[Path], Model]) -> None:
    a = opened(write_tiny(folder / "base.gguf", "llama"))
    short = opened(write_tiny(folder / "short.gguf", "llama", n_layer=2))
    with pytest.raises(UsageError, match=r"base and short cannot .*: they have 3 and 2 layers$"):
        diff(a, short, "The cat")
    spm = opened(write_tiny(folder / "spm.gguf", "llama", spm=True))
    with pytest.raises(UsageError, match=r"328 and 362 tokens in the vocabulary$"):
        diff(a, spm, "The cat")
    with pytest.raises(UsageError, match="a window of 3 tokens is too short"):
        diff(a, a, "The cat", window=3)


def test_vocabularies_are_compared_by_their_texts(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, *_ = two
    check_comparable(a, b)
    monkeypatch.setitem(b.__dict__, "tokenizer_hash", "another")
    with pytest.raises(UsageError, match="they have other texts of the same number of tokens"):
        check_comparable(a, b)


# -- blame -----------------------------------------------------------------------------


def put(rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda _: rows


def test_each_number_of_the_blame_is_that_of_a_run_alone(two: Two) -> None:
    a, b, oracle_a, oracle_b = two
    ids, positions = ids_of(a, 9), [4, 5, 8]
    r = blame(a, b, ids, positions)
    x = oracle_a.run(ids)

    def to_a(logits: np.ndarray) -> float:
        return float(kl(x["logits"], logits)[positions].mean())

    unchanged = to_a(oracle_b.run(ids)["logits"])
    assert r.kl == pytest.approx(unchanged, rel=1e-3)
    assert [row.place for row in r.rows] == [
        "embedding", "layer 0", "layer 1", "layer 2", "unembedding",
    ]  # fmt: skip
    before, source = unchanged, None
    for row in r.rows[:-1]:
        site = "embed" if row.layer is None else f"resid_post.{row.layer}"
        edits: dict[str, Any] = {} if source is None else {source: put(x[source])}
        theirs = oracle_b.run(ids, edits)  # b, on a's input of this block
        patched = to_a(oracle_b.run(ids, {site: put(x[site])})["logits"])
        alone = to_a(oracle_a.run(ids, {site: put(theirs[site])})["logits"])
        assert row.patched == pytest.approx(patched, rel=2e-3, abs=1e-5)
        assert row.alone == pytest.approx(alone, rel=2e-3, abs=1e-5)
        assert row.share == pytest.approx(before - patched, rel=5e-3, abs=1e-5)
        if row.layer is not None:
            assert source is not None
            start = x[f"resid_pre.{row.layer}"]
            error = np.linalg.norm(theirs[site] - x[site], axis=-1) / np.linalg.norm(
                x[site] - (x[source] if row.layer else x["embed"]), axis=-1
            )
            assert start.shape == x[site].shape
            assert row.own_error == pytest.approx(error.mean(), rel=2e-3)
            for part, got, own in (
                ("attn_out", row.attn, row.attn_error),
                ("mlp_out", row.mlp, row.mlp_error),
            ):
                key = f"{part}.{row.layer}"
                without = to_a(oracle_b.run(ids, {key: put(x[key])})["logits"])
                assert got == pytest.approx(unchanged - without, rel=5e-3, abs=2e-5)
                own_error = np.linalg.norm(theirs[key] - x[key], axis=-1) / np.linalg.norm(
                    x[key], axis=-1
                )
                assert own == pytest.approx(own_error.mean(), rel=5e-3)
        before, source = patched, site
    assert sum(row.share or 0 for row in r.rows) == pytest.approx(r.kl, abs=1e-6)
    assert r.floor_a < 1e-5 and r.floor_b < 1e-3


@pytest.mark.parametrize("layer", range(3))
def test_the_layer_that_was_changed_is_named_first(
    layer: int, folder: Path, opened: Callable[[Path], Model]
) -> None:
    base = write_tiny(folder / "base.gguf", "llama")
    path = perturbed(base, folder / f"layer{layer}.gguf", of_layer(layer), size=0.01)
    r = diff(opened(base), opened(path), "The capital of France is the capital of")
    assert r.blame is not None
    first = r.blame.ranked()[0]
    assert (first.layer, r.blame.coarsest()) == (layer, first)
    others = [x for x in r.blame.rows if x is not first]
    assert all((x.alone or 0) <= r.blame.floor_a for x in others)
    assert {t.layer for t in r.tensors if t.differs} == {layer}
    assert f"first: layer {layer}" in r.plain()
    assert r.layers[layer - 1].error == 0 or layer == 0
    assert r.document()["blame"]["ranked"][0] == f"layer {layer}"


@pytest.mark.parametrize("place", ["embedding", "unembedding"])
def test_the_embedding_and_the_unembedding_can_be_named(
    place: str, folder: Path, opened: Callable[[Path], Model]
) -> None:
    name = {"embedding": "token_embd.weight", "unembedding": "output.weight"}[place]
    base = write_tiny(folder / "base.gguf", "llama")
    path = perturbed(base, folder / f"{place}.gguf", lambda n: n == name, size=0.05)
    r = blame(opened(base), opened(path), list(range(5, 15)), range(10))
    assert r.ranked()[0].place == place and r.coarsest() is None


def test_one_file_twice_differs_in_nothing(two: Two) -> None:
    a = two[0]
    r = diff(a, a, "The cat sat on the")
    assert all(x.error == 0 and x.cosine_worst > 0.999999 for x in r.layers)
    assert all(t.same for t in r.tensors)
    assert "no block alone moves the predictions by more than the noise floor" in r.plain()
    assert r.end.kl.value < 1e-4  # 16 bits


@pytest.mark.parametrize("two", ["llama"], indirect=True)
def test_the_report_gives_rows_and_a_picture(two: Two, tmp_path: Path) -> None:
    a, b, *_ = two
    r = diff(a, b, "The cat sat on the", k=2)
    rows = r.rows()
    assert len(rows) == a.n_layer and {"error", "lens_kl", "alone", "own_error"} <= rows[0].keys()
    r.plot(tmp_path / "d.svg")
    text = (tmp_path / "d.svg").read_text()
    assert "alone in A" in text and "worst token" in text
    assert [line for line in r.plain().splitlines() if line.startswith("place ")]
    assert "attn" not in diff(a, b, "The cat", blame_tokens=0).plain().split("residual behind")[1]
    assert len(re.findall(r"^(?:layer \d|embedding|unembedding) ", r.plain(), re.M)) == 2


# -- tensors ---------------------------------------------------------------------------


def test_tensors_side_by_side(folder: Path) -> None:
    a = write_tiny(folder / "wide.gguf", "llama", qtype="Q8_0")
    q = write_tiny(folder / "wide-q.gguf", "llama", qtype="Q4_0")
    b = mixed(a, q, folder / "mix.gguf", of_layer(1))
    pairs = {t.name: t for t in tensor_pairs(a, b)}
    changed = {n for n, t in pairs.items() if t.differs}
    assert changed == {n for n in pairs if of_layer(1)(n)}
    t = pairs["blk.1.ffn_up.weight"]
    assert (t.layer, t.role, t.type_a, t.type_b) == (1, "ffn_up.weight", "q8_0", "q4_0")
    n = 96 * 64 // 32
    assert (t.shape, t.bytes_a, t.bytes_b) == ((96, 64), n * 34, n * 18)
    assert t.error is not None and 0.03 < t.error < 0.2
    same = pairs["blk.0.ffn_up.weight"]
    assert same.same and len(same.sha256) == 64 and same.error is None
    assert pairs["output_norm.weight"].layer is None


def test_layers_are_told_in_order_whatever_that_of_the_file() -> None:
    layers = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    pair = TensorPair("", None, "attn_q.weight", (4,), "f16", "q8_0", 8, 4, False, "", 0.1)
    (text,) = _tensor_lines([replace(pair, layer=i) for i in layers])
    assert " 0..11 " in text


def test_large_files_are_not_read_and_a_tensor_may_be_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mia.models import tensor_diff

    a = write_tiny(folder / "own.gguf", "llama")
    b = write_tiny(folder / "tied.gguf", "llama", tied=True)
    monkeypatch.setattr(tensor_diff, "READ", 1000)
    monkeypatch.setattr(tensor_diff, "_SAMPLE", 200)  # some rows of each tensor
    pairs = {t.name: t for t in tensor_pairs(a, b)}
    output = pairs["output.weight"]
    assert (output.type_b, output.bytes_b, output.same, output.shape) == ("", 0, False, None)
    t = pairs["blk.0.attn_q.weight"]
    assert (t.same, t.sha256, t.error) == (None, "", 0.0)


# -- the real model --------------------------------------------------------------------

TEXT = Path(__file__).parents[2].joinpath("README.md")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """smollm2 as f16."""
    try:
        convert("smollm2", "f16", str(folder / "smollm2-f16.gguf"))
    except Exception as err:
        pytest.skip(str(err))
    return folder / "smollm2-f16.gguf"


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 29])
def test_a_coarser_layer_of_the_real_model_is_named_first(
    layer: int, base: Path, folder: Path, opened: Callable[[Path], Model]
) -> None:
    coarse = folder / "q4_0.gguf"
    if not coarse.exists():
        convert(str(base), "q4_0", str(coarse))
    path = mixed(base, coarse, folder / "one.gguf", of_layer(layer))
    a = opened(base)
    with Model(path) as b:
        r: Blame = blame(
            a, b, a.tokenize(TEXT.read_text(), bos=True)[:12], range(6, 12), parts=False
        )
    first, second = r.ranked()[:2]
    assert first.layer == layer and r.coarsest() == first
    assert (first.alone or 0) > 20 * max(r.floor_a, second.alone or 0)


@pytest.mark.slow
def test_ends_are_those_of_the_tool(
    base: Path, folder: Path, smollm2: Model, opened: Callable[[Path], Model]
) -> None:
    tools = os.environ.get("MIA_LLAMA_TOOLS")
    if not tools:
        pytest.skip("MIA_LLAMA_TOOLS does not name the folder of llama-perplexity")
    text = TEXT.read_text()[:3000].removesuffix("\n")
    Path(folder / "text.txt").write_text(text)
    said = _perplexity(Path(tools), folder, base, smollm2.path)
    r = diff(opened(base), smollm2, text, window=128, lens_tokens=0, blame_tokens=0)
    end: Any = r.end
    for title, got in (
        ("Mean    KLD", end.kl.value),
        ("Maximum KLD", end.largest),
        ("99.0%   KLD", end.percentiles["99"]),
        ("Median  KLD", end.percentiles["50"]),
        ("Mean ln(PPL(Q)/PPL(base))", end.log_ratio.value),
        ("Same top p", end.same_top.value * 100),
        ("Mean    Δp", end.p_change.value * 100),
        ("RMS Δp", end.p_change_rms * 100),
    ):
        number = re.search(rf"{re.escape(title)}\s*: *(-?[\d.]+)", said)
        assert number, (title, said)
        tolerance = 0.5 if "top" in title else 0.05 if "Δp" in title else 1e-3
        assert got == pytest.approx(float(number[1]), abs=tolerance), title


def _perplexity(tools: Path, folder: Path, base: Path, other: Path) -> str:
    """What llama.cpp's tool prints of two files."""
    program, kept = tools / "llama-perplexity", folder / "base.dat"
    common: list[str | Path] = [program, "-t", "2", "-c", "128", "--kl-divergence-base", kept]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tools)}
    out = ""
    runs: list[list[str | Path]] = [
        ["-m", base, "-f", folder / "text.txt"],
        ["-m", other, "--kl-divergence"],
    ]
    for words in runs:
        done = subprocess.run(
            [*common, *words], env=environment, capture_output=True, text=True, check=True
        )
        out = done.stdout + done.stderr
    return out
