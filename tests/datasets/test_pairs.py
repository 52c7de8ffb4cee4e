"""Contrast pairs: each kind of file, and files that are broken."""

import json
from pathlib import Path

import pytest

from mia.datasets.pairs import ContrastPair, load_pairs, select_pairs
from mia.errors import FileError, MiaError


def test_pairs_from_each_kind_of_file(tmp_path: Path) -> None:
    want = [ContrastPair("a, b", "c"), ContrastPair("d", 'e "f"')]
    (tmp_path / "p.jsonl").write_text(
        '{"positive": "a, b", "negative": "c"}\n\n{"positive": "d", "negative": "e \\"f\\""}\n'
    )
    (tmp_path / "p.csv").write_text('negative,positive\nc,"a, b"\n"e ""f""",d\n')
    (tmp_path / "pos.txt").write_text("a, b\n\nd\n\n")
    (tmp_path / "neg.txt").write_text('c\n \ne "f"\n')
    assert load_pairs(tmp_path / "p.jsonl") == want
    assert load_pairs(tmp_path / "p.csv") == want
    assert load_pairs(tmp_path / "pos.txt", tmp_path / "neg.txt") == want
    rows = [{"positive": p.positive, "negative": p.negative} for p in want]
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    assert load_pairs(tmp_path / "p.json") == want
    (tmp_path / "i.jsonl").write_text('{"positive": "a", "negative": "b", "read_positive": -2}\n')
    assert load_pairs(tmp_path / "i.jsonl") == [ContrastPair("a", "b", -2, None)]
    assert len(load_pairs("french")) >= 60


def test_marks_of_other_editors_are_read(tmp_path: Path) -> None:
    """A BOM in front, and line separators that are part of a text."""
    bom = "\ufeff"
    want = [ContrastPair("a\u2028b", "c\x0cd"), ContrastPair("e", "f")]
    rows = [{"positive": p.positive, "negative": p.negative} for p in want]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    for name, text in {
        "p.jsonl": "\n".join(lines),
        "p.json": f"[{','.join(lines)}]",
        "p.csv": "positive,negative\na\u2028b,c\x0cd\ne,f\n",
        "pos.txt": "a\u2028b\ne",
        "neg.txt": "c\x0cd\nf",
    }.items():
        (tmp_path / name).write_text(bom + text, encoding="utf-8")
    for name in ("p.jsonl", "p.json", "p.csv"):
        assert load_pairs(tmp_path / name) == want, name
    assert load_pairs(tmp_path / "pos.txt", tmp_path / "neg.txt") == want


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"p.jsonl": ""}, "p.jsonl is empty"),
        ({"p.csv": "positive,negative\n"}, "p.csv is empty"),
        ({"p.jsonl": '{"positive": "a"}'}, "line 1: there is no text 'negative'"),
        ({"p.csv": "positive,other\na,b\n"}, "row 1: there is no text 'negative'"),
        ({"p.jsonl": "[1"}, "line 1 is not JSON"),
        ({"p.jsonl": "1"}, "line 1: there is no text 'positive'"),
        ({"p.jsonl": "[1]"}, "item 0: there is no text 'positive'"),
        ({"p.csv": "positive,negative\na,b\nc,d,e\n"}, "row 2 has more fields than the header"),
        ({"p.csv": f"positive,negative\na,{'b' * 140000}\n"}, "is not CSV that can be read"),
        ({"a.txt": "x\n\ny\n", "b.txt": "z\nw\n"}, "a.txt, line 2 is blank, but that of .*b.txt"),
        ({"a.txt": "x\ny\nz\n", "b.txt": "z\n\nw\n"}, "b.txt, line 2 is blank"),
        ({"a.txt": "x\ny\n", "b.txt": "z\n"}, "has 2 texts and .*b.txt has 1"),
        ({"a.txt": "x\n", "b.txt": ""}, "b.txt is empty"),
        ({"a.txt": "x", "b.txt": "y", "c.txt": "z"}, "one file or two, got 3 files"),
    ],
)
def test_broken_pairs_are_one_clear_line(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(MiaError, match=message) as err:
        load_pairs(*(tmp_path / name for name in files))
    assert "\n" not in str(err.value)


def test_no_file() -> None:
    with pytest.raises(FileError, match=r"no file nowhere.*shipped: .*sentiment"):
        load_pairs("nowhere")


def test_a_selection_knows_its_files(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"positive": "a", "negative": "b"}\n' * 3)
    selection = select_pairs(tmp_path / "p.jsonl")
    assert selection.items == (ContrastPair("a", "b"),) * 3 and selection.range == "0..2"
    metadata = selection.metadata()
    assert metadata["data"] == "p.jsonl" and metadata["items"] == "0..2"
    assert select_pairs("french").paths[0].name == "french.jsonl"
