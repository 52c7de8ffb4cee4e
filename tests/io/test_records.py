"""Records: rounds of results, kept whole or not at all."""

import json
from pathlib import Path

import pytest

from mia.errors import FileError
from mia.io import runs
from mia.io.records import Records

WORK = {"record": "test", "seed": 1}


def test_rounds_are_kept_and_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = Records(path, WORK)
    records.add([{"x": 1.25}, {"x": None}])
    records.add([{"x": 0.1}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        WORK,
        {"round": 0, "of": 2, "x": 1.25},
        {"round": 0, "of": 2, "x": None},
        {"round": 1, "of": 1, "x": 0.1},
    ]
    again = Records(path, WORK)
    assert again.rounds == records.rounds and len(again.rounds) == 2
    assert again.rounds[1][0]["x"] == 0.1


@pytest.mark.parametrize("cut", [1, 3, 25, 40])
def test_what_a_killed_process_has_left_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    first, second = [{"x": 1}, {"x": 2}], [{"x": 3}, {"x": 4}]
    records = Records(path, WORK)
    records.add(first)
    one = path.read_bytes()
    records.add(second)
    whole = path.read_bytes()
    assert cut < len(whole) - len(one)
    path.write_bytes(whole[:-cut])
    again = Records(path, WORK)
    assert len(again.rounds) == 1 and path.read_bytes() == one
    again.add(second)
    assert path.read_bytes() == whole


def test_rounds_that_are_not_wanted_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = Records(path, WORK)
    for i in range(3):
        records.add([{"x": i}])
    records.keep(1)
    records.keep(5)
    records.add([{"x": 9}])
    assert [r[0]["x"] for r in Records(path, WORK).rounds] == [0, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"record": "test", "seed": 2}\n', "made with another seed .2, here it is 1."),
        ('{"record": "test", "seed": 1, "more": 3}\n', "made with another more"),
        ('{"record": "other", "seed": 1}\n', "no record of this kind"),
        ("hello\n", "no record of this kind"),
        ("", "no record of this kind"),
        ('{"record": "test", "seed": 1}\nhello\n', "a line that is no result: b'hello'"),
        ('{"record": "test", "seed": 1}\n[1]\n', "a line that is no result"),
    ],
)
def test_other_files_are_refused_and_stay(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(FileError, match=message):
        Records(path, WORK)
    assert path.read_text() == text


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        Records(tmp_path / "none" / "r.jsonl", WORK)


def test_without_a_path_and_in_a_replay_nothing_is_written(tmp_path: Path) -> None:
    Records(None, WORK).add([{"x": 1}])
    path = tmp_path / "r.jsonl"
    with runs.recorded(runs.Replay()):
        records = Records(path, WORK)
        records.add([{"x": 1}])
        records.keep(0)
    assert not path.exists() and records.rounds == []


def test_a_manifest_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Records(path, WORK)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    Records(path, WORK).add([{"x": 1}])
    assert Records(path, WORK).rounds == [[{"round": 0, "of": 1, "x": 1}]]
