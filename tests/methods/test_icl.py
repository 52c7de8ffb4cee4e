"""In-context tasks: prompts, means, effects and right answers, against the oracle."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from letters import FORMAT, NEXT, SETUP, TASK, probability
from reference import TOLERANCE
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.datasets.tasks import Format, Pair, Task
from mia.edits import Edit
from mia.errors import RangeError, UsageError
from mia.methods.icl import AnswerScores, IclExperiment, IclPrompt, TaskSetup, best_of, experiment
from mia.model import Model
from mia.request import Request


def test_an_experiment_is_made_from_a_name_a_file_or_a_task(llama: Tiny, tmp_path: Path) -> None:
    (tmp_path / "next.json").write_text(json.dumps(NEXT))
    of_task, of_file = (experiment(llama.model, t, SETUP) for t in (TASK, tmp_path / "next.json"))
    assert of_task.facts == of_file.facts and of_task.test == of_file.test
    assert of_task.facts == {
        "task": "next",
        "format": FORMAT.text,
        "shots": 2,
        "bos": True,
        "seed": 0,
        "pairs": {"train": 16, "dev": 4, "test": 6},
    }
    shipped = experiment(llama.model, "antonym", TaskSetup(n_test=7), shots=3)
    assert (shipped.shots, len(shipped.test), shipped.format.text[:2]) == (3, 7, "Q:")
    assert IclExperiment(llama.model, TASK, TaskSetup(n_test=2)).shots == 5
    with pytest.raises(UsageError, match="unknown format 'x'"):
        experiment(llama.model, TASK, TaskSetup(format="x"))
    with pytest.raises(RangeError, match="too few for a prompt of 30 examples"):
        experiment(llama.model, TASK, TaskSetup(shots=30))


def test_known_pairs_are_found_once_and_stay_under_another_seed(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def known(self: IclExperiment) -> Task:
        calls.append(self.seed)
        return replace(self.task, pairs=self.task.pairs[:12], known_of=26)

    monkeypatch.setattr(IclExperiment, "known", known)
    ex = experiment(llama.model, TASK, replace(SETUP, known=True, seed=3))
    other = ex.with_seed(4)
    assert calls == [3]
    assert {*other.train, *other.dev, *other.test} == set(TASK.pairs[:12])
    assert other.facts["known_of"] == 26 and other.seed == 4
    assert other.test != ex.test


def test_the_best_variant_is_the_most_accurate_then_the_most_probable() -> None:
    correct = np.array([[1, 0], [1, 1], [1, 1], [0, 0]], bool)
    logprob = np.array([[0, 0], [-2, -3], [-2, -1], [0, 0]], float)
    assert best_of(AnswerScores(correct, logprob)) == 2


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
    bare = IclExperiment(ex.model, TASK, replace(SETUP, bos=False))
    assert ex.model.detokenize(bare.zero_shot(bare.test)[0].tokens) == f"{bare.test[0].input}:"


def test_a_space_that_is_a_token_goes_to_the_prompt(ex: IclExperiment) -> None:
    """No answer is right for beginning with a space."""
    spaced = IclExperiment(ex.model, TASK, replace(SETUP, format="{input}: {output};"))
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
            ex = IclExperiment(m, task, TaskSetup(format=form, shots=1))
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

    def scores(self: IclExperiment, prompts: list[IclPrompt]) -> AnswerScores:
        asked.extend(prompts)
        sets = np.repeat(np.arange(4), len(TASK.pairs))
        right = [s < knows.get(p.query.input, 0) for s, p in zip(sets, prompts, strict=True)]
        return AnswerScores(np.array([right]), np.zeros((1, len(right))))

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
    again = ex.with_seed(1)
    assert again.dummies(5) != first


def test_means_agree_with_the_oracle(case: Tiny) -> None:
    ex = IclExperiment(case.model, TASK, TaskSetup(format=FORMAT, shots=2))
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
    ex = IclExperiment(m, TASK, TaskSetup(format=FORMAT, shots=2))
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
            changes.append(probability(patched, p.answers) - probability(plain, p.answers))
        assert effects[layer, head] == pytest.approx(np.mean(changes), abs=TOLERANCE)


def test_means_are_over_prompts_that_are_answered_right(ex: IclExperiment) -> None:
    prompts = ex.dummies(5)
    rows, _ = ex.rows("head_out", prompts)
    said = [int(logits(ex.model.run([Request(p.tokens)])[0])[0].argmax()) for p in prompts]
    answers = [(said[0],), (said[1] + 1,), (said[2], 5), (said[3] + 1,), (said[4] + 1,)]
    asked = [replace(p, answers=a) for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(ex.means("head_out", asked), rows[[0, 2]].mean(0), atol=1e-6)
    np.testing.assert_allclose(ex.means("head_out", asked[3:]), rows[3:].mean(0), atol=1e-6)


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
        ex.accuracy([p], match="all")  # type: ignore[arg-type]
