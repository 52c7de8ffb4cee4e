"""The demo: its text and its table; on smollm2 itself in tests/test_smollm2.py."""

import io

import pytest
from rich.console import Console
from tiny import Tiny

from mia.edits import Edit
from mia.methods import demo
from mia.methods.demo import SITE, SOURCE, Answer, Demo
from mia.model import Model


@pytest.fixture
def report(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """The demo on the tiny model, which has three layers."""
    monkeypatch.setattr("mia.model.Model", lambda _, bos: Model(llama.path, bos=bos, threads=1))
    monkeypatch.setattr(demo, "SITE", "l_out-1")
    monkeypatch.setattr(demo, "_FIRST", 1)
    return demo.demo()


def test_the_patched_run_is_what_patch_gives(report: Demo, llama: Tiny) -> None:
    m = llama.model
    source = m.tokenize(SOURCE, bos=True)
    assert report.n_source == len(source)
    task = m.look(source, "l_out-1")[-1]
    for answer in report.answers:
        ids = m.tokenize(f"Q: {answer.query}\nA:", bos=True)
        patched = m.generate(ids, 1, edits=[Edit("l_out-1", "replace", task, tokens=-1)])
        assert (answer.plain, answer.patched) == (m.generate(ids, 1).text, patched.text)
    assert [row.layer for row in report.lens.lens] == [1, 2]
    assert report.lens.lens[-1].top[0]["text"] == report.answers[0].patched


def test_the_text_tells_the_story(report: Demo) -> None:
    lines = report.plain().splitlines()
    assert lines[0].startswith(f"Five questions and four answers, {report.n_source} tokens;")
    assert lines[2].startswith("  Q: Egypt A: Cairo  Q: Norway A: Oslo")
    assert lines[6].startswith("  Q: France   A:   plain ->") and "patched ->" in lines[6]
    assert lines[-2].startswith("  l_out-1  ") and lines[-1].count("|") == 3
    screen = Console(width=100, file=io.StringIO())
    screen.print(report.table(100))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "Q: Russia   A:" in text and "l_out-2" in text and "|" not in text


def test_the_document_has_the_answers() -> None:
    assert SITE == "l_out-21"
    assert Answer("France", " a", " b").document() == {
        "query": "France",
        "plain": " a",
        "patched": " b",
    }
