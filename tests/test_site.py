"""The contents of the documentation site, and the pages that are made for it."""

import mia
from site_pages import PACKAGES, contents, reference


def test_contents_follow_the_order_and_lose_no_page() -> None:
    pages = ["zoo.md", "commands.md", "guide/b.md", "guide/a.md", "index.md", "guide/index.md"]
    guide = ["guide/index.md", "guide/a.md", "guide/b.md"]
    assert contents(pages) == ["index.md", {"Guide": guide}, "commands.md", "zoo.md"]


def test_the_reference_has_every_public_name_and_method() -> None:
    pages = reference()
    names = pages["python/index.md"].split("::: ")[1:]
    assert [n.strip() for n in names] == [f"mia.{name}" for name in mia.__all__]
    assert "::: mia.methods.caa\n" in pages["python/methods.md"]
    assert all("::: " in pages[f"python/{package}.md"] for package in PACKAGES)
