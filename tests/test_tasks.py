"""Tasks: three file formats, prompts, splits; and `mia tasks`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mia import tasks
from mia.cli import app
from mia.errors import FileError, RangeError, UsageError
from mia.tasks import FORMATS, Format, Pair, Task


def _pairs(n: int) -> tuple[Pair, ...]:
    return tuple(Pair(f"in{i}", (f"out{i}",)) for i in range(n))


def test_every_task_of_the_index_loads() -> None:
    for entry in tasks.index():
        task = tasks.load(entry["name"])
        assert (task.family, len(task.pairs)) == (entry["family"], entry["count"])
        assert len({p.input for p in task.pairs}) == len(task.pairs)


def test_compositions_name_tasks_that_there_are() -> None:
    names = {e["name"] for e in tasks.index()}
    found = tasks.compositions()
    assert len(found) >= 4
    for c in found:
        assert {c.ac, c.bc, c.bd, c.ad} <= names
    assert tasks.composition(found[0].name) == found[0]
    with pytest.raises(UsageError, match=f"unknown composition 'x'; known: {found[0].name}"):
        tasks.composition("x")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"input": "a", "output": "b"}\n\n{"input": 1, "output": ["x", "y", "x"]}\n'),
        ("a.json", '[{"input": "a", "output": "b"}, {"input": 1, "output": ["x", "y"]}]'),
        ("b.json", '{"a": "b", "1": ["x", "y"]}'),
    ],
)
def test_three_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    task = tasks.load(tmp_path / name)
    assert task.name == name[0]
    assert task.pairs == (Pair("a", ("b",)), Pair("1", ("x", "y")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no pairs"),
        ("{}", "has no pairs"),
        ("nonsense", "line 1 is not JSON"),
        ('{"input": "a", "output": "b"}\n{"input": "a"}', 'line 2 is not an object with "input"'),
        ('[{"input": "a", "output": []}]', "item 0 has an empty input or output"),
        ('{"a": {"b": 1}}', "key 'a'"),
    ],
)
def test_damaged_files_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=message):
        tasks.load(tmp_path / "a.json")


def test_unknown_tasks_and_files() -> None:
    with pytest.raises(UsageError, match="unknown task 'antonyms'; give a"):
        tasks.load("antonyms")
    with pytest.raises(FileError, match="cannot read the task /nowhere/a"):
        tasks.load("/nowhere/a.json")


def test_formats_write_prompts_to_the_letter() -> None:
    pairs = [Pair("hot", ("cold", "cool")), Pair("up", ("down",))]
    assert FORMATS["qa"].prompt(pairs, "big") == "Q: hot\nA: cold\n\nQ: up\nA: down\n\nQ: big\nA:"
    assert FORMATS["arrow"].prompt(pairs, "big") == "hot -> cold, up -> down, big ->"
    assert FORMATS["qa"].answer("small") == " small" and FORMATS["arrow"].end == ", "
    tight = tasks.read_format("{input}={output};")
    assert (tight.query("a"), tight.answer("b"), tight.end) == ("a=", "b", ";")
    assert FORMATS["qa"].prompt([], "{output}") == "Q: {output}\nA:"


@pytest.mark.parametrize(
    "text", ["{output} {input}", "{input}", "{input} {output} {output}", "x{y}"]
)
def test_formats_need_both_places(text: str) -> None:
    with pytest.raises(UsageError, match="once after it"):
        Format(text)
    with pytest.raises(UsageError, match="unknown format 'qaa'; known: qa, arrow"):
        tasks.read_format("qaa")


def test_a_split_shares_nothing_and_repeats_itself() -> None:
    task = Task("t", _pairs(50))
    a, b, c = (tasks.split(task, np.random.default_rng(s), n_test=20, n_dev=7) for s in (3, 3, 4))
    assert a == b != c
    assert [len(a.train), len(a.dev), len(a.test)] == [23, 7, 20]
    assert {*a.train, *a.dev, *a.test} == set(task.pairs)
    most = tasks.split(task, np.random.default_rng(0), n_test=100, n_dev=100)
    assert [len(most.train), len(most.dev), len(most.test)] == [10, 10, 30]
    with pytest.raises(RangeError, match="t has 4 pairs; at least 5"):
        tasks.split(Task("t", _pairs(4)), np.random.default_rng(0))
    with pytest.raises(RangeError, match="0 test and 1 dev"):
        tasks.split(task, np.random.default_rng(0), n_test=0, n_dev=1)


def test_draw_never_takes_the_query() -> None:
    pool = _pairs(6)
    for seed in range(20):
        drawn = tasks.draw(pool, 5, np.random.default_rng(seed), without="in2")
        assert set(drawn) == set(pool) - {pool[2]}
    with pytest.raises(RangeError, match="6 examples are asked for; 5 are left"):
        tasks.draw(pool, 6, np.random.default_rng(0), without="in2")


@pytest.mark.parametrize("n", [2, 3, 10])
def test_shuffled_leaves_no_answer_where_it_was(n: int) -> None:
    pairs = _pairs(n)
    for seed in range(10):
        dealt = tasks.shuffled(pairs, np.random.default_rng(seed))
        assert [p.input for p in dealt] == [p.input for p in pairs]
        assert {p.outputs for p in dealt} == {p.outputs for p in pairs}
        assert all(a.outputs != b.outputs for a, b in zip(dealt, pairs, strict=True))
    assert tasks.shuffled(pairs[:1], np.random.default_rng(0)) == list(pairs[:1])


def _run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["tasks", *words])
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def test_cli_lists_shows_and_prompts(tmp_path: Path) -> None:
    listed = json.loads(_run("--json").stdout)
    assert [e["name"] for e in listed["tasks"]] == [e["name"] for e in tasks.index()]
    assert listed["compositions"][0].keys() == {"name", "AC", "BC", "BD", "AD"}
    plain = _run().stdout.splitlines()
    assert len(plain) == len(listed["tasks"]) and plain[0].startswith("country_capital ")

    file = tmp_path / "mine.json"
    file.write_text('{"a": ["b", "c"], "d": "e", "f": "g"}')
    assert _run(str(file)).stdout == "a\tb | c\nd\te\nf\tg\n"
    shown = json.loads(_run(str(file), "--json").stdout)
    assert shown["pairs"][0] == {"input": "a", "output": ["b", "c"]}

    made = json.loads(
        _run(
            str(file), "--prompt", "--shots", "2", "--format", "{input}>{output}\\n", "--json"
        ).stdout
    )
    lines = made["prompt"].split("\n")
    assert (
        len(lines) == 3 and lines[2].endswith(">") and made["answers"] in (["b", "c"], ["e"], ["g"])
    )
    assert _run("nope", code=1).stderr.startswith("mia: unknown task 'nope'")
    assert "3 examples are asked for" not in _run(str(file), "--prompt", "--shots", "2").stdout
