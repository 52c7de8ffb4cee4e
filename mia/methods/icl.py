"""What the in-context methods share: prompts of a task, means over them, effects of heads,
accuracy under edits.

    ex = IclExperiment(model, load("antonym"), shots=5, seed=0)
    means = ex.means("head_out", ex.dummies(100))              # (n_layer, width)
    effects = ex.effects(ex.few_shot(ex.train[:25], wrong=True), means)
    ex.accuracy(ex.zero_shot(ex.test), [some_edit])

Words: a *query* is the pair asked about, *examples* are the pairs before it, a *dummy* is
a query from the training part whose answer nobody looks at. Everything that is drawn
comes from the seed and a word for what it is for, so that no step depends on another's
having run.

A BOS stands in front of each prompt wherever the vocabulary has one, whatever the file
asks for, unless `bos` says otherwise: without it small models read the first token as
little more than a beginning.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.datasets.tasks import FORMATS, Format, Pair, Split, Task, draw, shuffled, split
from mia.edits import Edit, Tokens
from mia.errors import UsageError
from mia.measure.estimates import Accuracy, accuracy
from mia.measure.metrics import FirstToken, exact_match
from mia.request import Capture, Request
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Array = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

MATCHES = ("first", "exact")


@dataclass(frozen=True, slots=True)
class IclPrompt:
    """A prompt ready to run.

    Attributes:
        tokens: the text's token ids; the last is the one that vectors are read and put at.
        answers: ids with which a right answer may begin.
    """

    examples: tuple[Pair, ...]
    query: Pair
    tokens: tuple[int, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every variant and prompt: (n_variants, n_prompts).

    Attributes:
        correct: whether the answer is right.
        logprob: natural log-probability of the right answers' first tokens together.
    """

    correct: Bools
    logprob: npt.NDArray[np.float64]

    def accuracy(self, variant: int = 0) -> Accuracy:
        return accuracy(self.correct[variant])


class IclExperiment:
    """A task on a model.

    Attributes:
        train, dev, test: pairs, none in two of them.
        shots: examples in a prompt.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        *,
        fmt: Format = FORMATS["qa"],
        shots: int = 5,
        bos: bool | None = None,
        seed: int = 0,
        n_test: int = 100,
        n_dev: int = 40,
        parts: Split | None = None,
    ):
        """Splits the task, or takes `parts` as they are.

        Raises:
            RangeError: the task is too small.
        """
        self.model, self.task, self.fmt, self.shots, self.seed = model, task, fmt, shots, seed
        self.bos = (model.bos_token >= 0) if bos is None else bos
        parts = parts or split(task, self.rng("split"), n_test=n_test, n_dev=n_dev, shots=shots)
        self.train, self.dev, self.test = parts.train, parts.dev, parts.test
        #: called as the requests of a run finish
        self.progress: Progress | None = None

    def rng(self, what: str) -> np.random.Generator:
        """Random numbers of the seed for one purpose."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{self.task.name} {what}".encode())])

    @property
    def facts(self) -> dict[str, Any]:
        """What makes the same prompts again."""
        return {
            "task": self.task.name,
            "format": self.fmt.text,
            "shots": self.shots,
            "bos": self.bos,
            "seed": self.seed,
            **({} if self.task.known_of is None else {"known_of": self.task.known_of}),
            "pairs": {"train": len(self.train), "dev": len(self.dev), "test": len(self.test)},
        }

    def known(self, sets: int = 5) -> Task:
        """The task with those of its pairs alone that the model knows: whose answer is right
        after at least half of `sets` sets of examples, drawn from the whole task. Todd et al. 2023
        count such queries only; the sets are others than those that anything is measured with.

        Raises `UsageError` where fewer than five are left."""
        rng = self.rng("known")
        prompts = []
        for _ in range(sets):
            # the same examples for all, so that they are run once; one more for those among them
            *examples, spare = draw(self.task.pairs, self.shots + 1, rng)
            for p in self.task.pairs:
                shown = [spare if e.input == p.input else e for e in examples]
                prompts.append(self.prompt(shown, p))
        right = self.scores(prompts).correct.reshape(sets, -1).mean(0)
        kept = tuple(p for p, share in zip(self.task.pairs, right, strict=True) if share >= 0.5)
        if len(kept) < 5:
            raise UsageError(
                f"{self.task.name}: after examples the model answers {len(kept)} of "
                f"{len(self.task.pairs)} pairs; at least 5 are needed"
            )
        return replace(self.task, pairs=kept, known_of=len(self.task.pairs))

    # -- prompts -------------------------------------------------------------------

    def zero_shot(self, queries: Iterable[Pair]) -> list[IclPrompt]:
        return [self.prompt((), q) for q in queries]

    def few_shot(
        self, queries: Iterable[Pair], *, wrong: bool = False, what: str = "few-shot"
    ) -> list[IclPrompt]:
        """Each query after examples from the training part, itself never among them.

        Args:
            wrong: the examples' outputs dealt anew among them.
            what: another word draws other examples.
        """
        rng = self.rng(f"{what} {wrong}")
        out = []
        for q in queries:
            examples = draw(self.train, self.shots, rng, without=q.input)
            out.append(self.prompt(shuffled(examples, rng) if wrong else examples, q))
        return out

    def dummies(self, n: int, *, wrong: bool = False, what: str = "dummies") -> list[IclPrompt]:
        """n prompts with examples and query from the training part."""
        return self.few_shot(self._training_queries(n, what), wrong=wrong, what=what)

    def same_examples(self, examples: Sequence[Pair], n: int, what: str) -> list[IclPrompt]:
        """One set of examples before n different dummies, none of them among the examples."""
        used = {e.input for e in examples}
        left = [p for p in self.train if p.input not in used]
        if not left:
            raise UsageError(f"{self.task.name} has no training pairs left for dummy queries")
        order = self.rng(what).permutation(len(left))[: min(n, len(left))].tolist()
        return [self.prompt(examples, left[i]) for i in order]

    def prompt(self, examples: Sequence[Pair], query: Pair) -> IclPrompt:
        text = self.fmt.prompt(examples, query.input)
        tokens = self.model.tokenize(text, bos=self.bos)
        lead, answers = self._first_tokens(query)
        return IclPrompt(tuple(examples), query, (*tokens, *lead), answers)

    def answers(self, pair: Pair) -> tuple[int, ...]:
        """First tokens of the right answers, as they continue a query."""
        return self._first_tokens(pair)[1]

    def _first_tokens(self, pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What to add to the prompt, and the tokens that may follow. Where the space in front of an
        answer is a token of its own, as before digits, it says nothing: it goes to the prompt."""
        ids = [self._answer_ids(pair, o) for o in pair.outputs]
        lead: tuple[int, ...] = ()
        shared = all(len(x) > 1 and x[0] == ids[0][0] for x in ids)
        if shared and not self.model.piece(ids[0][0]).strip():
            lead, ids = (ids[0][0],), [x[1:] for x in ids]
        return lead, tuple(dict.fromkeys(x[0] for x in ids if x))

    def _answer_ids(self, pair: Pair, output: str) -> list[int]:
        return self.model.continuation(self.fmt.query(pair.input), self.fmt.answer(output))

    def _training_queries(self, n: int, what: str) -> list[Pair]:
        """n of the training part; each as often as any other, give or take one."""
        rng = self.rng(f"{what} queries")
        rounds = -(-n // len(self.train))
        order = np.concatenate([rng.permutation(len(self.train)) for _ in range(rounds)])[:n]
        return [self.train[i] for i in order.tolist()]

    # -- runs ----------------------------------------------------------------------

    def rows(
        self, site: str, prompts: Sequence[IclPrompt], *, tokens: Tokens = -1
    ) -> tuple[Array, Bools]:
        """A site in every layer, (n_prompts, n_layer, width), by default at the last token and of
        several tokens the mean over them; and (n_prompts,) whether the answer is right."""
        sites = [Site(site, i) for i in range(self.model.n_layer)]
        capture = Capture(sites, tokens)
        requests = [
            Request(p.tokens, captures=[capture], metric=FirstToken(p.answers)) for p in prompts
        ]
        results = self.model.run(requests, progress=self.progress)
        rows = [np.stack([r.captures[s].mean(0) for s in sites]) for r in results]
        return np.stack(rows), np.array([r.value.correct for r in results])

    def means(self, site: str, prompts: Sequence[IclPrompt], *, tokens: Tokens = -1) -> Array:
        """The mean of `rows`, (n_layer, width), over the prompts that are answered right, as the code
        of Todd et al. has it; over all where none is."""
        return mean_of_right(*self.rows(site, prompts, tokens=tokens))

    def effects(self, prompts: Sequence[IclPrompt], means: Array) -> npt.NDArray[np.float64]:
        """(n_layer, n_head): how much the probability of the right answer rises, on the mean over
        prompts, when one head's output at the last token becomes its mean (Todd et al., eq. 4)."""
        m = self.model
        by_head = means.reshape(m.n_layer, m.n_head, -1)  # (n_layer, n_head, head_dim)
        variants: list[list[Edit]] = [[]]
        for layer in range(m.n_layer):
            for head in range(m.n_head):
                variants.append([head_edit(layer, head, by_head[layer, head])])
        p = np.exp(self.scores(prompts, variants).logprob)  # (1 + n_layer * n_head, n_prompts)
        return (p[1:] - p[0]).mean(1).reshape(m.n_layer, m.n_head)

    def scores(
        self, prompts: Sequence[IclPrompt], variants: Sequence[Sequence[Edit]] = ((),)
    ) -> Scores:
        """Runs every prompt under each list of edits; by the first token of the answer."""
        requests = [
            Request(p.tokens, v, metric=FirstToken(p.answers)) for p in prompts for v in variants
        ]
        found = [r.value for r in self.model.run(requests, progress=self.progress)]
        shape = (len(prompts), len(variants))
        correct = np.array([s.correct for s in found]).reshape(shape).T
        logprob = np.array([s.logprob for s in found]).reshape(shape).T
        return Scores(correct, logprob)

    def right(
        self,
        prompts: Sequence[IclPrompt],
        variants: Sequence[Sequence[Edit]] = ((),),
        *,
        match: str = "first",
    ) -> Bools:
        """(n_variants, n_prompts): whether the answer is right by its first token, or exact after
        greedy generation."""
        if match == "first":
            return self.scores(prompts, variants).correct
        if match != "exact":
            raise UsageError(f"unknown match {match!r}; known: {', '.join(MATCHES)}")
        rows = []
        for edits in variants:
            said = self.answers_of(prompts, edits)
            rows.append(
                [
                    exact_match(t, p.query.outputs, self.fmt.end)
                    for t, p in zip(said, prompts, strict=True)
                ]
            )
        return np.array(rows, np.bool_)

    def accuracy(
        self, prompts: Sequence[IclPrompt], edits: Sequence[Edit] = (), *, match: str = "first"
    ) -> Accuracy:
        """Share of right answers."""
        return accuracy(self.right(prompts, [edits], match=match)[0])

    def answers_of(self, prompts: Sequence[IclPrompt], edits: Sequence[Edit] = ()) -> list[str]:
        """What the model says, greedily, for as long as the longest right answer and two tokens."""
        requests = []
        for p in prompts:
            n = max(len(self._answer_ids(p.query, o)) for o in p.query.outputs)
            requests.append(Request(p.tokens, edits, logits=None, n_predict=n + 2))
        results = self.model.run(requests, progress=self.progress)
        return [self.model.text(r.tokens) for r in results]


def mean_of_right(rows: Array, right: Bools) -> Array:
    """The mean of rows (n, …) over those that are right, or over all where none is."""
    return (rows[right] if right.any() else rows).mean(0, dtype=np.float64).astype(np.float32)


def head_edit(layer: int, head: int, mean: Array) -> Edit:
    """Puts a head's mean (head_dim,) at the last token of a prompt."""
    return Edit(Site("head_out", layer), "replace", mean, tokens=-1, heads=[head])
