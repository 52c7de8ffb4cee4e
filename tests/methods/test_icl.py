"""Task, function and soft vectors: means, effects and blended runs against the oracle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import TOLERANCE
from tiny import Tiny
from tiny_gguf import write_tiny

from mia import vectors
from mia.datasets.tasks import Format, Pair, Task, load
from mia.edits import Edit
from mia.errors import FileError, MiaError, RangeError, UsageError
from mia.methods import function_vectors as fv
from mia.methods import optimisers
from mia.methods import soft_vectors as sv
from mia.methods import task_vectors as tv
from mia.methods.icl import IclExperiment, IclPrompt, Scores
from mia.model import Model
from mia.request import Request
from mia.sites import Site

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASK = Task("next", tuple(Pair(a, (b,)) for a, b in zip(LETTERS, LETTERS[1:] + "a", strict=True)))
FORMAT = Format("{input}:{output};")


@pytest.fixture
def ex(llama: Tiny) -> IclExperiment:
    return IclExperiment(llama.model, TASK, fmt=FORMAT, shots=2, n_test=6, n_dev=4)


def _probability(logits: np.ndarray, answers: tuple[int, ...]) -> float:
    p = np.exp(logits - logits.max())
    return float(p[list(answers)].sum() / p.sum())


# -- prompts -----------------------------------------------------------------------


def test_no_query_is_among_its_examples(ex: IclExperiment) -> None:
    assert len(ex.train) == 16
    training = set(ex.train)
    for prompts in (ex.few_shot(ex.test), ex.dummies(40), ex.few_shot(ex.dev, wrong=True)):
        for p in prompts:
            assert p.query.input not in {e.input for e in p.examples}
            assert {e.input for e in p.examples} <= {e.input for e in training}
    assert {p.query for p in ex.dummies(40)} == training
    assert not {p.query for p in ex.few_shot(ex.test)} & training
    fixed = ex.same_examples(ex.train[:2], 50, "x")
    assert sorted(p.query.input for p in fixed) == sorted(p.input for p in ex.train[2:])


def test_prompts_are_text_with_a_bos_in_front(ex: IclExperiment) -> None:
    p = ex.few_shot(ex.test)[0]
    text = FORMAT.prompt(p.examples, p.query.input)
    assert ex.model.detokenize(p.tokens) == "<|endoftext|>" + text
    assert ex.model.piece(p.answers[0]) == p.query.output
    wrong = ex.few_shot(ex.test, wrong=True)[0]
    truth = {a.input: a.output for a in TASK.pairs}
    assert all(truth[e.input] != e.output for e in wrong.examples)
    bare = IclExperiment(ex.model, TASK, fmt=FORMAT, bos=False)
    assert ex.model.detokenize(bare.zero_shot(bare.test)[0].tokens) == f"{bare.test[0].input}:"


def test_a_space_that_is_a_token_goes_to_the_prompt(ex: IclExperiment) -> None:
    """No answer is right for beginning with a space."""
    spaced = IclExperiment(ex.model, TASK, fmt=Format("{input}: {output};"), shots=2)
    p = spaced.zero_shot(spaced.test)[0]
    assert ex.model.detokenize(p.tokens) == f"<|endoftext|>{p.query.input}: "
    assert [ex.model.piece(t) for t in p.answers] == [p.query.output]


def test_answers_are_tokens_as_they_follow_the_query(tmp_path: Path) -> None:
    """A SentencePiece vocabulary would put a space in front of an answer read alone."""
    words = ["cat", "dog", "Paris", "France", "Rome", "Italy"]
    task = Task(
        "x", tuple(Pair(a, (b,)) for a, b in zip(words, words[1:] + words[:1], strict=True))
    )
    with Model(write_tiny(tmp_path / "spm.gguf", "llama", spm=True), threads=1) as m:
        for text in ("Q: {input}\nA: {output}\n\n", "{input}:{output}\n"):
            form = Format(text)
            ex = IclExperiment(m, task, fmt=form, shots=1)
            for pair in task.pairs:
                p = ex.prompt(task.pairs[:1], pair)
                whole = form.prompt(task.pairs[:1], pair.input) + form.answer(pair.output)
                assert (*p.tokens, *p.answers) == tuple(m.tokenize(whole, bos=True))
        assert m.piece(m.token_id(" Paris")) == " Paris"
        assert m.token_id(" Paris") == m.token_id("Paris")  # alone it gets that space


def test_known_pairs_are_those_answered_after_half_of_the_sets(
    ex: IclExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[IclPrompt] = []
    knows = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 4, "g": 2}  # sets that answer it

    def scores(self: IclExperiment, prompts: list[IclPrompt]) -> Scores:
        asked.extend(prompts)
        sets = np.repeat(np.arange(4), len(TASK.pairs))
        right = [s < knows.get(p.query.input, 0) for s, p in zip(sets, prompts, strict=True)]
        return Scores(np.array([right]), np.zeros((1, len(right))))

    monkeypatch.setattr(IclExperiment, "scores", scores)
    known = ex.known(4)
    assert [p.input for p in known.pairs] == ["c", "d", "e", "f", "g"]
    assert (known.name, known.known_of) == ("next", 26)
    assert all(p.query not in p.examples for p in asked)
    for n in range(4):
        of_set = asked[26 * n : 26 * (n + 1)]
        assert [p.query for p in of_set] == list(TASK.pairs)
        assert len({p.examples for p in of_set}) == 3  # one, and one for each query in it
    assert len({p.examples for p in asked}) == 12
    monkeypatch.setitem(knows, "g", 1)
    with pytest.raises(UsageError, match="next: after examples the model answers 4 of 26 pairs"):
        ex.known(4)


def test_steps_do_not_depend_on_one_another(ex: IclExperiment) -> None:
    first = ex.dummies(5)
    ex.few_shot(ex.test)
    assert ex.dummies(5) == first
    again = IclExperiment(ex.model, TASK, fmt=FORMAT, shots=2, seed=1, n_test=6, n_dev=4)
    assert again.dummies(5) != first


# -- means, effects, blends --------------------------------------------------------


def test_means_agree_with_the_oracle(case: Tiny) -> None:
    ex = IclExperiment(case.model, TASK, fmt=FORMAT, shots=2)
    prompts = ex.dummies(6)
    runs = [case.oracle.run(p.tokens) for p in prompts]
    for site in ("head_out", "resid_post"):
        truth = [
            np.mean([r[f"{site}.{i}"][-1] for r in runs], 0) for i in range(case.model.n_layer)
        ]
        np.testing.assert_allclose(ex.means(site, prompts), truth, atol=TOLERANCE)
    two = ex.means("resid_post", prompts[:1], tokens=[0, 2])
    np.testing.assert_allclose(two[1], runs[0]["resid_post.1"][[0, 2]].mean(0), atol=TOLERANCE)


def test_effects_agree_with_the_oracle(case: Tiny) -> None:
    m = case.model
    ex = IclExperiment(m, TASK, fmt=FORMAT, shots=2)
    prompts = ex.few_shot(ex.train[:3], wrong=True)
    means = np.random.default_rng(5).standard_normal((m.n_layer, m.n_head, m.head_dim))
    effects = ex.effects(prompts, means.astype(np.float32).reshape(m.n_layer, -1))
    assert effects.shape == (m.n_layer, m.n_head)
    for layer, head in ((0, 0), (1, m.n_head - 1), (m.n_layer - 1, 1)):
        changes = []
        for p in prompts:

            def put(x: np.ndarray, layer: int = layer, head: int = head) -> np.ndarray:
                x[-1, head * m.head_dim : (head + 1) * m.head_dim] = means[layer, head]
                return x

            plain, patched = (
                case.oracle.run(p.tokens, e)["logits"][-1] for e in ({}, {f"head_out.{layer}": put})
            )
            changes.append(_probability(patched, p.answers) - _probability(plain, p.answers))
        assert effects[layer, head] == pytest.approx(np.mean(changes), abs=TOLERANCE)


def test_blended_runs_agree_with_the_oracle(case: Tiny) -> None:
    m = case.model
    ex = IclExperiment(m, TASK, fmt=FORMAT, shots=2)
    rng = np.random.default_rng(6)
    means = rng.standard_normal((m.n_layer, m.n_head, m.head_dim)).astype(np.float32)
    weights = rng.random((m.n_layer, m.n_head))
    weights[1] = 0  # a layer that is left alone
    prompts = ex.zero_shot(ex.test[:3])
    edits = sv.blend_edits(means, weights)
    assert [e.site for e in edits] == [Site("head_out", i) for i in range(m.n_layer) if i != 1]
    found = ex.scores(prompts, [edits]).logprob[0]

    def blend(layer: int) -> Any:
        w = weights[layer].repeat(m.head_dim)

        def apply(x: np.ndarray) -> np.ndarray:
            x[-1] = x[-1] * (1 - w) + means[layer].ravel() * w
            return x

        return apply

    for p, logprob in zip(prompts, found, strict=True):
        changes = {f"head_out.{i}": blend(i) for i in range(m.n_layer)}
        truth = case.oracle.run(p.tokens, changes)["logits"][-1]
        assert np.exp(logprob) == pytest.approx(_probability(truth, p.answers), abs=TOLERANCE)


def test_several_coefficients_stand_for_equal_parts_of_the_row() -> None:
    rows = np.ones((1, 6), np.float32)
    at = np.zeros(1, np.intp)
    Edit("head_out.0", "blend", np.full(6, 3), coeff=[0, 1, 0.5]).apply(rows, at, at)
    np.testing.assert_array_equal(rows, [[1, 1, 3, 3, 2, 2]])
    Edit("head_out.0", "scale", coeff=np.array([2, 0])).apply(rows, at, at)
    np.testing.assert_array_equal(rows, [[2, 2, 6, 0, 0, 0]])
    Edit("resid_post.0", "add", np.ones(2), dims=[0, 5], coeff=[1, -1]).apply(rows, at, at)
    np.testing.assert_array_equal(rows, [[3, 2, 6, 0, 0, -1]])
    with pytest.raises(UsageError, match="rows of 6 here, which 4 coefficients do not divide"):
        Edit("mlp_out.0", "scale", coeff=[1, 2, 3, 4]).check(Site("mlp_out", 0), (6,), 1)
    with pytest.raises(UsageError, match="'clamp' takes one coefficient"):
        Edit("mlp_out.0", "clamp", np.ones(6), coeff=[1, 2])
    with pytest.raises(UsageError, match="not a finite number"):
        Edit("mlp_out.0", "scale", coeff=[1, np.nan])


def test_all_heads_through_w_o_are_what_attention_adds(llama: Tiny) -> None:
    m = llama.model
    ex = IclExperiment(m, TASK, fmt=FORMAT, shots=2)
    prompts = ex.dummies(4)
    means = ex.means("head_out", prompts).reshape(m.n_layer, m.n_head, -1)
    every = [(1, h) for h in range(m.n_head)]
    truth = np.mean([llama.oracle.run(p.tokens)["attn_out.1"][-1] for p in prompts], 0)
    np.testing.assert_allclose(fv.head_vector(m, means, every), truth, atol=TOLERANCE)
    parts = [fv.head_vector(m, means, [h]) for h in every]
    np.testing.assert_allclose(np.sum(parts, 0), truth, atol=TOLERANCE)


# -- task vectors ------------------------------------------------------------------


def test_a_task_vector_is_the_mean_residual_of_right_dummies(ex: IclExperiment) -> None:
    theta = tv.extract(ex, sets=3, dummies=4)
    assert theta.vector.layers == list(range(ex.model.n_layer))
    assert theta.dev.shape == (ex.model.n_layer,) and theta.dev_by_set.shape == (3,)
    assert theta.dev[theta.layer] == theta.dev_by_set.max() or len(theta.sets) > 1
    each = tv._thetas(ex, 3, 4)
    used = each[list(theta.sets)].mean(0)
    for i in theta.vector.layers:
        np.testing.assert_allclose(theta.vector[i], used[i], rtol=1e-6)
    again = tv.extract(ex, sets=3, dummies=4)
    np.testing.assert_array_equal(again.vector[theta.layer], theta.vector[theta.layer])
    with pytest.raises(RangeError, match="layer 3 is out of range"):
        tv.extract(ex, layers=[3])


def test_only_right_dummies_count(ex: IclExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 1, 2)
    right = np.array([False, True, True, False, False, False])
    monkeypatch.setattr(ex, "rows", lambda *_: (rows, right))
    np.testing.assert_array_equal(tv._thetas(ex, 2, 3)[:, 0], [[3, 4], [8, 9]])


def test_evaluation_counts_what_the_runs_say(ex: IclExperiment) -> None:
    theta = tv.extract(ex, sets=2, dummies=3)
    e = tv.evaluate(ex, theta, by_layer=True)
    zero = ex.zero_shot(ex.test)
    assert e.zero_shot == ex.accuracy(zero)
    assert e.vector == e.by_layer[theta.layer] == ex.accuracy(zero, theta.edits())
    assert e.icl == ex.accuracy(ex.few_shot(ex.test))
    exact = tv.evaluate(ex, theta, match="exact")
    assert exact.vector.correct <= e.vector.correct


def test_exact_answers_are_generated_under_the_edit(ex: IclExperiment) -> None:
    """An edit of the logits makes each prompt say its answer, and what follows ends it."""
    end = ex.model.tokenize(";", bos=False)[0]
    p = ex.zero_shot(ex.test)[0]
    say = np.full(ex.model.n_vocab, -50, np.float32)
    say[p.answers[0]] = 50
    stop = np.full(ex.model.n_vocab, -50, np.float32)
    stop[end] = 50
    edits = [
        Edit("logits", "replace", say, tokens=-1),
        Edit("logits", "replace", stop, tokens=[], generated=True),
    ]
    assert ex.accuracy([p], edits, match="exact").correct == 1
    assert ex.accuracy([p], edits[1:], match="exact").correct == 0
    with pytest.raises(UsageError, match="unknown match 'all'; known: first, exact"):
        ex.accuracy([p], match="all")


def test_conflict_asks_what_both_tasks_know(ex: IclExperiment) -> None:
    other = Task(
        "before", tuple(Pair(b, (a,)) for a, b in zip(LETTERS, LETTERS[1:] + "a", strict=True))
    )
    source = IclExperiment(ex.model, other, fmt=FORMAT, shots=2)
    theta = tv.extract(source, sets=1, dummies=2)
    c = tv.conflict(ex, theta, source)
    used = {p.input for p in (*source.train, *source.dev)}
    asked = [q for q in (*ex.test, *ex.dev) if q.input not in used]
    assert c.shown.n == c.put.n == len(asked) > 2
    assert c.shown_plain == ex.accuracy(ex.few_shot(asked, what="conflict"))
    with pytest.raises(UsageError, match="next and next have no inputs in common"):
        tv.conflict(ex, theta, ex)  # the same answers


def test_pooled_test_parts_count_a_query_once(ex: IclExperiment) -> None:
    theta = tv.extract(ex, sets=1, dummies=2)
    one = tv.evaluate(ex, theta, by_layer=True)
    both = tv.pool([one, one])
    assert (both.icl.n, both.icl.distinct) == (12, 6)
    assert both.vector.correct == 2 * one.vector.correct and both.icl.interval == one.icl.interval
    assert both.by_layer[0].document()["distinct"] == 6
    other = replace(one, asked=frozenset("uvwxyz"))
    assert one.asked.isdisjoint("xy") or tv.pool([one, other]).icl.distinct < 12


# -- function vectors --------------------------------------------------------------


def test_top_heads_come_in_order() -> None:
    effects = np.array([[0.1, 0.5], [0.5, -1.0], [0.3, 0.2]])
    assert fv.top_heads(effects, 4) == ((0, 1), (1, 0), (2, 0), (2, 1))
    with pytest.raises(RangeError, match="7 heads are asked for; the model has 6"):
        fv.top_heads(effects, 7)


def test_extraction_is_its_steps(ex: IclExperiment) -> None:
    made = fv.extract(ex, prompts=4, effect_prompts=2, counts=[2, 3])
    assert made.heads == fv.top_heads(made.effects, len(made.heads)) and len(made.heads) in (2, 3)
    np.testing.assert_array_equal(made.vector, fv.head_vector(ex.model, made.means, made.heads))
    zero = ex.zero_shot(ex.dev)
    assert made.dev[made.layer] == ex.accuracy(zero, made.edits()).value == made.dev.max()
    e = fv.evaluate(ex, made.vector, made.layer, by_layer=True)
    assert e.by_layer[made.layer] == (e.zero_shot_vector, e.wrong_vector)
    assert e.wrong == ex.accuracy(ex.few_shot(ex.test, wrong=True))


def test_decoding_with_and_without_the_final_norm(llama: Tiny) -> None:
    v = llama.vector()
    table = llama.oracle.weights["output.weight"]
    found = fv.decode(llama.model, v, 5)
    raw = np.argsort(-(table @ v))[:5].tolist()
    weighted = np.argsort(-(table @ (v * llama.oracle.weights["output_norm.weight"])))[:5].tolist()
    assert [t["id"] for t in found["raw"]] == raw != weighted
    assert [t["id"] for t in found["norm"]] == weighted


def test_a_vector_composed_of_one_task_is_that_task(ex: IclExperiment) -> None:
    known = {"next": fv.head_statistics(ex, prompts=3, effect_prompts=2)}
    made = fv.compose(ex, ex, ex, ex, n_heads=3, known=known)
    np.testing.assert_allclose(made.vector, made.direct.vector, atol=1e-5)
    assert made.cosine == pytest.approx(1) and made.evaluation == made.direct_evaluation


def test_means_are_over_prompts_that_are_answered_right(ex: IclExperiment) -> None:
    prompts = ex.dummies(5)
    rows, _ = ex.rows("head_out", prompts)
    said = [int(ex.model.run([Request(p.tokens)])[0].logits[0].argmax()) for p in prompts]
    answers = [(said[0],), (said[1] + 1,), (said[2], 5), (said[3] + 1,), (said[4] + 1,)]
    asked = [replace(p, answers=a) for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(ex.means("head_out", asked), rows[[0, 2]].mean(0), atol=1e-6)
    np.testing.assert_allclose(ex.means("head_out", asked[3:]), rows[3:].mean(0), atol=1e-6)


# -- soft vectors ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reinforce", "es", "cma"])
def test_optimisers_climb(name: str) -> None:
    """Weights near a target of ones and zeros pay most."""
    if name == "cma":
        pytest.importorskip("cma")
    rng = np.random.default_rng(7)
    target = (rng.random(20) < 0.5).astype(float)
    made = sv.OPTIMISERS[name](np.full(20, 0.5), np.random.default_rng(0), population=24)
    for _ in range(60):
        asked = made.ask()
        assert asked.shape == (24, 20) and (asked >= 0).all() and (asked <= 1).all()
        made.tell(-((asked - target) ** 2).sum(1))
    assert ((made.current()[0] > 0.5) == (target > 0.5)).all()


def test_equal_rewards_have_equal_ranks() -> None:
    ranks = optimisers._ranked(np.array([2.0, 1.0, 2.0, 5.0]))
    assert ranks[0] == ranks[2] and ranks[1] < ranks[0] < ranks[3]
    assert abs(ranks.mean()) < 1e-12 and not optimisers._ranked(np.ones(4)).any()


def test_training_keeps_within_its_evaluations_and_repeats_itself(ex: IclExperiment) -> None:
    how = sv.Training(evaluations=90, population=8, batch=4, every=2, prompts=4, patience=50)
    done, again = sv.train(ex, how), sv.train(ex, how)
    assert done.evaluations <= 90 and done.curve == again.curve
    np.testing.assert_array_equal(done.soft.weights, again.soft.weights)
    assert done.curve[-1].evaluations == done.evaluations
    assert done.dev == ex.accuracy(ex.zero_shot(ex.dev), done.soft.edits()).value
    assert done.dev >= max(s.dev for s in done.curve if s.dev is not None)
    with pytest.raises(UsageError, match="unknown optimiser 'sgd'; known: reinforce, es, cma"):
        sv.Training("sgd")


def test_training_starts_from_the_best_run_of_layers(
    ex: IclExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = ex.model
    wanted = np.zeros((m.n_layer, m.n_head))
    wanted[1:2] = 0.75
    asked: list[int] = []

    def rewards(_: Any, means: np.ndarray, prompts: Any, candidates: np.ndarray) -> np.ndarray:
        asked.append(len(candidates))
        return -((candidates - wanted.ravel()) ** 2).sum(1)

    monkeypatch.setattr(sv, "_rewards", rewards)
    means = np.zeros((m.n_layer, m.n_head, m.head_dim), np.float32)
    for most, rounds in ((2000, 4), (30, 2), (9, 1)):
        asked.clear()
        start, spent = sv._best_start(
            ex, means, ex.zero_shot(ex.train), sv.Training(evaluations=most), ex.rng("x")
        )
        assert spent == sum(asked) <= most and len(asked) == rounds
        if most > 9:
            np.testing.assert_array_equal(start.reshape(wanted.shape), wanted)


def test_soft_vectors_survive_a_file(ex: IclExperiment, tmp_path: Path) -> None:
    m = ex.model
    rng = np.random.default_rng(8)
    means = rng.standard_normal((m.n_layer, m.n_head, m.head_dim)).astype(np.float32)
    soft = sv.SoftVector(means, np.round(rng.random((m.n_layer, m.n_head)), 3), {"name": "x"})
    soft.save(tmp_path / "s.safetensors")
    back = sv.load(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(back.means, means)
    np.testing.assert_allclose(back.weights, soft.weights, atol=1e-7)
    assert back.metadata["name"] == "x"
    sv.check(back, m)
    with pytest.raises(UsageError, match="is for 2 layers of"):
        sv.check(sv.SoftVector(means[:2], soft.weights[:2]), m)
    vectors.Vector({0: means[0, 0]}).save(tmp_path / "v.safetensors")
    with pytest.raises(FileError, match="is not a soft vector"):
        sv.load(tmp_path / "v.safetensors")


def test_sparse_weights_are_the_largest_that_are_enough(
    ex: IclExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.linspace(0.1, 0.9, ex.model.n_layer * ex.model.n_head)
    means = np.zeros((ex.model.n_layer, ex.model.n_head, ex.model.head_dim), np.float32)
    soft = sv.SoftVector(means, weights.reshape(means.shape[:2]))

    def scores(prompts: list[IclPrompt], variants: list[list[Edit]]) -> Any:
        """Right as soon as three heads are blended."""
        active = [sum(int((np.asarray(e.coeff) > 0).sum()) for e in v) for v in variants]
        correct = np.repeat([[n >= 3] for n in active], len(prompts), 1)
        return type("Scores", (), {"correct": correct})

    monkeypatch.setattr(ex, "scores", scores)
    few = sv.sparsify(ex, soft)
    assert few.n_active == 3
    np.testing.assert_array_equal(few.weights.ravel()[-3:], weights[-3:])
    with pytest.raises(RangeError, match=r"keep 1\.5 is not in"):
        sv.sparsify(ex, soft, keep=1.5)


# -- the real model ----------------------------------------------------------------


@pytest.mark.slow
def test_vectors_do_on_smollm2_what_examples_do() -> None:
    try:
        model = Model("smollm2")
    except MiaError as err:
        pytest.skip(str(err))
    with model:
        ex = IclExperiment(model, load("present_past"), n_test=24, n_dev=12)
        theta = tv.extract(ex, sets=2, dummies=4, layers=range(16, 24))
        e = tv.evaluate(ex, theta)
        assert e.zero_shot.value <= 0.25 and e.vector.value >= 0.6
        made = fv.extract(ex, prompts=8, effect_prompts=1, counts=[40], layers=range(8, 20))
        added = fv.evaluate(ex, made.vector, made.layer)
        assert added.zero_shot_vector.value > added.zero_shot.value
