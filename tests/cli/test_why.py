"""The command `why`: the page, the picture, what is refused."""

from pathlib import Path

from commands import document, refused, run
from one_prompt import PROMPT

from mia.model import Model

HOSTILE = "<script>x</script> The cat sat. The dog ran \x1b[2J and the cat"


def test_page_and_picture(path: Path) -> None:
    result = run("why", "-p", HOSTILE, "--spans", "words", "-o", "why.html", "--plot", "why.svg")
    assert "wrote why.html" in result.stderr and result.stdout == ""
    page = Path("why.html").read_text()
    assert "&lt;script&gt;x" in page and "<script>x" not in page and "\x1b" not in page
    assert "arguments.spans" in page  # how it was made
    assert Path("why.svg").read_text().startswith("<?xml")


def test_document(path: Path) -> None:
    found = document("why", "-p", PROMPT, "--spans", "2", "--no-parts", "--null", "3")
    assert found["cut_into"] == "2" and found["map"] is None and found["null"] == 3
    assert [s["score"] for s in found["spans"]] == sorted(
        (s["score"] for s in found["spans"]), reverse=True
    )
    with Model(path, threads=1) as m:
        n = len(m.tokenize(PROMPT))
    assert found["asking"][1] == n and found["apart"][0]["token"] == 0


def test_one_span_is_refused() -> None:
    message = refused("why", "-p", "cat", "--spans", "lines")
    assert message.startswith("the prompt is one line, which asks")
    assert "known: auto, sentences" in refused("why", "-p", PROMPT, "--spans", "pages")
