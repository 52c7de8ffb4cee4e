"""mkdocs calls this (mkdocs.yml): it adds the Python reference and puts the contents in order."""

from pathlib import Path
from typing import Any

import mia

#: files and folders of docs/; in a folder, index.md comes first and the others by name
ORDER = (
    "index.md",
    "guide/",
    "methods/",
    "models.md",
    "architectures.md",
    "results/",
    "architecture.md",
    "performance.md",
    "reliability.md",
    "options.md",
    "commands.md",
    "python/",
)
#: the pages of guide/ as they are read
GUIDE = (
    "install",
    "models",
    "serve",
    "devices",
    "first-look",
    "explore",
    "sites-and-edits",
    "patching",
    "heads",
    "steering",
    "tasks",
    "pictures",
    "files",
    "python",
)
#: packages with a page of their own in the reference
PACKAGES = ("methods", "lenses", "vectors", "datasets", "measure", "io", "show", "models")


def reference() -> dict[str, str]:
    """The pages of python/, by address: mkdocstrings fills in the docstrings."""
    names = "\n\n".join(f"::: mia.{name}" for name in mia.__all__)
    pages = {
        "python/index.md": f"# The public names\n\n`from mia import *` gives these.\n\n{names}"
    }
    for package in PACKAGES:
        folder = Path(mia.__file__).parent / package
        files = sorted(f for f in folder.glob("*.py") if not f.name.startswith("_"))
        modules = "\n\n".join(f"::: mia.{package}.{file.stem}" for file in files)
        pages[f"python/{package}.md"] = f"# mia.{package}\n\n{modules}"
    return pages


def contents(pages: list[str]) -> list[Any]:
    """mkdocs' `nav` for these pages; a page that ORDER does not have stands at the end."""
    guide = {f"guide/{name}.md": i for i, name in enumerate(GUIDE)}
    rest = sorted(pages, key=lambda p: (not p.endswith("index.md"), guide.get(p, 0), p))
    nav: list[Any] = []
    for place in ORDER:
        part = [p for p in rest if p == place or (place.endswith("/") and p.startswith(place))]
        rest = [p for p in rest if p not in part]
        if part:
            nav.append({place[:-1].capitalize(): part} if place.endswith("/") else part[0])
    return nav + rest


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for address, text in reference().items():
        files.append(File.generated(config, address, content=text))
    config.nav = contents([file.src_uri for file in files.documentation_pages()])
    return files
