"""Head scores: by their definitions on patterns drawn by hand, and on models."""

import numpy as np
import pytest
from one_prompt import Function, log_prob, patterns, without_head
from tiny import Tiny

from mia.errors import RangeError, UsageError
from mia.methods.changes import Changes
from mia.methods.head_ablation import head_edits
from mia.methods.heads import (
    RandomRepeats,
    copy_control,
    copy_loss,
    head_scores,
    heads,
    repeated_random,
    score_pattern,
)
from mia.model import Model
from mia.ranges import Head, every_head


def _looks_at(keys: list[int]) -> np.ndarray:
    """One head, (n, n): query i looks at keys[i] alone."""
    return np.eye(len(keys), dtype=np.float32)[keys]


def test_previous_token_head() -> None:
    scores = score_pattern(_looks_at([0, 0, 1, 2, 3, 4]), [5, 6, 7, 5, 6, 7])
    assert scores["previous"] == 1 and scores["duplicate"] == 0
    # query 3 looks at 2, and after the earlier 5 comes 1; nowhere else do they meet
    assert scores["induction"] == 0 and scores["entropy"] == 0


def test_duplicate_and_induction_heads() -> None:
    tokens = [9, 5, 6, 7, 5, 6, 7]  # 9 stands for a BOS
    duplicate = score_pattern(_looks_at([0, 0, 0, 0, 1, 2, 3]), tokens)
    names = ("duplicate", "induction", "previous")
    assert [float(duplicate[name]) for name in names] == [1, 0, pytest.approx(1 / 6)]
    induction = score_pattern(_looks_at([0, 0, 0, 0, 2, 3, 4]), tokens)
    assert [float(induction[name]) for name in names[:2]] == [0, 1]


def test_every_earlier_occurrence_counts_but_not_the_query_itself() -> None:
    tokens = [5, 6, 5, 5]
    weights = np.asarray(
        [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]], np.float32
    )
    scores = score_pattern(weights, tokens)
    # 2 was before at 0, 3 at 0 and 2
    assert scores["duplicate"] == pytest.approx((0.2 + 0.1 + 0.3) / 2)
    # behind them: 1 for query 2; 1 for query 3, where key 3 is the query
    assert scores["induction"] == pytest.approx((0.3 + 0.2) / 2)
    assert scores["previous"] == pytest.approx((0.5 + 0.3 + 0.3) / 3)
    rows = [[0.5, 0.5], [0.2, 0.3, 0.5], [0.1, 0.2, 0.3, 0.4]]
    entropy = [-sum(p * np.log(p) for p in row) for row in rows]
    assert scores["entropy"] == pytest.approx(np.mean(entropy))


def test_what_cannot_be_scored_is_nan() -> None:
    scores = score_pattern(np.tri(3, dtype=np.float32)[None] / np.float32(3), [5, 6, 7])
    assert np.isnan(scores["duplicate"]).all() and np.isnan(scores["induction"]).all()
    assert np.isnan(score_pattern(np.ones((2, 1, 1), np.float32), [5])["previous"]).all()


def test_scores_of_models_are_those_of_the_oracles_patterns(case: Tiny) -> None:
    prompts = [[*case.prompt(6, seed=s), *case.prompt(6, seed=s)] for s in (1, 2)]
    scores = head_scores(case.model, prompts)
    expected = [score_pattern(patterns(case.oracle, p), p) for p in prompts]
    for name in ("previous", "duplicate", "induction", "entropy"):
        both = np.stack([s[name] for s in expected])  # (n_prompts, n_layer, n_head)
        assert np.abs(scores[name] - both.mean(0)).max() < 1e-4
        assert np.abs(scores.spread[name] - both.std(0)).max() < 1e-4
    (best,) = scores.top("induction", 1)
    assert scores.induction[best] == scores.induction.max()
    with pytest.raises(UsageError, match="unknown score 'copying'; known: previous, duplicate"):
        scores.top("copying", 1)


def test_random_tokens_come_twice_and_differ(llama: Tiny) -> None:
    tokens = repeated_random(llama.model, 25, rng=np.random.default_rng(0))
    assert len(tokens) == 51 and tokens[0] == llama.model.bos_token
    assert tokens[1:26] == tokens[26:] and len(set(tokens[1:26])) == 25
    assert not {0, 1, 2} & set(tokens[1:])  # control tokens
    assert len(repeated_random(llama.model, 4, rng=np.random.default_rng(0), bos=False)) == 8
    with pytest.raises(RangeError, match="1 random tokens cannot be repeated"):
        repeated_random(llama.model, 1, rng=np.random.default_rng(0))
    with pytest.raises(RangeError, match="100000 random tokens are more than the vocabulary's"):
        repeated_random(llama.model, 100000, rng=np.random.default_rng(0))


def test_copy_loss_is_the_oracles_mean_over_the_second_copy(case: Tiny) -> None:
    prompts = [repeated_random(case.model, 5, rng=np.random.default_rng(s)) for s in (0, 1)]
    loss = copy_loss(case.model, prompts, [[], head_edits(case.model, [Head(1, 0)])])
    for v, edits in enumerate(({}, {"head_out.1": without_head(case.oracle, 0)})):
        for i, p in enumerate(prompts):
            assert abs(loss[v, i] - _copy_loss(case, p, edits)) < 1e-4


def _copy_loss(t: Tiny, prompt: list[int], edits: dict[str, Function]) -> float:
    """Of a BOS and five tokens, repeated."""
    logits = t.oracle.run(prompt, edits)["logits"]
    return -float(np.mean([log_prob(logits[q], prompt[q + 1]) for q in range(6, 10)]))


# -- the report -------------------------------------------------------------------------


def test_the_copy_control_is_the_loss_without_heads(llama: Tiny) -> None:
    """Head by head against the oracle: nothing, the best, and others drawn by the generator."""
    o, m = llama.oracle, llama.model
    prompts = [repeated_random(m, 5, rng=np.random.default_rng(s)) for s in (0, 1)]
    scores = head_scores(m, prompts)
    rng = np.random.default_rng(7)
    copying = copy_control(m, prompts, scores, 1, draws=2, rng=rng)
    best = scores.top("induction", 1)
    others = [h for h in every_head(m.n_layer, m.n_head) if h not in best]
    again = np.random.default_rng(7)
    drawn = [[others[int(again.choice(len(others), 1, replace=False)[0])]] for _ in range(2)]
    assert copying.heads == [[], best, *drawn]
    for ablated, loss in zip(copying.heads, copying.loss, strict=True):
        edits = {f"head_out.{h.layer}": without_head(o, h.head) for h in ablated}
        assert abs(loss - np.mean([_copy_loss(llama, p, edits) for p in prompts])) < 1e-4
    document = copying.document()
    assert document["loss"][1]["heads"] == [best[0].document()]
    assert document["loss"][1]["factor"] == round(float(copying.loss[1] / copying.loss[0]), 6)
    with pytest.raises(UsageError, match="18 heads cannot be compared with 18 others"):
        copy_control(m, prompts, scores, 18, rng=rng)


def test_a_report_on_random_tokens_is_drawn_by_its_seed(llama: Tiny) -> None:
    m, rng = llama.model, np.random.default_rng(3)
    prompts = [repeated_random(m, 6, rng=rng, bos=False) for _ in range(2)]
    report = heads(m, RandomRepeats(6, 2, seed=3, bos=False), k=3, ablate_top=2, draws=1)
    scores = head_scores(m, prompts)
    assert [t.id for t in report.tokens] == prompts[0] and report.n_prompts == 2
    np.testing.assert_array_equal(report.scores.induction, scores.induction)
    # the same generator goes on to draw the other heads
    copying = copy_control(m, prompts, scores, 2, draws=1, rng=rng)
    assert report.copying is not None and report.copying.heads == copying.heads
    np.testing.assert_array_equal(report.copying.loss, copying.loss)
    document = report.document()
    assert [len(t) for t in document["top"].values()] == [3] * 4
    assert document["copying"] == copying.document()


def test_a_report_on_a_prompt(llama: Tiny) -> None:
    tokens = [*llama.prompt(6), *llama.prompt(6)]
    report = heads(llama.model, tokens, k=1, changes=Changes(ablate="0.3"))
    edits = {"head_out.0": without_head(llama.oracle, 3)}
    expected = score_pattern(patterns(llama.oracle, tokens, edits), tokens)
    rows = report.rows()
    assert len(rows) == 18 and rows[7]["layer"] == 1 and rows[7]["head"] == 1
    assert abs(rows[7]["previous"] - expected["previous"][1, 1]) < 1e-4
    assert "copying" not in report.document()
    (best,) = report.scores.top("previous", 1)
    first = report.plain().splitlines()[0]
    assert first == f"previous: {best} {report.scores.previous[best]:.3f}"


def test_a_report_refuses(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="a copy needs a prompt of repeated random tokens"):
        heads(llama.model, llama.prompt(4), ablate_top=2)
    with pytest.raises(UsageError, match="unknown score 'copying'"):
        heads(llama.model, llama.prompt(4), score="copying")  # type: ignore[arg-type]


@pytest.mark.slow
def test_smollm2_has_induction_heads_that_copying_needs() -> None:
    """25 random tokens twice. Five heads in 270 carry most of it."""
    with Model("smollm2") as model:
        rng = np.random.default_rng(0)
        prompts = [repeated_random(model, 25, rng=rng) for _ in range(3)]
        scores = head_scores(model, prompts)
        best = scores.top("induction", 5)
        assert best[0] == Head(18, 6) and scores.induction[best[0]] > 0.85
        assert scores.induction[best[4]] > 0.45 and np.median(scores.induction) < 0.05
        loss = copy_control(model, prompts, scores, 5, rng=rng).loss
        assert loss[1] > 4 * loss[0]
        assert np.median(loss[2:]) < 1.4 * loss[0]  # some draws have heads that copying needs
