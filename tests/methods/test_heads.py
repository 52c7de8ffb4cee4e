"""Head scores: by their definitions on patterns drawn by hand, and on models."""

import numpy as np
import pytest
from tiny import Tiny

from mia.errors import RangeError, UsageError
from mia.methods.ablation import head_edits
from mia.methods.heads import copy_loss, head_scores, repeated_random, score_pattern
from mia.model import Model


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
    assert (duplicate["duplicate"], duplicate["induction"], duplicate["previous"]) == (1, 0, 1 / 6)
    induction = score_pattern(_looks_at([0, 0, 0, 0, 2, 3, 4]), tokens)
    assert (induction["duplicate"], induction["induction"]) == (0, 1)


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
    scores = score_pattern(np.tri(3, dtype=np.float32)[None] / 3, [5, 6, 7])
    assert np.isnan(scores["duplicate"]).all() and np.isnan(scores["induction"]).all()
    assert np.isnan(score_pattern(np.ones((2, 1, 1), np.float32), [5])["previous"]).all()


def test_scores_of_models_are_those_of_the_oracles_patterns(case: Tiny) -> None:
    prompts = [[*case.prompt(6, seed=s), *case.prompt(6, seed=s)] for s in (1, 2)]
    found = head_scores(case.model, prompts)
    each = []
    for p in prompts:
        sites = case.oracle.run(p)
        patterns = [sites[f"attn_pattern.{i}"].swapaxes(0, 1) for i in range(case.oracle.n_layer)]
        each.append(score_pattern(np.stack(patterns), p))
    for name in ("previous", "duplicate", "induction", "entropy"):
        want = np.stack([s[name] for s in each])  # (n_prompts, n_layer, n_head)
        assert np.abs(getattr(found, name) - want.mean(0)).max() < 1e-4
        assert np.abs(found.spread[name] - want.std(0)).max() < 1e-4
    layer, head, value = found.top("induction", 1)[0]
    assert value == found.induction.max() == found.induction[layer, head]
    with pytest.raises(UsageError, match="unknown score 'copying'; known: previous, duplicate"):
        found.top("copying", 1)


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
    without = head_edits(case.model, {1: [0]})
    found = copy_loss(case.model, prompts, [[], without])

    def silence(z: np.ndarray) -> np.ndarray:
        z[:, : case.oracle.head_dim] = 0
        return z

    for v, edits in enumerate(({}, {"head_out.1": silence})):
        for i, p in enumerate(prompts):
            logits = case.oracle.run(p, edits)["logits"]
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            want = -np.mean([logprobs[q, p[q + 1]] for q in range(6, 10)])  # BOS, 5, 5
            assert abs(found[v, i] - want) < 1e-4


@pytest.mark.slow
def test_smollm2_has_induction_heads_that_copying_needs() -> None:
    """25 random tokens twice. Five heads in 270 carry most of it."""
    with Model("smollm2") as model:
        rng = np.random.default_rng(0)
        prompts = [repeated_random(model, 25, rng=rng) for _ in range(3)]
        scores = head_scores(model, prompts)
        best = scores.top("induction", 5)
        assert best[0][:2] == (18, 6) and best[0][2] > 0.85
        assert best[4][2] > 0.45 and np.median(scores.induction) < 0.05

        def without(chosen: list[tuple[int, int]]) -> list:
            layers = {i for i, _ in chosen}
            return head_edits(model, {i: [h for j, h in chosen if j == i] for i in layers})

        others = [
            (i, h) for i in range(30) for h in range(9) if (i, h) not in {b[:2] for b in best}
        ]
        drawn = [[others[i] for i in rng.choice(len(others), 5, replace=False)] for _ in range(5)]
        variants = [[], without([b[:2] for b in best]), *map(without, drawn)]
        loss = copy_loss(model, prompts, variants).mean(1)
        assert loss[1] > 4 * loss[0]
        assert np.median(loss[2:]) < 1.4 * loss[0]  # some draws have heads that copying needs
