"""The page of the server in a browser: what it writes and shows is what Python computes, each state
has a link, and what it exports opens without the server."""

import base64
import hashlib
import json
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Page
from serving import Client, serving

from mia.edits import Edit
from mia.methods.attention import attention_maps
from mia.methods.changes import Changes
from mia.methods.logit_lens import logit_lens
from mia.model import Model

PROMPT = "The cat sat on the mat"
N = 6


@pytest.fixture
def page(chrome: Page, client: Client) -> Page:
    return _opened(chrome, client)


def _opened(chrome: Page, client: Client, hash: str = "") -> Page:
    chrome.open("about:blank")
    chrome.errors.clear()
    chrome.requests.clear()
    chrome.open(f"http://127.0.0.1:{client.port}/{hash}")
    chrome.wait_for("MODEL !== null")
    return chrome


def _settled(page: Page) -> None:
    """All that is written and drawn."""
    page.wait_for("!running.some(Boolean) && !!source && source.lensColumns.size === explorer.N")
    page.value("explorer.draw()")
    assert page.errors == [] and page.value("$('error').textContent") == ""


def _write(page: Page, text: str = PROMPT, *, mode: str = "plain", n: int = N) -> None:
    page.value(f"document.querySelector('input[value={mode}]').click()")
    n_before = page.value("branches.length")
    page.value(f"$('max_tokens').value = {n}; $('prompt').value = ''; $('prompt').focus()")
    page.type(text)
    page.key("Enter", 0 if mode == "chat" else 2)
    page.wait_for(f"branches.length > {n_before}")
    _settled(page)


def _ids(page: Page, view: int) -> list[int]:
    ids: list[int] = page.value(f"state.written[{view}] && ids(state.written[{view}])")
    return ids


def _click(page: Page, words: str, where: str = "body") -> None:
    """The button with these words."""
    found = page.value(
        f"(() => {{ const b = [...document.querySelectorAll('{where} button')]"
        f".find(b => b.textContent.startsWith({json.dumps(words)})); b?.click(); return !!b; }})()"
    )
    assert found, f"there is no button {words!r}"


def _text(page: Page, selector: str) -> str:
    text: str = page.value(f"document.querySelector({json.dumps(selector)}).textContent")
    return text


def _is_the_lens(page: Page, model: Model, ids: list[int], edits: Sequence[Edit] = ()) -> None:
    """What the page shows of the first, a middle and the last token is what the lens reads."""
    table = logit_lens(model, ids, k=5, edits=edits).document()["lens"]
    for row in table:
        if row["token_index"] not in (0, len(ids) // 2, len(ids) - 1):
            continue
        shown = page.value(f"source.lens({row['layer']}, {row['token_index']})")
        assert [a["id"] for a in shown] == [a["id"] for a in row["top"]]
        probs = [a["prob"] for a in row["top"]]
        assert [a["prob"] for a in shown] == pytest.approx(probs, abs=1e-5)


def _prompt(model: Model) -> list[int]:
    return model.ids(PROMPT, bos=True)


def test_a_prompt_is_written_and_read(page: Page, model: Model) -> None:
    _write(page)
    ids = _prompt(model)
    assert page.value("ids(state.given)") == ids
    written = model.generate(ids, N).tokens
    assert _ids(page, 0) == written
    assert _text(page, "#panes").startswith("The model")
    whole = [*ids, *written]
    n = len(ids)
    _is_the_lens(page, model, whole)
    weights = attention_maps(model, whole)
    row = page.value(f"source.attention(1, 2, {n})")
    assert np.abs(np.array(row) - weights[1, 2][n, : n + 1]).max() < 1e-4
    assert _text(page, "#token").startswith(f"Token {n} of {len(whole)}")
    # nothing of another host
    assert all(f"127.0.0.1:{page.value('location.port')}" in r for r in page.requests)


def test_the_first_grid_is_timed(page: Page) -> None:
    _write(page)
    page.wait_for("performance.getEntriesByName('first lens grid').length")


def test_a_cell_is_pinned_with_the_keys(page: Page, model: Model) -> None:
    _write(page)
    page.value("document.querySelector('#lens td[tabindex=\"0\"]').focus()")
    for key in ("Home", "ArrowDown", "ArrowRight", "Enter"):
        page.key(key)
    page.value("explorer.draw()")
    assert page.value("explorer.state.cell") == [model.n_layer - 2, 1]
    assert _text(page, "#cell").startswith(f"Layer {model.n_layer - 2} after token 1")
    assert f"cell={model.n_layer - 2}.1" in page.value("location.hash")
    assert "by layer" in _text(page, "#follow")


def test_the_conversation_branches_at_an_alternative(page: Page, model: Model) -> None:
    _write(page)
    first, t = _ids(page, 0), len(_prompt(model)) + 2
    page.value(f"explorer.set({{token: {t}}})")
    other = page.value(f"source.alternatives({t}).then(a => a.top[2].id)")
    page.value(f"document.querySelector('#else button[data-id=\"{other}\"]').click()")
    given = [*_prompt(model), *first[:2], other]
    page.wait_for(f"state.given.length === {len(given)}")
    _settled(page)
    assert page.value("ids(state.given)") == given
    assert _ids(page, 0) == model.generate(given, N).tokens
    assert page.value("document.querySelectorAll('#branches button').length") == 2
    page.value("history.back()")
    page.wait_for(f"state.given.length === {len(_prompt(model))}")
    _settled(page)
    assert _ids(page, 0) == first


def _changed(page: Page, model: Model, changes: Changes) -> None:
    """What is written beside the unchanged text is what Python writes with these changes."""
    page.wait_for("state.written[1] && !running.some(Boolean)")
    ids = page.value("ids(state.given)")
    edits = changes.edits(model, ids)
    assert _ids(page, 0)[: N - 1] == model.generate(ids, N).tokens[: N - 1]
    written = model.generate(ids, N, edits=edits).tokens
    assert _ids(page, 1) == written
    page.value("document.querySelector('#panes input[value=\"1\"]').click()")
    _settled(page)
    whole = [*ids, *written]
    _is_the_lens(page, model, whole, changes.edits(model, whole))


def test_a_slider_steers(page: Page, model: Model, folder: Path) -> None:
    _write(page)
    page.value("$('steer-warm').focus()")
    for _ in range(15):
        page.key("ArrowRight")
    assert page.value("state.changes.steer") == {"warm": 1.5}
    assert page.value("document.activeElement.id") == "steer-warm"
    _changed(page, model, Changes(steer=str(folder / "warm.safetensors"), steer_coeff=1.5))
    assert "warm × 1.5" in _text(page, "#panes")
    _click(page, "take all back")
    page.wait_for("state.written[1] === null && state.view === 0")
    _settled(page)
    assert page.value("document.querySelectorAll('.pane').length") == 1


def test_a_head_is_silenced(page: Page, model: Model) -> None:
    _write(page)
    page.value("explorer.lookTable.cells[1][2].click()")
    page.value("explorer.draw()")
    _click(page, f"silence head {model.n_layer - 2}.2")
    _changed(page, model, Changes(ablate=f"{model.n_layer - 2}.2"))
    assert page.value("$('silenced').value") == f"{model.n_layer - 2}.2"


def test_a_token_is_hidden(page: Page, model: Model) -> None:
    _write(page)
    page.value("explorer.set({token: 2})")
    _click(page, "hide it from later tokens")
    _changed(page, model, Changes(block=["3..->2"]))


def test_a_residual_is_moved(page: Page, model: Model, tmp_path: Path) -> None:
    _write(page)
    page.value("explorer.set({cell: [1, 2]})")
    _click(page, "pick up the residual of layer 1 at token 2")
    assert "In hand" in _text(page, "#others")
    page.value("explorer.set({cell: [1, 4]})")
    _click(page, "put it here")
    assert "put at token 4" in _text(page, "#others")
    model.look(_prompt(model), "l_out-1").save(tmp_path / "residual.safetensors")
    patch = ("l_out-1", str(tmp_path / "residual.safetensors"), "2", "4")
    _changed(page, model, Changes(patch=[patch]))


def test_a_residual_is_put_at_a_token_that_was_written(page: Page, model: Model) -> None:
    _write(page)
    n = len(_prompt(model))
    page.value("explorer.set({cell: [1, 2]})")
    _click(page, "pick up the residual")
    page.value(f"explorer.set({{cell: [1, {n + 1}]}})")
    _click(page, "put it here")
    page.wait_for("state.written[1] && !running.some(Boolean)")
    assert page.value("state.given.length") == n + 2
    assert page.value("state.changes.moved[0].to") == n + 1


def test_a_link_restores_without_writing(chrome: Page, client: Client, model: Model) -> None:
    page = _opened(chrome, client)
    _write(page)
    _click(page, "silence head")
    page.wait_for("state.written[1] && !running.some(Boolean)")
    page.value("document.querySelector('#panes input[value=\"1\"]').click()")
    _settled(page)
    page.value("explorer.set({token: 3, cell: [0, 2]})")
    was = page.value("[state.given, state.written, state.changes, state.view, explorer.state]")
    hash = page.value("$('page-link').getAttribute('href')")
    assert hash == page.value("location.hash")
    again = _opened(chrome, client, hash)
    _settled(again)
    assert (
        again.value("[state.given, state.written, state.changes, state.view, explorer.state]")
        == was
    )
    assert not any("completions" in r for r in again.requests)


@pytest.mark.parametrize(
    "hash",
    [
        "#given=%%%&text=zz",
        "#given=zzzzzz&model=served",
        "#given=1.2&model=served&changes={&chat=[1]&view=7&token=99",
        "#given=1.2&model=served&changes=" + '{"steer":{"a":{}},"heads":[1],"moved":[{}]}',
    ],
)
def test_a_wrong_link_does_no_harm(chrome: Page, client: Client, hash: str) -> None:
    page = _opened(chrome, client, hash)
    page.wait_for("$('error').textContent || (source && source.lensColumns.size)")
    assert page.errors == []
    _write(page)


def _exported(page: Page, folder: Path) -> Path:
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    _click(page, "Export")
    page.wait_for("$('status').textContent.startsWith('One file')")
    end = time.monotonic() + 20
    while not (files := [*folder.glob("*.html")]):
        assert time.monotonic() < end, "there is no file"
        time.sleep(0.05)
    (file,) = files
    return file


def test_the_export_opens_without_the_server(
    page: Page, chrome: Page, model: Model, tmp_path: Path
) -> None:
    _write(page)
    _click(page, "silence head")
    page.wait_for("state.written[1] && !running.some(Boolean)")
    _settled(page)
    lens = page.value(f"source.lens(1, {len(_prompt(model))})")
    written = [_ids(page, 0), _ids(page, 1)]
    file = _exported(page, tmp_path)
    chrome.open("about:blank")
    chrome.requests.clear()
    chrome.open(f"file://{file}")
    assert chrome.value("VIEWS.map(v => v.label)") == ["unchanged", "changed"]
    n = len(_prompt(model))
    for view in (0, 1):
        assert chrome.value(f"VIEWS[{view}].tokens.slice({n}).map(t => t[0])") == written[view]
    shown = chrome.value(f"explorer.source.lens(1, {n})")
    assert [a["id"] for a in shown] == [a["id"] for a in lens]
    chrome.value("document.querySelector('#views input[value=\"1\"]').click()")
    chrome.value("explorer.draw()")
    assert "silenced" in _text(chrome, "#text") or "ablate" in _text(chrome, "#explorer")
    assert chrome.errors == [] and chrome.requests == [f"file://{file}"]


def test_the_commands_do_the_same(
    page: Page, model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands import run

    _write(page)
    page.value("document.querySelector('#steer-warm').value = 3")
    page.value("document.querySelector('#steer-warm').dispatchEvent(new Event('input'))")
    _click(page, "silence head")
    page.value("explorer.set({token: 3})")
    _click(page, "hide it from later tokens")
    page.value("explorer.set({cell: [1, 2]})")
    _click(page, "pick up the residual")
    page.value("explorer.set({cell: [1, 4]})")
    _click(page, "put it here")
    page.wait_for("state.written[1] && !running.some(Boolean)")
    page.value("document.querySelector('#panes input[value=\"1\"]').click()")
    _settled(page)
    monkeypatch.chdir(folder)
    (folder / model.path.name).symlink_to(model.path)
    page.wait_for("document.querySelectorAll('#same code').length > 1")
    texts = page.value("[...document.querySelectorAll('#same code')].map(c => c.textContent)")
    *lines, code = texts
    written, n = _ids(page, 1), len(_prompt(model))
    shown: dict[str, Any] = {}
    for line in lines:
        mia, name, *words = shlex.split(line)
        assert mia == "mia"
        if name == "save":
            run(name, *words, "-q")
        elif "-o" not in words:
            shown[name] = json.loads(run(name, *words, "--json", "-t", "1").stdout)
    cell = page.value("explorer.cell")
    best = page.value(f"source.lens({cell[0]}, {cell[1]})")[0]
    assert shown["logit-lens"]["lens"][0]["top"][0]["id"] == best["id"]
    assert shown["logit-lens"]["lens"][0]["top"][0]["prob"] == pytest.approx(best["prob"], abs=1e-5)
    done: dict[str, Any] = {}
    exec(code, done)
    assert done["ids"][n:] == written


def test_a_chat_goes_on(page: Page, client: Client, model: Model) -> None:
    _write(page, "The cat", mode="chat")
    first = model.chat([{"role": "user", "content": "The cat"}])
    assert page.value("ids(state.given)") == model.ids(first)
    answer = page.value("state.said[0]")
    body: dict[str, Any] = {"prompt": model.ids(first), "max_tokens": N, "temperature": 0}
    assert answer == client.choice(**body)["text"]
    _write(page, "sat", mode="chat")
    messages = [
        {"role": "user", "content": "The cat"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "sat"},
    ]
    assert page.value("ids(state.given)") == model.ids(model.chat(messages))
    assert page.value("document.querySelectorAll('#turns .turn').length") == 3
    assert _text(page, "#turns").startswith("YouThe cat")


def test_it_asks_for_the_key(chrome: Page, model: Model) -> None:
    with serving(model, key="secret") as client:
        chrome.open(f"http://127.0.0.1:{client.port}/")
        chrome.wait_for("!$('unlock').hidden")
        assert _text(chrome, "#error") == "The server asks for its key."
        for wrong in ("wrong", "ключ"):
            chrome.value(f"$('error').textContent = ''; $('key').value = '{wrong}'")
            chrome.value("$('unlock').requestSubmit()")
            chrome.wait_for("$('error').textContent === 'This is not the server’s key.'")
        chrome.value("$('key').focus()")
        chrome.type("secret")
        chrome.key("Enter")
        chrome.wait_for("MODEL !== null")
        _write(chrome)
        assert _ids(chrome, 0) == model.generate(_prompt(model), N).tokens


def test_it_has_no_room_to_scroll_sideways(page: Page) -> None:
    """As wide as a telephone."""
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=360,
        height=740,
        deviceScaleFactor=1,
        mobile=False,
    )
    try:
        _write(page)
        assert page.value("document.documentElement.scrollWidth") <= 360
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_a_screen_reader_finds_a_name_for_everything(page: Page) -> None:
    _write(page)
    _click(page, "silence head")
    page.wait_for("state.written[1] && !running.some(Boolean)")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "slider", "spinbutton", "radio", "link", "grid", "toolbar"}
    found = [n for n in nodes if n.get("role", {}).get("value") in roles]
    nameless = [n for n in found if not n.get("name", {}).get("value", "").strip()]
    assert len(found) > 50 and nameless == []


def test_text_from_outside_stays_text(
    chrome: Page, tmp_path: Path, folder: Path, model: Model
) -> None:
    name = "<img src=x onerror=boom()>"
    (tmp_path / f"{name}.gguf").symlink_to(model.path)
    with Model(tmp_path / f"{name}.gguf", threads=1) as hostile, serving(hostile) as client:
        page = _opened(chrome, client)
        page.value("globalThis.boom = () => { globalThis.hurt = true; }")
        assert _text(page, "#title") == f"{name} · mia"
        _write(page, f"</script><script>boom()</script>{name}\x1b]52;\u202e", n=2)
        page.value("explorer.set({cell: [1, 2]})")
        _click(page, "pick up")
        page.value("explorer.set({cell: [1, 3]})")
        _click(page, "put it here")
        page.wait_for("state.written[1] && !running.some(Boolean)")
        _settled(page)
        assert page.value("document.images.length") == 0 and page.value("globalThis.hurt") is None
        assert page.value("document.querySelectorAll('script').length") == 1


def test_the_page_is_one_file_with_a_policy(client: Client) -> None:
    answer = client.get("/")
    html = answer.data.decode()
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
    policy = "default-src 'none'; script-src 'sha256-"
    assert policy in html and "connect-src 'self'" in html and "/*" not in html.split("<script")[0]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in html
    assert not re.search(r"(src|href)=(?![\"']?(data:|#))", html.split("<script")[0])
    assert client.ask("GET", "/", Host="evil.example").status == 403


def test_back_keeps_the_branches_apart(page: Page, model: Model) -> None:
    """Each branch of the list leads to its own text, after Back too."""
    _write(page)
    first, t = _ids(page, 0), len(_prompt(model)) + 1
    page.value(f"explorer.set({{token: {t}}})")
    page.value("explorer.draw()")
    _click(page, "go on from here", "#else")
    page.wait_for("branches.length === 2")
    _settled(page)
    second = page.value("ids(state.given)")
    page.value("history.back()")
    page.wait_for(f"state.given.length === {len(_prompt(model))}")
    _settled(page)
    pressed = "[...document.querySelectorAll('#branches button')].map(b => b.ariaPressed)"
    assert page.value(pressed) == ["true", "false"]
    page.value("document.querySelectorAll('#branches button')[1].click()")
    page.wait_for(f"state.given.length === {len(second)}")
    _settled(page)
    assert page.value("ids(state.given)") == second
    page.value("document.querySelectorAll('#branches button')[0].click()")
    page.wait_for(f"state.given.length === {len(_prompt(model))}")
    _settled(page)
    assert _ids(page, 0) == first


def test_an_answer_keeps_what_became_given(page: Page, client: Client) -> None:
    """A change at a token of a chat's answer: the next message follows the whole answer."""
    _write(page, "The cat", mode="chat")
    begun = page.value("state.begun")
    page.value("explorer.set({cell: [1, 2]})")
    _click(page, "pick up")
    page.value(f"explorer.set({{cell: [1, {begun + 2}]}})")
    _click(page, "put it here")
    page.wait_for("state.written[1]?.length && !running.some(Boolean)")
    _settled(page)
    for view in (0, 1):
        answer = page.value(f"ids([...state.given, ...state.written[{view}]].slice({begun}))")
        said = client.post("/detokenize", tokens=answer).document["prompt"]
        # bytes that are no letter are written in two ways
        texts = [re.sub("�|<0x..>", "", x) for x in (page.value(f"state.said[{view}]"), said)]
        assert texts[0] == texts[1] != ""
    assert page.value("state.kept") != ""


def test_a_change_taken_back_while_it_is_written(page: Page) -> None:
    _write(page)
    page.value("$('max_tokens').value = 1500")
    _click(page, "silence head")
    page.wait_for("state.written[1]?.length > 2")
    _click(page, "take all back")
    page.wait_for("!running.some(Boolean)")
    assert page.value("$('stop').hidden") and _text(page, "#status") == ""
    assert page.value("state.written[1]") is None
    _settled(page)


def test_settings_are_those_that_the_text_was_written_with(
    page: Page, model: Model, tmp_path: Path
) -> None:
    """Not those that stand in the form for the next one."""
    page.value("$('temperature').value = 0.7; $('seed').value = 5")
    _write(page)
    page.value("$('temperature').value = 0; $('seed').value = 0; explorer.set({token: 3})")
    page.wait_for("!!document.querySelector('#same code')")
    (line, *_) = page.value("explorer.commands()")
    assert "--temperature 0.7 --seed 5" in line["line"]
    assert "temperature=0.7&seed=5" in page.value("location.hash")
    assert '"temperature":0.7,"seed":5' in _exported(page, tmp_path).read_text()
    # a change is compared with a text that is written in the same way
    _click(page, "silence head")
    page.wait_for("state.written[1]?.length && !running.some(Boolean)")
    _settled(page)
    assert _ids(page, 0) == model.generate(_prompt(model), N).tokens
    # several goes, each with its seed: no one command says them
    page.value("$('temperature').value = 0.7")
    _click(page, "Write further")
    page.wait_for(f"state.written[0].length === {2 * N} && !running.some(Boolean)")
    _settled(page)
    titles = [c["title"] for c in page.value("explorer.commands()")]
    assert titles and "This page" not in titles
    page.value("$('temperature').value = 0")


def test_the_lens_that_fails_holds_nothing_else_up(page: Page) -> None:
    page.value(
        "globalThis.asked = fetch; globalThis.fetch = (path, more) => more.body?.includes?.('\"lens\"')"
        " ? Promise.reject(new Error('busy')) : asked(path, more)"
    )
    page.value(f"$('max_tokens').value = {N}; $('prompt').value = 'The cat'; send()")
    page.wait_for("document.querySelector('#looks')?.textContent")
    page.wait_for("document.querySelector('#sum')?.textContent")
    assert _text(page, "#error") == "busy" and page.errors == []


def test_a_model_without_a_lens(
    chrome: Page, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mia.methods.explore_parts as parts

    monkeypatch.setattr(parts, "missing_parts", lambda _: {"lens": "served has no norm"})
    with serving(model) as client:
        page = _opened(chrome, client)
        page.value(f"$('max_tokens').value = {N}; $('prompt').value = 'The cat'; send()")
        page.wait_for("!!document.querySelector('#same code')")
        assert "served has no norm" in _text(page, "[aria-labelledby=h-lens]")
        assert page.value("explorer.draw()") is None
        assert page.errors == [] and _text(page, "#error") == ""


def test_the_focus_stays(page: Page) -> None:
    _write(page)
    page.value("explorer.set({token: 2})")
    focus = "[...document.querySelectorAll('#explorer button')].find(b => b.textContent === '{}').focus()"
    page.value(focus.format("hide it from later tokens"))
    page.key("Enter")
    page.wait_for("state.written[1]?.length && !running.some(Boolean)")
    _settled(page)
    assert page.value("document.activeElement.textContent") == "no longer hide it"
    page.value("document.querySelector('#panes input[value=\"1\"]').click()")
    _settled(page)
    page.value("$('silence').focus()")
    page.key("Enter")
    page.wait_for(
        "state.changes.heads.length && state.written[1]?.length && !running.some(Boolean)"
    )
    _settled(page)
    assert page.value("document.activeElement.id") == "silence"


def test_a_server_that_is_gone_is_said(chrome: Page, model: Model) -> None:
    with serving(model) as client:
        page = _opened(chrome, client)
        _write(page)
    page.value("$('prompt').value = 'x'; send()")
    page.wait_for("$('error').textContent.startsWith('the server does not answer')")
    assert page.errors == [] and page.value("$('stop').hidden")


def test_a_text_that_was_left_early_is_written(page: Page, model: Model) -> None:
    """With a change: not the changed text alone."""
    _write(page)
    hash = re.sub("&text=[^&]*", "&text=", page.value("location.hash"))
    changes = '{"heads":["1.2"]}'
    page.value(
        f"location.hash = {json.dumps(hash)} + '&changes=' + encodeURIComponent('{changes}')"
    )
    page.wait_for("state.written.every(w => w?.length) && !running.some(Boolean)")
    _settled(page)
    assert _ids(page, 0)[: N - 1] == model.generate(_prompt(model), N).tokens[: N - 1]
    assert page.value("state.changes.heads") == ["1.2"]
