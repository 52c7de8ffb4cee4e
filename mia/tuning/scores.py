"""What a search makes large: words in what follows, an answer's probability, a function of logits.

`Answer` and `Words` say what is asked; their `score` gives the requests that measure it on a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mia.arrays import Array
from mia.datasets.prompts import Prompt
from mia.datasets.shipped import read_lines
from mia.edits import Edit
from mia.errors import UsageError
from mia.measure.answers import UNITS, Metric, metric as metric_of, needs
from mia.measure.metrics import word_share
from mia.notices import notice
from mia.request import Request, Result, Sampling

if TYPE_CHECKING:
    from mia.model import Model


#: gives a text the edits of a setting. Each text has its own: with the same ones, texts that begin with
#: the same token, as a BOS, would share its edited row, and could not resume from an unedited run
Edits = Callable[[], Sequence[Edit]]


def no_edits() -> Sequence[Edit]:
    return ()


class Score(Protocol):
    """A number of a model under edits.

    Attributes:
        name, unit: what it is.
        sign: -1 where less is better.
        about: what a document says of it.
    """

    name: str
    unit: str
    sign: int
    about: dict[str, Any]

    def requests(self, edits: Edits) -> list[Request]: ...

    def value(self, results: Sequence[Result]) -> float: ...


# -- answers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What should follow each prompt, and the metric of it; prompts may have answers of their own.

    Attributes:
        answer, against: as typed, with the space in front that most words need.
        metric: as `mia.measure.answers` names it; by default the logit difference where there is
            another answer, else the log-probability.
        minimise: less of it is better.
    """

    answer: str = ""
    against: str = ""
    metric: str | None = None
    minimise: bool = False

    def score(self, model: Model, prompts: Sequence[Prompt]) -> Score:
        """Raises `UsageError`: an unknown metric, `kl`, or one that lacks an answer."""
        asked = [
            replace(p, answer=p.answer or self.answer, against=p.against or self.against)
            for p in prompts
        ]
        every = all(p.against for p in asked)
        name = self.metric or ("logit-diff" if every else "logprob")
        if name == "kl":
            raise UsageError("kl is what a change costs, not what it is for; give another metric")
        needs(name)
        return _AnswerScore(model, asked, name, self.minimise)


class _AnswerScore:
    """The mean of a metric over prompts."""

    def __init__(self, model: Model, asked: Sequence[Prompt], name: str, minimise: bool):
        self.name, self.unit = name, UNITS.get(name, "")
        self.sign = -1 if minimise != (name == "rank") else 1
        self._texts: list[tuple[list[int], Metric]] = []
        self.about: dict[str, Any] = {"metric": name, "larger_is_better": self.sign > 0}
        self.about["prompts"] = []
        for prompt in asked:
            ids = model.ids(prompt.prompt)
            before = model.piece(ids[-1])
            answer, against = (
                model.continuation(before, t) if t else [] for t in (prompt.answer, prompt.against)
            )
            metric = metric_of(name, answer=answer, against=against)
            self._texts.append(([*ids, *answer[: metric.n_positions - 1]], metric))
            self.about["prompts"].append({"tokens": ids, "answer": answer, "against": against})

    def requests(self, edits: Edits) -> list[Request]:
        return [
            Request(
                ids,
                edits(),
                logits=range(len(ids) - metric.n_positions, len(ids)),
                metric=metric.function,
            )
            for ids, metric in self._texts
        ]

    def value(self, results: Sequence[Result]) -> float:
        numbers = [m.number(r.value) for (_, m), r in zip(self._texts, results, strict=True)]
        return float(np.mean(numbers))


# -- words -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Listed words in what follows each prompt.

    Without samples, the score is the log-probability that the next token is one of the words, the mean
    over the places of a text that the plain model has written: that needs no generation. With
    samples, it is the share of the words in texts that are sampled under each setting.

    Attributes:
        words: a file with one word per line, or a shipped list (`positive_words`).
        samples: texts per prompt, with seeds that follow `sampling.seed`; 0 for none.
        n_predict: tokens of a text.
        minimise: fewer of them is better.
    """

    words: str
    samples: int = 0
    n_predict: int = 32
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    minimise: bool = False

    def score(self, model: Model, prompts: Sequence[Prompt]) -> Score:
        """Raises `UsageError`: samples that would all be the same, or no word that is a token."""
        listed = {w.strip().lower() for w in read_lines(self.words).values()}
        ids = [model.ids(p.prompt) for p in prompts]
        if self.samples and self.sampling.temperature == 0 and self.samples > 1:
            raise UsageError(
                "texts sampled at temperature 0 are all the same; give a temperature (1 is the "
                "model's own)"
            )
        return (_WordShare if self.samples else _WordMass)(model, ids, self, listed)

    def texts(self, ids: Sequence[Sequence[int]], edits: Edits, n: int) -> list[Request]:
        """Requests that write n texts after each prompt."""
        seed = self.sampling.seed
        return [
            Request(
                prompt,
                same,
                logits=None,
                n_predict=self.n_predict,
                sampling=replace(self.sampling, seed=seed + i),
            )
            for prompt, same in ((prompt, edits()) for prompt in ids)
            for i in range(n)
        ]

    def about(self, ids: Sequence[Sequence[int]], name: str) -> dict[str, Any]:
        return {
            "metric": name,
            "larger_is_better": not self.minimise,
            "words": self.words,
            "samples": self.samples,
            "n_predict": self.n_predict,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
            "prompts": [{"tokens": list(prompt)} for prompt in ids],
        }


class _WordShare:
    """The share of listed words in sampled texts, the mean over texts."""

    name, unit = "share of listed words", ""

    def __init__(
        self, model: Model, ids: Sequence[list[int]], asked: Words, listed: Collection[str]
    ):
        self._model, self._ids, self._asked, self._listed = model, ids, asked, listed
        self.sign = -1 if asked.minimise else 1
        self.about = asked.about(ids, self.name)

    def requests(self, edits: Edits) -> list[Request]:
        return self._asked.texts(self._ids, edits, self._asked.samples)

    def value(self, results: Sequence[Result]) -> float:
        texts = [self._model.text(r.tokens) for r in results]
        return float(np.mean([word_share(text, self._listed) for text in texts]))


class _WordMass:
    """The log-probability of listed words as the next token, the mean over places."""

    name, unit = "log-probability of listed words", "nats"

    def __init__(
        self, model: Model, ids: Sequence[list[int]], asked: Words, listed: Collection[str]
    ):
        tokens = _word_tokens(model, listed, asked.words)
        written = [r.tokens for r in model.run(asked.texts(ids, no_edits, 1))]
        # nothing is predicted from the last token
        self._texts = [
            (len(prompt), [*prompt, *more[:-1]]) for prompt, more in zip(ids, written, strict=True)
        ]
        self._mass = _LogMass(tokens)
        self.sign = -1 if asked.minimise else 1
        self.about = {**asked.about(ids, self.name), "word_tokens": len(tokens)}

    def requests(self, edits: Edits) -> list[Request]:
        return [
            Request(text, edits(), logits=range(n - 1, len(text)), metric=self._mass)
            for n, text in self._texts
        ]

    def value(self, results: Sequence[Result]) -> float:
        return float(np.mean(np.concatenate([r.value for r in results])))


class _LogMass:
    """A metric: log of the probability that the next token is one of some, at each place."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = list(tokens)

    def __call__(self, logits: Array) -> Array:
        top = logits.max(1, keepdims=True)
        every = np.exp(logits - top).sum(1, dtype=np.float64)
        some = np.exp((logits[:, self._tokens] - top).astype(np.float64)).sum(1)
        return (np.log(np.maximum(some, 1e-300)) - np.log(every)).astype(np.float32)


def _word_tokens(model: Model, words: Collection[str], name: str) -> list[int]:
    """The tokens that are a listed word with a space in front, small or with a capital."""
    tokens: set[int] = set()
    several = 0
    for word in sorted(words):
        forms = {f" {word}", f" {word.capitalize()}"}
        ids = [model.continuation(":", form) for form in sorted(forms)]
        whole = {i[0] for i in ids if len(i) == 1}
        tokens |= whole
        several += not whole
    if not tokens:
        raise UsageError(f"no word of {name} is one token of {model.name}; sample texts instead")
    if several:
        notice(f"{several} of the {len(words)} words of {name} are several tokens and not counted")
    return sorted(tokens)
