"""tune: its numbers are the oracle's, its front that of every setting, and a stopped one goes on."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import expected
from tiny import Tiny

from mia.datasets.prompts import Prompt, load_prompts
from mia.errors import FileError, NotFiniteError, UsageError
from mia.methods import steering
from mia.methods.tune import Space, tune
from mia.methods.tune_reports import Tuned
from mia.model import Model
from mia.request import Request, Sampling
from mia.steering import Steering
from mia.tuning.pareto import front
from mia.tuning.scores import Answer, Words
from mia.tuning.trials import Neutral, Trials
from mia.vectors import Vector, load

pytestmark = pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")
SPACE = Space(("add", "project_out", "clamp"), widths=(1, 2), coeffs=(0.5, 2.0, -1.0))
NEUTRAL = Neutral(tokens=16, window=8)


def vector(tiny: Tiny) -> Vector:
    layers = range(tiny.model.n_layer)
    return Vector({i: tiny.vector(seed=i) / np.float32(2) for i in layers}, metadata={"name": "v"})


def tuned(tiny: Tiny, **how: Any) -> Tuned:
    prompt = how.pop("prompt", tiny.prompt(6))
    score = how.pop("score", Answer(" cat"))
    options = {"space": SPACE, "neutral": NEUTRAL, "kl_budget": 0.2, "runs": 10**6}
    return tune(tiny.model, prompt, vector(tiny), score, **{**options, **how})


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# -- numbers -----------------------------------------------------------------------------


def test_scores_and_kl_are_the_oracles(case: Tiny) -> None:
    m, v, prompt = case.model, vector(case), case.prompt(6)
    got = tuned(case)
    answer = m.continuation(m.piece(prompt[-1]), " cat")
    text = [*prompt, *answer[:-1]]
    windows = NEUTRAL.windows(m)
    assert len(windows) == 2 and {len(w) for w in windows} == {8}
    assert len(got.trials) == len({t.setting for t in got.trials}) == got.n_settings
    for t in got.trials[:: max(len(got.trials) // 8, 1)]:
        edits = t.setting.edits(v)
        logp = log_softmax(expected(case.oracle, Request(text, edits))["logits"])
        want = sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
        kls = []
        for w in windows:
            base = log_softmax(case.oracle.run(w)["logits"])
            changed = log_softmax(expected(case.oracle, Request(w, edits))["logits"])
            kls.append((np.exp(base) * (base - changed)).sum(-1))
        np.testing.assert_allclose(t.score, want, atol=1e-3, err_msg=str(t.setting))
        np.testing.assert_allclose(t.kl, np.concatenate(kls).mean(), atol=1e-4, rtol=1e-3)
    plain = log_softmax(case.oracle.run(text)["logits"])
    want = sum(plain[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
    np.testing.assert_allclose(got.unchanged, want, atol=1e-3)
    assert got.score_floor < 1e-2 and got.kl_floor < 1e-6


def test_the_front_is_that_of_every_setting(llama: Tiny) -> None:
    whole = tuned(llama)
    within = [
        t for t in whole.trials if t.kl <= 0.2 and t.score > whole.unchanged + whole.score_floor
    ]
    best = [
        t for t in within if not any(o.score > t.score and o.kl <= t.kl for o in within if o != t)
    ]
    assert whole.front == sorted(best, key=lambda t: t.kl) and whole.best == whole.front[-1]
    some = tuned(llama, runs=len(whole.trials) - 1, seed=3)
    known = {t.setting: t for t in whole.trials}
    assert len(some.trials) == len(whole.trials) - 1
    for t in some.trials:
        np.testing.assert_allclose(
            (t.score, t.kl), (known[t.setting].score, known[t.setting].kl), atol=1e-5
        )
    assert [t.setting for t in some.front] == [t.setting for t in whole.front]


def test_the_best_is_what_steers(llama: Tiny) -> None:
    got = tuned(llama)
    assert got.best is not None
    p = llama.prompt(6)
    answer = llama.model.continuation(llama.model.piece(p[-1]), " cat")
    text = [*p, *answer[:-1]]
    with llama.model.steered(got.steering()):
        logits = llama.model.run([Request(text, logits=slice(len(p) - 1, None))])[0].logits
    assert logits is not None
    score = sum(log_softmax(logits)[i, t] for i, t in enumerate(answer))
    np.testing.assert_allclose(score, got.best.score, atol=1e-4)


@pytest.mark.parametrize("operator", ["add", "clamp"])
def test_the_file_of_the_best(llama: Tiny, tmp_path: Path, operator: str) -> None:
    got = tuned(llama, space=replace(SPACE, operators=(operator,)), kl_budget=50.0)
    assert got.best is not None
    setting, path = got.best.setting, tmp_path / "best.gguf"
    got.write_best(path)
    file, v = load(path), vector(llama)
    assert file.layers == list(setting.layers)
    factor = setting.coeff if operator == "add" else 1.0
    for layer in setting.layers:
        np.testing.assert_allclose(file[layer], factor * v[layer], rtol=1e-6)
    assert file.metadata["tuned_operator"] == operator
    # the command that is told uses the file as the setting used the vector
    coeff = 1.0 if operator == "add" else setting.coeff
    edits = Steering(file, operator, coeff).edits()
    kl = [
        float(k)
        for k in steering.mean_kl(llama.model, [llama.prompt(6)], [edits, setting.edits(v)])
    ]
    assert kl[0] == pytest.approx(kl[1], abs=1e-6) and kl[0] > 1e-3


def test_texts_of_a_setting_share_no_edit(llama: Tiny, monkeypatch: Any) -> None:
    """Or texts that begin alike could not resume from their unedited runs."""
    run, seen = Model.run, []

    def keeps(self: Model, requests: Any, **how: Any) -> Any:
        seen.extend(requests := list(requests))
        return run(self, requests, **how)

    monkeypatch.setattr(Model, "run", keeps)
    tuned(llama, space=Space(("add",), 1, widths=(1,), coeffs=(0.5, 1.0)))
    edits = [id(e) for r in seen for e in r.edits]
    assert len(edits) == len(set(edits)) == 3 * (4 + 2)  # the floor's and the settings'


# -- what is made large ------------------------------------------------------------------


def test_metrics_and_directions(llama: Tiny) -> None:
    m, p = llama.model, llama.prompt(6)
    logits = llama.oracle.run(p)["logits"][-1]
    cat, dog = (m.continuation(m.piece(p[-1]), t)[0] for t in (" cat", " dog"))
    small = {"space": Space(("add",), 1, widths=(1,), coeffs=(0.5,)), "kl_budget": 9.0}
    diff = tuned(llama, score=Answer(" cat", " dog"), **small)
    np.testing.assert_allclose(diff.unchanged, logits[cat] - logits[dog], atol=1e-3)
    assert diff.score_name == "logit-diff"
    less = tuned(llama, score=Answer(" cat", " dog", minimise=True), **small)
    assert less.unchanged == -diff.unchanged and less.trials[0].score == -diff.trials[0].score
    rank = tuned(llama, score=Answer(" cat", metric="rank"), **small)
    assert rank.unchanged == -(1 + (logits > logits[cat]).sum())
    assert rank.document()["plain"] == -rank.unchanged and "less is better" in rank.plain()
    own = tuned(llama, score=Answer(metric="own_functions:top_logit"), **small)
    np.testing.assert_allclose(own.unchanged, logits.max(), atol=1e-3)


def test_the_mean_over_prompts_with_their_own_answers(llama: Tiny, tmp_path: Path) -> None:
    m = llama.model
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "The cat", "answer": " dog"}\n{"prompt": "The"}\n')
    got = tuned(llama, prompt=load_prompts(file))
    wants = []
    for text, answer in (("The cat", " dog"), ("The", " cat")):
        ids = m.tokenize(text)
        more = m.continuation(m.piece(ids[-1]), answer)
        logp = log_softmax(llama.oracle.run([*ids, *more[:-1]])["logits"])[len(ids) - 1 :]
        wants.append(sum(logp[i, t] for i, t in enumerate(more)))
    np.testing.assert_allclose(got.unchanged, np.mean(wants), atol=1e-3)
    (tmp_path / "lines.txt").write_text("The cat\n\nThe\n")
    assert load_prompts(tmp_path / "lines.txt") == [Prompt("The cat"), Prompt("The")]
    for text, message in (("{}", "no text 'prompt'"), ("[1]", "no object"), ("[]", "is empty")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(FileError, match=message):
            load_prompts(tmp_path / "bad.json")


def test_the_probability_of_words(llama: Tiny, tmp_path: Path) -> None:
    m, p, n = llama.model, llama.prompt(6), 4
    (tmp_path / "w.txt").write_text("cat\nDog\n")
    words = Words(str(tmp_path / "w.txt"), n_predict=n, sampling=Sampling())
    got = tuned(llama, score=words)
    more = m.run([Request(p, logits=None, n_predict=n)])[0].tokens[:-1]
    tokens = sorted(
        {
            t
            for w in (" cat", " Cat", " dog", " Dog")
            if len(i := m.continuation(":", w)) == 1
            for t in i
        }
    )
    assert tokens
    t = next(t for t in got.trials if t.setting.operator == "add")
    for edits, score in (((), got.unchanged), (t.setting.edits(vector(llama)), t.score)):
        logits = expected(llama.oracle, Request([*p, *more], edits))["logits"][len(p) - 1 :]
        mass = np.log(np.exp(log_softmax(logits))[:, tokens].sum(1))
        assert len(mass) == n
        np.testing.assert_allclose(score, mass.mean(), atol=1e-3)


def test_the_share_of_words_in_sampled_texts(llama: Tiny, tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("the\ncat\n")
    words = Words(str(tmp_path / "w.txt"), samples=2, n_predict=6)
    got = tuned(llama, score=words, space=Space(("add",), 1, widths=(1,), coeffs=(0.5, 4.0)))
    from mia.measure.metrics import word_share

    p = llama.prompt(6)
    for t in got.trials:
        requests = [
            Request(
                p,
                t.setting.edits(vector(llama)),
                logits=None,
                n_predict=6,
                sampling=Sampling(1.0, seed=s),
            )
            for s in range(2)
        ]
        texts = [llama.model.text(r.tokens) for r in llama.model.run(requests)]
        assert t.score == pytest.approx(np.mean([word_share(x, {"the", "cat"}) for x in texts]))


# -- stopped, and gone on ----------------------------------------------------------------


def test_a_search_that_was_stopped_goes_on(llama: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    how: dict[str, Any] = {"runs": 20, "seed": 2}
    want = tuned(llama, record=whole, **how)
    run, calls = Trials._measured, [0]

    def dies(self: Trials, *words: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:  # the noise floor, the first round, then in the second
            raise KeyboardInterrupt
        return run(self, *words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trials, "_measured", dies)
        tuned(llama, record=cut, **how)
    assert 0 < len(cut.read_bytes()) < len(whole.read_bytes())
    cut.write_bytes(cut.read_bytes() + b'{"round": 1, "of')  # half a line
    measured: list[int] = []

    def counts(self: Trials, edits: Any, *rest: Any) -> Any:
        measured.append(len(edits))
        return run(self, edits, *rest)

    monkeypatch.setattr(Trials, "_measured", counts)
    got = tuned(llama, record=cut, **how)
    assert cut.read_bytes() == whole.read_bytes() and got.document() == want.document()
    assert sum(measured) == 4 + 14  # the floor, and what was not there
    again = tuned(llama, record=cut, **how)
    assert sum(measured) == 4 + 14 + 4 and again.document() == want.document()


def test_the_same_seed_gives_the_same_result(llama: Tiny, reopen: Any) -> None:
    one, two = (tuned(t, runs=20, seed=5) for t in (llama, reopen(llama)))
    assert one.document() == two.document()
    other = tuned(llama, runs=20, seed=6)
    assert [t.setting for t in other.trials] != [t.setting for t in one.trials]


@pytest.mark.parametrize(("old", "new"), [('"score": ', '"score": "x", "y": '), ('"kl"', '"l"')])
def test_a_record_whose_numbers_are_none(llama: Tiny, tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "r.jsonl"
    tuned(llama, record=path, runs=12)
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text(head + "".join(line.replace(old, new) for line in lines))
    with pytest.raises(FileError, match=r"the record has a line whose (score|kl) is no number"):
        tuned(llama, record=path, runs=12)


def test_the_record_of_another_search_is_refused(llama: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    tuned(llama, record=path, runs=12)
    before = path.read_bytes()
    for how, key in (
        ({"seed": 1}, "seed"),
        ({"kl_budget": 0.1}, "kl_budget"),
        ({"score": Answer(" dog")}, "score"),
    ):
        with pytest.raises(FileError, match=f"made with another {key}"):
            tuned(llama, record=path, **{"runs": 12, **how})
    assert path.read_bytes() == before
    assert json.loads(before.splitlines()[0])["record"] == "tune"


# -- what does not go well -----------------------------------------------------------------


def test_a_budget_that_nothing_meets(llama: Tiny, tmp_path: Path) -> None:
    got = tuned(llama, kl_budget=1e-9, space=replace(SPACE, operators=("add",)))
    assert got.failed and got.best is None and got.front == [] and got.hypervolume == 0
    assert "no setting that was tried stays within a KL of 1e-09: " in got.plain()
    with pytest.raises(UsageError, match="no setting that was tried stays within"):
        got.write_best(tmp_path / "best.gguf")
    with pytest.raises(UsageError, match="stays within"):
        got.steering()
    assert not list(tmp_path.iterdir())
    got.plot(tmp_path / "nothing.png")


def test_nothing_that_is_better(llama: Tiny) -> None:
    space = Space(("add",), 1, widths=(1,), coeffs=(1.0,))
    both = [
        tuned(llama, space=space, score=Answer(" cat", minimise=less), kl_budget=99.0)
        for less in (False, True)
    ]
    worse = next(t for t in both if t.failed)
    assert (
        "no setting that was tried within a KL of 99 is better than the plain model by"
        in worse.plain()
    )
    assert [t.failed for t in both].count(True) == 1


def test_numbers_that_are_not_finite_end_no_search(llama: Tiny, monkeypatch: Any) -> None:
    run = Model.run

    def breaks(self: Model, requests: Any, **how: Any) -> Any:
        requests = list(requests)
        if any(e.coeff == 2.0 for r in requests for e in r.edits):
            raise NotFiniteError("not finite")
        return run(self, requests, **how)

    monkeypatch.setattr(Model, "run", breaks)
    got = tuned(llama)
    broken = [t for t in got.trials if not t.finite]
    assert {t.setting.coeff for t in broken} == {2.0} and len(broken) < len(got.trials)
    assert all(math.isinf(t.kl) for t in broken) and got.front == [
        t for t in front(got.trials) if t.kl <= 0.2 and t.score > got.unchanged + got.score_floor
    ]
    assert f"{len(broken)} gave numbers that are not finite" in got.plain()
    assert json.loads(json.dumps(got.document(), allow_nan=False))["trials"]
    some = tuned(llama, runs=20)  # the search goes on with them
    assert len(some.trials) == 20 and any(not t.finite for t in some.trials)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kl_budget": 0}, "budget of 0 is not positive"),
        ({"runs": 0}, "0 runs; at least 1"),
        ({"space": Space(("scale",))}, "unknown operator 'scale'; known: replace, add,"),
        ({"space": Space(widths=(9,))}, "no 9 consecutive layers"),
        ({"space": Space(widths=(0,))}, "width of 0 layers"),
        ({"space": Space(coeffs=())}, "needs an operator, a width and a coefficient"),
        ({"score": Answer(" cat", metric="kl")}, "kl is what a change costs"),
        ({"score": Answer(metric="logprob")}, "needs an answer"),
        ({"score": Answer(" cat", metric="hello")}, "unknown metric 'hello'"),
        ({"neutral": Neutral(tokens=1)}, "needs two tokens"),
        ({"prompt": []}, "the prompt is empty"),
    ],
)
def test_what_cannot_be_searched(llama: Tiny, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tuned(llama, **how)


# -- as it is shown ------------------------------------------------------------------------


def test_text_rows_and_picture(llama: Tiny, tmp_path: Path) -> None:
    got = tuned(llama)
    lines = got.plain().splitlines()
    assert lines[0].startswith("logprob (nats): plain -")
    assert lines[1].split() == ["setting", "score", "change", "KL"]
    assert str(got.front[0].setting) in lines[2] and lines[1 + len(got.front)].endswith("best")
    assert "hypervolume" in lines[-2] and lines[-1].startswith("noise floor: score ")
    rows = got.rows()
    assert len(rows) == len(got.trials) and sum(r["best"] for r in rows) == 1
    assert sum(r["front"] for r in rows) == len(got.front)
    assert {r["coeff"] for r in rows if r["operator"] == "project_out"} == {None}
    got.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000
    assert "best" in got._repr_html_()
