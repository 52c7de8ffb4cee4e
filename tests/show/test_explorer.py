"""The page of a text in a browser: what it shows is what Python computed, it is driven by mouse and
keyboard, its address restores it, and no token's text can put a script into it."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Page
from commands import run
from tiny import Tiny

from mia.methods.explore import explore
from mia.methods.explore_reports import Explored
from mia.show.html import write_page

#: each would do something in some place of a page
EVIL = [
    "</script><script>boom()</script>",
    "<img src=x onerror=boom()>",
    '" onmouseover="boom()" x="',
    "<!--DATA--><!--TITLE--></main>",
    "\u202e\x1b]52;c;QQ==\x07\ud800\u2028'`${boom()}",
]


@pytest.fixture(scope="module")
def report(tiny: Callable[[str], Tiny]) -> Explored:
    m = tiny("llama").model
    return explore(m, m.ids("The cat sat on the mat", bos=True), n_predict=6, k=4, branches=2)


@pytest.fixture(scope="module")
def file(report: Explored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    report.save(path)
    return path


@pytest.fixture
def page(chrome: Page, file: Path) -> Page:
    return _opened(chrome, file)


def _opened(chrome: Page, file: Path, hash: str = "") -> Page:
    chrome.open("about:blank")  # another hash alone would not load the page again
    chrome.errors.clear()
    chrome.requests.clear()
    chrome.open(f"file://{file}{hash}")
    assert chrome.value("explorer.draw()") is not None or not chrome.errors
    return chrome


def _settled(page: Page) -> None:
    page.value("explorer.draw()")


def _key(page: Page, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
    _settled(page)


def _text(page: Page, selector: str) -> str:
    text: str = page.value(f"document.querySelector({json.dumps(selector)}).textContent")
    return text


def _click(page: Page, selector: str) -> None:
    page.value(f"document.querySelector({json.dumps(selector)}).click()")
    _settled(page)


def test_the_page_holds_everything_and_asks_for_nothing(page: Page, file: Path) -> None:
    assert page.errors == [] and page.requests == [f"file://{file}"]
    html = file.read_text()
    assert not re.search(r"(src|href)=(?![\"']?(data:|#))", html.split("<script")[0])
    assert "default-src 'none'; script-src 'sha256-" in html


def test_the_numbers_are_those_of_the_report(page: Page, report: Explored) -> None:
    assert report.attention is not None and report.attribution is not None
    assert report.blocking is not None
    n, t = len(report.tokens), report.n_prompt + 1
    after = page.value(f"explorer.source.alternatives({t})")
    assert [a["id"] for a in after["top"]] == report.alternatives.ids[t - 1].tolist()
    own = report.alternatives.own[t - 1], int(report.alternatives.ranks[t - 1])
    assert (after["own"]["logprob"], after["own"]["rank"]) == pytest.approx(own, abs=1e-6)
    for layer in range(report.facts.n_layer):
        cell = page.value(f"explorer.source.lens({layer}, {t})")
        assert [c["id"] for c in cell] == report.lens.ids[layer, t].tolist()
        assert [c["prob"] for c in cell] == pytest.approx(report.lens.probs[layer, t].tolist())
        row = page.value(f"explorer.source.attention({layer}, 1, {t})")
        assert row == pytest.approx(report.attention[layer, 1][t, : t + 1].tolist(), abs=1e-4)
    for i in (0, n - 1):
        m = len(report.lens.followed[i]) - 1
        token = int(report.lens.followed[i][m])
        steps = page.value(f"explorer.source.follow({i}, {token})")
        assert [s["rank"] for s in steps] == report.lens.ranks[i][:, m].tolist()
        logprobs = report.lens.logprobs[i][:, m].tolist()
        assert [s["logprob"] for s in steps] == pytest.approx(logprobs)
    assert page.value("explorer.source.follow(0, 1e9)") is None
    looks = np.array(page.value(f"explorer.source.looks({t}, 2)"))
    assert np.abs(looks - report.attention.weights[:, :, t, 2]).max() < 1e-4
    shares, found = report.attribution[t - 1], page.value(f"explorer.source.attribution({t})")
    assert shares is not None
    for name in ("logit", "embed", "attn", "mlp", "heads"):
        assert np.abs(np.subtract(found[name], getattr(shares, name))).max() < 1e-5
    dropped = page.value(f"explorer.source.blocking({t}).then(b => b.drop.slice(0, {t - 1}))")
    assert dropped == pytest.approx(report.blocking.drop[t, : t - 1].tolist(), abs=1e-6)
    for b in report.branches:
        branch = page.value(f"explorer.source.branch({b.at}, {b.token})")
        assert branch["tokens"] == b.tokens


def test_a_token_is_chosen_with_the_mouse_and_the_keys(page: Page, report: Explored) -> None:
    t = report.n_prompt
    assert _text(page, "#token").startswith(f"Token {t} of {len(report.tokens)}")
    box = page.value(
        "(() => { const r = document.querySelectorAll('#text button')[3].getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    page.click(*box)
    _settled(page)
    assert _text(page, "#token").startswith("Token 3 of")
    assert page.value("location.hash").startswith("#token=3&")
    for key, chosen in (("ArrowRight", 4), ("ArrowLeft", 3), ("End", 13), ("Home", 0)):
        _key(page, key)
        here = min(chosen, len(report.tokens) - 1)
        assert _text(page, "#token").startswith(f"Token {here} of")
        assert page.value("document.activeElement.getAttribute('aria-pressed')") == "true"
    assert page.value("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1
    assert "Nothing predicts the first token" in _text(page, "#else")
    assert page.errors == []


def test_a_cell_is_pinned_and_a_token_followed(page: Page, report: Explored) -> None:
    n_layer = report.facts.n_layer
    page.value("document.querySelector('#lens table .lens, #lens td[tabindex=\"0\"]').focus()")
    for key in ("Home", "ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        _key(page, key)
    layer = n_layer - 2
    assert page.value("explorer.state.cell") == [layer, 2]
    said = _text(page, "#cell")
    label = report.pieces[int(report.lens.ids[layer, 2, 0])]["text"]
    assert said.startswith(f"Layer {layer} after token 2") and label.strip() in said
    other = int(report.lens.ids[layer, 2, 2])
    _click(page, f'#follow button[data-id="{other}"]')
    assert page.value("explorer.state.follow") == other
    m = report.lens.followed[2].tolist().index(other)
    rows = page.value(
        "[...document.querySelectorAll('#follow tbody tr')].map(r => +r.cells[2].textContent)"
    )
    assert rows == report.lens.ranks[2][::-1, m].tolist()  # the model's end on top
    assert f"cell={layer}.2" in page.value("location.hash")
    assert f"follow={other}" in page.value("location.hash")


def test_the_text_branches_at_an_alternative(page: Page, report: Explored) -> None:
    branch = report.branches[1]
    _click(page, f'#else button[data-id="{branch.token}"]')
    said = _text(page, "#else [role=status]")
    text = "".join(report.pieces[t]["text"] for t in branch.tokens)
    assert f"With “{report.pieces[branch.token]['text']}”" in said
    assert text.replace("\n", "\\n").strip()[:12] in said and "The text" in said
    last = int(report.alternatives.ids[branch.at - 1][-1])
    _click(page, f'#else button[data-id="{last}"]')
    if last not in [b.token for b in report.branches if b.at == branch.at]:
        assert "is not in this page" in _text(page, "#else")


def test_heads_and_keys_are_chosen(page: Page, report: Explored) -> None:
    assert report.attention is not None
    n_layer, t = report.facts.n_layer, report.n_prompt
    page.value("explorer.lookTable.cells[1][2].click()")
    _settled(page)
    layer = n_layer - 2
    assert page.value("[explorer.state.layer, explorer.state.head]") == [layer, 2]
    best = int(report.attention[layer, 2][t].argmax())
    weight = report.attention[layer, 2][t, best]
    assert f": {weight:.3f} at token {best} " in _text(page, "#looks")
    page.value("explorer.lookStrip.buttons[3].click()")
    _settled(page)
    assert "at token 3" in _text(page, "#overview-title")
    label = page.value("explorer.lookTable.cells[1][2].getAttribute('aria-label')")
    assert label.startswith(f"layer {layer}, head 2: {report.attention[layer, 2][t, 3]:.4f}")
    page.value("document.querySelector('input[value=before]').click()")
    _settled(page)
    assert f"from token {t - 1} " in _text(page, "#looks")


def test_an_address_restores_what_was_chosen(chrome: Page, file: Path, report: Explored) -> None:
    branch = report.branches[-1]
    hash = f"#token={branch.at}&layer=1&head=2&key=3&cell=2.4&branch={branch.token}&query=before"
    page = _opened(chrome, file, hash)
    state = page.value("explorer.state")
    assert state == {
        "token": branch.at,
        "layer": 1,
        "head": 2,
        "key": 3,
        "cell": [2, 4],
        "follow": None,
        "branch": branch.token,
        "query": "before",
    }
    assert "Layer 2 after token 4" in _text(page, "#cell")
    assert _text(page, "#else .branch mark") != ""
    assert page.value("document.querySelector('#link').getAttribute('href') === hash()")
    again = page.value("hash()")
    assert _opened(chrome, file, again).value("explorer.state") == state


@pytest.mark.parametrize("hash", ["#token=99&layer=x&head=-1&cell=1", "#%%%", "#follow=7&branch=1"])
def test_a_wrong_address_does_no_harm(
    chrome: Page, file: Path, report: Explored, hash: str
) -> None:
    page = _opened(chrome, file, hash)
    assert page.errors == []
    assert page.value("explorer.state.token") == report.n_prompt


def test_what_is_hidden_within_the_noise_is_grey(
    chrome: Page, report: Explored, tmp_path: Path
) -> None:
    assert report.blocking is not None
    t = report.n_prompt
    drop, floor = report.blocking.drop.copy(), report.blocking.floor.copy()
    drop[t, :3], floor[t] = (0.5, -0.004, 0.005), 0.005
    write_page(
        tmp_path / "page.html",
        replace(report, blocking=replace(report.blocking, drop=drop, floor=floor)).page(),
    )
    page = _opened(chrome, tmp_path / "page.html")
    quiet = page.value(
        "explorer.blockStrip.buttons.slice(0, 3).map(b => b.classList.contains('z'))"
    )
    assert quiet == [False, True, True]
    assert "±0.0050" in _text(page, "#blocked-legend")


def test_what_is_missing_is_said(chrome: Page, report: Explored, tmp_path: Path) -> None:
    why = "tiny has no site attn_pattern.0 (</script>no softmax)"
    none = replace(
        report,
        attention=None,
        attribution=None,
        blocking=None,
        missing=dict.fromkeys(("attention", "attribution", "blocking"), why),
    )
    none.save(tmp_path / "page.html")
    page = _opened(chrome, tmp_path / "page.html", "#token=3&layer=1")
    assert page.errors == [] and why in _text(page, "#heads") and why in _text(page, "#made")


#: every element with the names of its attributes
MARKUP = "[...document.querySelectorAll('*')].map(e => [e.tagName, ...e.getAttributeNames()])"


@pytest.mark.parametrize("evil", EVIL)
def test_no_token_breaks_out(chrome: Page, report: Explored, tmp_path: Path, evil: str) -> None:
    """A page of hostile tokens has the elements of one of harmless ones."""

    def opened(text: str) -> Page:
        every = replace(
            report,
            tokens=[replace(t, text=text) for t in report.tokens],
            pieces={i: {"id": i, "text": text} for i in report.pieces},
            facts=replace(report.facts, name=text, architecture=text),
        )
        every.save(tmp_path / "page.html")
        branch = report.branches[0]
        return _opened(chrome, tmp_path / "page.html", f"#token={branch.at}&branch={branch.token}")

    harmless = opened("harmless!").value(MARKUP)
    page = opened(evil)
    page.value("globalThis.boom = () => { globalThis.hurt = true; }")
    assert page.errors == [] and page.value("globalThis.hurt ?? false") is False
    assert page.value(MARKUP) == harmless
    assert page.value("document.querySelectorAll('script').length") == 2


def _data(file: Path) -> dict[str, Any]:
    """What a page has in it."""
    found = re.search(r'id="data">(.*?)</script>', file.read_text(), re.S)
    assert found is not None
    (data,) = json.loads(found[1])["views"]
    assert isinstance(data, dict)
    return data


@pytest.mark.parametrize("prompt", ["-n 5", "The 😀 sat, “é”"])
def test_a_prompt_is_given_to_the_command_as_it_is(
    chrome: Page,
    tiny: Callable[[str], Tiny],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
) -> None:
    """One that looks like an option, and one with letters whose bytes are tokens of their own."""
    m = tiny("llama").model
    ids = m.ids(prompt, bos=True)
    explore(m, ids, n_predict=2, k=2, branches=0).save(tmp_path / "page.html")
    page = _opened(chrome, tmp_path / "page.html")
    _, *command = shlex.split(page.value(f'explorer.command("tokens", {len(ids)})'))
    monkeypatch.chdir(m.path.parent)
    tokens = json.loads(run(*command, "--json").stdout)["tokens"]
    assert [t["id"] for t in tokens] == ids


def test_the_commands_and_the_python_compute_what_is_shown(
    page: Page, file: Path, report: Explored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run as they stand in the page, in the folder of the model's file."""
    assert report.attribution is not None and report.attention is not None
    monkeypatch.chdir(report.facts.path.parent)
    words = page.value(
        "(W => explorer.tokens.map(({id}, t) => W.prompts[t] && t > 1 && W.prompts[t - 1] && W.answers.includes(id)))(explorer.source.words)"
    )
    t = max(i for i, told in enumerate(words) if told)
    page.value(f"explorer.set({{token: {t}, layer: 1, head: 2, cell: [1, {t - 1}]}})")
    other = page.value(
        f"explorer.source.alternatives({t}).then(a => a.top[explorer.source.words.alternatives[{t - 1}].lastIndexOf(true)].id)"
    )
    page.value(f"explorer.set({{branch: {other}}})")
    lines = {c["title"]: c for c in page.value("explorer.commands()")}
    assert len(lines) == 6
    shown = {}
    for title, c in lines.items():
        assert c["line"] is not None, title
        mia, *command = shlex.split(c["line"])
        assert mia == "mia"
        if "-o" in command:
            assert run(*command).stdout == ""
            assert _data(Path("page.html"))["branches"] == _data(file)["branches"]
            assert _data(Path("page.html"))["alternatives"] == _data(file)["alternatives"]
        else:
            shown[command[0]] = json.loads(run(*command, "--json", "-t", "1").stdout)
    best = shown["logit-lens"]["lens"][0]["top"][0]
    assert best["id"] == int(report.lens.ids[1, t - 1, 0])
    assert best["prob"] == pytest.approx(float(report.lens.probs[1, t - 1, 0]), abs=1e-5)
    weights = np.array(shown["attention"]["weights"])
    assert np.abs(weights[0, 0, t] - report.attention[1, 2][t, : t + 1]).max() < 1e-5
    shares = report.attribution[t - 1]
    assert shares is not None
    assert np.abs(np.subtract(shown["attribute"]["heads"], shares.heads)).max() < 1e-4
    assert report.blocking is not None
    effect = np.array(shown["sweep"]["values"]) - shown["sweep"]["unchanged"]
    assert np.abs(effect[: t - 1] + report.blocking.drop[t, : t - 1]).max() < 1e-4
    assert [w["id"] for w in shown["run"]["tokens"]][-1] == other
    code = _text(page, "#same .code:last-child code")
    done: dict[str, object] = {}
    exec(code, done)
    assert done["ids"] == [x.id for x in report.tokens]


def test_a_notebooks_frame_works(chrome: Page, report: Explored, tmp_path: Path) -> None:
    """In a frame without an origin of its own: no address, no clipboard."""
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><meta charset=utf-8>{report._repr_html_()}", encoding="utf-8"
    )
    chrome.open("about:blank")
    chrome.errors.clear()
    chrome.open(f"file://{tmp_path / 'notebook.html'}")
    own, chrome._session = chrome._session, ""
    targets = chrome.call("Target.getTargets")["targetInfos"]
    (frame,) = [t["targetId"] for t in targets if t["type"] == "iframe"]
    chrome._session = chrome.call("Target.attachToTarget", targetId=frame, flatten=True)[
        "sessionId"
    ]
    try:
        assert chrome.value("self.origin") == "null"
        _click(chrome, "#text button:nth-child(3)")
        assert _text(chrome, "#token").startswith("Token 2 of")
        assert chrome.value("location.protocol") == "about:"
    finally:
        chrome._session = own
    assert chrome.errors == []
