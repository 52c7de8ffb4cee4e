"""-o writes by the ending of the file's name: the document, the rows, a page or a picture."""

import csv
import html
import json
import re
from pathlib import Path

import pytest
from commands import document, refused, run
from letters import NEXT, WORDS
from one_prompt import PROMPT

from mia.methods.logit_lens import logit_lens
from mia.model import Model

LENS = ("logit-lens", "l_out", "-p", PROMPT, "-k", "2")
#: commands with a picture, and one for each kind of page
DRAWN = [
    LENS,
    ("sweep", "-p", PROMPT, "--zero", "--answer", " of", "--null", "2"),
    ("attribute", "-p", PROMPT, "--answer", " of"),
    ("ablate", "-p", PROMPT, "--answer", " of"),
    ("heads", "-p", PROMPT),
    ("attention", "-p", PROMPT, "--layers", "1"),
]
PLAIN = [("tokens", "-p", PROMPT), ("sites",), ("run", "-p", PROMPT, "-n", "2"), ("tasks",)]


def test_a_json_is_the_document() -> None:
    result = run(*LENS, "-o", "x.json")
    assert result.stdout == "" and "mia: wrote x.json\n" in result.stderr
    saved = json.loads(Path("x.json").read_text())
    assert saved.pop("run")["command"] == "logit-lens"
    shown = document(*LENS)
    del shown["run"]
    assert saved == shown


def test_a_csv_has_the_rows(path: Path) -> None:
    run(*LENS, "--bos", "-o", "x.CSV")
    with Path("x.CSV").open(newline="") as f:
        rows = list(csv.DictReader(f))
    with Model(path, threads=1) as m:
        expected = logit_lens(m, m.ids(PROMPT, bos=True), "l_out", 2).rows()
    names = dict.fromkeys(k for row in expected for k in row)
    assert rows == [{k: str(row.get(k, "")) for k in names} for row in expected]


@pytest.mark.parametrize(
    ("words", "name", "start"),
    [
        (DRAWN[0], "x.png", b"\x89PNG"),
        (DRAWN[1], "x.PDF", b"%PDF"),
        (DRAWN[2], "x.svg", b"<?xml"),
    ],
)
def test_a_picture_has_the_kind_of_its_ending(
    words: tuple[str, ...], name: str, start: bytes
) -> None:
    assert run(*words, "-o", name).stdout == ""
    assert Path(name).read_bytes().startswith(start)


@pytest.mark.parametrize("words", [DRAWN[1], DRAWN[-1], PLAIN[0], PLAIN[2]], ids=lambda w: w[0])
def test_a_page_is_one_file(words: tuple[str, ...]) -> None:
    assert run(*words, "-o", "x.html").stdout == ""
    page = Path("x.html").read_text()
    assert page.startswith("<!doctype html>") and not re.search(r"(?:src|href)=.?https?:", page)
    if words[0] != "attention":  # which has a page of its own
        assert "To run it again" in page and f"mia {words[0]}" in page
    if words[0] == "sweep":  # each cell has its command
        command = re.search(r'data-command="([^"]*)"', page)
        assert command is not None
        start, *places = json.loads(html.unescape(command[1]))
        assert places == [" --layers=", 0, " --token-idx=", 1]
        assert start.startswith("mia sweep --answer ' of' --null 2 ") and "--zero" in start


@pytest.mark.parametrize("words", [*DRAWN, *PLAIN], ids=lambda w: w[0])
def test_other_endings_are_refused_before_any_work(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIA_MODEL", "no-such-model")
    own = {"attention": ", .safetensors", "sweep": ", .jsonl"}.get(words[0], "")
    pictures = ", .png, .svg, .pdf" if words in DRAWN else ""
    ends = f"its name must end in .json, .csv, .html{pictures}{own}"
    assert refused(*words, "-o", "x.txt") == f"cannot write x.txt: {ends}"
    assert refused(*words, "-o", "x") == f"cannot write x: {ends}"
    if not pictures:
        said = refused(*words, "-o", "x.png")
        assert said == f"cannot write x.png: the result has no picture; {ends}"
    assert not list(Path().glob("x*"))


def test_a_command_that_computes_curves_for_a_picture_is_told_of_it() -> None:
    """`task-vector eval` has accuracies by layer only if there will be a picture."""
    Path("next.json").write_text(json.dumps(NEXT))
    words = ("task-vector", "eval", "next.json", "--sets", "1", "--dummies", "2", *WORDS)
    run(*words, "-o", "x.png", "-q")
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_plot_and_out_write_two_files() -> None:
    assert run(*LENS, "-o", "x.json", "--plot", "x.png").stdout == ""
    assert Path("x.json").exists() and Path("x.png").exists()


def test_the_same_from_python(path: Path, tmp_path: Path) -> None:
    with Model(path, threads=1) as m:
        report = logit_lens(m, PROMPT, "l_out", 2)
    for name in ("y.json", "y.csv", "y.html", "y.svg"):
        report.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 500
    page = (tmp_path / "y.html").read_text()
    assert 'class="lens"' in page and "To run it again" not in page
