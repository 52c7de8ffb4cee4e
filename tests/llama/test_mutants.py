"""GGUF files changed in one place: an error of mia's or a model that runs, never a death or a hang.

`mia.llama.gguf_check` refuses what llama.cpp would die of. The default run tries the changes that
were once seen to kill it, and a sample of all; the slow one a larger sample, `scripts/soak files` as many
as one has time for.
"""

import faulthandler
import os
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from zlib import crc32

import pytest
from children import in_child
from mutants import Gguf, flipped, mutants, read
from tiny_gguf import write_tiny

import mia
from mia.errors import ModelError
from mia.llama import child, gguf_check
from mia.llama.gguf_check import check_gguf
from mia.llama.gguf_write import write_gguf
from mia.llama.trial import open_and_decode, try_open
from mia.model import Model
from mia.request import Capture, Request

ROOT = Path(mia.__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_NO_BACKTRACE", "1")
    monkeypatch.setenv("MIA_EXTRA_BUFTS", "1")


def use(path: Path) -> str:
    """Opens a model, reads a text, runs with and without a callback."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    with Model(path, threads=1) as m:
        if m._llama.has_vocab:
            for token in (*m.tokenize("The cat sat.\n é", bos=False), 0, m.n_vocab - 1):
                m.piece(token)
        m.run([Request([0, m.n_vocab - 1], captures=[Capture("embed")])])
        m.run([Request([0, m.n_vocab - 1], n_predict=2)])
    return "runs"


def fates(files: Iterable[tuple[str, bytes]], file: Path) -> dict[str, str]:
    """What became of each changed file that neither ran nor was refused with an error of mia's."""
    bad, tried = {}, 0
    for what, raw in files:
        tried += 1
        file.write_bytes(raw)
        said = in_child(lambda: use(file))
        if said.partition(":")[0] not in (
            "runs",
            "ModelError",
            "RangeError",
            "EngineError",
            "NotFiniteError",
        ):
            bad[what] = said
    assert tried
    return bad


SOURCES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "gemma2": {},
    "gpt2": {},
    "mamba": {},
    "spm": {"spm": True},
    "mixtral": {},
    "dots1": {},
    "qwen2moe": {},
}


def source(folder: Path, name: str) -> Path:
    arch = "llama" if name == "spm" else name
    return write_tiny(folder / f"{name}.gguf", arch, n_layer=2, **SOURCES[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sample_of_damaged_files(tmp_path: Path, name: str) -> None:
    path = source(tmp_path, name)
    changed = [m for i, m in enumerate(mutants(path)) if crc32(f"{name}{i}".encode()) % 200 == 0]
    assert fates([*changed, *flipped(path, 10, seed=1)], tmp_path / "m.gguf") == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_many_damaged_files(tmp_path: Path, name: str) -> None:
    path = source(tmp_path, name)
    assert fates(islice(mutants(path), 3, None, 15), tmp_path / "m.gguf") == {}
    assert fates(flipped(path, 60, seed=2), tmp_path / "m.gguf") == {}


def value(key: str, kind: int, new: object) -> Callable[[Gguf], None]:
    def change(g: Gguf) -> None:
        g.values[key.encode()] = (kind, new)

    return change


def without(key: str) -> Callable[[Gguf], None]:
    def change(g: Gguf) -> None:
        del g.values[key.encode()]

    return change


def tokens(change: Callable[[list[bytes]], object]) -> Callable[[Gguf], None]:
    def changed(g: Gguf) -> None:
        change(g.values[b"tokenizer.ggml.tokens"][1][1])

    return changed


def integers(g: Gguf) -> None:
    next(t for t in g.tensors if t.name == b"blk.0.attn_q.weight").kind = 26


def half_norm(g: Gguf) -> None:
    next(t for t in g.tensors if t.name == b"blk.0.attn_q_norm.weight").kind = 30


NAN = struct.unpack("<f", struct.pack("<f", float("nan")))[0]
DEADLY: list[tuple[str, Callable[[Gguf], None], str]] = [
    ("llama", value("llama.block_count", 4, 0), r"llama\.block_count is 0, not 1 to 512"),
    ("llama", value("llama.block_count", 4, 65535), r"llama\.block_count is 65535, not 1 to 512"),
    ("llama", value("llama.rope.dimension_count", 4, 0), "is 0, not even and positive, at most 8"),
    ("gemma2", value("gemma2.rope.dimension_count", 4, 7), "is 7, not even and positive, at most"),
    (
        "qwen2",
        value("qwen2.rope.dimension_count", 4, 10),
        "is 10, not even and positive, at most 8",
    ),
    ("qwen2", value("qwen2.rope.dimension_count", 4, 2), "is 2, not the width of a head, 8"),
    (
        "gemma2",
        value("gemma2.rope.dimension_count_swa", 4, 7),
        "dimension_count_swa is 7, not even",
    ),
    (
        "llama",
        value("llama.attention.layer_norm_rms_epsilon", 6, NAN),
        "epsilon is nan, not a numb",
    ),
    ("llama", value("llama.attention.layer_norm_rms_epsilon", 6, -1.0), "epsilon is -1.0, not a"),
    ("gpt2", value("gpt2.attention.layer_norm_epsilon", 6, NAN), "epsilon is nan, not a number"),
    ("gpt2", value("gpt2.attention.key_length", 4, 7), "key_length is 7, not 8"),
    ("llama", value("llama.rope.scaling.type", 8, b"odd"), "type is b'odd', none of none, linear"),
    (
        "llama",
        value("llama.nextn_predict_layers", 4, 99),
        "nextn_predict_layers is 99, not at most 2",
    ),
    (
        "llama",
        value("llama.expert_count", 4, 3),
        "it has 3 experts, and no llama.expert_used_count",
    ),
    ("llama", value("llama.expert_count", 4, 65535), "expert_count is 65535, not at most 1024"),
    (
        "llama",
        value("llama.expert_used_count", 4, 3),
        "expert_used_count is 3, not 0, as there are",
    ),
    ("llama", value("llama.expert_group_count", 4, 3), "expert_group_count is 3, not a divisor of"),
    (
        "mixtral",
        value("llama.expert_group_count", 4, 3),
        "3 groups of experts, and no llama.expert_group",
    ),
    (
        "dots1",
        value("dots1.expert_group_used_count", 4, 0),
        "expert_group_used_count is 0, not 1 to 3",
    ),
    ("dots1", value("dots1.expert_gating_func", 4, 7), "expert_gating_func is 7, not 1 to 4"),
    ("dots1", value("dots1.expert_gating_func", 4, 0), "expert_gating_func is 0, not 1 to 4"),
    (
        "dots1",
        without("dots1.expert_gating_func"),
        "has 8 experts, and no dots1.expert_gating_func",
    ),
    ("llama", tokens(lambda t: t.__setitem__(9, t[8])), "has the token '.' more than once"),
    ("llama", tokens(lambda t: t.__setitem__(9, b"a\0b")), "has the token 'a' more than once"),
    ("spm", value("tokenizer.ggml.model", 8, b"bert"), "of the kind bert has tokens for bytes"),
    (
        "dots1",
        value("dots1.attention.head_count_kv", 4, 64),
        "kv is 64, not a divisor of the 6 heads",
    ),
    ("dots1", value("dots1.attention.head_count_kv", 4, 3), "kv is 3, not 6"),
    ("dots1", half_norm, "blk.0.attn_q_norm.weight is of ggml's type 30, not f32"),
    ("llama", integers, "the weights of blk.0.attn_q.weight are of type i32"),
]


@pytest.mark.parametrize(("name", "change", "message"), DEADLY, ids=range(len(DEADLY)))
def test_what_kills_llama_cpp_is_refused_before(
    tmp_path: Path, name: str, change: Callable[[Gguf], None], message: str
) -> None:
    path = source(tmp_path, name)
    check_gguf(path)
    g = read(path)
    assert g.bytes() == path.read_bytes()
    change(g)
    path.write_bytes(g.bytes())
    with pytest.raises(ModelError, match=f"{path} cannot be used: it is damaged, .*{message}"):
        check_gguf(path)


def test_what_is_odd_and_runs_is_not_refused(tmp_path: Path) -> None:
    """Empty tokens get names of their own; a scaling that is known; no experts, said so."""
    g = read(source(tmp_path, "llama"))
    tokens(lambda t: t.__setitem__(slice(7, 9), [b"", b""]))(g)
    value("llama.rope.scaling.type", 8, b"linear")(g)
    value("llama.expert_count", 4, 0)(g)
    value("llama.expert_used_count", 4, 0)(g)
    path = tmp_path / "odd.gguf"
    path.write_bytes(g.bytes())
    assert in_child(lambda: use(path)) == "runs"


def test_a_text_that_a_vocabulary_cannot_spell(tmp_path: Path) -> None:
    """A SentencePiece vocabulary without tokens for bytes: llama.cpp ends the process."""
    g = read(source(tmp_path, "spm"))

    def without_bytes(texts: list[bytes]) -> None:
        texts[3:259] = [b"byte %d" % i for i in range(256)]

    tokens(without_bytes)(g)
    path = tmp_path / "m.gguf"
    path.write_bytes(g.bytes())

    def spell(text: str) -> object:
        with Model(path, threads=1) as m:
            return m.tokenize(text, bos=False)

    assert in_child(lambda: spell("Q cat")).startswith("[")
    for text, char in (("cat é", "é"), ("cat !", "!")):
        said = in_child(lambda text=text: spell(text))  # type: ignore[misc]
        assert said == f"ModelError: the vocabulary of this model has no token for {char!r}"
    whole = source(tmp_path, "spm")
    with Model(whole, threads=1) as m:
        assert m.detokenize(m.tokenize("cat é!", bos=False)).endswith("cat é!")


def test_a_large_vocabulary_is_checked_at_once(tmp_path: Path) -> None:
    """Measured: 0.05 s; the bound is for a busy machine."""
    path = tmp_path / "large.gguf"
    texts = [f"token {i * 7919}" for i in range(150_000)]
    merges = [f"{t[:3]} {t[3:]}" for t in texts]
    facts = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    arrays = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.merges": merges}
    write_gguf(path, {**facts, **arrays}, {})
    check_gguf(path)


# -- a child that opens a doubtful file ------------------------------------------------------


def test_a_trial_says_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path, "llama")
    assert try_open(path) == ""
    g = read(path)
    value("llama.block_count", 4, 0)(g)
    path.write_bytes(g.bytes())
    assert try_open(path).startswith(f"{path} cannot be used: it is damaged, llama.block_count")
    assert try_open(tmp_path / "gone.gguf") == f"no such file: {tmp_path / 'gone.gguf'}"

    def plays(code: str) -> None:
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(child, "python", lambda *_: command)

    steps = "import os, sys; print('load\\ncontext', flush=True); "
    plays(steps + "print('a.cpp:7: GGML_ASSERT(x) failed\\nmore', file=sys.stderr); "
          "sys.stderr.flush(); os.abort()")  # fmt: skip
    expected = "llama.cpp dies planning its graph (SIGABRT): a.cpp:7: GGML_ASSERT(x) failed"
    assert try_open(path) == f"{path}: {expected}"
    plays(steps + "import time; time.sleep(60)")
    expected = "llama.cpp dies planning its graph (no answer in 1 s)"
    assert try_open(path, seconds=1) == f"{path}: {expected}"
    monkeypatch.setattr(child, "python", lambda *_: ["/no/such/python"])
    assert try_open(path).startswith(f"could not start a process to open {path}: No such file")


def test_a_trial_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that an operation does not take are only seen when it runs."""
    path = source(tmp_path, "dots1")
    assert try_open(path) == ""
    g = read(path)
    half_norm(g)
    path.write_bytes(g.bytes())
    monkeypatch.setattr(gguf_check, "check_gguf", lambda path: None)

    def trial() -> None:
        faulthandler.disable()  # of pytest's, which would print a death that is wanted
        open_and_decode(path)

    assert in_child(trial) == "SIGABRT"


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("Linux alone tells a child of its parent's death")
    pid_file = tmp_path / "pid"
    sleeper = (
        "import os, time; from pathlib import Path; from mia.llama import child; child.prepare(); "
        f"Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = f"import sys; from mia.llama import child; child.run([sys.executable, '-c', {sleeper!r}], cwd={str(ROOT)!r})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", parent], env=env) as process:
        for _ in range(200):
            if pid_file.exists() and pid_file.read_text():
                break
            time.sleep(0.05)
        process.kill()
    pid = int(pid_file.read_text())
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("the child lives on")
