"""Steering on the real model: the worked example of docs/guide/steering.md, cut short."""

import numpy as np
import pytest

from mia.datasets.pairs import load_pairs
from mia.datasets.shipped import read_lines, read_text
from mia.measure.estimates import bootstrap
from mia.measure.metrics import word_share
from mia.methods import contrast, perplexity, steering
from mia.methods.tune import Space, tune
from mia.model import Model
from mia.request import Request, Sampling
from mia.steering import Steering
from mia.tuning.scores import Words
from mia.tuning.trials import Neutral

pytestmark = pytest.mark.slow


def test_a_sentiment_vector_brings_positive_words_at_a_bearable_price(smollm2: Model) -> None:
    vector = contrast.train(smollm2, load_pairs("sentiment"), read="mean", bos=True)
    edits = Steering(vector, coeff=4, layers=[22]).edits()
    assert {r["path"] for r in steering.explain(smollm2, edits)} == {"control vector"}

    ids = smollm2.tokenize("I went to the cinema and the film was", bos=True)
    words = set(read_lines("positive_words").values())
    shares = []
    for changes in ([], edits):
        samples = [Sampling(temperature=1.0, seed=i) for i in range(16)]
        requests = [Request(ids, changes, logits=None, n_predict=16, sampling=s) for s in samples]
        shares.append([word_share(smollm2.text(r.tokens), words) for r in smollm2.run(requests)])
    change = bootstrap(np.subtract(shares[1], shares[0]), np.random.default_rng(0))
    assert change.low > 0, change

    text = smollm2.tokenize(read_text("neutral"), bos=True)[:100]
    plain = perplexity.perplexity(smollm2, text).value
    assert perplexity.perplexity(smollm2, text, edits=edits).value < 2.5 * plain


def test_a_coefficient_within_a_budget(smollm2: Model) -> None:
    vector = contrast.train(smollm2, load_pairs("sentiment")[:20], bos=True, layers=[22])
    ids = smollm2.tokenize("The film was", bos=True)
    choice = steering.choose_coefficient(
        smollm2, [ids], [Steering(vector)], 0.3, candidates=(0.25, 1, 16), n_predict=6
    )
    assert choice.coeff < 16 and choice.kl[choice.coeff] <= 0.3 < choice.kl[16]


@pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")
def test_a_search_finds_what_every_setting_would(smollm2: Model) -> None:
    layers = [20, 22, 24, 26, 28]
    vector = contrast.train(
        smollm2, load_pairs("sentiment")[:20], read="mean", bos=True, layers=layers
    )
    ids = smollm2.tokenize("I went to the cinema and the film was", bos=True)
    score = Words("positive_words", n_predict=8)
    space = Space(("add", "project_out"), widths=(1,), coeffs=(0.5, 1, 2, 4, 8))
    neutral = Neutral(tokens=32, window=32, bos=True)
    tried = {
        runs: tune(smollm2, ids, vector, score, space=space, runs=runs, neutral=neutral)
        for runs in (15, 30)
    }
    part, whole = tried[15], tried[30]
    assert [len(t.trials) for t in tried.values()] == [15, 30]
    assert part.hypervolume > 0.8 * whole.hypervolume > 0
    assert part.best is not None and whole.best is not None
    assert part.best.kl <= 0.3 and part.best.score > part.unchanged + 10 * part.score_floor
    # every layer alone: more strength, more KL
    for layer in layers:
        kls = [t.kl for t in whole.trials if t.setting.layers == (layer,)][:5]
        assert kls == sorted(kls)
