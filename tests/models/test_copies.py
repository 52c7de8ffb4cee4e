"""Copies of models in another type: made once, whole or not at all, found again, and removed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from tiny import Tiny
from tiny_gguf import write_tiny

import mia
from mia import Edit, Model, Request, Vector
from mia.errors import EngineError, FileError, ModelError, UsageError
from mia.io import files
from mia.io.activations import load
from mia.io.provenance import warn_of_other_model
from mia.llama import file_tensors
from mia.models import copies, copy_store
from mia.notices import MiaWarning

ROOT = Path(mia.__file__).parents[1]
PROMPT = [5, 9, 12, 7, 30, 4]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of copies, empty."""
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "copies"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "small.gguf", "llama", qtype="Q8_0")


def logits(model: Model) -> np.ndarray:
    result = model.run([Request(PROMPT, logits="all")])[0]
    assert result.logits is not None
    return result.logits


def opened(path: Path | str, as_type: str) -> Model:
    return Model(path, as_type=as_type, threads=1)


def made(path: Path | str, as_type: str) -> Model:
    with pytest.warns(MiaWarning, match=r"^made a copy of \S+ as \w+ \(\d MB\), which is kept"):
        return opened(path, as_type)


def copied(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.glob("*.gguf"))


# -- what a copy is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("as_type", "note"),
    [
        ("f16", "weights of q8_0 are rounded to f16"),
        ("bf16", "weights of q8_0 are rounded to bf16"),
        ("f32", ""),
    ],
)
def test_a_copy_is_the_model_in_another_type(
    small: Path, cache: Path, as_type: str, note: str
) -> None:
    with Model(small, threads=1) as plain, made(small, as_type) as m:
        assert m.copy is not None and m.copy.path.parent == cache
        types = {t.name: t.type for t in file_tensors(m.copy.path)}
        number = {"f16": 1, "bf16": 30, "f32": 0}[as_type]
        assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == number
        assert types["blk.0.attn_norm.weight"] == 0
        # the model is the one that was asked for
        assert (m.name, m.path, m.file_hash) == (plain.name, small, files.file_sha256(small))
        document = m.facts.document()
        assert document["sha256"] == plain.file_hash and document["file"] == "small.gguf"
        assert (document["as_type"], document.get("as_type_note", "")) == (as_type, note)
        assert m.facts.metadata()["as_type"] == as_type
        assert "as_type" not in plain.facts.document()
        # bf16 has 8 bits; the plain model rounds activations to 8 bits too
        assert np.abs(logits(m) - logits(plain)).max() < 0.5
    with opened(small, as_type) as again:  # no notice: it was there
        assert again.copy is not None and len(copied(cache)) == 1


def test_an_f32_copy_is_exact(small: Path) -> None:
    """The same values: llama.cpp's own float32 run, against numpy's in float64."""
    with made(small, "f32") as m:
        assert m.kv_type == "f32"
        truth = Tiny("small", small, m).oracle.run(PROMPT)["logits"]
        np.testing.assert_allclose(logits(m), truth, atol=2e-4)


@pytest.mark.parametrize(("qtype", "as_type"), [("F16", "f16"), ("F32", "f32"), ("BF16", "bf16")])
def test_a_file_of_that_type_is_not_copied(
    tmp_path: Path, cache: Path, qtype: str, as_type: str
) -> None:
    path = write_tiny(tmp_path / "same.gguf", "llama", qtype=qtype)
    with opened(path, as_type) as m:
        assert m.copy is not None and (m.copy.path, m.copy.hold) == (path, None)
        assert m.facts.document()["as_type"] == as_type
    assert not cache.exists()


def test_wider_weights_are_rounded_and_results_say_so(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "wide.gguf", "llama")
    with made(path, "f16") as m:
        assert m.facts.as_type_note == "weights of f32 are rounded to f16"


def test_what_the_quantizer_leaves_is_named(tmp_path: Path) -> None:
    """The router of a mixture stays f32 without a word: it is no rounding type."""
    path = write_tiny(tmp_path / "mixture.gguf", "mixtral")
    with made(path, "f16") as m:
        assert m.copy is not None
        kinds = {t.name: t.type for t in file_tensors(m.copy.path)}
        assert kinds["blk.0.ffn_gate_inp.weight"] == 0 and kinds["blk.0.ffn_up_exps.weight"] == 1
        assert m.facts.as_type_note == "weights of f32 are rounded to f16"
    record = copy_store.Record("m", "m.gguf", "f16", rounded=["q4_K"], left=["q8_0"])
    assert copies._note(record) == "weights of q4_K are rounded to f16; some stay q8_0"


def test_an_unknown_type_is_refused(small: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match="unknown type 'f8'; known: f16, bf16, f32"):
        Model(small, as_type="f8")
    assert not cache.exists()


def test_vectors_of_the_model_are_its_own_in_a_copy(
    small: Path, recwarn: pytest.WarningsRecorder
) -> None:
    with Model(small, threads=1) as plain:
        vector = Vector({1: np.ones(plain.n_embd, np.float32)}, metadata=plain.file_metadata())
        activations = plain.look(PROMPT, "resid_post.1")
        assert "as_type" not in activations.metadata
        activations.save(small.with_name("a.safetensors"))
    with made(small, "f16") as m:
        recwarn.clear()
        warn_of_other_model([vector.metadata], "v", m.facts)
        m.check_vector(vector)
        m.check_activations(load(small.with_name("a.safetensors")))
        made_here = m.look(PROMPT, "resid_post.1").metadata
        assert made_here["as_type"] == "f16"
        assert made_here["model_sha256"] == plain.file_hash
        assert not recwarn.list


def test_sites_are_checked_anew_in_a_copy(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "wide.gguf", "llama")
    from mia.models.algebra import file_key

    with Model(path, threads=1) as plain, made(path, "f16") as m:
        assert file_key(plain) != file_key(m)
        assert m.site_checks.refused == {}


def test_names_and_split_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = partial(gguf.GGUFWriter, split_max_tensors=9)
    monkeypatch.setattr(gguf, "GGUFWriter", split)
    write_tiny(tmp_path / "parts.gguf", "llama", qtype="Q8_0")
    monkeypatch.undo()
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    first = tmp_path / "parts-00001-of-00004.gguf"
    assert first.exists(), list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.toml").write_text(f'[mine]\npath = "{first}"\n')
    with Model("mine", threads=1) as plain, made("mine", "f32") as m:
        assert (m.name, m.file_hash) == ("mine", plain.file_hash)
        assert np.abs(logits(m) - logits(plain)).max() < 0.5
    # a change of any part is another model
    os.utime(tmp_path / "parts-00003-of-00004.gguf")
    made("mine", "f32").close()
    assert len(copied(cache)) == 1


# -- one that is no longer the model's -----------------------------------------------------------


def test_another_file_of_the_same_name_size_and_time_is_copied_anew(
    tmp_path: Path, cache: Path
) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", qtype="Q8_0")
    made(path, "f16").close()
    old, times = copied(cache), path.stat()
    write_tiny(path, "llama", qtype="Q8_0", seed=1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size and path.stat().st_mtime_ns == times.st_mtime_ns
    with made(path, "f16") as m, Model(path, threads=1) as plain:
        assert np.abs(logits(m) - logits(plain)).max() < 0.5
    assert len(copied(cache)) == 1 and copied(cache) != old  # the old one is gone


@pytest.mark.parametrize("harm", ["cut", "gone", "written", "no record", "bad record"])
def test_a_copy_that_was_harmed_is_made_again(small: Path, cache: Path, harm: str) -> None:
    with made(small, "f16") as m:
        expected = logits(m)
    (path,) = cache.glob("*.gguf")
    if harm == "cut":
        os.truncate(path, 1000)
    elif harm == "gone":
        path.unlink()
    elif harm == "written":
        data = bytearray(path.read_bytes())
        data[-100:] = bytes(100)
        path.write_bytes(data)
    elif harm == "no record":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"name": 3}')
    with made(small, "f16") as m:
        np.testing.assert_array_equal(logits(m), expected)


# -- numbers beyond half precision ------------------------------------------------------------


def _scaled(path: Path, scales: dict[str, float]) -> None:
    """Multiplies tensors of an F32 file."""
    tensors = {t.name: t for t in file_tensors(path)}
    with path.open("r+b") as f:
        for name, scale in scales.items():
            t = tensors[name]
            f.seek(t.offset)
            values = np.frombuffer(f.read(4 * int(np.prod(t.ne))), "<f4") * np.float32(scale)
            f.seek(t.offset)
            f.write(values.astype("<f4").tobytes())


@pytest.mark.parametrize(
    ("scales", "why"),
    [
        # queries do not see the scale of keys that are 0, and what is read is finite
        ({"blk.1.ffn_down.weight": 1e6}, "it has weights beyond 65504, the largest of f16"),
        (
            {"blk.1.ffn_up.weight": 3e4, "blk.1.ffn_gate.weight": 3e3},
            "activations go beyond 65504, the largest of f16",
        ),
    ],
    ids=["weights", "activations"],
)
def test_what_does_not_fit_into_f16_is_opened_as_bf16(
    tmp_path: Path, cache: Path, scales: dict[str, float], why: str
) -> None:
    path = write_tiny(tmp_path / "large.gguf", "llama")
    _scaled(path, scales)
    with Model(path, threads=1) as m:
        assert np.isfinite(logits(m)).all()
    with pytest.warns(MiaWarning) as told:
        m = opened(path, "f16")
    texts = [str(w.message) for w in told]
    assert texts[0] == f"large is opened as bf16: {why}" and len(texts) == 2
    with m:
        document = m.facts.document()
        assert document["as_type"] == "bf16"
        assert document["as_type_note"] == (
            f"instead of f16: {why}; weights of f32 are rounded to bf16"
        )
        assert np.isfinite(logits(m)).all()
    assert len(copied(cache)) == 1
    # remembered: nothing is tried again, and the notice is there again
    with pytest.warns(MiaWarning) as told, opened(path, "f16") as m:
        assert m.facts.as_type == "bf16"
    assert [str(w.message) for w in told] == texts[:1]
    copies.forget()
    with pytest.warns(MiaWarning, match="is opened as bf16"), opened(path, "f16") as m:
        assert m.facts.as_type == "bf16"


def test_an_overflow_in_a_run_says_what_helps(small: Path) -> None:
    with made(small, "f16") as m:
        huge = Edit("resid_post.1", "add", np.full(m.n_embd, 1e5, np.float32))
        wide = Edit("mlp_norm.1", "replace", np.full(m.n_embd, 9e7, np.float32))
        m.run([Request(PROMPT, [huge])])  # a norm is behind it
        with pytest.raises(EngineError, match="f16 ends at 65504, which as_type bf16 does not"):
            m.run([Request(PROMPT, [wide], logits="all")])


# -- room ---------------------------------------------------------------------------------------


def _models(tmp_path: Path, n: int) -> list[Path]:
    return [
        write_tiny(tmp_path / f"m{i}.gguf", "llama", qtype="Q8_0", seed=i, n_layer=1)
        for i in range(n)
    ]


def _used(path: Path, ago: float) -> None:
    """As if the model's copy had last been opened so many seconds ago."""
    then = time.time() - ago
    for c in copies.copies():
        if c.source == path:
            os.utime(c.path.with_suffix(".json"), (then, then))


def test_the_least_recently_used_make_room(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c, d = _models(tmp_path, 4)
    for i, path in enumerate((a, b, c)):
        made(path, "f16").close()
        _used(path, 300 - 100 * i)
    opened(a, "f16").close()  # used now: b is the oldest
    assert [x.source for x in copies.copies()] == [a, c, b]
    three = sum(x.bytes for x in copies.copies())
    monkeypatch.setattr(copy_store, "limit", lambda: int(three * 1.1))
    made(d, "f16").close()
    assert {x.source for x in copies.copies()} == {a, c, d}


def test_what_is_open_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = _models(tmp_path, 3)
    with made(a, "f16") as m:
        _used(a, 500)
        made(b, "f16").close()
        assert [x.is_open for x in copies.copies()] == [False, True]
        size = copies.bytes_as(a, "f16")
        monkeypatch.setattr(copy_store, "limit", lambda: int(2.1 * size))
        made(c, "f16").close()
        assert {x.source for x in copies.copies()} == {a, c}
        assert not copies.remove(next(x for x in copies.copies() if x.source == a))
        m.close()
        with pytest.raises(UsageError, match="closed"):
            logits(m)
    assert all(copies.remove(x) for x in copies.copies())


def test_a_dropped_model_holds_nothing(small: Path) -> None:
    made(small, "f16")
    (copy,) = copies.copies()
    assert not copy.is_open and copies.remove(copy)


def test_no_room(small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_store, "limit", lambda: 1000)
    with pytest.raises(
        FileError, match=r"needs .* bytes, and all copies may have 1,000 on this disk"
    ):
        opened(small, "f16")
    monkeypatch.undo()
    monkeypatch.setattr(files, "cache_folder", lambda: cache.parent)
    monkeypatch.setattr(
        copy_store, "disk_of", lambda folder: SimpleNamespace(total=10**12, free=1000)
    )
    with pytest.raises(FileError, match=r"has 1,000 bytes free, a copy of small as f16 needs"):
        opened(small, "f16")
    assert not list(cache.glob("*.gguf")) and not list(cache.glob("*.json"))


def test_the_limit_is_a_tenth_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for total, expected in ((64 * 10**9, 20 * 10**9), (10**12, 10**11)):
        disk = SimpleNamespace(total=total, free=total)
        monkeypatch.setattr(copy_store, "disk_of", lambda folder, disk=disk: disk)
        assert copies.limit() == expected


def test_the_size_is_known_before(small: Path) -> None:
    for kind in copies.TYPES:
        made(small, kind).close()
    for copy in copies.copies():
        assert copy.bytes <= copies.bytes_as(small, copy.type) <= 1.1 * copy.bytes + 4096


def test_a_folder_that_cannot_be_made(small: Path, tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file")
    with pytest.raises(FileError, match=r"a copy of small cannot be kept in .*: Not a directory"):
        opened(small, "f16")


# -- processes ----------------------------------------------------------------------------------

_OPEN = "import sys; from mia import Model; m = Model(sys.argv[1], as_type='f16', threads=1)"


def _start(code: str, path: Path, cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache.parent)}
    # what files.cache_folder gives there
    code = f"from mia.io import files; files.cache_folder = lambda: __import__('pathlib').Path({str(cache.parent)!r}); {code}"
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_make_one_copy(small: Path, cache: Path) -> None:
    code = f"{_OPEN}; print(m.copy.path.stat().st_size, len(m.generate([5, 6], 3).tokens))"
    both = [_start(code, small, cache) for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum("made a copy" in err for _, err in said) == 1
    assert len(copied(cache)) == 1 and not list(cache.glob("*.tmp"))


def test_what_another_process_has_open_stays(small: Path, cache: Path) -> None:
    process = _start(
        f"{_OPEN}; print('open', flush=True); import time; time.sleep(60)", small, cache
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        (copy,) = copies.copies()
        assert copy.is_open and not copies.remove(copy)
    finally:
        process.kill()
        process.communicate()
    (copy,) = copies.copies()
    assert not copy.is_open and copies.remove(copy)


@pytest.mark.skipif(sys.platform != "linux", reason="the child ends with its parent there")
def test_a_killed_process_leaves_nothing_half(
    small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = (
        "from mia.models import copies; import time; "
        "whole = copies._convert; "
        "copies._convert = lambda *a: (whole(*a), print('half', flush=True), time.sleep(60)); "
    )
    process = _start(slow + _OPEN, small, cache)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (half,) = cache.glob(".mia-*.tmp")
    assert copied(cache) == [] and copies.copies() == []
    old = time.time() - 3600
    os.utime(half, (old, old))
    monkeypatch.setattr(files, "_swept", set())
    with made(small, "f16") as m:
        assert np.isfinite(logits(m)).all()
    assert not half.exists() and len(copied(cache)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no limits")
def test_a_full_disk_leaves_nothing(small: Path, cache: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    full = (
        "from mia.models import copies; from types import SimpleNamespace; "
        "copies.disk_of = lambda folder: SimpleNamespace(free=0, total=1); "
    )
    process = _start(limit + full + _OPEN, small, cache)
    _, err = process.communicate(timeout=120)
    last = err.strip().splitlines()[-1]
    assert last.startswith("mia.errors.FileError: a copy of small as f16 cannot be written: the ")
    assert last.endswith(" is full") and process.returncode
    assert [p.name for p in cache.iterdir()] == ["lock"]


def test_a_model_that_changes_while_it_is_copied(
    small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = copies._convert

    def convert(source: Path, *rest: object) -> None:
        whole(source, *rest)  # type: ignore[arg-type]
        os.utime(source)

    monkeypatch.setattr(copies, "_convert", convert)
    with pytest.raises(ModelError, match="was changed while it was copied"):
        opened(small, "f16")
    assert copied(cache) == []


# -- the list -----------------------------------------------------------------------------------


def test_the_list_says_what_is_of_no_use(small: Path, tmp_path: Path) -> None:
    from mia.models import reports

    made(small, "f16").close()
    report = reports.copies()
    (row,) = report.rows()
    assert row["name"] == "small" and row["source"] == str(small) and row["type"] == "f16"
    assert (row["current"], row["open"]) == (True, False)
    assert report.document()["bytes"] == row["bytes"] == Path(row["path"]).stat().st_size
    assert json.loads(json.dumps(report.document()))["removed"] == []
    small.unlink()
    assert reports.copies().rows()[0]["current"] is False
    assert "(of another file or llama.cpp)" in reports.copies().plain()
    with pytest.raises(UsageError, match="there is no copy of 'other'; copies: small"):
        reports.copies(remove=["other"])
    report = reports.copies(remove=["small"])
    assert [c.name for c in report.removed] == ["small"] and report.copies == []
    with pytest.raises(UsageError, match="copies: there is none"):
        reports.copies(remove=["small"])


@pytest.mark.parametrize("how", ["file", "clear"])
def test_what_is_open_is_not_removed(small: Path, how: str) -> None:
    from mia.models import reports

    ask: Callable[[], reports.Copies] = (
        partial(reports.copies, clear=True)
        if how == "clear"
        else partial(reports.copies, remove=[str(small)])
    )
    with made(small, "f16"), pytest.warns(MiaWarning, match="small as f16 is open, and stays"):
        assert len(ask().copies) == 1
    assert ask().copies == []
