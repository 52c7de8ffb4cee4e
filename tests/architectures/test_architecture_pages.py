"""docs/models.md and docs/architectures.md are what the last comparison gave."""

from pathlib import Path

from architectures import pages
from architectures.recipes import RECIPES
from architectures.results import CHECKS, OPERATORS, Cell, Row, load, save
from mia.sites import NAMES


def test_the_pages_are_up_to_date() -> None:
    for path, text in pages.pages(load()).items():
        assert path.read_text(encoding="utf-8") == text, "run scripts/make_architectures --pages"


def test_every_recipe_was_compared() -> None:
    assert [row.name for row in load()] == list(RECIPES)


def test_at_least_forty_architectures() -> None:
    assert len({row.architecture for row in load()}) >= 40


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    row = Row("a", "llama", False, {"q": Cell("ok", 2e-6, layers=[1])})
    row.operators["zero"] = {"q": Cell("WRONG", 0.5, "why")}
    save([row], tmp_path / "r.json")
    assert load(tmp_path / "r.json") == [row]


def test_a_wrong_cell_is_shown() -> None:
    row = Row("a", "llama", False, {n: Cell("none") for n in NAMES})
    row.operators = {op: {} for op in OPERATORS}
    row.checks = {c: Cell("ok", 0.0) for c in CHECKS}
    row.sites["mlp_out"] = Cell("WRONG", 3.3, "is resid_post.1")
    texts = pages.pages([row]).values()
    assert all("WRONG" in text for text in texts)
    assert any("**`mlp_out` is WRONG**: is resid_post.1 (a)" in text for text in texts)
