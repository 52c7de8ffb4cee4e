"""Opens a doubtful file in a child process, and says how that went.

llama.cpp ends the process at some damaged files, and hangs at others, which cannot be caught.
Run as a program, this module is the child.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mia.llama import child

_STAGES = {
    "": "starting",
    "load": "loading the file",
    "tokenize": "reading a text with its vocabulary",
    "context": "planning its graph",
    "decode": "decoding its first tokens",
}


def try_open(path: str | Path, *, seconds: float = 120.0) -> str:
    """Loads a model, reads a text and decodes it, in a child process.

    Returns:
        "" if all went well; else one line: mia's error, or at which step the process died, and of
        what.
    """
    try:
        outcome = child.run(
            child.python("mia.llama.trial", str(Path(path).absolute())), seconds=seconds
        )
    except OSError as err:
        return f"could not start a process to open {path}: {err.strerror or err}"
    if outcome.code == 0:
        return ""
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    if outcome.code == 1 and lines:
        return lines[-1]
    stages = outcome.out.split()
    doing = _STAGES.get(stages[-1] if stages else "", "starting")
    said = next((line for line in lines if "GGML_ASSERT" in line or "GGML_ABORT" in line), "")
    said = said or (lines[-1] if lines else "")
    return f"{path}: llama.cpp dies {doing} ({outcome.death})" + (f": {said}" if said else "")


def open_and_decode(path: Path) -> None:
    """What the child does; each step prints its name before it begins.

    Raises `MiaError`."""
    from mia.llama.context import Context, ContextParams
    from mia.llama.gguf_check import check_gguf
    from mia.llama.model import LlamaModel

    def step(name: str) -> None:
        print(name, flush=True)

    check_gguf(path)
    step("load")
    model = LlamaModel(path)
    model.metadata()
    step("tokenize")
    if model.has_vocab:
        ids = model.tokenize("The cat sat.\n é", special=True)
        _ = [model.piece(t) for t in (*ids, 0, model.n_vocab - 1)]
    step("context")
    for callback in (True, False):  # the callback sees the graph, and lets nothing run
        params = ContextParams(
            n_ctx=256,
            n_ubatch=64,
            n_seq=4,
            flash=False,
            kv_type="f16",
            threads=1,
            callback=callback,
        )
        context = Context(model, params)
        if not callback:
            step("decode")
        context.decode([0, model.n_vocab - 1], [0, 1], [0, 0], [False, True])
        context.close()
    model.close()


def main(path: str) -> int:
    from mia.errors import MiaError

    child.prepare()
    try:
        open_and_decode(Path(path))
    except MiaError as err:
        print(err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
