"""In-context tasks on a model: prompts, means over them, effects of heads, accuracy under edits.

    ex = experiment(model, "antonym", TaskSetup(shots=5, seed=0))
    means = ex.means("head_out", ex.dummies(100))              # (n_layer, width)
    effects = ex.effects(ex.few_shot(ex.train[:25], wrong=True), means)
    ex.accuracy(ex.zero_shot(ex.test), [some_edit])

Words: a *query* is the pair that a prompt asks about, *examples* are the pairs before it, a
*dummy* is a query from the training part whose answer is not looked at. Random numbers
depend on the seed and on the purpose they are drawn for, so that no step depends on whether
another one has run.

Each prompt starts with a BOS if the vocabulary has one, whatever the file asks for,
unless the setup says otherwise: without it small models make little of the first token.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from mia.arrays import Array, Floats
from mia.datasets.tasks import (
    Format,
    Pair,
    Split,
    Task,
    draw,
    load,
    load_many,
    read_format,
    shuffled,
    split,
)
from mia.edits import Edit, Tokens
from mia.errors import UsageError
from mia.measure.estimates import Accuracy, accuracy
from mia.measure.metrics import FirstToken, exact_match
from mia.progress import step
from mia.ranges import Head, every_head
from mia.request import Capture, Request, one_or_more
from mia.sites import Site

if TYPE_CHECKING:
    from mia.model import Model
    from mia.progress import Progress

Bools = npt.NDArray[np.bool_]

#: what has to be right: the first token of the answer, or all of it, generated
Match = Literal["first", "exact"]
#: tasks as a method takes them: names, .json or .jsonl files, `Task`s; one or several
Tasks = str | Path | Task | Sequence[str | Path | Task]


def each_task(tasks: Tasks) -> list[Task]:
    """Tasks by name or file, or as they are, one or several; "all" stands for every task that
    comes with mia. Raises as `mia.datasets.tasks.load` does."""
    several = [tasks] if isinstance(tasks, (str, Path, Task)) else tasks
    return [x for t in several for x in ([t] if isinstance(t, Task) else load_many(t))]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSetup:
    """How a task is run.

    Attributes:
        format: "qa", "arrow", or a text with {input} and {output}.
        shots: examples in a prompt; None for the method's default (5, function vectors 10).
        bos: put the BOS token in front, if the vocabulary has one.
        seed: of splits, examples and everything else that is drawn.
        known: keep only the pairs that the model knows (`IclExperiment.known`).
        n_test: test queries, at most 60 % of the pairs.
        n_dev: development queries, at most 20 % of the pairs.
    """

    format: str | Format = "qa"
    shots: int | None = None
    bos: bool = True
    seed: int = 0
    known: bool = False
    n_test: int = 100
    n_dev: int = 40


@dataclass(frozen=True, slots=True)
class IclPrompt:
    """A prompt ready to run.

    Attributes:
        tokens: the text's token ids; vectors are read and edited at the last one.
        answers: ids with which a right answer may begin.
    """

    examples: tuple[Pair, ...]
    query: Pair
    tokens: tuple[int, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Scores of every variant and prompt, (n_variants, n_prompts).

    Attributes:
        correct: whether the answer is right.
        logprob: natural log-probability of the first tokens of all right answers together.
    """

    correct: Bools
    logprob: Floats

    def accuracy(self, variant: int = 0) -> Accuracy:
        return accuracy(self.correct[variant])


def experiment(
    model: Model,
    task: str | Path | Task,
    setup: TaskSetup | None = None,
    *,
    shots: int = 5,
) -> IclExperiment:
    """A task on a model.

    Args:
        task: a name, a .json or .jsonl file of pairs, or a `Task`.
        shots: examples in a prompt, if the setup does not say.

    Raises as `mia.datasets.tasks.load`, and `RangeError` for a task that is too small."""
    setup = setup or TaskSetup()
    if setup.shots is None:
        setup = replace(setup, shots=shots)
    return IclExperiment(model, task if isinstance(task, Task) else load(task), setup)


class IclExperiment:
    """A task on a model.

    Attributes:
        train, dev, test: pairs; no input is in two of them.
        shots: examples in a prompt.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        setup: TaskSetup | None = None,
        *,
        parts: Split | None = None,
    ):
        """Splits the task, or takes `parts` as they are.

        Raises:
            RangeError: the task is too small.
            UsageError: a format that cannot be read, or too few known pairs.
        """
        self.model, self.task = model, task
        self.setup = setup = setup or TaskSetup()
        self.format = read_format(setup.format)
        self.shots = 5 if setup.shots is None else setup.shots
        self.seed = setup.seed
        self.bos = setup.bos and model.bos_token >= 0
        self._bar: Progress | None = None
        if setup.known and task.known_of is None:
            self.task = self.known()
        parts = parts or split(
            self.task,
            self.rng("split"),
            n_test=setup.n_test,
            n_dev=setup.n_dev,
            shots=self.shots,
        )
        self.train, self.dev, self.test = parts.train, parts.dev, parts.test

    def with_seed(self, seed: int) -> IclExperiment:
        """The same pairs under another seed."""
        return IclExperiment(self.model, self.task, replace(self.setup, seed=seed))

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step of the experiment, for progress bars: "evaluating" names it and the task."""
        with step(f"{what} {self.task.name}") as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def rng(self, what: str) -> np.random.Generator:
        """The random numbers of this seed for one purpose."""
        name = f"{self.task.name} {what}".encode(errors="surrogatepass")  # of any file's name
        return np.random.default_rng([self.seed, zlib.crc32(name)])

    @property
    def facts(self) -> dict[str, Any]:
        """What is needed to make the same prompts again."""
        return {
            "task": self.task.name,
            "format": self.format.text,
            "shots": self.shots,
            "bos": self.bos,
            "seed": self.seed,
            **({} if self.task.known_of is None else {"known_of": self.task.known_of}),
            "pairs": {"train": len(self.train), "dev": len(self.dev), "test": len(self.test)},
        }

    def known(self, sets: int = 5) -> Task:
        """The task with only the pairs that the model knows: it answers them right after at
        least half of `sets` sets of examples, drawn from the whole task. Todd et al. 2023 count
        only such queries. Measurements use other sets of examples than these.

        Raises `UsageError` if fewer than five pairs are left."""
        rng = self.rng("known")
        prompts = []
        for _ in range(sets):
            # all queries get the same examples, so that these run once; the spare one replaces
            # a query among its own examples
            *examples, spare = draw(self.task.pairs, self.shots + 1, rng)
            for p in self.task.pairs:
                others = [spare if e.input == p.input else e for e in examples]
                prompts.append(self.prompt(others, p))
        with self.step(f"what {self.model.name} knows of"):
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
        """Each query after examples from the training part, never with itself among them.

        Args:
            wrong: shuffle the outputs among the examples.
            what: the purpose; another one draws other examples.
        """
        rng = self.rng(f"{what} {wrong}")
        out = []
        for q in queries:
            examples = draw(self.train, self.shots, rng, without=q.input)
            out.append(self.prompt(shuffled(examples, rng) if wrong else examples, q))
        return out

    def dummies(self, n: int, *, wrong: bool = False, what: str = "dummies") -> list[IclPrompt]:
        """n prompts with examples and queries from the training part."""
        return self.few_shot(self._training_queries(n, what), wrong=wrong, what=what)

    def same_examples(self, examples: Sequence[Pair], n: int, what: str) -> list[IclPrompt]:
        """One set of examples before n different dummies that are not among the examples."""
        used = {e.input for e in examples}
        left = [p for p in self.train if p.input not in used]
        if not left:
            raise UsageError(f"{self.task.name} has no training pairs left for dummy queries")
        order = self.rng(what).permutation(len(left))[: min(n, len(left))].tolist()
        return [self.prompt(examples, left[i]) for i in order]

    def prompt(self, examples: Sequence[Pair], query: Pair) -> IclPrompt:
        text = self.format.prompt(examples, query.input)
        tokens = self.model.tokenize(text, bos=self.bos)
        lead, answers = self._first_tokens(query)
        return IclPrompt(tuple(examples), query, (*tokens, *lead), answers)

    def answers(self, pair: Pair) -> tuple[int, ...]:
        """The first tokens of the right answers, as they continue the query."""
        return self._first_tokens(pair)[1]

    def _first_tokens(self, pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What to add to the prompt, and the tokens that may follow. If the space in front of an
        answer is a token of its own, as before digits, every answer begins with it: it is added
        to the prompt."""
        ids = [self._answer_ids(pair, o) for o in pair.outputs]
        lead: tuple[int, ...] = ()
        shared = all(len(x) > 1 and x[0] == ids[0][0] for x in ids)
        if shared and not self.model.piece(ids[0][0]).strip():
            lead, ids = (ids[0][0],), [x[1:] for x in ids]
        return lead, tuple(dict.fromkeys(x[0] for x in ids if x))

    def _answer_ids(self, pair: Pair, output: str) -> list[int]:
        return self.model.continuation(self.format.query(pair.input), self.format.answer(output))

    def _training_queries(self, n: int, what: str) -> list[Pair]:
        """n pairs of the training part, each used equally often (±1)."""
        rng = self.rng(f"{what} queries")
        rounds = -(-n // len(self.train))
        order = np.concatenate([rng.permutation(len(self.train)) for _ in range(rounds)])[:n]
        return [self.train[i] for i in order.tolist()]

    # -- runs ----------------------------------------------------------------------

    def rows(
        self, site: str, prompts: Sequence[IclPrompt], *, tokens: Tokens = -1
    ) -> tuple[Array, Bools]:
        """A site in every layer, (n_prompts, n_layer, width), at the last token by default and
        as the mean over several tokens; and whether the answer is right, (n_prompts,)."""
        sites = [Site(site, i) for i in range(self.model.n_layer)]
        capture = Capture(sites, tokens)
        requests = [
            Request(p.tokens, captures=[capture], metric=FirstToken(p.answers)) for p in prompts
        ]
        results = self.model.run(requests, progress=self._bar)
        rows = [np.stack([r.captures[s].mean(0) for s in sites]) for r in results]
        return np.stack(rows), np.array([r.value.correct for r in results])

    def means(self, site: str, prompts: Sequence[IclPrompt], *, tokens: Tokens = -1) -> Array:
        """The mean of `rows`, (n_layer, width), over the prompts that are answered right, as in the
        code of Todd et al.; over all prompts if none is."""
        return mean_of_right(*self.rows(site, prompts, tokens=tokens))

    def effects(self, prompts: Sequence[IclPrompt], means: Array) -> Floats:
        """(n_layer, n_head): how much the probability of the right answer rises, on the mean over
        prompts, when one head's output at the last token becomes its mean (Todd et al., eq. 4)."""
        m = self.model
        by_head = means.reshape(m.n_layer, m.n_head, -1)  # (n_layer, n_head, head_dim)
        heads = every_head(m.n_layer, m.n_head)
        variants: list[list[Edit]] = [[], *([head_edit(h, by_head[h])] for h in heads)]
        p = np.exp(self.scores(prompts, variants).logprob)  # (1 + n_layer * n_head, n_prompts)
        return (p[1:] - p[0]).mean(1).reshape(m.n_layer, m.n_head)

    def scores(
        self, prompts: Sequence[IclPrompt], variants: Sequence[Sequence[Edit]] = ((),)
    ) -> AnswerScores:
        """Runs every prompt under every list of edits; answers count by their first token."""
        requests = [
            Request(p.tokens, v, metric=FirstToken(p.answers)) for p in prompts for v in variants
        ]
        scores = [r.value for r in self.model.run(requests, progress=self._bar)]
        shape = (len(prompts), len(variants))
        correct = np.array([s.correct for s in scores]).reshape(shape).T
        logprob = np.array([s.logprob for s in scores]).reshape(shape).T
        return AnswerScores(correct, logprob)

    def right(
        self,
        prompts: Sequence[IclPrompt],
        variants: Sequence[Sequence[Edit]] = ((),),
        *,
        match: Match = "first",
    ) -> Bools:
        """(n_variants, n_prompts): whether the answer is right by its first token, or whether the
        whole answer is, generated greedily. Raises `UsageError` for an unknown match."""
        if match == "first":
            return self.scores(prompts, variants).correct
        if match != "exact":
            raise UsageError(f"unknown match {match!r}; known: {', '.join(get_args(Match))}")
        rows = []
        for edits in variants:
            texts = self.answers_of(prompts, edits)
            rows.append(
                [
                    exact_match(t, p.query.outputs, self.format.end)
                    for t, p in zip(texts, prompts, strict=True)
                ]
            )
        return np.array(rows, np.bool_)

    def accuracy(
        self,
        prompts: Sequence[IclPrompt],
        edits: Edit | Sequence[Edit] = (),
        *,
        match: Match = "first",
    ) -> Accuracy:
        """Share of right answers."""
        return accuracy(self.right(prompts, [one_or_more(edits, Edit)], match=match)[0])

    def answers_of(
        self, prompts: Sequence[IclPrompt], edits: Edit | Sequence[Edit] = ()
    ) -> list[str]:
        """What the model writes, greedily: as many tokens as the longest right answer has, and
        two more."""
        requests = []
        for p in prompts:
            n = max(len(self._answer_ids(p.query, o)) for o in p.query.outputs)
            requests.append(
                Request(p.tokens, one_or_more(edits, Edit), logits=None, n_predict=n + 2)
            )
        results = self.model.run(requests, progress=self._bar)
        return [self.model.text(r.tokens) for r in results]


def mean_of_right(rows: Array, right: Bools) -> Array:
    """The mean of rows (n, …) over those that are right, or over all if none is."""
    return (rows[right] if right.any() else rows).mean(0, dtype=np.float64).astype(np.float32)


def head_edit(head: Head, mean: Array) -> Edit:
    """Replaces a head's output at the last token of a prompt by its mean (head_dim,)."""
    return Edit(Site("head_out", head.layer), "replace", mean, tokens=-1, heads=[head.head])


def best_of(scores: AnswerScores) -> int:
    """The variant with the best accuracy; of several, the best mean log-probability."""
    return int(np.lexsort((scores.logprob.mean(1), scores.correct.mean(1)))[-1])
