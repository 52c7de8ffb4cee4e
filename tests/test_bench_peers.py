"""The harness of `scripts/bench peers`, without the libraries: turns, checks, parts and tables."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from benchmarks.peers import report
from benchmarks.peers.contestants import (
    LIBRARIES,
    ROOT,
    Contestant,
    Running,
    chosen,
    of_library,
    of_mia,
)
from benchmarks.peers.jobs import JOBS, Check, check, inputs, write_inputs
from benchmarks.peers.rounds import Table, Timing, measure
from benchmarks.peers.weights import export
from benchmarks.peers.worker import part_of, partly, shortened, texts_of, words

#: a contestant that doubles numbers; called "wrong", it adds a tenth
FAKE = """
import sys
from benchmarks.peers.worker import Outcome, partly, serve
import numpy as np

def lens(inputs):
    print("noise of a library")
    values = 2 * inputs["x"] + (0.1 if sys.argv[1] == "wrong" else 0)
    if sys.argv[1] == "part":
        return partly(values[::2], np.arange(0, len(values), 2), len(values))
    return Outcome(lambda: {"values": values})

def capture(inputs):
    raise ValueError("no such thing")

serve({"lens": lens, "capture": capture}, {"fake": "1.0"}, sys.argv[2:])
"""


def fake(tmp_path: Path, name: str) -> Running:
    (tmp_path / "fake.py").write_text(FAKE)
    argv = [sys.executable, str(tmp_path / "fake.py"), name]
    return Running(Contestant(name, "mia", argv, name), tmp_path / f"{name}.log").wait()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[list[Running]]:
    all_of_them = [fake(tmp_path, name) for name in ("right", "wrong", "part")]
    yield all_of_them
    for r in all_of_them:
        r.close()


def test_turns(running: list[Running], tmp_path: Path) -> None:
    """What is wrong is not timed; what is done in part is scaled; libraries may print."""
    np.savez(tmp_path / "x.npz", x=np.arange(4.0))
    table = measure(
        JOBS["lens"],
        tmp_path / "x.npz",
        running,
        running[0],
        rounds=3,
        folder=tmp_path,
        part=5,
    )
    right, wrong, part = table.timings
    assert len(right.cpu) == len(right.wall) == 3 and not right.error
    assert wrong.error.startswith("wrong: 0.1") and not wrong.cpu
    assert part.scale == 2 and len(part.cpu) == 3
    assert [t.name for t in table.mias] == ["right", "part"]
    assert "noise of a library" in (tmp_path / "right.log").read_text()


def test_libraries_take_part_in_some_rounds(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(4.0))
    slow, quick = fake(tmp_path, "slow"), fake(tmp_path, "quick")
    slow.contestant = replace(slow.contestant, library="nnsight")
    try:
        table = measure(
            JOBS["lens"], tmp_path / "x.npz", [slow, quick], quick, rounds=5, folder=tmp_path
        )
    finally:
        slow.close()
        quick.close()
    assert [len(t.cpu) for t in table.timings] == [3, 5]
    assert len(table.ratios(*table.timings)) == 3


def test_a_failure_is_a_row(running: list[Running], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(4.0))
    table = measure(
        JOBS["capture"], tmp_path / "x.npz", running[:1], running[0], rounds=1, folder=tmp_path
    )
    assert [t.error for t in table.timings] == ["ValueError: no such thing"]
    assert "ValueError: no such thing" in report.detail(table)


def test_a_process_that_ends_is_said(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "raise SystemExit(3)"]
    gone = Running(Contestant("gone", "mia", argv), tmp_path / "log")
    with pytest.raises(SystemExit, match="gone does not start"):
        gone.wait()
    gone.close()


def test_check_of_numbers() -> None:
    want = {"values": np.linspace(-1, 1, 50)}
    near = {"values": want["values"] + 5e-4}
    far = {"values": want["values"] + 5e-3}
    noise = {"values": np.random.default_rng(0).normal(size=50)}
    job = JOBS["patches"]
    assert check(job, near, want, exact=True).right
    assert not check(job, far, want, exact=True).right
    assert check(job, far, want, exact=False).right
    assert not check(job, noise, want, exact=False).right
    assert not check(job, {"values": want["values"][:-1]}, want, exact=True).right
    assert not check(job, {"values": np.full(50, np.nan)}, want, exact=False).right
    part = {"values": want["values"][::7], "index": np.arange(0, 50, 7)}
    assert check(job, part, want, exact=True).difference == 0


def test_check_of_rows_is_by_their_size() -> None:
    want = {"values": np.array([[1000.0, -1000.0], [1.0, -1.0]])}
    got = {"values": want["values"] + np.array([[0.5], [0.0]])}
    assert check(JOBS["capture"], got, want, exact=True).difference == pytest.approx(5e-4)


def test_check_of_tokens() -> None:
    want, job = {"values": np.arange(8)}, JOBS["steer"]
    other = {"values": np.array([0, 1, 2, 9, 9, 9, 9, 9])}
    assert check(job, {"values": np.arange(3)}, want, exact=True).right  # the first ones
    assert not check(job, other, want, exact=True).right
    assert check(job, other, want, exact=False) == Check(5.0, 3 / 8, True)
    assert not check(job, {"values": np.arange(1, 9)}, want, exact=False).right


def test_check_of_pairs() -> None:
    rows = np.random.default_rng(0).normal(size=(12, 2, 5))
    job = JOBS["pairs"]
    want = {"values": rows[::2].mean(0) - rows[1::2].mean(0), "rows": rows}
    index = np.array([0, 4])
    some = (rows[::2] - rows[1::2])[index].mean(0)
    assert check(job, {"values": some, "index": index}, want, exact=True).right
    assert not check(job, {"values": some}, want, exact=True).right
    differences = rows[::2, 1] - rows[1::2, 1]
    centred = differences - differences.mean(0)
    best = np.linalg.svd(centred)[2][0]
    for direction, right in ((-3 * best, True), (best + 1, False)):
        got = {"principal": direction[None], "layers": np.array([1])}
        assert check(job, got, want, exact=True).right is right


def test_parts() -> None:
    assert part_of(5, 24).tolist() == [0, 1, 2, 3, 4]
    index = part_of(720, 24)
    assert 20 <= len(index) <= 30
    assert len({i % 24 for i in index.tolist()}) > 20  # as many tokens as there are
    assert partly(np.zeros(len(index)), index, 720).scale == 720 / len(index)
    assert shortened({"n_predict": np.asarray(64)}) == (16, 4.0)
    tokens = np.array([[5, 6, -1], [7, -1, -1]] * 8)
    index, texts, scale = texts_of({"tokens": tokens})
    assert index.tolist() == [0, 4] and scale == 4
    assert [t.tolist() for t in texts] == [[5, 6], [7]] * 2
    assert words(tokens[0]) == "t5 t6"


def test_names() -> None:
    assert chosen(None, ["a", "b"], "job") == ["a", "b"]
    assert chosen("b, a", ["a", "b"], "job") == ["a", "b"]
    with pytest.raises(SystemExit, match=r"unknown job 'c'; known: a, b"):
        chosen("a,c", ["a", "b"], "job")


def test_contestants() -> None:
    mias = of_mia({"given": "m", "f32": "x.gguf"}, {"given": "Q4_1 (given)", "f32": "F32"})
    assert [(c.name, c.exact) for c in mias] == [
        ("mia Q4_1 (given)", False),
        ("mia F32", True),
        ("llama.cpp Q4_1 (given)", False),
    ]
    for library in LIBRARIES:
        for c in of_library(library, Path("hf"), Path("environments")):
            module = c.argv[c.argv.index("-m") + 1]
            assert (ROOT / "scripts" / Path(*module.split("."))).with_suffix(".py").exists()
            assert c.exact is (c.name != "expert bfloat16")


def table() -> Table:
    us = Timing("mia F16", "mia", "f16", [1.0, 2.0, 1.0], [1.0, 2.0, 1.0])
    us.check = Check(0.01, 0.999, True)
    expert = Timing("expert float32", "expert", "", [2.0, 3.0, 0.8], [2.0, 3.0, 0.8])
    slow = Timing("nnsight documented", "nnsight", "", [9.0] * 3, [9.0] * 3, scale=10)
    wrong = Timing("nnsight batched", "nnsight", "", error="wrong: 3, 0.1")
    return Table(JOBS["patches"], 3, [us, expert, slow, wrong])


def test_tables() -> None:
    summary = report.summary([table()])
    lines = summary.splitlines()
    assert lines[0] == "| job | expert float32 / F16 |" and lines[2].endswith("| 1.5 |")
    assert lines[4] == "| job | nnsight documented / F16 | nnsight batched / F16 |"
    assert lines[6].endswith("| 9 | wrong |")
    detail = report.detail(table())
    assert "1/3 of it done, scaled up" in detail
    assert "| mia F16 | 1 | 1 | 1 | 0.01, 0.9990 |  |" in detail
    assert "| expert float32 | 2 | 2 | 1.5 (0.8–2) |  |  |" in detail
    assert "| nnsight documented | 9 | 9 | 9 (4.5–9) |  | 1/10 |" in detail
    process = report.Process("lens", "mia F16", [1.0, 3.0, 2.0], [0.5], [300.4])
    assert "| lens: mia F16 | 2 | 0.5 | 300 |" in report.of_processes([process])


def test_where_mia_is_behind_is_bold() -> None:
    t = table()
    t.timings[1].cpu = [0.5, 1.0, 0.5]
    assert "| **0.50** |" in report.summary([t])


def test_the_document_is_json() -> None:
    document = json.loads(json.dumps(report.document({"model": "m"}, [table()], [])))
    assert document["jobs"][0]["contestants"][1]["cpu"] == [2.0, 3.0, 0.8]


def test_tables_go_between_the_marks_of_a_page() -> None:
    page = f"# Title\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nrest\n"
    new = report.put_into(page, "new")
    assert new == page.replace("old", "new")
    with pytest.raises(SystemExit, match="once each"):
        report.put_into("# Title\n", "new")
    assert report.put_into((ROOT / "docs/performance.md").read_text(), "")  # it has them


@pytest.mark.parametrize("name", JOBS)
def test_inputs_are_read_back(name: str, llama: Tiny, tmp_path: Path) -> None:
    from benchmarks.peers.worker import read_inputs

    model = llama.model
    want: dict[str, Any] = inputs(model, name)
    got = read_inputs(str(write_inputs(model, name, tmp_path)))
    assert set(got) == set(want)
    for key, array in want.items():
        if key == "texts":
            assert len(got[key]) == 64
        else:
            np.testing.assert_array_equal(got[key], array)
    if name == "patches":
        whole = inputs(model, name, whole=True)
        assert len(whole["cells"]) == model.n_layer * 24
        assert len(want["cells"]) == len(whole["cells"]) // 3
    if name == "heads":
        assert len(inputs(model, name, size=70)["cells"]) == 70


def test_weights_for_transformers(llama: Tiny, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    export(llama.model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    q = llama.model.weights.matrix("blk.1.attn_q.weight")
    half = llama.model.head_dim // 2
    theirs = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(theirs[half], q[1])  # element 1 of a head is now behind the half
    np.testing.assert_array_equal(theirs[1], q[2])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == llama.model.n_layer
    assert config["tie_word_embeddings"] is ("lm_head.weight" not in tensors)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(llama.model.n_vocab))
