"""Whether llama.cpp's extra weight buffers (AMX among them) can be trusted on this machine.

Some builds of llama.cpp crash at the first decode on a processor with AMX: GCC 12 drops half
of the tile configuration as dead stores unless told `-fno-tree-dse -fno-dse` (llama.cpp issue
20824). A crash cannot be caught, so if the library reports AMX a child process decodes a tiny
random model first, with the extra buffers and without, and compares. The verdict is kept
per build of the library in `probe.json` of `mia.io.files.cache_folder`. Without AMX nothing of this
runs.

`MIA_EXTRA_BUFTS=1` or `0` decides by hand. `python -m mia.llama.probe` is the child.
"""

from __future__ import annotations

import os
import platform
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mia.errors import UsageError
from mia.llama import child
from mia.llama.verdicts import read_verdicts, write_verdicts

_FILE = "probe.json"  # in mia's cache folder
_SECONDS = 60.0
_WRONG = 3  # the child's exit status if the numbers are wrong
_TOLERANCE = 0.1  # |with - without| / |without|; both round activations to 8 bits, alike
_REBUILD = (
    "CMAKE_ARGS=\"-DGGML_RPC=ON -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'\" pip install "
    "--force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={version}"
)


def extra_buffers_safe() -> bool:
    """Whether to load models with `use_extra_bufts`.

    Raises:
        UsageError: MIA_EXTRA_BUFTS is neither 0 nor 1.
    """
    wish = os.environ.get("MIA_EXTRA_BUFTS", "")
    if wish not in ("", "0", "1"):
        raise UsageError(f"MIA_EXTRA_BUFTS must be 0 (without AMX) or 1 (with AMX), got {wish!r}")
    if wish:
        return wish == "1"
    from mia.llama.library import library_info

    return "AMX_INT8 = 1" not in library_info()["features"] or _verdict()


@cache
def _verdict() -> bool:
    """The remembered verdict on this build, or the child's, which it remembers."""
    from mia.llama.library import library_info

    key, known = _build_key(), read_verdicts(_FILE)
    if key in known:
        return known[key]
    complaint, decided = _ask_child()
    if complaint:
        rebuild = _REBUILD.format(version=library_info()["llama_cpp_python"])
        print(
            f"mia: {complaint}; going on without AMX, which is slower. To have it: {rebuild}",
            file=sys.stderr,
        )
    if decided:
        write_verdicts(_FILE, {**known, key: not complaint})
    return not complaint


def _ask_child() -> tuple[str, bool]:
    """Runs the child. Returns (what is wrong, or ""; whether that is worth remembering)."""
    import tempfile  # here: machines without AMX need none of it

    with tempfile.TemporaryDirectory(prefix="mia-probe-") as folder:
        try:
            outcome = child.run(_command(folder), seconds=_SECONDS, cwd=folder)
        except OSError as err:
            return f"could not find out whether llama.cpp's AMX code works ({err})", False
    code = outcome.code
    if code is None:
        return f"llama.cpp's AMX code hangs (no answer in {_SECONDS:.0f} s)", True
    if code == 0:
        return "", True
    if code == _WRONG:
        return "llama.cpp's AMX code computes wrong numbers", True
    if code in (1, 2):  # Python's own: the child did not get as far as llama.cpp's decode
        return f"could not find out whether llama.cpp's AMX code works (exit status {code})", False
    how = outcome.death
    return f"llama.cpp's AMX code crashes in this build ({how} in a trial decode)", True


def _command(folder: str) -> list[str]:
    return child.python("mia.llama.probe", folder)


# ---------------------------------------------------------------------------
# what a verdict is about


def _build_key() -> str:
    """Version, library files and processor: another of any of them is asked anew."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    stats = [(p.name, p.stat()) for p in sorted(folder.glob("*ggml-cpu*"))]
    files = [f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats]
    return " ".join([llama_cpp.__version__, *files, processor_name()])


def processor_name() -> str:
    """The processor's name, as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# ---------------------------------------------------------------------------
# the child


def main(folder: str) -> int:
    """Decodes with and without extra buffers: 0 if they agree, 3 if not, or no return."""
    child.prepare()
    path = Path(folder) / "probe.gguf"
    write_model(path)
    plain, extra = _logits(path, extra_bufts=False), _logits(path, extra_bufts=True)
    off = float(np.linalg.norm(extra - plain) / np.linalg.norm(plain))
    return 0 if off < _TOLERANCE else _WRONG  # NaN is not below


def _logits(path: Path, *, extra_bufts: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A prompt in one batch, then one token: other kernels. (n_tokens, n_vocab)"""
    from mia.llama.context import Context, ContextParams
    from mia.llama.model import LlamaModel

    model = LlamaModel(path, extra_bufts=extra_bufts)
    context = Context(
        model,
        ContextParams(
            n_ctx=256, n_ubatch=64, n_seq=1, flash=False, kv_type="f16", threads=2, callback=False
        ),
    )
    rows, start = [], 0
    for n in (_N_PROMPT, 1):
        at = np.arange(start, start + n, dtype=np.int32)
        context.decode(at * 37 % _N, at, np.zeros(n, np.int32), np.ones(n, np.int8))
        rows.append(context.logits().copy())
        start += n
    context.close()
    model.close()
    return np.concatenate(rows)


_N_PROMPT = 40  # more than one tile of rows, and not a multiple of it
_N = 256  # every size of the model: AMX wants multiples of 32, of 256 for the K types

# every type that has an AMX kernel: its ggml number, values and bytes of a block, and the
# float16 fields (offset: value) that make random bytes into weights around 0, 1/16 wide
_TYPES: dict[str, tuple[int, int, int, dict[int, float]]] = {
    "Q4_0": (2, 32, 18, {0: 0.0136}),
    "Q4_1": (3, 32, 20, {0: 0.0136, 2: -0.102}),
    "Q8_0": (8, 32, 34, {0: 0.00084}),
    "Q4_K": (12, 256, 144, {0: 0.000245, 2: 0.00184}),
    "Q5_K": (13, 256, 176, {0: 0.000119, 2: 0.00184}),
    "Q6_K": (14, 256, 210, {208: 0.000046}),
    "IQ4_XS": (23, 256, 136, {0: 0.000048}),
}
_MATRICES = {
    "token_embd": "Q8_0",
    "blk.0.attn_q": "Q4_0",
    "blk.0.attn_k": "Q4_1",
    "blk.0.attn_v": "Q8_0",
    "blk.0.attn_output": "Q4_K",
    "blk.0.ffn_gate": "Q5_K",
    "blk.0.ffn_up": "Q6_K",
    "blk.0.ffn_down": "IQ4_XS",
    "output": "Q4_0",
}
_NORMS = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
_METADATA: dict[str, str | int | float] = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "no_vocab",
    "llama.vocab_size": _N,
    "llama.context_length": _N,
    "llama.embedding_length": _N,
    "llama.feed_forward_length": _N,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def write_model(path: Path) -> None:
    """Writes a random llama of one block, half a megabyte, with a matrix of each type."""
    rng = np.random.default_rng(0)
    infos, data = b"", b""
    for name, kind in _MATRICES.items():
        number, n_values, n_bytes, halves = _TYPES[kind]
        blocks = rng.integers(0, 256, (_N * _N // n_values, n_bytes), dtype=np.uint8)
        for offset, value in halves.items():
            blocks[:, offset : offset + 2] = np.frombuffer(struct.pack("<e", value), np.uint8)
        infos += _text(f"{name}.weight") + struct.pack("<IQQIQ", 2, _N, _N, number, len(data))
        data += blocks.tobytes()  # a multiple of 32 bytes, as the format wants it
    for name in _NORMS:
        infos += _text(f"{name}.weight") + struct.pack("<IQIQ", 1, _N, 0, len(data))
        data += np.ones(_N, "<f4").tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(_MATRICES) + len(_NORMS), len(_METADATA))
    for key, v in _METADATA.items():
        head += _text(key)
        if isinstance(v, str):
            head += struct.pack("<I", 8) + _text(v)
        else:
            head += struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v)
    head += infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(sys.argv[1]))
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mia-probe-") as own:
        sys.exit(main(own))
