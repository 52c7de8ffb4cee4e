"""What the page of a text is made of, against the oracle and the library's own functions."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.errors import UsageError
from mia.lenses.followed import follow
from mia.methods import explore as module
from mia.methods.attention import attention_maps
from mia.methods.attribution import attribute_logit
from mia.methods.changes import Changes
from mia.methods.explore import explore
from mia.methods.explore_changes import said_of
from mia.methods.explore_parts import N_NUDGES
from mia.methods.explore_reports import Explored
from mia.methods.sweep import sweep
from mia.model import Model
from mia.ranges import Head
from mia.request import Sampling
from mia.show.explorer import explorer_data
from mia.sweeps.experiments import Blocking

N_PROMPT, N = 8, 6
TOLERANCE = 1e-4


_KEPT: dict[str, Explored] = {}


def _explored(t: Tiny, **more: object) -> Explored:
    """The report of a tiny model; one with no settings of its own is made once."""
    if not more and t.name in _KEPT:
        return _KEPT[t.name]
    settings: dict[str, object] = {"n_predict": N, "k": 4, "branches": 2, **more}
    report = explore(t.model, t.prompt(N_PROMPT), **settings)  # type: ignore[arg-type]
    if not more:
        _KEPT[t.name] = report
    return report


def _ids(report: Explored) -> list[int]:
    return [t.id for t in report.tokens]


def _logprobs(logits: np.ndarray) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def _ranks(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(n, m) of tokens (n, m) in logits (n, n_vocab): 1 and how many are larger."""
    return np.array(
        [[1 + (row > row[i]).sum() for i in own] for row, own in zip(logits, ids, strict=True)]
    )


def test_the_text_is_what_the_model_writes(case: Tiny) -> None:
    report = _explored(case)
    ids = _ids(report)
    assert ids[: report.n_prompt] == case.prompt(N_PROMPT)
    assert ids[N_PROMPT:] == case.model.generate(case.prompt(N_PROMPT), N).tokens
    assert report.missing == {}


def test_alternatives_are_the_oracles(case: Tiny) -> None:
    report = _explored(case)
    ids, a = _ids(report), report.alternatives
    truth = case.oracle.run(ids)["logits"]
    logprobs = _logprobs(truth)
    assert np.array_equal(a.ids, np.argsort(-truth, axis=1, kind="stable")[:, :4])
    assert np.abs(a.logprobs - np.take_along_axis(logprobs, a.ids, 1)).max() < TOLERANCE
    own = np.array([logprobs[i, t] for i, t in enumerate(ids[1:])])
    assert np.abs(a.own[:-1] - own).max() < TOLERANCE
    assert np.array_equal(a.ranks[:-1], _ranks(truth[:-1], np.array(ids[1:])[:, None])[:, 0])
    assert np.isnan(a.own[-1]) and a.ranks[-1] == 0


def test_the_lens_and_what_is_followed_are_the_oracles(case: Tiny) -> None:
    report = _explored(case)
    ids, lens, o = _ids(report), report.lens, case.oracle
    sites = o.run(ids)
    for layer in range(o.n_layer):
        truth = o.lens(sites[f"resid_post.{layer}"])
        logprobs = _logprobs(truth)
        assert np.array_equal(lens.ids[layer], np.argsort(-truth, axis=1, kind="stable")[:, :4])
        best = np.exp(np.take_along_axis(logprobs, lens.ids[layer], 1))
        assert np.abs(lens.probs[layer] - best).max() < TOLERANCE
        for i, followed in enumerate(lens.followed):
            assert np.abs(lens.logprobs[i][layer] - logprobs[i, followed]).max() < 1e-3
            assert np.array_equal(lens.ranks[i][layer], _ranks(truth[i : i + 1], followed[None])[0])


def test_what_is_followed_are_all_tokens_that_are_listed(llama: Tiny) -> None:
    report = _explored(llama)
    for i, followed in enumerate(report.lens.followed):
        listed = {*report.lens.ids[:, i].ravel(), *report.alternatives.ids[i]}
        assert set(followed) == listed | set(_ids(report)[i + 1 : i + 2])
        assert len(set(followed)) == len(followed)


def test_rows_are_followed_in_parts(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    h = np.random.default_rng(0).standard_normal((7, llama.model.n_embd)).astype(np.float32)
    tokens = np.arange(21).reshape(7, 3)
    whole = follow(llama.model.lens, h, tokens)
    monkeypatch.setattr("mia.lenses.followed._SCORES", 2 * llama.model.n_vocab)
    parts = follow(llama.model.lens, h, tokens)
    assert np.abs(whole.logprobs - parts.logprobs).max() < 1e-5
    assert np.array_equal(whole.ranks, parts.ranks)
    with pytest.raises(UsageError, match=r"tokens of shape \(6, 3\) are not those of 7 rows"):
        follow(llama.model.lens, h, tokens[:6])


def test_equal_logits_share_the_smallest_rank(llama: Tiny) -> None:
    class Flat:
        n_vocab = 4

        def logits(self, h: np.ndarray) -> np.ndarray:
            return np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)

    ranks = follow(Flat(), np.zeros((1, 2), np.float32), np.array([[0, 1, 2, 3]])).ranks  # type: ignore[arg-type]
    assert ranks.tolist() == [[4, 1, 1, 3]]


def test_attention_and_attribution_are_the_librarys(case: Tiny) -> None:
    report = _explored(case)
    ids = _ids(report)
    assert report.attention is not None and report.attribution is not None
    maps = attention_maps(case.model, ids)
    assert np.abs(report.attention.weights - maps.weights).max() < 1e-5
    assert len(report.attribution) == len(ids) - 1
    for t in (1, N_PROMPT, len(ids) - 1):
        shares, own = attribute_logit(case.model, ids[:t], ids[t]), report.attribution[t - 1]
        assert own is not None
        for name in ("embed", "attn", "mlp", "heads", "attn_bias", "bias", "logit"):
            difference = np.asarray(getattr(own, name)) - getattr(shares, name)
            assert np.abs(difference).max() < TOLERANCE


def test_blocking_is_the_oracles(case: Tiny) -> None:
    report = _explored(case)
    ids, o = _ids(report), case.oracle
    assert report.blocking is not None
    clean = _logprobs(o.run(ids)["logits"])
    for key in (0, 3, len(ids) - 3):

        def hidden(scores: np.ndarray, key: int = key) -> np.ndarray:
            scores = scores.copy()
            scores[key + 1 :, :, key] = -np.inf
            return scores

        edits = {f"attn_scores.{i}": hidden for i in range(o.n_layer)}
        blocked = _logprobs(o.run(ids, edits)["logits"])
        for t in range(key + 2, len(ids)):
            drop = clean[t - 1, ids[t]] - blocked[t - 1, ids[t]]
            assert abs(report.blocking.drop[t, key] - drop) < 1e-3
        assert np.isnan(report.blocking.drop[: key + 2, key]).all()
    assert (report.blocking.floor[1:] < 1e-3).all()


def test_blocking_is_what_the_sweep_gives(llama: Tiny) -> None:
    report = _explored(llama)
    ids, t = _ids(report), N_PROMPT + 2
    assert report.blocking is not None
    piece = llama.model.piece(ids[t])
    assert llama.model.continuation(llama.model.piece(ids[t - 1]), piece) == [ids[t]]
    one = sweep(llama.model, ids[:t], Blocking(), over="token", answer=piece, metric="logprob")
    drop = report.blocking.drop[t, : t - 1]
    assert np.abs(one.effect[: t - 1] + drop).max() < TOLERANCE


def test_branches_are_what_the_model_would_write(case: Tiny) -> None:
    report = _explored(case)
    ids = _ids(report)
    assert len(report.branches) == 2 * N
    for branch in report.branches:
        assert branch.token in report.alternatives.ids[branch.at - 1]
        assert branch.token != ids[branch.at]
        n = 0 if case.model.ends_turn(branch.token) else N_PROMPT + N - branch.at - 1
        own = case.model.generate([*ids[: branch.at], branch.token], n)
        assert branch.tokens == own.tokens
        assert np.abs(np.subtract(branch.logprobs, own.logprobs)).max(initial=0) < TOLERANCE


def test_nothing_follows_the_end_of_a_turn(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _explored(llama)
    branch = next(b for b in report.branches if len(b.tokens) > 1)
    ends = llama.model.ends_turn
    monkeypatch.setattr(llama.model, "ends_turn", lambda t: t == branch.token or ends(t))
    again = _explored(llama, sampling=Sampling())
    ended = next(b for b in again.branches if (b.at, b.token) == (branch.at, branch.token))
    assert ended.tokens == [] and ended.logprobs == []
    others = [b for b in again.branches if b.token != branch.token]
    assert [b.tokens for b in others] == [
        b.tokens for b in report.branches if b.token != branch.token
    ]


def test_all_that_changes_is_one_run(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = llama.model.lens, llama.model.unfused_topology
    sizes, run = [], llama.model.run

    def counted(requests: list[object], **more: object) -> object:
        sizes.append(len(requests))
        return run(requests, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(llama.model, "run", counted)
    _explored(llama, sampling=Sampling())
    blocks = 1 + N_NUDGES + N_PROMPT + N - 2
    assert sizes == [1, 3, 2 * N + blocks]


def test_sampled_tokens_stand_where_they_rank(llama: Tiny) -> None:
    how = Sampling(temperature=2.0, seed=3)
    report = _explored(llama, sampling=how)
    ids = _ids(report)
    assert ids[N_PROMPT:] == llama.model.generate(ids[:N_PROMPT], N, sampling=how).tokens
    assert report.alternatives.ranks[N_PROMPT - 1 : -1].max() > 1
    assert report.words.sampling == {"temperature": 2.0, "seed": 3}


def test_what_an_architecture_lacks_is_left_out(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("mamba")
    report = explore(t.model, t.prompt(5), n_predict=3)
    assert report.attention is None and report.attribution is None and report.blocking is None
    assert report.missing.keys() == {"attention", "attribution", "blocking"}
    assert all("this block has no softmax attention" in why for why in report.missing.values())
    assert len(report.branches) == 9 and report.lens.ids.shape[:2] == (t.model.n_layer, 8)
    assert report.document()["attribution"] is None


def test_prompts_of_the_page_are_read_as_its_tokens(llama: Tiny) -> None:
    m = llama.model
    report = explore(m, m.ids("The cat sat\non the mat", bos=True), n_predict=4)
    ids, words = _ids(report), report.words
    assert words.bos and words.prompts[0]
    for i, same in enumerate(words.prompts, 1):
        text = "".join(t.text for t in report.tokens[1:i])[words.cut :]
        assert (m.ids(text, bos=True) == ids[:i]) == same
    for i, row in enumerate(words.alternatives):
        for other, same in zip(report.alternatives.ids[i].tolist(), row, strict=True):
            text = m.detokenize([*ids[1 : i + 1], other])[words.cut :]
            assert not same or m.ids(text, bos=True) == [*ids[: i + 1], other]
    assert all(m.token_id(m.piece(t)) == t for t in words.answers)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"n_predict": 0}, "n_predict is 0; a text to explore has at least 1"),
        ({"k": 0}, "k is 0 and branches 2; they are at least 1 and 0"),
        ({"branches": -1}, "k is 4 and branches -1"),
    ],
)
def test_wrong_numbers_are_refused(llama: Tiny, more: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        _explored(llama, **more)


def test_a_text_too_long_for_a_page_is_refused_before_any_work(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_WEIGHTS", 1000)
    monkeypatch.setattr(llama.model, "run", None)
    heads = llama.model.n_layer * llama.model.n_head
    with pytest.raises(
        UsageError, match=rf"14 tokens with {heads} heads are too many for one page"
    ):
        _explored(llama, n_predict=N)


def test_the_report(llama: Tiny, tmp_path: Path) -> None:
    report = _explored(llama)
    document = report.document()
    assert json.loads(json.dumps(document)) == document
    assert len(document["alternatives"]) == len(document["tokens"]) == N_PROMPT + N
    assert document["branches"][0]["at"] == N_PROMPT
    assert np.asarray(document["attribution"][0]["heads"]).shape == (
        llama.model.n_layer,
        llama.model.n_head,
    )
    assert report.plain().count("\n") == N - 1
    assert len(report.rows()) == 4 * (N_PROMPT + N - 1)
    report.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == report.page()
    report.save(tmp_path / "page.json")
    assert json.loads((tmp_path / "page.json").read_text()) == document
    frame = report._repr_html_()
    assert frame.startswith("<iframe") and 'sandbox="allow-scripts"' in frame
    assert "<script" not in frame  # all of it is text of one attribute


@pytest.mark.slow
def test_smollm2(smollm2: Model) -> None:
    ids = smollm2.ids("The Colosseum is in the city of", bos=True)
    report = explore(smollm2, ids, n_predict=4)
    assert report.missing == {} and "Rome" in report.tokens[len(ids)].text
    n = len(report.tokens)
    assert report.alternatives.ranks[len(ids) - 1 : n - 1].max() <= 2  # greedy, but for rounding
    last = report.lens.probs[-1, :, 0]
    assert np.abs(last - np.exp(report.alternatives.logprobs[:, 0])).max() < 0.05  # 8-bit rows
    assert report.blocking is not None and report.attribution is not None
    assert (report.blocking.floor[1:] > 0).all() and None not in report.attribution
    place = next(t.index for t in report.tokens if "Col" in t.text)
    drop, floor = report.blocking.drop[len(ids)], report.blocking.floor[len(ids)]
    assert np.nanmax(drop) > 5 * floor and int(np.nanargmax(drop)) in range(place, place + 3)
    # 16 bits for each weight, 4/3 of it as base64: 60 tokens are below 6 MB by far
    assert len(report.page()) < 6e6 * n * (n + 1) / (60 * 61) + 2e5


# -- with changes ------------------------------------------------------------------------

CHANGES = Changes(ablate="1.1,2.*", block=["3..->1", "5->0"])


def test_the_changed_text_stands_beside_the_unchanged_one(llama: Tiny) -> None:
    m, prompt = llama.model, llama.prompt(N_PROMPT)
    report = _explored(llama, changes=CHANGES)
    assert report.changed is not None and report.views == [report, report.changed]
    assert [v.label for v in report.views] == ["unchanged", "changed"]
    plain = _explored(llama)
    assert _ids(report) == _ids(plain) and report.said.text == ""
    for name in ("ids", "probs"):
        a, b = (getattr(x.lens, name) for x in (report, plain))
        np.testing.assert_allclose(a, b, atol=1e-5)
    edits = CHANGES.edits(m, prompt)
    ids = _ids(report.changed)
    assert ids[N_PROMPT:] == m.generate(prompt, N, edits=edits).tokens != _ids(plain)[N_PROMPT:]
    alone = _explored(llama, changes=CHANGES, baseline=False)
    assert alone.changed is None and alone.label == "changed" and _ids(alone) == ids
    given = _explored(llama, changes=CHANGES, written=[_ids(plain)[N_PROMPT:], ids[N_PROMPT:]])
    assert given.changed is not None and [*map(_ids, given.views)] == [*map(_ids, report.views)]


def test_a_changed_text_is_read_with_its_changes(llama: Tiny) -> None:
    """As the oracle computes it with the same edits at the prompt's tokens and the generated ones."""
    m, o, prompt = llama.model, llama.oracle, llama.prompt(N_PROMPT)
    edit = Edit("l_out-1", "add", 3 * llama.vector(), tokens=[2, 5], generated=True)
    report = explore(m, prompt, n_predict=N, k=4, branches=2, edits=edit, baseline=False)
    ids = _ids(report)
    n = len(ids)
    rows = [2, 5, *range(N_PROMPT, n)]

    def added(h: np.ndarray) -> np.ndarray:
        h = h.copy()
        h[rows[: sum(r < len(h) for r in rows)]] += edit._value
        return h

    sites = o.run(ids, {"resid_post.1": added})
    logprobs = _logprobs(sites["logits"])
    own = [logprobs[i, t] for i, t in enumerate(ids[1:])]
    np.testing.assert_allclose(report.alternatives.own[:-1], own, atol=TOLERANCE)
    truth = o.lens(sites["resid_post.1"])
    assert np.array_equal(report.lens.ids[1], np.argsort(-truth, axis=1, kind="stable")[:, :4])
    assert report.attention is not None and report.attribution is not None
    patterns = sites["attn_pattern.2"].swapaxes(0, 1)
    shape = report.attention.weights[2].shape
    assert np.abs(report.attention.weights[2] - patterns.reshape(shape)).max() < 1e-4
    for branch in report.branches[:4]:
        text = [*ids[: branch.at], branch.token]
        left = 0 if m.ends_turn(branch.token) else N_PROMPT + N - branch.at - 1
        cut = edit.on_text(N_PROMPT, len(text))
        assert branch.tokens == m.generate(text, left, edits=cut).tokens
    assert report.blocking is not None

    def hidden(scores: np.ndarray) -> np.ndarray:
        scores = scores.copy()
        scores[4:, :, 3] = -np.inf
        return scores

    edits = {f"attn_scores.{i}": hidden for i in range(o.n_layer)} | {"resid_post.1": added}
    drops = logprobs - _logprobs(o.run(ids, edits)["logits"])
    for t in (6, n - 1):
        assert abs(report.blocking.drop[t, 3] - drops[t - 1, ids[t]]) < 1e-3
    assert report.said.text == "1 edit" and report.said.options is None


def test_changes_are_said(llama: Tiny) -> None:
    m, prompt = llama.model, llama.prompt(N_PROMPT)
    changes = Changes(
        ablate=[Head(1, 1), "2.*"],
        block=["-2..->0,1,2@1", "1,5..->0"],
        steer=["a.gguf"],
        steer_coeff=2,
        steer_layers=[1, 2],
    )
    said = said_of(changes, m, prompt)
    assert said.options == [
        (0, ["--ablate", "1.1,2.*"]),
        (7, ["--block", "6..->0..2@1"]),
        (6, ["--block", "1,5..->0"]),
        (0, ["--steer=a.gguf"]),
        (0, ["--steer-coeff", "2"]),
        (0, ["--steer-layers", "1,2"]),
    ]
    python = (
        "Changes(ablate='1.1,2.*', block=['6..->0..2@1', '1,5..->0'], steer=['a.gguf'], "
        "steer_coeff=2, steer_layers=[1, 2])"
    )
    assert said.python == python
    assert said.text.startswith("heads 1.1,2.* ablated; attention 6..->0..2@1 blocked; ")
    assert said.text.endswith("steered by a.gguf × 2 at layers 1,2")
    both = Changes(ablate="1.1,2.*", block=["-2..->0,1,2@1", "1,5..->0"])
    same = Changes(ablate="1.1,2.*", block=["6..->0..2@1", "1,5..->0"])
    a, b = (m.generate(prompt, 6, edits=c.edits(m, prompt)).tokens for c in (both, same))
    assert a == b
    patched = Changes(patch=[("l_out-1", "x.safetensors", "-1", "-1,2")])
    assert said_of(patched, m, prompt).options == [
        (8, ["--patch", "l_out-1", "x.safetensors", "-1", "7,2"])
    ]
    assert said_of(None, m, prompt).options is None
    exact = said_of(Changes(steer="v.gguf", steer_coeff=0.12345678), m, prompt).options
    assert exact is not None and (0, ["--steer-coeff", "0.12345678"]) in exact


def test_a_report_of_two_texts(llama: Tiny) -> None:
    report = _explored(llama, changes=CHANGES)
    assert report.changed is not None
    document = report.document()
    assert json.loads(json.dumps(document)) == document
    assert document["changed"]["changes"] == report.changed.said.text
    assert document["changed"]["tokens"][-1]["id"] == _ids(report.changed)[-1]
    lines = report.plain().splitlines()
    assert lines[0] == "unchanged:" and lines[N + 1] == "changed:" and len(lines) == 2 * N + 2
    assert [row["view"] for row in report.rows()[:: 4 * (N_PROMPT + N - 1)]] == [
        "unchanged",
        "changed",
    ]
    views = explorer_data(report)["views"]
    assert [v["label"] for v in views] == ["unchanged", "changed"]
    assert [v["python"] for v in views] == ["", report.changed.said.python]
    assert views[1]["options"] == list(report.changed.said.options or ())


def test_given_texts_are_as_many_as_there_are(llama: Tiny) -> None:
    cases: list[list[list[int]]] = [[[5], [6]], [[]], []]
    for written in cases:
        with pytest.raises(UsageError, match="written has the tokens of 1 texts"):
            _explored(llama, written=written)


def test_changes_of_the_residual_are_why_parts_do_not_add_up(llama: Tiny) -> None:
    wide = np.ones(llama.model.n_embd, np.float32)
    report = explore(llama.model, llama.prompt(5), n_predict=2, edits=Edit("l_out-1", "add", wide))
    assert report.changed is not None and "attribution" not in report.missing
    assert "the changes write into the residual" in report.changed.missing["attribution"]
