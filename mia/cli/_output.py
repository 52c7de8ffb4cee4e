"""Printing: data on stdout, notices on stderr, tables only where a person looks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mia.cli._options import OutputOptions

if TYPE_CHECKING:
    from rich.console import Console

    from mia.model import Model


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def on_terminal() -> bool:
    return sys.stdout.isatty()


def notice(text: str, output: OutputOptions) -> None:
    """One line for the person, not for the pipe."""
    if not output.quiet:
        print(f"mia: {text}", file=sys.stderr)


@contextmanager
def progress(what: str, output: OutputOptions) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, where that is a terminal; else None."""
    if output.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def finish(document: dict[str, Any], output: OutputOptions, human: Callable[[], None]) -> None:
    """Writes the document where it was asked for; else shows it to a person."""
    if output.out is not None:
        from mia.io.files import write_json

        write_json(output.out, document)
        notice(f"wrote {output.out}", output)
    if output.json:
        print(json.dumps(document, ensure_ascii=False))
    elif output.out is None:
        human()


def visible(piece: str) -> str:
    """A token's text on one line: line ends and tabs spelled out."""
    table = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(table.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in piece)


def token_list(model: Model, tokens: Sequence[int]) -> list[dict[str, Any]]:
    return [{"index": i, "id": t, "text": model.piece(t)} for i, t in enumerate(tokens)]


def model_facts(model: Model) -> dict[str, Any]:
    """The `model` entry of every document."""
    from mia import __version__
    from mia.llama.ggml import library_info

    return {
        "name": model.name,
        "file": model.path.name,
        "sha256": model.file_hash,
        "architecture": model.architecture,
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "mia": __version__,
        "llama_cpp_python": library_info()["llama_cpp_python"],
    }
