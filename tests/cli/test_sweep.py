"""mia sweep and mia merge as a person types them: files of rows."""

import json
from pathlib import Path

import pytest
from commands import document, refused, run
from one_prompt import PROMPT

from mia.methods.sweep import load

SWEEP = ("sweep", "-p", PROMPT, "--zero", "--over", "layer,neuron", "--token-idx", "-1")


def test_rows_go_into_a_file_and_on_with_it() -> None:
    printed = run(*SWEEP, "-o", "rows.jsonl")
    assert printed.stdout == "" and printed.stderr.endswith("mia: wrote rows.jsonl\n")
    rows = Path("rows.jsonl").read_bytes()
    whole = document(*SWEEP)
    whole.pop("run")
    assert load("rows.jsonl").document() == whole
    assert [json.loads(line)["neuron"] for line in rows.splitlines()[:2]] == [0, 1]
    assert "rows.jsonl is there already" in refused(*SWEEP, "-o", "rows.jsonl")
    Path("rows.jsonl").write_bytes(rows[: len(rows) // 2])
    run(*SWEEP, "-o", "rows.jsonl", "--resume", "--plot", "map.png")
    assert Path("rows.jsonl").read_bytes() == rows and Path("map.png").exists()
    assert "null: 12, not 3" in refused(*SWEEP, "-o", "rows.jsonl", "--resume", "--null", "3")
    manifest = json.loads(Path("rows.jsonl.manifest.json").read_text())
    assert manifest["command"].startswith("mia sweep --over layer,neuron --token-idx=-1")
    assert manifest["run"]["arguments"]["zero"] is True


def test_shards_are_merged() -> None:
    more = ("--batch-mem", "1")
    run(*SWEEP, *more, "-o", "whole.jsonl")
    n = json.loads(Path("whole.jsonl.manifest.json").read_text())["settings"]["chunks"][0]
    assert n > 1
    for i in (1, 2):
        run(*SWEEP, *more, "--shard", f"{i}/2", "-o", f"{i}.jsonl")
    assert "1 of 2 shards are missing: 2/2" in refused("merge", "1.jsonl", "-o", "all.jsonl")
    says = "cannot write all.html: its name must end in .jsonl"
    assert refused("merge", "1.jsonl", "2.jsonl", "-o", "all.html") == says
    assert refused("merge", "3.jsonl", "-o", "all.jsonl") == "there is no file 3.jsonl"
    said = refused("report", "1.jsonl.manifest.json")
    assert said == "1.jsonl.manifest.json is of the rows beside it: give 1.jsonl"
    printed = run("merge", "2.jsonl", "1.jsonl", "-o", "all.jsonl").stdout
    assert Path("all.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert printed == run(*SWEEP, *more).stdout


def test_what_it_would_cost() -> None:
    text = run(*SWEEP, "--explain").stdout
    assert text.startswith("144 cells in 1 chunk\ntoken-forwards: ")
    told = document(*SWEEP, "--explain")
    n_tokens = len(document("tokens", "-p", PROMPT)["tokens"])
    assert told["token_forwards"]["one_by_one"] == 144 * n_tokens
    assert sum(told["batches"]["rows"]) == told["token_forwards"]["planned"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--resume"], "there is no file of rows to go on with"),
        (["--resume", "-o", "rows.json"], "there is no file of rows to go on with"),
        (["--shard", "3"], "shard '3' is not I/N, like 3/16"),
        (["--shard", "2/3"], "the sweep runs in 1 chunk: too few for 3 shards"),
        (["--explain", "--resume"], "--resume is of a sweep that runs"),
        (["--explain", "-o", "rows.jsonl"], "--explain writes no rows"),
        (["--explain", "--plot", "x.png"], "--plot is of a sweep that runs"),
        (["-o", "none/rows.jsonl"], "there is no folder none"),
    ],
)
def test_what_is_refused(words: list[str], says: str) -> None:
    assert says in refused(*SWEEP, *words)
    assert not Path("rows.jsonl").exists()
