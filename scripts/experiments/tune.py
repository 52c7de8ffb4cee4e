"""`mia tune` against an exhaustive grid: the share of its hypervolume that a fifth of its runs reaches.

    python scripts/experiments/tune.py EXAMPLE [-t THREADS] [--folder FOLDER] [--seeds N]

EXAMPLE is sentiment, refusal or french, of docs/results/steering.md. The vector is trained as there. Then
every setting is tried (the record grid-EXAMPLE.jsonl, which is gone on with if it is there), and the
search is run on these numbers with N seeds, beside as many settings drawn at random. The constants of
the search were chosen on french; sentiment and refusal are what is reported.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mia import MiaWarning, Model
from mia.datasets.choices import select_items
from mia.datasets.pairs import select_pairs
from mia.datasets.prompts import Prompt
from mia.methods import caa, contrast
from mia.methods.tune import Space, tune
from mia.methods.tune_reports import Tuned
from mia.tuning.pareto import hypervolume
from mia.tuning.scores import Answer, Words
from mia.tuning.search import Search
from mia.tuning.settings import Trial
from mia.tuning.trials import Neutral
from mia.vectors import Vector, load

BUDGET = 0.3
SPACE = Space(("add", "project_out"), "5..29", widths=(1, 4), coeffs=(0.25, 0.5, 1, 2, 4))
NEUTRAL = Neutral(tokens=64)
PROMPTS = {
    "sentiment": "I went to the cinema and the film was",
    "french": "Yesterday I went to the market and",
}
#: questions of refuse_vs_comply that the vector is not trained on
HELD_OUT = (40, 56)


def trained(m: Model, example: str, folder: Path) -> Vector:
    """The vector of docs/results/steering.md."""
    path = folder / f"{example}.gguf"
    if not path.exists():
        if example == "refusal":
            items = select_items("refuse_vs_comply", "0..39")
            caa.learn(m, [items], by_text=True).write([str(path)])
        else:
            pairs = select_pairs(example)
            contrast.learn(m, pairs, name=example, read="mean").write(str(path))
    return load(path)


def asked(m: Model, example: str) -> tuple[list[Prompt], Answer | Words]:
    """Prompts and score: words of a list in what follows, or how likely a refusal is."""
    if example == "refusal":
        questions = select_items("refuse_vs_comply").items
        texts = [questions[i].choices()[0] for i in HELD_OUT]
        return [Prompt(m.ids(t, chat=True)) for t in texts], Answer("I'm sorry")
    words = {"sentiment": "positive_words", "french": "french_words"}[example]
    return [Prompt(PROMPTS[example])], Words(words, n_predict=16)


def grid(m: Model, example: str, folder: Path) -> Tuned:
    prompts, score = asked(m, example)
    return tune(
        m,
        prompts,
        trained(m, example, folder),
        score,
        kl_budget=BUDGET,
        space=SPACE,
        neutral=NEUTRAL,
        runs=10**6,
        record=folder / f"grid-{example}.jsonl",
    )


def searched(trials: Sequence[Trial], plain: float, runs: int, seed: int) -> list[Trial]:
    """What the search tries of settings whose numbers are known."""
    rng = np.random.default_rng(seed)
    settings = [t.setting for t in trials]
    search = Search(settings, budget=BUDGET, plain=plain, runs=runs, rng=rng)
    tried: dict[int, Trial] = {}
    while chosen := search.next(tried):
        tried |= {i: trials[i] for i in chosen}
    return list(tried.values())


def drawn(trials: Sequence[Trial], plain: float, runs: int, seed: int) -> list[Trial]:
    chosen = np.random.default_rng(seed).choice(len(trials), runs, replace=False)
    return [trials[i] for i in chosen]


Chooser = Callable[[Sequence[Trial], float, int, int], list[Trial]]


def shares(full: Tuned, choose: Chooser, runs: int, seeds: int) -> np.ndarray:
    """(n_seeds,) share of the grid's hypervolume."""
    volumes = [
        hypervolume(
            choose(full.trials, full.unchanged, runs, seed), budget=BUDGET, plain=full.unchanged
        )
        for seed in range(seeds)
    ]
    return np.array(volumes) / full.hypervolume


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("example", choices=["sentiment", "refusal", "french"])
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=Path("experiments"))
    parser.add_argument("--seeds", type=int, default=20)
    a = parser.parse_args()
    a.folder.mkdir(exist_ok=True)
    warnings.simplefilter("ignore", MiaWarning)
    with Model("smollm2", threads=a.threads, bos=True) as m:
        full = grid(m, a.example, a.folder)
    print(f"{a.example}\n{full}\n")
    full.plot(a.folder / f"grid-{a.example}.png")
    n = len(full.trials)
    print(f"share of hypervolume over {a.seeds} seeds: mean, least")
    print(f"{'runs':<12s} {'search':<14s} random")
    for share in (0.05, 0.1, 0.15, 0.2):
        runs = round(share * n)
        ours, random = (shares(full, f, runs, a.seeds) for f in (searched, drawn))
        cells = [f"{x.mean():.3f}, {x.min():.3f}" for x in (ours, random)]
        print(f"{share:<4.0%} {runs:>4d}   {cells[0]:<14s} {cells[1]}", flush=True)


if __name__ == "__main__":
    main()
