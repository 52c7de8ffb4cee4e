"""Sweeps: every cell is the same run done alone, and the oracle's; axes, metrics, the noise floor."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.datasets.prompt_pairs import PromptPair, load_prompt_pairs
from mia.edits import Edit
from mia.errors import FileError, RangeError, SiteError, UsageError
from mia.measure.answers import metric
from mia.methods.sweep import explain, load, spread, sweep
from mia.request import Request
from mia.sweeps.axes import window
from mia.sweeps.changes import Base, aligned, first_difference
from mia.sweeps.experiments import (
    Ablation,
    Blocking,
    Experiment,
    Patching,
    PatchingPairs,
    PathPatching,
    Steering,
    swapped,
    tokens_of,
)
from mia.sweeps.paths import Receiver, parse_receivers
from mia.vectors import Vector


def piece(case: Tiny, logits: np.ndarray) -> str:
    return case.model.piece(int(logits.argmax()))


@pytest.mark.parametrize("site", ["resid_post", "attn_out", "mlp_out", "head_out", "resid_pre"])
@pytest.mark.parametrize("into", ["corrupted", "clean"])
def test_a_patched_cell_is_the_oracles(case: Tiny, site: str, into: Any) -> None:
    clean, corrupted = case.prompt(5, seed=4), case.prompt(5, seed=5)
    done = sweep(case.model, clean, Patching(corrupted, into=into), site=site, metric="kl", null=3)
    source, base = (clean, corrupted) if into == "corrupted" else (corrupted, clean)
    rows, plain = case.oracle.run(source), case.oracle.run(base)["logits"][-1]
    assert done.values.shape == (case.model.n_layer, 5)
    for layer, token in np.ndindex(*done.values.shape):
        name = f"{site}.{layer}"

        def put(h: np.ndarray, name: str = name, token: int = token) -> np.ndarray:
            h[token] = rows[name][token]
            return h

        logits = case.oracle.run(base, {name: put})["logits"][-1]
        assert done.values[layer, token] == pytest.approx(kl(plain, logits), abs=1e-4)
    assert done.unchanged == pytest.approx(0, abs=1e-6) and done.floor < 1e-6


@pytest.mark.parametrize("site", ["attn_pattern", "attn_scores", "v"])
@pytest.mark.parametrize("over", ["layer,head", "layer,token"])
def test_patterns_and_values_apart(case: Tiny, site: str, over: str) -> None:
    """Where a head looks comes from one run, what it reads there from the other."""
    clean, corrupted = case.prompt(5, seed=4), case.prompt(5, seed=5)
    done = sweep(case.model, clean, Patching(corrupted), over=over, site=site, metric="kl", null=2)
    rows, plain = case.oracle.run(clean), case.oracle.run(corrupted)["logits"][-1]
    for layer, other in np.ndindex(*done.values.shape):
        name, chosen = f"{site}.{layer}", (slice(None), other) if over.endswith("head") else other

        shape = (5, -1, 5) if site.startswith("attn") else (5, case.model.n_head_kv, -1)

        def put(
            h: np.ndarray, name: str = name, chosen: Any = chosen, shape: Any = shape
        ) -> np.ndarray:
            h.reshape(shape)[chosen] = rows[name].reshape(shape)[chosen]
            return h

        logits = case.oracle.run(corrupted, {name: put})["logits"][-1]
        assert done.values[layer, other] == pytest.approx(kl(plain, logits), abs=1e-4)
    assert done.effect.max() > 1e-3


def test_what_the_runs_share_is_not_patched(case: Tiny) -> None:
    """Rows before the first difference are the same: their cells cost nothing, and are the
    unchanged number to the last bit. All others are the oracle's."""
    clean = case.prompt(6, seed=4)
    corrupted = [*clean[:3], (clean[3] + 1) % 40 + 3, *clean[4:]]
    whole = explain(case.model, clean, Patching(case.prompt(6, seed=9)), metric="kl", null=0)
    shared = explain(case.model, clean, Patching(corrupted), metric="kl", null=0)
    assert shared.planned.rows < whole.planned.rows
    done = sweep(case.model, clean, Patching(corrupted), metric="kl", null=2)
    assert (done.values[:, :3] == done.unchanged).all()
    rows, plain = case.oracle.run(clean), case.oracle.run(corrupted)["logits"][-1]
    for layer, token in [(0, 3), (1, 4), (2, 5)]:
        name = f"resid_post.{layer}"

        def put(h: np.ndarray, name: str = name, token: int = token) -> np.ndarray:
            h[token] = rows[name][token]
            return h

        logits = case.oracle.run(corrupted, {name: put})["logits"][-1]
        assert done.values[layer, token] == pytest.approx(kl(plain, logits), abs=1e-4)
    every = sweep(case.model, clean, Patching(corrupted), over="layer", metric="kl", null=0)
    assert every.values[-1] == pytest.approx(kl(plain, rows["logits"][-1]), abs=1e-4)


def test_where_two_runs_differ_first() -> None:
    base = Base([1, 2, 3, 4], [Edit("embed", "zero", tokens=[-2])])
    assert first_difference(base, Base([1, 2, 3, 4])) == 2
    assert first_difference(Base([1, 2, 9]), Base([1, 2, 3, 4])) == 2
    assert first_difference(Base([1, 2, 9]), Base([1, 2, 9])) == 3


def kl(p: np.ndarray, q: np.ndarray) -> float:
    p, q = (x - np.logaddexp.reduce(x) for x in (p.astype(float), q.astype(float)))
    return float((np.exp(p) * (p - q)).sum())


@pytest.mark.parametrize(
    ("over", "options"),
    [
        ("layer,token", {"window": 2}),
        ("layer,head", {"site": "head_out", "tokens": "-1"}),
        ("layer,head", {"site": "q", "tokens": "1,3"}),
        ("site,layer", {"site": ["attn_out", "mlp_out"]}),
        ("neuron", {"layers": "1", "neurons": "0..4", "tokens": "2"}),
        ("token,layer,neuron", {"layers": "0,2", "neurons": "3,-1", "tokens": "0,-1"}),
    ],
)
@pytest.mark.parametrize("experiment", ["patch", "zero", "mean"])
def test_a_cell_is_the_same_run_alone(
    case: Tiny, over: str, options: dict[str, Any], experiment: str
) -> None:
    m, clean, other = case.model, case.prompt(5, seed=4), case.prompt(5, seed=5)
    kinds: dict[str, Experiment] = {
        "patch": Patching(other),
        "zero": Ablation(),
        "mean": Ablation(other),
    }
    done = sweep(
        m, clean, kinds[experiment], over=over, metric="logit", answer=_text(case), **options
    )
    rows = m.look(other if experiment == "mean" else clean, list({*_sites(options)}))
    base = other if experiment == "patch" else clean
    answer = m.continuation(m.piece(clean[-1]), _text(case))[0]
    alone = []
    for cell in np.ndindex(*done.values.shape):
        at = {a.name: a.values[i] for a, i in zip(done.axes, cell, strict=True)}
        edits = _edits(case, at, options, experiment, rows)
        logits = m.run([Request(base, edits)])[0].logits
        assert logits is not None
        alone.append(logits[-1][answer])
    np.testing.assert_allclose(done.values.ravel(), alone, atol=1e-4)


def _text(case: Tiny) -> str:
    """Some token's text that can follow."""
    return next(
        text
        for text in map(case.model.piece, range(5, 200))
        if len(case.model.continuation("a", text)) == 1 and text.strip()
    )


def _sites(options: dict[str, Any]) -> list[str]:
    site = options.get("site", "resid_post")
    return [site] if isinstance(site, str) else site


def _edits(
    case: Tiny, at: dict[str, Any], options: dict[str, Any], experiment: str, rows: Any
) -> list[Edit]:
    """What a cell is, written down once more."""
    n_layer = case.model.n_layer
    name = at.get("site", _sites(options)[0])
    layers = [at["layer"]] if "layer" in at else [int(options["layers"])]
    if "window" in options:  # of two: the layer below, and the cell's
        layers = [i for i in (at["layer"] - 1, at["layer"]) if 0 <= i < n_layer]
    given = [int(t) % 5 for t in options.get("tokens", "0,1,2,3,4").split(",")]
    tokens = [at["token"]] if "token" in at else given
    out = []
    for layer in layers:
        site = f"{name}.{layer}"
        every = rows[site]
        heads, dims = at.get("head"), at.get("neuron")
        value = every.mean(0, keepdims=True).repeat(5, 0) if experiment == "mean" else every
        if heads is not None:
            n = case.model.topology.sites[
                next(s for s in case.model.topology.sites if str(s) == site)
            ]
            value = value.reshape(5, n.shape[0], -1)[:, heads]
        if dims is not None:
            value = value[:, [dims]]
        if experiment == "zero":
            value = np.zeros_like(value)
        out.append(Edit(site, "replace", value[tokens], tokens=tokens, heads=heads, dims=dims))
    return out


def test_prompts_of_two_lengths_are_paired_as_one_says(llama: Tiny) -> None:
    clean, corrupted = llama.prompt(6, seed=4), llama.prompt(4, seed=5)
    with pytest.raises(UsageError, match="have 4 and 6 tokens"):
        sweep(llama.model, clean, Patching(corrupted))
    at_end = sweep(llama.model, clean, Patching(corrupted, align="end"))
    assert [a.values for a in at_end.axes] == [(0, 1, 2), (0, 1, 2, 3)]
    row = llama.model.look(clean, "resid_post.1")["resid_post.1"][5]
    alone = llama.model.run([Request(corrupted, [Edit("resid_post.1", "replace", row, 3)])])[0]
    plain = llama.model.run([Request(corrupted)])[0]
    assert alone.logits is not None and plain.logits is not None
    assert at_end.values[1, 3] == pytest.approx(kl(plain.logits[-1], alone.logits[-1]), abs=1e-4)
    assert aligned(4, 6, "start") == {0: 0, 1: 1, 2: 2, 3: 3}
    assert aligned(6, 4, "end") == {2: 0, 3: 1, 4: 2, 5: 3}
    with pytest.raises(UsageError, match="aligned at the start or the end"):
        aligned(4, 6, "middle")


def test_noise_is_averaged_over_draws(llama: Tiny) -> None:
    m, tokens = llama.model, llama.prompt(6, seed=4)
    word = m.detokenize(tokens[2:3])
    done = sweep(m, tokens, Patching(noise_on=word, draws=3), metric="logit", answer=_text(llama))
    again = sweep(m, tokens, Patching(noise_on=word, draws=3), metric="logit", answer=_text(llama))
    other = sweep(
        m, tokens, Patching(noise_on=word, draws=3, seed=9), metric="logit", answer=_text(llama)
    )
    assert done.n_runs == 3 and done.low is not None and done.high is not None
    assert (done.low <= done.effect + 1e-9).all() and (done.effect <= done.high + 1e-9).all()
    np.testing.assert_array_equal(done.values, again.values)
    assert done.unchanged != other.unchanged
    # the last block's output at the last token is all that the logits read
    assert done.values[-1, -1] == pytest.approx(done.source, abs=1e-4)
    assert done.restored[-1, -1] == pytest.approx(1, abs=1e-3)


def test_blocked_keys_and_added_vectors(llama: Tiny) -> None:
    m, tokens = llama.model, llama.prompt(5, seed=4)
    blocked = sweep(m, tokens, Blocking(), metric="kl")
    assert blocked.values.shape == (3, 5)
    np.testing.assert_allclose(blocked.effect[:, -1], 0, atol=1e-6)  # nobody comes after it
    assert (blocked.values[:, 1] > 0).all()
    v = Vector({1: llama.vector()})
    added = sweep(m, tokens, Steering(v), over="coeff", layers="1", coeffs=[0, 1, 4], metric="kl")
    assert added.values[0] == pytest.approx(0, abs=1e-6)
    assert 0 < added.values[1] < added.values[2]


def test_a_vector_is_beside_random_directions_of_its_norm(llama: Tiny, tmp_path: Path) -> None:
    m, tokens = llama.model, llama.prompt(5, seed=4)
    v = Vector({1: llama.vector(), 2: 3 * llama.vector(seed=8)})
    how: dict[str, Any] = {"metric": "kl", "coeffs": [2], "null": 4}
    done = sweep(m, tokens, Steering(v), rows=tmp_path / "r.jsonl", **how)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    tried = [(i, line) for i, line in enumerate(lines) if "random" in line]
    assert len(tried) == 4 and all("null" in line for _, line in tried)
    plain = llama.oracle.run(tokens)["logits"][-1]
    for i, line in tried:
        d = np.random.default_rng(i).normal(size=v[line["layer"]].shape)
        d *= 2 * np.linalg.norm(v[line["layer"]]) / np.linalg.norm(d)

        def add(h: np.ndarray, d: np.ndarray = d, token: int = line["token"]) -> np.ndarray:
            h[token] += d
            return h

        logits = llama.oracle.run(tokens, {f"resid_post.{line['layer']}": add})["logits"][-1]
        assert line["random"] == pytest.approx(kl(plain, logits), abs=1e-4)
    assert done.random == pytest.approx([line["random"] for _, line in tried], abs=1e-6)
    assert done.document()["random"] == pytest.approx(done.random, abs=1e-4)
    said = f"4 random directions of the same norm moved it by {np.mean(done.random):.2g} nats"
    assert said in done.plain() and said in done.page()
    assert load(tmp_path / "r.jsonl").random == done.random
    assert sweep(m, tokens, Ablation(), metric="kl").random == ()


def test_texts_of_a_prompt(llama: Tiny) -> None:
    assert swapped("Ann met Bob; Ann left", {"Ann": "Bob", "Bob": "Ann"}) == "Bob met Ann; Bob left"
    with pytest.raises(UsageError, match="does not contain 'Eve'"):
        swapped("Ann", {"Eve": "Ann"})
    tokens = llama.model.tokenize("The cat sat")
    assert tokens_of(llama.model, tokens, "cat")
    with pytest.raises(UsageError, match="does not contain 'dog'"):
        tokens_of(llama.model, tokens, "dog")


def _divergence(base: np.ndarray, logits: np.ndarray) -> float:
    measured = metric("kl")
    early = measured.function(logits)  # before the unchanged run: it waits
    measured.of_unchanged(base)
    late = measured.function(logits)
    assert measured.number(early) == pytest.approx(measured.number(late), rel=1e-5)
    return measured.number(late)


def test_a_metric_of_ones_own_fails_in_one_line(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metrics.py").write_text("def fails(logits): return 1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"the metric own_metrics:fails failed: ZeroDivisionError"):
        sweep(llama.model, llama.prompt(4), Ablation(), metric="own_metrics:fails", layers="1")


def test_experiments_have_sites_and_axes_of_their_own(llama: Tiny) -> None:
    m, tokens, v = llama.model, llama.prompt(5), Vector({1: llama.vector()})
    assert sweep(m, tokens, Steering(v), over="coeff", layers="1").site == "resid_post"
    assert sweep(m, tokens, Blocking(), over="layer,head", tokens="1").values.shape == (3, 6)
    for experiment, options, says in (
        (Steering(v), {"site": "mlp_out"}, "the site is resid_post, not mlp_out"),
        (Steering(v), {"over": "layer,neuron"}, "there is no neuron to choose"),
        (Steering(v), {"over": "layer", "layers": "0..1"}, "there is no layer 0 to choose"),
        (Blocking(), {"site": "embed"}, "the site is attn_scores, not embed"),
        (Blocking(), {"over": "layer"}, "with all tokens hidden nobody is left"),
        (PathPatching(llama.prompt(5, seed=3)), {"site": "q"}, "the site is head_out, not q"),
        (Ablation(tokens), {"site": "attn_pattern"}, "it has no mean over tokens"),
        (Patching(tokens[1:], align="end"), {"site": "attn_pattern"}, "paired from the start"),
        (Patching(tokens[1:], align="end"), {"tokens": "0"}, "token 0 has no partner"),
    ):
        given: dict[str, Any] = options
        base = [*tokens[1:], *tokens[:3]] if "partner" in says else tokens
        if "partner" in says:
            experiment = Patching([*base, 5, 6], align="end")
        with pytest.raises(UsageError, match=says):
            sweep(m, base, experiment, **given)


def test_the_run_that_kl_is_measured_from_is_among_the_others(llama: Tiny) -> None:
    for site in ("attn_scores", "attn_pattern", "embed"):
        over = "token" if site == "embed" else "layer,token"
        done = sweep(llama.model, llama.prompt(5), Ablation(), site=site, over=over, metric="kl")
        assert done.unchanged == 0 and (done.values >= -1e-9).all()


def test_small_parts() -> None:
    assert spread(100, 4) == [12, 37, 62, 87] and spread(3, 12) == [0, 1, 2] and spread(5, 0) == []
    assert window(0, 3, 5) == (0, 1) and window(2, 1, 5) == (2,) and window(4, 4, 5) == (2, 3, 4)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"over": "layer,tokens"}, UsageError, "unknown axis 'tokens'; known: layer, head"),
        ({"over": "layer,layer"}, UsageError, "the axis layer is given twice"),
        ({"over": "layer,head"}, UsageError, "resid_post has no heads"),
        ({"over": "layer,coeff"}, UsageError, "there is no coeff to choose"),
        ({"coeffs": [2]}, UsageError, "there is no coeff to choose"),
        ({"site": "embed"}, UsageError, "embed has no layers"),
        ({"site": ["q", "k"], "over": "site,head"}, UsageError, "unequal numbers of heads"),
        ({"site": "attn_pattern", "over": "layer,neuron"}, UsageError, "has keys, no neurons"),
        ({"site": "nowhere"}, UsageError, "unknown site 'nowhere'; known: embed"),
        ({"site": ["q", "k"]}, UsageError, "several values of site need the axis site"),
        ({"layers": "7"}, RangeError, "7"),
        ({"tokens": "9"}, RangeError, "9"),
        ({"metric": "nats"}, UsageError, "unknown metric 'nats'; known: logprob"),
        ({"metric": "logprob"}, UsageError, "the metric logprob needs an answer"),
        ({"window": 0}, UsageError, "a window of 0 layers"),
        ({"site": "router"}, SiteError, "router"),
    ],
)
def test_what_cannot_be_swept(
    llama: Tiny, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        sweep(llama.model, llama.prompt(5), Patching(llama.prompt(5, seed=9)), **options)


def test_the_report(llama: Tiny, tmp_path: Path) -> None:
    done = sweep(llama.model, llama.prompt(5), Patching(llama.prompt(5, seed=9)), k=2)
    document = done.document()
    assert np.shape(document["values"]) == (3, 5) and document["null"] == 12
    assert [a["name"] for a in document["axes"]] == ["layer", "token"]
    rows = done.rows()
    assert len(rows) == 15 and rows[7]["layer"] == 1 and rows[7]["token"] == 2
    text = done.plain().splitlines()
    assert len(text) == 4 and "noise floor" in text[-1]
    done.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    with pytest.raises(FileError):
        done.plot(tmp_path / "a.xyz")


def test_metrics() -> None:
    rng = np.random.default_rng(0)
    logits, base = (rng.normal(size=(2, 9)).astype(np.float32) for _ in range(2))
    logp = logits.astype(float) - np.logaddexp.reduce(logits.astype(float), axis=1)[:, None]
    last = logits[-1:]
    whole = metric("logprob", answer=[3, 5])
    assert whole.n_positions == 2
    assert whole.function(logits) == pytest.approx(logp[0, 3] + logp[1, 5])
    probability = metric("prob", answer=[3, 5]).function(logits)
    assert probability == pytest.approx(math.exp(logp[0, 3] + logp[1, 5]))
    difference = metric("logit-diff", answer=[3], against=[2]).function(last)
    assert difference == pytest.approx(logits[1, 3] - logits[1, 2])
    assert metric("logit", answer=[3]).function(last) == pytest.approx(logits[1, 3])
    assert metric("rank", answer=[int(logits[1].argmax())]).function(logits) == 1
    assert metric("rank", answer=[int(logits[1].argmin())]).function(logits) == 9
    assert _divergence(base, logits) == pytest.approx(kl(base[1], logits[1]), rel=1e-5)
    for bad in ("abc", None, math.nan, math.inf):
        with pytest.raises(UsageError, match="the metric logprob is "):
            whole.number(bad)
    with pytest.raises(UsageError, match="begin with the same token"):
        metric("logit-diff", answer=[1], against=[1])


def test_pairs_of_a_file_give_means_and_intervals(llama: Tiny, tmp_path: Path) -> None:
    m = llama.model
    prompts = [llama.prompt(5, seed=i) for i in range(4)]
    texts = [m.detokenize(p) for p in prompts]
    records = [
        {"clean_prompt": texts[0], "corrupt": texts[1], "answers": [_text(llama), "b"]},
        {"clean": texts[2], "corrupted": texts[3], "answer": _text(llama)},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    pairs = load_prompt_pairs(path)
    assert pairs[0].against == "b" and pairs[1].against == ""
    options: dict[str, Any] = {"over": "layer", "tokens": "-1", "metric": "logit"}
    done = sweep(m, None, PatchingPairs(pairs, align="end"), **options)
    single = [
        sweep(m, p.clean, Patching(p.corrupted, align="end"), answer=p.answer, **options)
        for p in pairs
    ]
    np.testing.assert_allclose(done.values, np.mean([s.values for s in single], axis=0), atol=1e-5)
    assert done.n_runs == 2 and done.low is not None and done.n_null == 6
    longer = [PromptPair("a b", "b a"), PromptPair("a b c d e f", "f e d c b a")]
    with pytest.raises(UsageError, match="their tokens are no one axis"):
        sweep(m, None, PatchingPairs(longer, align="end"), metric="kl")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is empty"),
        ('{"clean": "a"}', "there is no text 'corrupted' .corrupted, corrupt"),
        ('{"clean": "a", "corrupted": 3}', "there is no text 'corrupted'"),
        ('{"clean": "a", "corrupted": "b", "answers": "c"}', "answers is not a list"),
        ("[3]", "no object"),
    ],
)
def test_files_of_pairs_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(text)
    with pytest.raises(FileError, match=says):
        load_prompt_pairs(path)


@pytest.mark.parametrize("receivers", ["", "q:2.1,2.3", "v:1.*;k:2.0", "resid_post:1"])
def test_paths_are_the_oracles(case: Tiny, receivers: str) -> None:
    if case.name == "gpt2" and receivers.startswith(("q", "v")):
        receivers = receivers.replace("2.3", "2.0")
    m, clean, corrupted = case.model, case.prompt(5, seed=4), case.prompt(5, seed=5)
    done = sweep(
        m,
        clean,
        PathPatching(corrupted, receivers),
        over="layer,head",
        site="head_out",
        metric="kl",
        tokens="1,4",
    )
    run, plain, other = case.oracle.run, case.oracle.run(clean), case.oracle.run(corrupted)
    width = m.head_dim
    ends = parse_receivers(receivers, m) if receivers else []
    for layer, head in np.ndindex(*done.values.shape):
        part = slice(head * width, (head + 1) * width)

        def frozen(i: int, layer: int = layer, part: slice = part) -> Any:
            def put(h: np.ndarray) -> np.ndarray:
                h[:] = plain[f"head_out.{i}"]
                if i == layer:
                    h[[1, 4], part] = other[f"head_out.{i}"][[1, 4], part]
                return h

            return put

        sent = run(clean, {f"head_out.{i}": frozen(i) for i in range(m.n_layer)})
        got = sent
        if ends:
            got = run(clean, {str(r.site): _received(m, r, sent) for r in ends})
        want = kl(plain["logits"][-1], got["logits"][-1])
        assert done.values[layer, head] == pytest.approx(want, abs=1e-4)


def _received(m: Any, receiver: Receiver, sent: Any) -> Any:
    rows = sent[str(receiver.site)]

    def put(h: np.ndarray) -> np.ndarray:
        if receiver.heads is None:
            h[:] = rows
            return h
        n = m.topology.sites[receiver.site].shape[0]
        for head in receiver.heads:
            h.reshape(len(h), n, -1)[:, head] = rows.reshape(len(h), n, -1)[:, head]
        return h

    return put


@pytest.mark.parametrize("text", ["q", "q:9.0", "nowhere:1", "attn_scores:1.0", "embed:1"])
def test_receivers_that_are_none(llama: Tiny, text: str) -> None:
    with pytest.raises((UsageError, RangeError)):
        parse_receivers(text, llama.model)
