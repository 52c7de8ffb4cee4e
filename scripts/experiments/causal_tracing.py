"""Where facts are kept: causal tracing over facts that the model knows (Meng et al. 2022, figure 1).

    python scripts/experiments/causal_tracing.py [MODEL] [--as TYPE] [--draws N] [--restored residual] [-o FILE.png]

For each fact the subject's embeddings get noise, and one place is restored at a time: the residual stream
of one layer, or the output of a window of MLPs or attention layers. The effect is on the probability of the
answer. Tokens are averaged by their part in the prompt, facts give the 95 % interval. A fact is known if
the model's own continuation is the answer. Subjects have two tokens or more, so that first and last differ.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mia import MiaWarning, Model
from mia.datasets.tasks import load
from mia.measure.estimates import bootstrap_interval
from mia.methods.sweep import sweep
from mia.show import plots
from mia.sweeps.experiments import Patching, tokens_of

#: shipped task -> a sentence about its inputs
SENTENCES = {
    "landmark_country": "{} is in the country of",
    "product_company": "{} is a product made by",
    "country_capital": "The capital city of {} is",
    "country_language": "The people of {} speak",
    "country_currency": "The currency of {} is the",
}
PARTS = (
    "first of the subject",
    "middle of the subject",
    "last of the subject",
    "first after it",
    "further",
    "last token",
)
#: what is restored -> site, and layers around a cell, a fifth of the model as in the paper
RESTORED = {"residual": ("resid_post", 0), "MLPs": ("mlp_out", 5), "attention": ("attn_out", 5)}


@dataclass(frozen=True)
class Fact:
    prompt: str
    subject: str
    answer: str


def known(model: Model) -> Iterator[Fact]:
    """The facts that the model knows, with subjects of several tokens."""
    for task, sentence in SENTENCES.items():
        for pair in load(task).pairs:
            fact = Fact(sentence.format(pair.input), pair.input, " " + pair.outputs[0])
            tokens = model.ids(fact.prompt)
            if len(tokens_of(model, tokens, fact.subject)) < 2:
                continue
            answer = model.continuation(model.piece(tokens[-1]), fact.answer)
            if model.generate(tokens, len(answer)).tokens == answer:
                yield fact


def parts(n_tokens: int, subject: list[int]) -> dict[str, list[int]]:
    """Which tokens of a prompt are which part of it."""
    after = list(range(subject[-1] + 1, n_tokens - 1))
    places = ([subject[0]], subject[1:-1], [subject[-1]], after[:1], after[1:], [n_tokens - 1])
    return dict(zip(PARTS, places, strict=True))


def trace(model: Model, fact: Fact, site: str, window: int, draws: int) -> np.ndarray:
    """(n_layer, n_parts) what a restored place adds to the probability; NaN for no such token."""
    tokens = model.ids(fact.prompt)
    done = sweep(
        model,
        fact.prompt,
        Patching(noise_on=fact.subject, draws=draws),
        answer=fact.answer,
        site=site,
        window=window,
        metric="prob",
        null=0,
    )
    out = np.full((model.n_layer, len(PARTS)), np.nan)
    for i, at in enumerate(parts(len(tokens), tokens_of(model, tokens, fact.subject)).values()):
        if at:
            out[:, i] = done.effect[:, at].mean(1)
    return out


def report(what: str, effects: np.ndarray) -> None:
    """A line for each part: the layer of its largest mean effect, with the interval.

    effects: (n_facts, n_layer, n_parts)."""
    print(f"\n{what}\n\n| tokens | facts | best layer | probability restored |\n|---|---|---|---|")
    for i, part in enumerate(PARTS):
        rows = effects[~np.isnan(effects[:, 0, i]), :, i]  # (n, n_layer)
        layer = int(rows.mean(0).argmax())
        low, high = bootstrap_interval(rows[:, layer], np.random.default_rng(0), n=2000)
        mean = rows[:, layer].mean()
        print(f"| {part} | {len(rows)} | {layer} | {mean:.3f} [{low:.3f}, {high:.3f}] |")


def draw(effects: dict[str, np.ndarray], path: str, title: str) -> None:
    fig = plots.figure(1.5 + 3.5 * len(effects), 5)
    panels = fig.subplots(1, len(effects), sharey=True, squeeze=False)[0]
    for axes, (what, a) in zip(panels, effects.items(), strict=True):
        image = axes.imshow(np.nanmean(a, 0), origin="lower", aspect="auto", cmap="Purples", vmin=0)
        axes.set_xticks(range(len(PARTS)), PARTS, rotation=40, ha="right", fontsize=8)
        axes.set_title(f"{what} restored", fontsize=10)
        fig.colorbar(image, ax=axes, fraction=0.06)
    panels[0].set_ylabel("layer")
    fig.suptitle(title, fontsize=10)
    plots.save(fig, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--as", dest="as_type")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--restored", nargs="*", choices=list(RESTORED), default=list(RESTORED))
    parser.add_argument("-o", "--out")
    o = parser.parse_args()
    warnings.simplefilter("ignore", MiaWarning)
    with Model(o.model, bos=True, as_type=o.as_type, threads=o.threads) as model:
        facts = list(known(model))
        print(f"{len(facts)} facts that {model.name} knows")
        effects = {}
        for what in o.restored:
            site, n = RESTORED[what]
            width = max(1, n * model.n_layer // 25)
            effects[what] = np.stack([trace(model, f, site, width, o.draws) for f in facts])
            report(f"{what}, {width} layers at a time" if width > 1 else what, effects[what])
        if o.out:
            draw(effects, o.out, f"{model.name}: mean over {len(facts)} known facts")


if __name__ == "__main__":
    main()
