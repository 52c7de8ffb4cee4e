"""Does `mia why` name the sentence that has the answer? Planted needles.

    python scripts/experiments/why_needles.py --seed 2026

Each prompt has sentences of one form about several people, fillers, and a question about one of them;
one sentence has the answer. Prompts that the model answers wrong are left out, and counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mia import Model, Request
from mia.measure.estimates import accuracy, format_estimate
from mia.methods.why import why

NAMES = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Iris",
    "Jack",
    "Karen",
    "Leo",
    "Maria",
    "Nina",
    "Oscar",
    "Paul",
    "Rosa",
    "Simon",
    "Tina",
    "Victor",
    "Alice",
    "Bob",
    "Carol",
    "Daniel",
    "Eva",
    "Frank",
    "George",
    "Helen",
    "Julia",
    "Kevin",
    "Laura",
    "Mark",
    "Nora",
    "Peter",
    "Robert",
    "Sarah",
    "Thomas",
]
CITIES = [
    "Paris",
    "London",
    "Rome",
    "Madrid",
    "Berlin",
    "Vienna",
    "Tokyo",
    "Moscow",
    "Athens",
    "Dublin",
    "Oslo",
    "Lisbon",
    "Cairo",
    "Chicago",
    "Boston",
    "Prague",
    "Sydney",
    "Toronto",
    "Mumbai",
    "Seoul",
    "Lima",
    "Denver",
    "Dallas",
    "Miami",
    "Seattle",
    "Houston",
    "Budapest",
    "Warsaw",
    "Stockholm",
    "Istanbul",
]
FILLERS = [
    "The weather was mild that year",
    "Most of the shops open at nine in the morning",
    "A small river runs behind the old mill",
    "The library has a reading room on the second floor",
    "Buses leave from the square every half hour",
    "The bridge was built a long time ago",
    "In summer the market sells fruit and flowers",
    "Children play football in the park after school",
    "The museum is closed on Mondays",
    "Nobody remembers who planted the trees",
    "The train was late again",
    "Dinner is served at seven",
    "The road to the coast is narrow",
    "Two cats sleep in front of the bakery",
    "The church bell rings at noon",
    "A new school is being built near the station",
    "The lake is cold even in July",
    "Old men play chess under the lime tree",
    "The theatre opens again in autumn",
    "Most houses here have red roofs.",
]
#: the sentence, and what asks
FORMS = {
    "city": (
        "{} lives in the city of {}.",
        " Question: In which city does {0} live? Answer: {0} lives in the city of",
    ),
    "code": (
        "The code of {} is {}.",
        " Question: What is the code of {0}? Answer: The code of {0} is",
    ),
    "cloze": ("The code of {} is {}.", " As stated above, the code of {0} is"),
}


@dataclass(frozen=True)
class Needle:
    """A prompt with one sentence that has the answer; its place among the sentences is from 0 to 1."""

    prompt: str
    answer: str
    sentence: str
    place: float


def needles(form: str, rng: np.random.Generator, fillers: int = 30) -> Iterator[Needle]:
    """Prompts without end: 3 to 8 sentences of the form, none to so many fillers (mostly few), all in a
    random order."""
    sentence, question = FORMS[form]
    while True:
        n, n_fillers = int(rng.integers(3, 9)), int((fillers + 1) * rng.random() ** 4)
        names = rng.permutation(NAMES)[:n]
        values = rng.permutation(CITIES)[:n]
        if form != "city":
            values = np.array([str(x) for x in rng.permutation(np.arange(1000, 10000))[:n]])
        planted = [sentence.format(*pair) for pair in zip(names, values, strict=True)]
        between = [f.rstrip(".") + "." for f in rng.choice(FILLERS, n_fillers)]
        order = rng.permutation(n + n_fillers)
        text = [(planted + between)[i] for i in order]
        which = int(rng.integers(n))
        place = text.index(planted[which]) / (len(text) - 1)
        yield Needle(
            " ".join(text) + question.format(names[which]),
            f" {values[which]}",
            planted[which],
            place,
        )


def answered(
    model: Model, form: str, seed: int, n: int, fillers: int = 30
) -> tuple[list[Needle], int]:
    """The first n prompts that the model answers right, and how many were tried."""
    right: list[Needle] = []
    tried = 0
    rng = np.random.default_rng([seed, sorted(FORMS).index(form)])
    source = needles(form, rng, fillers)
    while len(right) < n:
        batch = [next(source) for _ in range(8)]
        requests = [Request(model.ids(b.prompt, bos=True), logits=None, n_predict=6) for b in batch]
        for needle, result in zip(batch, model.run(requests), strict=True):
            tried += len(right) < n
            said = model.text(result.tokens)
            after = said[len(needle.answer) :][:1]
            if said.startswith(needle.answer) and not after.isalnum() and len(right) < n:
                right.append(needle)
    return right, tried


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=50, help="of each form")
    parser.add_argument("--forms", default="city,code")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--as", dest="as_type", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    firsts: dict[str, list[bool]] = {"score": [], "blocked": [], "alone": []}
    with Model(args.model, as_type=args.as_type, threads=args.threads) as model:
        for form in args.forms.split(","):
            chosen, tried = answered(model, form, args.seed, args.prompts)
            own: dict[str, list[bool]] = {key: [] for key in firsts}
            lengths, start = [], time.process_time()
            for needle in chosen:
                found = why(model, model.ids(needle.prompt, bos=True), parts=False, null=0)
                lengths.append(len(found.tokens))
                best = {
                    "score": max(found.spans, key=lambda e: e.score),
                    "blocked": min(found.spans, key=lambda e: e.blocked),
                    "alone": max(found.spans, key=lambda e: e.alone),
                }
                for key, effect in best.items():
                    own[key].append(effect.span.text.strip() == needle.sentence)
                if args.verbose:
                    n_right = {key: sum(hits) for key, hits in own.items()}
                    print(len(lengths), lengths[-1], f"{needle.place:.2f}", n_right, flush=True)
                    if not own["score"][-1]:
                        print(f"missed: {needle}\n{found}")
            seconds = (time.process_time() - start) / len(chosen)
            places = [n.place for n in chosen]
            print(
                f"{form}: {len(chosen)} of {tried} prompts answered right, {min(lengths)} to "
                f"{max(lengths)} tokens, needle at {min(places):.2f} to {max(places):.2f} of the text, "
                f"{seconds:.1f} s of processor time each"
            )
            for key, hits in own.items():
                firsts[key] += hits
                print(f"  first by {key}: {format_estimate(accuracy(hits).document())}", flush=True)
    for key, hits in firsts.items():
        print(f"first by {key}, all: {format_estimate(accuracy(hits).document())} of {len(hits)}")


if __name__ == "__main__":
    main()
