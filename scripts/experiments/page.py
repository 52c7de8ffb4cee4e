"""The page of `mia serve` in headless Chromium: how soon the lens is there, and the picture of the README.

    python scripts/experiments/page.py [-m MODEL] [--rounds N] [--picture docs/img/serve.png]

The residual of an in-context task (Hendel et al. 2023, arXiv 2310.15916) is picked up from one prompt and put
into another, all by mouse and keyboard. Then a text is written N times. Printed is the time from the end of
the answer to the first lens grid, 6 tokens × all layers, as the browser measures it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import chromium
from chromium import Page
from serving import serving

from mia import Model

TASK = "".join(
    f"Q: {q}\nA:{a}"
    for q, a in [
        ("Egypt", " Cairo\n\n"),
        ("Norway", " Oslo\n\n"),
        ("Japan", " Tokyo\n\n"),
        ("Italy", " Rome\n\n"),
        ("Spain", ""),
    ]
)
TEXT = "The Eiffel Tower is in the city of Paris, and the Colosseum is in the city of"
LAYER = 21


def settled(page: Page) -> None:
    ended = "!running.some(Boolean) && !!source && source.lensColumns.size === explorer.N"
    page.wait_for(ended, 600)
    page.value("explorer.draw()")


def write(page: Page, text: str, n: int) -> None:
    before = page.value("branches.length")
    page.value("document.querySelector('input[value=plain]').click(); $('bos').checked = true")
    page.value(f"$('max_tokens').value = {n}; $('prompt').value = ''; $('prompt').focus()")
    page.type(text)
    page.key("Enter", 2)
    page.wait_for(f"branches.length > {before}")
    settled(page)


def press(page: Page, words: str) -> None:
    page.value(
        "[...document.querySelectorAll('#explorer button')]"
        f".find(b => b.textContent.startsWith('{words}')).click()"
    )


def moved(page: Page) -> None:
    """What the last token of five questions holds, put at the last token of one question."""
    write(page, TASK, 1)
    page.value(f"explorer.set({{cell: [{LAYER}, state.given.length - 1]}})")
    press(page, "pick up")
    write(page, "Q: France\nA:", 8)
    page.value(f"explorer.set({{cell: [{LAYER}, state.given.length - 1]}})")
    press(page, "put it here")
    page.wait_for("state.written[1]?.length && !running.some(Boolean)", 60)
    page.value("document.querySelector('#panes input[value=\"1\"]').click()")
    settled(page)
    page.value("scrollTo(0, 0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if chromium.PROGRAM is None:
        sys.exit("there is no chromium here")
    with (
        tempfile.TemporaryDirectory() as profile,
        Model(given.model, ctx=2048) as model,
        serving(model) as client,
        chromium.browser(Path(profile)) as page,
    ):
        size = {"width": 1360, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.open(f"http://127.0.0.1:{client.port}/")
        page.wait_for("MODEL !== null")
        moved(page)
        texts = page.value("state.written.map(w => w.map(t => t.text).join(''))")
        print(f"unchanged: {texts[0]!r}\nchanged:   {texts[1]!r}")
        if given.picture is not None:
            page.screenshot(given.picture, whole=False)
        page.value("$('clear').click()")
        for _ in range(given.rounds):
            write(page, TEXT, 32)
        name = "performance.getEntriesByName('first lens grid').map(e => e.duration)"
        times = page.value(name)[-given.rounds :]
        print(
            f"first lens grid after {statistics.median(times):.0f} ms (median of {len(times)}: "
            f"{', '.join(f'{t:.0f}' for t in times)})"
        )


if __name__ == "__main__":
    main()
