"""Tasks: three file formats, prompts, splits."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mia.datasets import tasks
from mia.datasets.tasks import FORMATS, Format, Pair, Task
from mia.errors import FileError, RangeError, UsageError


def _pairs(n: int) -> tuple[Pair, ...]:
    return tuple(Pair(f"in{i}", (f"out{i}",)) for i in range(n))


def test_every_task_of_the_index_loads() -> None:
    for entry in tasks.index():
        task = tasks.load(entry["name"])
        assert (task.family, len(task.pairs)) == (entry["family"], entry["count"])
        assert len({p.input for p in task.pairs}) == len(task.pairs)


def test_compositions_name_tasks_that_there_are() -> None:
    names = {e["name"] for e in tasks.index()}
    shipped = tasks.compositions()
    assert len(shipped) >= 4
    for c in shipped:
        assert {c.ac, c.bc, c.bd, c.ad} <= names
    assert tasks.composition(shipped[0].name) == shipped[0]
    with pytest.raises(UsageError, match=f"unknown composition 'x'; known: {shipped[0].name}"):
        tasks.composition("x")


def test_a_composition_may_be_four_tasks() -> None:
    own = tasks.composition("antonym,uppercase,antonym,capitalize")
    assert own == tasks.Composition("capitalize", "antonym", "uppercase", "antonym", "capitalize")
    with pytest.raises(
        UsageError, match="'a,b' is not a composition; expected four tasks AC,BC,BD,AD"
    ):
        tasks.composition("a,b")
    with pytest.raises(UsageError, match="unknown task 'b'"):
        tasks.composition("antonym,b,antonym,antonym")


def test_all_stands_for_every_task_and_none_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "b"}')
    loaded = tasks.load_many(["antonym", tmp_path / "a.json", "all", "antonym"])
    names = [e["name"] for e in tasks.index()]
    assert [t.name for t in loaded] == ["antonym", "a", *(n for n in names if n != "antonym")]
    with pytest.raises(UsageError, match="unknown task 'x'"):
        tasks.load_many(["antonym", "x"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"input": "a", "output": "b"}\n\n{"input": 1, "output": ["x", "y", "x"]}\n'),
        ("a.json", '[{"input": "a", "output": "b"}, {"input": 1, "output": ["x", "y"]}]'),
        ("b.json", '{"a": "b", "1": ["x", "y"]}'),
        ("c.json", '\ufeff{"a": "b", "1": ["x", "y"]}'),
        ("c.jsonl", '\ufeff{"input": "a", "output": "b"}\r\n{"input": 1, "output": ["x", "y"]}'),
        ("d.json", '{"a": "b", "1": ["x", "y"], " a": "b"}'),
    ],
)
def test_three_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    task = tasks.load(tmp_path / name)
    assert task.name == name[0]
    assert task.pairs == (Pair("a", ("b",)), Pair("1", ("x", "y")))


def test_a_line_of_jsonl_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    text = '{"input": "a\u2028b", "output": "c\x85d"}\n{"input": "e", "output": "f"}\n'
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    assert tasks.read_pairs(tmp_path / "a.jsonl") == (
        Pair("a\u2028b", ("c\x85d",)),
        Pair("e", ("f",)),
    )


def test_a_flat_object_may_have_input_among_its_words(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "b", "c": "d", "e": "f", "g": "h", "input": "output"}')
    assert tasks.read_pairs(tmp_path / "a.json")[-1] == Pair("input", ("output",))
    (tmp_path / "a.json").write_text('{\n"input": "a",\n"output": "b"\n}')
    assert tasks.read_pairs(tmp_path / "a.json") == (Pair("a", ("b",)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no pairs"),
        ("{}", "has no pairs"),
        ("nonsense", "is not JSON: Expecting value: line 1 column 1"),
        ('{"input": "a", "output": "b"}\n{"input": ', "line 2 is not JSON"),
        ('[{"input": "a", "output": "b"},\n]', "a.json is not JSON: .*line [12] column"),
        ('{"a": "b",\n"c" "d"}', "a.json is not JSON: Expecting ':' delimiter: line 2 column 5"),
        ('{"input": "a", "output": "b"}\n["a"]', 'line 2 is not an object with "input"'),
        ('{"input": "a", "output": "b"}\n{"input": "a"}', "line 2 has no 'output'"),
        ('{"input": "a"}', "line 1 has no 'output'"),
        ('{"output": "a", "id": 3}', "line 1 has no 'input'"),
        ('[{"input": "a", "answer": "b"}]', "item 0 has no 'output'"),
        ('{"input": "a", "output": NaN}', "line 1: nan is not a finite number"),
        ('{"a": [1, -Infinity]}', "key 'a': -inf is not a finite number"),
        ('[{"input": 1e400, "output": "a"}]', "item 0: inf is not a finite number"),
        (
            '{"input": "a", "output": "b"}\n\n{"input": "a ", "output": ["b", "c"]}',
            "the input 'a' has the answer 'b' at line 1 and 'b', 'c' at line 3; if both",
        ),
        ('{"a": "b", "a ": "c"}', "'b' at key 'a' and 'c' at key 'a '"),
        ('{"a": "b", "a": "c"}', "a.json: the key 'a' has two values, 'b' and 'c'"),
        ('[{"input": "a", "output": []}]', "item 0 has an empty input or output"),
        ('{"a": {"b": 1}}', "key 'a'"),
    ],
)
def test_damaged_files_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FileError, match=message):
        tasks.load(tmp_path / "a.json")


def test_unknown_tasks_and_files() -> None:
    with pytest.raises(UsageError, match="unknown task 'antonyms', did you mean antonym"):
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


def test_a_format_ends_after_the_answer() -> None:
    with pytest.raises(UsageError, match=r"'{input} to {output}' ends with {output}; .* as \\n$"):
        tasks.read_format("{input} to {output}")
    assert tasks.read_format("{input} to {output} ").end == " "


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
    with pytest.raises(RangeError, match="need at least 1 test and 1 dev query, got 0 and 1"):
        tasks.split(task, np.random.default_rng(0), n_test=0, n_dev=1)


def test_a_split_leaves_enough_to_draw_from() -> None:
    """A command over all tasks must not end at the smallest."""
    small = Task("small", _pairs(50))
    parts = tasks.split(small, np.random.default_rng(0), shots=10)
    assert (len(parts.train), len(parts.dev), len(parts.test)) == (11, 10, 29)
    same = tasks.split(small, np.random.default_rng(0), shots=9)
    assert same == tasks.split(small, np.random.default_rng(0))
    with pytest.raises(RangeError, match="small has 50 pairs, too few for a prompt of 40 examples"):
        tasks.split(small, np.random.default_rng(0), shots=40)
    for entry in tasks.index():
        tasks.split(tasks.load(entry["name"]), np.random.default_rng(0), shots=10)


def test_draw_never_takes_the_query() -> None:
    pool = _pairs(6)
    for seed in range(20):
        drawn = tasks.draw(pool, 5, np.random.default_rng(seed), without="in2")
        assert set(drawn) == set(pool) - {pool[2]}
    with pytest.raises(
        RangeError, match=r"need 6 examples, only 5 available: ask for fewer shots, or"
    ):
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


def _still_right(dealt: list[Pair], pairs: list[Pair]) -> int:
    return sum(bool({*a.outputs} & {*b.outputs}) for a, b in zip(dealt, pairs, strict=True))


def test_shuffled_leaves_few_right_answers_where_many_are_the_same() -> None:
    """A class of k among n pairs leaves at least 2 k - n of them right."""
    for k, least in ((2, 0), (4, 0), (5, 0), (7, 4), (10, 10)):
        pairs = [Pair(f"in{i}", ("x", str(i)) if i < k else (str(i),)) for i in range(10)]
        for seed in range(10):
            dealt = tasks.shuffled(pairs, np.random.default_rng(seed))
            assert [p.input for p in dealt] == [p.input for p in pairs]
            assert sorted(p.outputs for p in dealt) == sorted(p.outputs for p in pairs)
            assert least <= _still_right(dealt, pairs) <= least + (k == 5)  # few deals leave none
            assert dealt == tasks.shuffled(pairs, np.random.default_rng(seed))


def test_shuffled_continents_are_wrong() -> None:
    pool, left, least = tasks.load("country_continent").pairs, 0, 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        pairs = tasks.draw(pool, 10, rng)
        left += _still_right(tasks.shuffled(pairs, rng), pairs)
        most = max(Counter(p.output for p in pairs).values())
        least += max(2 * most - 10, 0)
    assert least <= left <= least + 5  # of 500
