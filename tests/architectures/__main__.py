"""Makes the models, compares them, and writes the results and the pages (`scripts/make_architectures`)."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from . import pages
from .compare import compare
from .make import build
from .recipes import RECIPES
from .reference import Reference
from .results import Row, save


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/make_architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these; nothing is written then")
    parser.add_argument("--files", type=Path, help="a folder to keep the models in")
    options = parser.parse_args()
    if unknown := set(options.names) - set(RECIPES):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.files or Path(temporary)
        names = options.names or list(RECIPES)
        subprocess.run(
            [sys.executable, "-m", f"{__package__}.make", str(folder), *names], check=True
        )
        rows = [_compared(name, folder) for name in names]
    if not options.names:
        save(rows)
        pages.write()


def _compared(name: str, folder: Path) -> Row:
    recipe = RECIPES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = compare(recipe, Reference(recipe, build(recipe)), folder / f"{name}.gguf")
    print(f"{name:20} {'; '.join(row.wrong) or 'right'}", flush=True)
    return row


if __name__ == "__main__":
    main()
