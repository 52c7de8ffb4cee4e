"""One look-up of shipped data and one reader of data files."""

import json
from pathlib import Path

import pytest

from mia.datasets.reader import read_records
from mia.datasets.shipped import Kind, find, names, read_lines
from mia.errors import FileError


def test_shipped_data_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped: list[tuple[Kind, str, str]] = [
        ("contrast", "weddings", "weddings.jsonl"),
        ("contrast", "weddings_on", "weddings_on.txt"),
        ("ab", "refuse_vs_comply", "refuse_vs_comply.json"),
        ("tasks", "antonym", "antonym.jsonl"),
    ]
    for kind, name, file in shipped:
        assert name in names(kind) and find(name, kind).name == file
    # a shipped name means the same in every folder; a path is a file
    Path("neutral").write_text("own\n")
    assert find("neutral").suffix == ".txt" and read_lines("./neutral") == {1: "own"}
    assert "index" not in names("tasks")


@pytest.mark.parametrize(
    ("kind", "word", "shipped"),
    [("contrast", "text", "french"), ("ab", "set", "agree_vs"), ("tasks", "task", "antonym")],
)
def test_what_is_neither_is_named(kind: Kind, word: str, shipped: str) -> None:
    with pytest.raises(FileError, match=rf"no file nowhere, nor a shipped {word}.*{shipped}"):
        find("nowhere", kind)


def test_records_of_every_format(tmp_path: Path) -> None:
    rows = [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    for name, text, place in (
        ("r.jsonl", "\n".join(map(json.dumps, rows)), "line 2"),
        ("r.json", json.dumps(rows, indent=1), "item 1"),
        ("r.csv", 'a,b\n1,"x, y"\n2,\n', "row 2"),
    ):
        (tmp_path / name).write_text(text)
        records = read_records(tmp_path / name)
        assert [r for _, r in records] == rows and records[1][0] == place
    (tmp_path / "one.json").write_text('\n{"a":\n 1}')
    assert read_records(tmp_path / "one.json") == [("line 2", {"a": 1})]
    (tmp_path / "none.jsonl").write_text("\n \n")
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": ', "line 2 is not JSON"),
        ("[1", "line 1 is not JSON"),
        ("[1,\n2", r"r\.json is not JSON: .* line 2 column 2"),
        ('{"a": 1, "a": 2}', "the key 'a' has two values, 1 and 2"),
    ],
)
def test_broken_records_name_their_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FileError, match=message):
        read_records(tmp_path / "r.json")


# -- damaged on purpose ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "deep", ["[" * 100_000, '{"a":' * 100_000, '{"a": 1}\n{"b":' + "[" * 100_000]
)
def test_deep_json_is_one_clear_error(suffix: str, deep: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(deep)
    with pytest.raises(FileError, match=r"nested too deep|is not JSON") as err:
        read_records(path)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize(
    "record",
    [
        '{"input": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"a": [1, {"b": "x\\uDBFFy"}]}',
        '"\\ud83d\\ud83d"',
    ],
)
def test_half_a_character_is_refused_with_its_place(record: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "\\ud83d\\ude00"}\n' + record + "\n")
    with pytest.raises(FileError, match=r"a\.jsonl, line 2: a text has '\\u"):
        read_records(path)


def test_a_whole_character_spelled_in_halves_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "\\ud83d\\ude00"}\n{"input": "b"}\n')
    assert read_records(path)[0] == ("line 1", {"input": "😀"})
