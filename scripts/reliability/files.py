"""Damaged model files, opened and run in children: a model that runs, or an error of mia's.

About half of them are changed in one place of the header, as `tests/mutants.py` lists them; in the others
a few bytes or numbers anywhere in the file are others.
"""

from __future__ import annotations

import random
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mia.errors
from mia.errors import MiaError
from mia.model import Model
from mia.request import Capture, Request
from reliability.part import Options, Part, count
from reliability.readers import damaged
from reliability.workers import Block, Event, work

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "gemma2": ("gemma2", {}),
    "gpt2": ("gpt2", {}),
    "mamba": ("mamba", {}),
    "llama, SentencePiece": ("llama", {"spm": True}),
    "mixtral": ("mixtral", {}),
    "qwen2moe": ("qwen2moe", {}),
    "dots1": ("dots1", {}),
}
#: of one file in a child of the child
HANG_SECONDS = 30.0
#: mia's errors by name
_OURS = {
    name for name, e in vars(mia.errors).items() if isinstance(e, type) and issubclass(e, MiaError)
}


def use(path: Path) -> str:
    """Opens a model, reads a text, runs with and without a callback."""
    warnings.simplefilter("ignore")
    with Model(path, threads=1, ctx=64) as m:
        if m._llama.has_vocab:
            for token in (*m.tokenize("The cat sat.\n é", bos=False), 0, m.n_vocab - 1):
                m.piece(token)
        m.run([Request([0, m.n_vocab - 1], captures=[Capture("embed")])])
        m.run([Request([0, m.n_vocab - 1], n_predict=2)])
    return "runs"


def mutants_of(name: str, n: int, seed: int, folder: Path) -> Iterator[tuple[str, bytes]]:
    """n changed files of one source, each with what was changed."""
    from mutants import mutants
    from tiny_gguf import write_tiny

    arch, options = SOURCES[name]
    path = write_tiny(folder / "whole.gguf", arch, n_layer=2, **options)
    rng = random.Random(f"{name} {seed}")
    # how many changes of one place there are is known at the end only: some thousands
    made, share = 0, n / 8000
    for what, data in mutants(path):
        if made < n and rng.random() < share:
            made += 1
            yield what, data
    whole = path.read_bytes()
    for i in range(made, n):
        yield f"bytes {i}", damaged(whole, ".gguf", rng)


def block(name: str, seed: int, count: int, first: int = 0) -> Iterator[Event]:
    """Changed files of one source from number `first` on. This process never runs a model itself,
    so that it can fork."""
    from children import in_child

    with tempfile.TemporaryDirectory() as place:
        for i, (what, data) in enumerate(mutants_of(name, count, seed, Path(place))):
            if i >= first:
                yield {"at": i}
                file = Path(place) / "m.gguf"
                file.write_bytes(data)
                said = in_child(partial(use, file), HANG_SECONDS)
                kind = said.partition(":")[0]
                good = kind == "runs" or kind in _OURS
                bad = None if good else data.hex()
                yield {"kind": kind if good else "bad", "what": what, "said": said, "data": bad}


def files(options: Options) -> Part:
    """Opens `options.n` damaged model files."""
    part = Part("files")
    kinds: Counter[str] = Counter()
    bad: Counter[str] = Counter()

    def blocks() -> Iterator[Block]:
        for i, name in enumerate(SOURCES):
            each = options.n // len(SOURCES) + (i < options.n % len(SOURCES))
            if not each or options.is_over:
                return
            task = {"task": "reliability.files:block", "name": name}
            yield {**task, "seed": options.seed, "count": each}

    for given, event in work(blocks(), workers=options.workers, seconds=4 * HANG_SECONDS):
        if "kind" in event:
            kinds[event["kind"]] += 1
            if kinds.total() % 500 == 0:
                part.say(f"{kinds.total()} files, {kinds['bad']} bad, {options.seconds:.0f} s")
            if event["kind"] == "bad":
                said = re.sub(r"\s+", " ", event["said"])[:160]
                bad[said] += 1
                file = f"file-{options.seed}-{kinds['bad']}.gguf"
                path = options.keep(file, bytes.fromhex(event["data"]))
                part.wrong(f"{given['name']}, {event['what']}: {said} ({path})")
        elif "died" in event or "hung" in event:
            how = event.get("died") or f"no answer in {event['hung']:.0f} s"
            part.wrong(f"{given['name']}, file {event['at']}: {how}")
    figures = part.figures
    figures["damaged model files"] = count(kinds.total())
    figures["run all the same"] = count(kinds["runs"])
    ours = kinds.total() - kinds["runs"] - kinds["bad"]
    figures["refused by one clear error"] = count(ours)
    deaths = sum(n for said, n in bad.items() if said.startswith("SIG"))
    figures["crashes, hangs"] = f"{deaths}, {bad['hangs']}"
    figures["foreign exceptions"] = count(kinds["bad"] - deaths - bad["hangs"])
    return part
