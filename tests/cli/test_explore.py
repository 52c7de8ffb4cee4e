"""The command that writes a page of one text, or of two: unchanged and changed."""

import json
import re
from pathlib import Path

from commands import document, refused, run
from one_prompt import PROMPT

WORDS = ["explore", "-p", PROMPT, "-n", "4"]
CHANGED = [*WORDS, "--ablate", "1.1,2.*", "--block", "2..->1"]


def test_changes_have_a_text_of_their_own() -> None:
    plain, both = document(*WORDS), document(*CHANGED)
    assert both["tokens"] == plain["tokens"] and "changes" not in both
    assert both["changed"]["changes"].startswith("heads 1.1,2.* ablated")
    alone = document(*CHANGED, "--no-baseline")
    assert alone["tokens"] == both["changed"]["tokens"] and "changed" not in alone
    generated = document("run", *CHANGED[1:])
    written = [t["id"] for t in alone["tokens"][-4:]]
    assert written == [t["id"] for t in generated["output_tokens"]]


def test_the_page_has_both(tmp_path: Path) -> None:
    run(*CHANGED, "-o", str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    data = re.search(r'type="application/json"[^>]*>(.*?)</script>', text, re.S)
    assert data is not None
    views = json.loads(data[1])["views"]
    assert [v["label"] for v in views] == ["unchanged", "changed"]
    assert views[1]["options"] == [
        [0, ["--ablate", "1.1,2.*"]],
        [3, ["--block", "2..->1"]],
    ]


def test_what_does_nothing_is_told() -> None:
    result = run(*WORDS, "--no-baseline")
    assert "nothing is changed" in result.stderr
    assert "--patch-mode needs --patch" in refused(*WORDS, "--patch-mode", "add")
