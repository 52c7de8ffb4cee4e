"""Saved results on one page, in a browser; what is no result is named."""

import json
import re
from pathlib import Path
from typing import Any

import chromium
import pytest
from commands import refused, run
from one_prompt import PROMPT

from mia.errors import FileError, UsageError
from mia.methods.results import results

EVIL = "</script><script>globalThis.boom = 1</script><img src=x onerror='globalThis.boom = 2'>"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIA_MODEL", str(tiny("llama").model.facts.path))
    return tmp_path


def _hostile(value: Any) -> Any:
    """A document all of whose texts, and names of the entries within, are hostile."""
    if isinstance(value, dict):
        return {k: _hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_hostile(v) for v in value]
    return EVIL if isinstance(value, str) else value


def test_results_of_several_commands_are_one_page(folder: Path) -> None:
    made = {
        "sweep": ("-p", PROMPT, "--zero", "--answer", " of"),
        "logit-lens": ("l_out", "-p", PROMPT),
        "tokens": ("-p", PROMPT),
    }
    for name, words in made.items():
        run(name, *words, "-o", f"{name}.json", "-q")
    sweep = json.loads(Path("sweep.json").read_text())
    hostile = {k: _hostile(v) for k, v in sweep.items() if k != "run"}
    hostile["axes"] = [
        {**a, "name": EVIL, "labels": [EVIL] * len(a["values"])} for a in sweep["axes"]
    ]
    Path("evil.json").write_text(json.dumps(hostile))
    Path("own.json").write_text(json.dumps({"model": {"name": EVIL}, EVIL: [{EVIL: EVIL}]}))
    files = [*(f"{name}.json" for name in made), "evil.json", "own.json"]
    assert run("report", *files, "--title", EVIL, "-o", "report.html").stdout == ""
    page = Path("report.html").read_text()
    for name in made:
        assert f"mia {name} · " in page and f"({name}.json)" in page
    assert page.count("To run it again") == 3
    if chromium.PROGRAM is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    with chromium.browser(folder / "profile") as tab:
        tab.open((folder / "report.html").as_uri())
        assert tab.value("globalThis.boom ?? null") is None and tab.errors == []
        assert tab.value("document.scripts.length") == 1 and len(tab.requests) == 1
        assert tab.value("document.title") == EVIL
        assert tab.value("document.querySelectorAll('img').length") == 0
        assert tab.value("document.querySelectorAll('table.map').length") == 2
        assert tab.value("document.querySelectorAll('table.lens').length") == 1
        cell = "document.querySelector('table.map td')"
        tab.value(f"{cell}.focus()")
        said = tab.value(f"{cell}.closest('figure').querySelector('.chosen').innerText")
        assert "mia sweep --answer ' of'" in said and "--layers=0 --token-idx=0" in said


def test_they_are_listed_without_a_file() -> None:
    run("tokens", "-p", "The cat", "-o", "t.json", "-q")
    Path("own.json").write_text('{"model": {"name": "m"}}')
    listed = run("report", "t.json", "own.json").stdout.splitlines()
    assert listed[0].startswith("t.json  llama  mia tokens ") and "--prompt 'The cat'" in listed[0]
    assert listed[1] == "own.json  m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x.json is not JSON"),
        ("[1]", "x.json is no result of a command"),
        ('{"a": 1}', "x.json is no result of a command"),
        ('{"lens": 3}', "x.json is no result of a command: its entries do not belong together"),
        ('{"run": {"command": 3}}', "x.json is no result of a command: run.command is 3"),
        ("[" * 100_000, "x.json is not JSON"),
    ],
)
def test_what_is_no_result_is_named(text: str, message: str) -> None:
    Path("x.json").write_text(text)
    run("tokens", "-p", "The cat", "-o", "t.json", "-q")
    assert message in refused("report", "t.json", "x.json", "-o", "out.html")
    assert not Path("out.html").exists()
    with pytest.raises(FileError, match=message.split(":")[0]):
        results(["t.json", "x.json"])


def test_a_command_that_is_not_there_is_left_out() -> None:
    run_ = {"command": "no such", "arguments": {"a": 1}}
    Path("x.json").write_text(json.dumps({"run": run_, "model": {"name": "m"}}))
    assert "To run it again" not in results("x.json").page()


def test_rows_of_a_sweep_are_its_map_with_commands() -> None:
    run("sweep", "-p", PROMPT, "--zero", "--answer", " of", "-o", "rows.jsonl", "-q")
    lines = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("rows.jsonl").write_text("".join(lines[:7]))  # the work was stopped
    manifest = Path("rows.jsonl.manifest.json")
    made = json.loads(manifest.read_text())
    made["run"]["arguments"]["shard"] = "1/2"
    manifest.write_text(json.dumps(made))
    (_, document, again), *_ = results("rows.jsonl").results
    values = document["values"]
    for row in map(json.loads, lines[:7]):
        assert values[row["layer"]][row["token"]] == pytest.approx(row["value"], abs=1e-6)
    assert sum(x is not None for line in values for x in line) == 7
    assert again is not None and "--shard 1/2" in again.line()
    page = results("rows.jsonl").page()
    (command,) = re.findall(r'data-command="([^"]*)"', page)
    assert "--layers=" in command and "--shard" not in command


def test_no_rows_and_no_files_are_refused() -> None:
    Path("rows.jsonl").write_text("{}")
    assert "rows.jsonl has no rows.jsonl.manifest.json" in refused("report", "rows.jsonl")
    with pytest.raises(UsageError, match="give a result"):
        results([])
    assert "cannot read none.json" in refused("report", "none.json")
