"""The index of methods in the package's docstring."""

import re
from importlib import import_module
from pathlib import Path

import mia.methods

#: what methods are made of
PARTS = {
    "ab_prompts",
    "explore_changes",
    "explore_parts",
    "explore_text",
    "explore_words",
    "optimisers",
    "rerun",
    "why_findings",
    "why_parts",
    "why_shown",
}


def test_the_index_has_every_method_and_its_functions() -> None:
    assert mia.methods.__doc__ is not None
    rows = [line.split("|")[1:4] for line in mia.methods.__doc__.splitlines() if "| `" in line]
    listed = {name.strip(" `"): re.findall(r"`(\w+)`", functions) for name, _, functions in rows}
    files = {p.stem for p in Path(mia.methods.__path__[0]).glob("*.py")}
    assert listed.keys() == {f for f in files - PARTS if not f.endswith(("__", "_reports"))}
    for name, functions in listed.items():
        module = import_module(f"mia.methods.{name}")
        assert functions and all(hasattr(module, f) for f in functions), name
