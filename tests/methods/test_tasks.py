"""What tasks there are, as reports."""

import numpy as np
import pytest

from mia.datasets import tasks as data
from mia.errors import UsageError
from mia.methods import tasks


def test_the_list_has_every_task_and_composition() -> None:
    report = tasks.overview()
    assert report.rows() == report.document()["tasks"] == data.index()
    lines = report.plain().splitlines()
    assert len(lines) == len(data.index()) + 2 + len(data.compositions())
    assert lines[-1].split()[0] == data.compositions()[-1].name


def test_pairs_are_those_of_the_task() -> None:
    report = tasks.pairs("antonym")
    assert len(report.rows()) == len(data.load("antonym").pairs)
    first = data.load("antonym").pairs[0]
    assert report.plain().splitlines()[0] == f"{first.input}\t{' | '.join(first.outputs)}"
    assert report.document()["family"] == "linguistic"


def test_a_prompt_has_examples_and_a_query_that_is_none_of_them() -> None:
    report = tasks.prompt("antonym", format="{input}>{output}\n", shots=3, seed=4)
    *examples, query = report.plain().split("\n")
    pairs = {p.input: p for p in data.load("antonym").pairs}
    assert len(examples) == 3 and query.endswith(">")
    assert query[:-1] not in {e.split(">")[0] for e in examples}
    assert tuple(report.answers) == pairs[query[:-1]].outputs
    drawn = np.random.default_rng(4).integers(len(pairs))
    assert query[:-1] == list(pairs)[drawn]
    assert tasks.prompt("antonym", shots=0).plain().count("Q:") == 1
    with pytest.raises(UsageError, match="shots must be at least 0, got -1"):
        tasks.prompt("antonym", shots=-1)
