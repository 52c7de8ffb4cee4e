"""Sweeps in files of rows: streamed, interrupted, resumed, in shards; what does not go together."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_file import write_lora
from tiny import Tiny

from mia.engine.dry import counted
from mia.errors import FileError, UsageError
from mia.methods.sweep import explain, load, merge, sweep
from mia.model import Model
from mia.notices import MiaWarning
from mia.sweeps.experiments import Ablation, Patching, PathPatching, Steering
from mia.sweeps.manifest import manifest_path
from mia.sweeps.work import Task, Work
from mia.vectors import Vector

#: makes chunks of a few cells
SMALL = 60_000
#: a metric that takes its time, and sees what is written meanwhile
METRICS = """
import os, time
from pathlib import Path
PATH, SEEN, DELAY = None, [], float(os.environ.get("DELAY", 0))
def first(logits):
    time.sleep(DELAY)
    if PATH is not None:
        SEEN.append(Path(PATH).read_bytes())
    return float(logits[-1, 5])
"""


def prompts(case: Tiny) -> tuple[list[int], list[int]]:
    return case.prompt(6, seed=4), case.prompt(6, seed=5)


def run(case: Tiny, path: Path | None = None, **options: Any) -> Any:
    clean, corrupted = prompts(case)
    options = {"metric": "kl", "memory": SMALL, "null": 4, **options}
    return sweep(case.model, clean, Patching(corrupted), rows=path, **options)


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of `METRICS`."""
    (tmp_path / "slow_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    import slow_metrics  # type: ignore[import-not-found]

    yield slow_metrics
    del sys.modules["slow_metrics"]


def test_a_file_has_the_numbers_of_the_report(case: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    done = run(case, path)
    assert len(Work(case.model, Task(prompts(case)[0], Ablation(), ["token"])).chunks) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["run"], x["layer"], x["token"]) for x in lines] == [
        (0, i, j) for i, j in np.ndindex(*done.values.shape)
    ]
    assert [x["value"] for x in lines] == done.values.ravel().tolist()
    assert lines[0]["source"] == done.source
    assert sum("null" in x for x in lines) == 4
    read = load(path)
    assert read.document() == done.document() and read.plain() == done.plain()
    np.testing.assert_array_equal(read.values, done.values)
    manifest = json.loads(manifest_path(path).read_text())
    assert manifest["rows"] == done.values.size and manifest["shard"] is None
    assert manifest["model"]["sha256"] == case.model.file_hash
    # in memory, and in one chunk, the same
    np.testing.assert_array_equal(run(case).values, done.values)
    np.testing.assert_allclose(run(case, memory=1 << 28).values, done.values, atol=1e-5)


def test_rows_are_written_as_they_are_known(llama: Tiny, tmp_path: Path, metrics: Any) -> None:
    metrics.PATH = path = tmp_path / "rows.jsonl"
    path.touch()
    many = {"over": "layer,token,neuron", "neurons": "0..9", "memory": 1 << 28}
    run(llama, path, metric="slow_metrics:first", **many)
    whole = path.read_bytes()
    counts = [seen.count(b"\n") for seen in metrics.SEEN]
    assert all(whole.startswith(seen) for seen in metrics.SEEN)
    assert counts == sorted(counts) and len(set(counts)) > 1  # of one chunk


def test_several_runs_go_together_and_are_told_apart(llama: Tiny, tmp_path: Path) -> None:
    m, tokens = llama.model, llama.prompt(6, seed=4)
    noisy = Patching(noise_on=m.detokenize(tokens[2:3]), draws=3)
    options: dict[str, Any] = {"metric": "kl", "null": 2}
    done = sweep(m, tokens, noisy, rows=tmp_path / "a.jsonl", **options)
    task = Task(tokens, noisy, ["layer", "token"], metric="kl")
    assert [len(chunk) for chunk in Work(m, task).chunks] == [3]
    assert done.n_runs == 3 and done.low is not None
    assert load(tmp_path / "a.jsonl").document() == done.document()
    cut = sweep(m, tokens, noisy, memory=SMALL, **options)
    np.testing.assert_allclose(cut.values, done.values, atol=1e-5)
    assert cut.low is not None
    np.testing.assert_allclose(cut.low, done.low, atol=1e-5)
    first = sweep(m, tokens, noisy, memory=SMALL, shard="1/2", **options)
    seen = np.isfinite(first.values)
    assert first.low is None and seen.any()
    mean = done.values[~seen].size  # some cells are of the other shard alone, or there are none
    assert mean == done.values.size - first.n_known


# -- interrupted ---------------------------------------------------------------------------

CHILD = """
import sys
from mia.model import Model
from mia.notices import MiaWarning
from mia.methods.sweep import sweep
from mia.sweeps.experiments import Patching
path, rows, clean, corrupted = sys.argv[1], sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
with Model(path, threads=1) as m:
    sweep(m, clean, Patching(corrupted), over="layer,token,neuron", neurons="0..5", rows=rows,
          metric="slow_metrics:first", memory=200_000, resume=True)
"""


def test_a_sweep_that_was_killed_gives_the_same_file(
    llama: Tiny, tmp_path: Path, metrics: Any
) -> None:
    clean, corrupted = prompts(llama)
    whole, path = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    options: dict[str, Any] = {"over": "layer,token,neuron", "neurons": "0..5", "memory": 200_000}
    options |= {"metric": "slow_metrics:first"}
    sweep(llama.model, clean, Patching(corrupted), rows=whole, **options)
    size, rng = whole.stat().st_size, random.Random(7)
    argv = [sys.executable, "-c", CHILD, str(llama.path), str(path), str(clean), str(corrupted)]
    folder = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{folder}:{tmp_path}", "DELAY": "0.008"}
    for moment in sorted(rng.random() for _ in range(5)):
        with subprocess.Popen(argv, env=env) as child:
            while not path.exists() or path.stat().st_size < moment * size:
                time.sleep(0.001)
                assert child.poll() is None
            time.sleep(rng.random() * 0.01)
            child.send_signal(signal.SIGKILL)
        assert whole.read_bytes().startswith(path.read_bytes()) and path.stat().st_size < size
        assert 0 < load(path).n_known < 108
    with path.open("ab") as f:
        f.write(b'{"run": 0, "la')  # half a line
    done = sweep(llama.model, clean, Patching(corrupted), rows=path, resume=True, **options)
    assert path.read_bytes() == whole.read_bytes()
    assert done.document() == load(whole).document()


def test_what_is_done_is_not_done_again(llama: Tiny, tmp_path: Path, metrics: Any) -> None:
    path = tmp_path / "rows.jsonl"
    metrics.PATH = path
    run(llama, path, metric="slow_metrics:first")
    whole, n = path.read_bytes(), len(metrics.SEEN)
    run(llama, path, metric="slow_metrics:first", resume=True)
    assert len(metrics.SEEN) == n and path.read_bytes() == whole
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    run(llama, path, metric="slow_metrics:first", resume=True)
    assert 0 < len(metrics.SEEN) - n < n / 2 and path.read_bytes() == whole


def test_an_error_leaves_what_was_known(llama: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    (tmp_path / "own.py").write_text(
        "n = 0\ndef fails(logits):\n    global n; n += 1\n    return 1 / (n != 16)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(UsageError, match="failed: ZeroDivisionError"):
            run(llama, path, metric="own:fails")
        assert 0 < load(path).n_known < 18
        run(llama, path, metric="own:fails", resume=True)
    assert load(path).n_known == 18


# -- what does not go together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metric": "logit"}, 'metric: "kl", not "logit"'),
        ({"null": 3}, "null: 4, not 3"),
        ({"over": "layer"}, r'axes: \["layer", "token"\], not \["layer"\]'),
        ({"layers": "0,1"}, r"layer: \[0, 1, 2\], not \[0, 1\]"),
        ({"site": "mlp_out"}, 'of every cell.site: "resid_post", not "mlp_out"'),
        ({"window": 2}, "window: 1, not 2"),
        ({"memory": 1 << 28}, "chunks: "),
        ({"shard": "1/2"}, "is of the whole sweep, not of shard 1/2"),
    ],
)
def test_a_file_of_other_settings_is_not_gone_on_with(
    llama: Tiny, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    path = tmp_path / "rows.jsonl"
    run(llama, path)
    before = path.read_bytes(), manifest_path(path).read_bytes()
    if options.get("metric") == "logit":
        options = {**options, "answer": _text(llama)}
    with pytest.raises(FileError, match=says):
        run(llama, path, resume=True, **options)
    assert (path.read_bytes(), manifest_path(path).read_bytes()) == before


def _text(case: Tiny) -> str:
    pieces = map(case.model.piece, range(5, 200))
    return next(t for t in pieces if len(case.model.continuation("a", t)) == 1 and t.strip())


def test_other_experiments_and_prompts_are_other_settings(llama: Tiny, tmp_path: Path) -> None:
    m, (clean, corrupted), path = llama.model, prompts(llama), tmp_path / "rows.jsonl"
    sweep(m, clean, Patching(corrupted), rows=path, metric="kl")
    for prompt, experiment in (
        (clean, Patching(llama.prompt(6, seed=9))),
        (llama.prompt(6, seed=9), Patching(corrupted)),
        (clean, Patching(corrupted, into="clean")),
        (clean, Ablation()),
    ):
        with pytest.raises(FileError, match=r"made with other settings: (experiment|prompts)"):
            sweep(m, prompt, experiment, rows=path, metric="kl", resume=True)
    v = [Vector({1: llama.vector()}), Vector({1: 2 * llama.vector()})]
    options: dict[str, Any] = {"rows": tmp_path / "v.jsonl", "over": "layer"}
    sweep(m, clean, Steering(v[0]), **options)
    with pytest.raises(FileError, match=r"experiment\.vector\.directions\.1: "):
        sweep(m, clean, Steering(v[1]), resume=True, **options)


def test_a_file_that_is_there_or_is_written_is_left_alone(
    llama: Tiny, tmp_path: Path, metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    run(llama, path)
    with pytest.raises(FileError, match=r"rows\.jsonl is there already: resume it, or remove it"):
        run(llama, path)
    with pytest.raises(UsageError, match="no file of rows to go on with"):
        run(llama, resume=True)
    child = (
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from mia.models.copy_store import lock\n"
        "f = open(sys.argv[1], 'r+b'); assert lock(f.fileno(), exclusive=True, wait=False)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", child, str(path), str(Path(__file__).parents[2])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, text=True, **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(FileError, match="being written by another process"):
            run(llama, path, resume=True)
        other.communicate()
    run(llama, path, resume=True)


def test_files_that_are_damaged(llama: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run(llama, path)
    whole, manifest = path.read_bytes(), manifest_path(path).read_text()
    lines = whole.splitlines(keepends=True)
    for text, says in (
        (b"".join(lines[1:]), "line 1 is not the row that comes there"),
        (lines[0] + b"[]\n", "line 2 is not"),
        (lines[0] + lines[1].replace(b'"value": ', b'"value": "x", "y": '), "line 2 is not"),
        (whole + lines[-1], "more rows than its sweep has cells"),
    ):
        path.write_bytes(text)
        with pytest.raises(FileError, match=says):
            load(path)
        with pytest.raises(FileError, match=says):
            run(llama, path, resume=True)
        assert path.read_bytes() == text
    path.write_bytes(whole)
    for damaged, says in (
        ("{}", "no manifest of a sweep"),
        ("[", "no JSON"),
        ('{"format": "mia sweep rows 1"}', "has no "),
        (manifest.replace('"name": "layer"', '"name": "later"'), "later"),
        (manifest.replace('"listed"', '"lasted"'), "manifest of .* is damaged"),
    ):
        manifest_path(path).write_text(damaged)
        with pytest.raises((FileError, UsageError), match=says):
            load(path)
    manifest_path(path).unlink()
    with pytest.raises(FileError, match=r"has no rows\.jsonl\.manifest\.json beside it"):
        load(path)


# -- shards ------------------------------------------------------------------------------


def test_shards_are_merged_into_the_same_file(case: Tiny, tmp_path: Path) -> None:
    run(case, tmp_path / "whole.jsonl")
    paths = [tmp_path / f"{i}.jsonl" for i in (1, 2, 3)]
    parts = [run(case, p, shard=f"{i}/3") for i, p in enumerate(paths, 1)]
    assert sum(part.n_known for part in parts) == case.model.n_layer * 6
    assert load(paths[1]).document() == parts[1].document()
    assert f"{parts[1].n_known} of {case.model.n_layer * 6} cells" in parts[1].plain()
    out = tmp_path / "all.jsonl"
    merged = merge(paths[::-1], out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert merged.document() == load(tmp_path / "whole.jsonl").document()
    run(case, out, resume=True)  # it is the whole sweep's


def test_a_shard_tells_of_the_floor_that_it_has_measured(llama: Tiny) -> None:
    shards = [run(llama, shard=f"{i}/3", null=1) for i in (1, 2, 3)]
    assert [s.n_null for s in shards] == [0, 1, 0]
    assert "noise floor" not in shards[0].plain() and shards[0].document()["null"] == 0
    assert "(1 change by 1e-5)" in shards[1].plain()


def test_shards_that_are_none(llama: Tiny, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.jsonl" for i in (1, 2, 3)]
    for i, path in enumerate(paths, 1):
        run(llama, path, shard=f"{i}/3")
    other, whole, out = tmp_path / "other.jsonl", tmp_path / "whole.jsonl", tmp_path / "all.jsonl"
    run(llama, other, shard="2/3", null=3)
    run(llama, whole)
    half = tmp_path / "half.jsonl"
    run(llama, half, shard="1/2")
    for files, says in (
        (paths[:1], "2 of 3 shards are missing: 2/3, 3/3"),
        ([*paths, paths[0]], r"are both shard 1/3"),
        ([paths[0], other, paths[2]], "do not go together: null: 3, not 4"),
        ([*paths, half], "one of 2 shards"),
        ([whole], "is no shard"),
    ):
        with pytest.raises(FileError, match=says):
            merge(files, out)
    with pytest.raises(FileError, match="is one of the shards"):
        merge(paths, paths[0])
    paths[2].write_bytes(paths[2].read_bytes()[:-9])
    with pytest.raises(FileError, match="has 5 of its 6 rows: resume it first"):
        merge(paths, out)
    assert not out.exists()
    for shard, says in (
        ("0/3", "is not I/N"),
        ("4/3", "is not I/N"),
        ("x", "is not I/N"),
        ("1/99", "too few for 99 shards"),
    ):
        with pytest.raises(UsageError, match=says):
            run(llama, shard=shard)


# -- memory, and what a sweep costs --------------------------------------------------------


def test_less_memory_makes_smaller_chunks(llama: Tiny) -> None:
    clean, corrupted = prompts(llama)

    def sizes(memory: int, experiment: Any, **options: Any) -> list[int]:
        task = Task(clean, experiment, ["layer", "token"], memory=memory, metric="kl", **options)
        return [p.stop - p.start for chunk in Work(llama.model, task).chunks for p in chunk]

    assert sizes(1 << 28, Patching(corrupted)) == [18]
    assert sizes(150_000, Patching(corrupted)) == [6, 6, 6]  # whole layers
    assert sizes(1, Ablation()) == [1] * 18
    paths = PathPatching(corrupted, "resid_post:1,2")
    task = Task(clean, paths, ["layer", "head"], site="head_out", memory=150_000, metric="kl")
    assert len(Work(llama.model, task).chunks) > 1
    done = [
        sweep(llama.model, clean, paths, over="layer,head", memory=n) for n in (150_000, 1 << 28)
    ]
    np.testing.assert_allclose(done[0].values, done[1].values, atol=1e-5)
    with pytest.raises(UsageError, match="cannot run in 0 bytes"):
        sizes(0, Ablation())


def test_a_chunk_takes_no_more_than_it_may(llama: Tiny) -> None:
    clean, corrupted = prompts(llama)
    peaks = {}
    for memory in (1 << 20, 1 << 22):
        task = Task(
            clean, Patching(corrupted), ["layer", "token", "neuron"], metric="kl", memory=memory
        )
        work = Work(llama.model, task)
        tracemalloc.start()
        with counted():
            work.run(work.chunks[0], lambda row: None)
        peaks[memory] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(work.chunks) > 1 and peaks[memory] < 1.1 * memory
    assert peaks[1 << 22] > 0.3 * (1 << 22)  # nor much less


def test_what_a_sweep_costs(llama: Tiny) -> None:
    clean, corrupted = prompts(llama)
    told = explain(llama.model, clean, Patching(corrupted), metric="kl", null=0)
    assert told.n_cells == 18 and told.one_by_one == 18 * 6 and told.n_chunks == 1
    # the source twice, the unchanged run, and of each cell the rows from its token on
    assert told.planned.rows == 3 * 6 + 3 * (6 + 5 + 4 + 3 + 2 + 1)
    assert told.document()["token_forwards"]["share"] == pytest.approx(81 / 108, abs=1e-6)
    assert told.block_share < told.share
    text = told.plain().splitlines()
    assert text[0] == "18 cells in 1 chunk" and "81 planned, 108 one by one (0.750)" in text[1]
    half = explain(llama.model, clean, Ablation(), metric="kl", memory=SMALL, shard="1/2")
    assert half.n_cells < 18
    with pytest.raises(UsageError, match="unknown metric"):
        explain(llama.model, clean, Ablation(), metric="nats")


# -- the real model ------------------------------------------------------------------------


@pytest.mark.slow
def test_on_a_quantized_file_too(smollm2: Model, tmp_path: Path) -> None:
    clean, corrupted = (
        smollm2.ids(f"The {x} is in the city of", bos=True) for x in ("Big Ben", "Taj Mahal")
    )
    options: dict[str, Any] = {"over": "layer,token", "layers": "18..29", "answer": " London"}
    options |= {"memory": 1_000_000}
    whole, path = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    with Model("smollm2", threads=1) as other:
        sweep(other, clean, Patching(corrupted, align="end"), rows=whole, **options)
    lines = whole.read_bytes().splitlines(keepends=True)
    manifest_path(path).write_bytes(manifest_path(whole).read_bytes())
    path.write_bytes(b"".join(lines[: len(lines) // 2]))
    sweep(smollm2, clean, Patching(corrupted, align="end"), rows=path, resume=True, **options)
    assert path.read_bytes() == whole.read_bytes()


def test_adapters_and_standing_edits_are_settings(llama: Tiny, tmp_path: Path) -> None:
    adapter, path = write_lora(tmp_path / "a.gguf", llama.oracle), tmp_path / "rows.jsonl"
    run(llama, path)
    with llama.model.reopened(lora={adapter: 0.5}) as m:
        changed = Tiny("llama", llama.path, m)
        with pytest.raises(FileError, match="other settings: adapters: "):
            run(changed, path, resume=True)
    with (
        llama.model.steered(Vector({1: llama.vector()})),
        pytest.raises(FileError, match="other settings: standing edits: "),
    ):
        run(llama, path, resume=True)


def test_a_sweep_that_goes_on_elsewhere_says_so(llama: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run(llama, path)
    manifest = json.loads(manifest_path(path).read_text())
    manifest["setup"]["processor"] = "another one"
    manifest_path(path).write_text(json.dumps(manifest))
    with pytest.warns(MiaWarning, match=r"rows\.jsonl was begun on another machine"):
        run(llama, path, resume=True)
