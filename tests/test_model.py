"""A model as its user meets it: opening, tokens and text, runs, control vectors, mistakes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import check, check_same
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.edits import Edit
from mia.errors import MiaError, ModelError, RangeError, SiteError, UsageError
from mia.llama import Context
from mia.llama.library import library
from mia.model import Model
from mia.request import Capture, Request, Result
from mia.sites import Site

# -- opening -----------------------------------------------------------------------------------


def test_what_a_model_says_of_itself(case: Tiny) -> None:
    m, o = case.model, case.oracle
    assert (m.n_layer, m.n_embd, m.n_vocab) == (o.n_layer, o.n_embd, o.n_vocab)
    assert (m.n_head, m.n_head_kv, m.head_dim) == (o.n_head, o.n_head_kv, o.head_dim)
    assert m.architecture == o.arch
    assert m.metadata["general.name"] == "tiny"
    assert m.n_ctx == 256
    assert m.kv_type == "f32"
    assert m.file_hash == hashlib.sha256(case.path.read_bytes()).hexdigest()
    assert repr(m) == f"Model({m.name!r}, n_layer=3, n_embd=48, n_head={o.n_head})"


def test_models_with_one_vocabulary_have_one_hash(tiny: Any, llama: Tiny) -> None:
    assert tiny("gpt2").model.tokenizer_hash == llama.model.tokenizer_hash
    texts = [t.encode() for t in _vocabulary(llama.path)]
    digest = hashlib.sha256(b"".join(len(t).to_bytes(4, "little") + t for t in texts))
    assert llama.model.tokenizer_hash == digest.hexdigest()


def _vocabulary(path: Path) -> list[str]:
    import gguf

    return gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -1])
def test_a_file_that_was_cut_short(llama: Tiny, tmp_path: Path, kept: int) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(llama.path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"short\.gguf"):
        Model(short, threads=1)


def test_what_is_no_model(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"<html>" * 1000)
    with pytest.raises(ModelError, match="not a GGUF file"):
        Model(other, threads=1)
    with pytest.raises(ModelError, match=r"nowhere\.gguf"):
        Model(tmp_path / "nowhere.gguf", threads=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ctx": -1}, RangeError, "ctx must be at least 1, got -1"),
        ({"threads": -2}, RangeError, "threads must be at least 1, got -2"),
        ({"kv_type": "q3"}, UsageError, "unknown kv type 'q3'; known: f32, f16, bf16"),
    ],
)
def test_options_that_make_no_sense(
    llama: Tiny, options: dict[str, Any], error: type[MiaError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Model(llama.path, **{"threads": 1, **options})


def test_a_model_closes(llama: Tiny) -> None:
    with Model(llama.path, threads=1) as m:
        m.run([Request([1, 2]), Request([1, 2], captures=[Capture("embed")])])
        assert m._engine.sessions.open
    assert not m._engine.sessions.open and m._llama.owned is None
    m.close()  # twice is once
    with pytest.raises(MiaError):
        m.run([Request([1, 2])])


def test_quantized_files_run(tmp_path: Path, llama: Tiny) -> None:
    """Blocks of 8 and 4 bits; llama.cpp rounds the activations too, so only roughly."""
    for qtype in ("Q8_0", "Q4_0", "F16"):
        path = write_tiny(tmp_path / f"{qtype}.gguf", "llama", qtype=qtype)
        with Model(path, threads=1) as m:
            assert m.kv_type == "f16"
            t = Tiny(qtype, path, m)
            prompt = t.prompt(8)
            got = m.run([Request(prompt, captures=[Capture("l_out")], logits="all")])[0]
            want = t.oracle.run(prompt)
            assert np.corrcoef(logits(got).ravel(), want["logits"].ravel())[0, 1] > 0.99
            for i in range(3):
                both = got[f"l_out-{i}"].ravel(), want[f"resid_post.{i}"].ravel()
                assert np.corrcoef(*both)[0, 1] > 0.99


# -- text ----------------------------------------------------------------------------------------


def test_tokens_and_text(llama: Tiny) -> None:
    m, text = llama.model, "The capital of France is Paris<|im_end|>"
    ids = m.tokenize(text)
    pieces = ["<|endoftext|>", "The", " capital", " of", " France", " is", " Paris", "<|im_end|>"]
    assert [m.piece(i) for i in ids] == pieces
    assert m.detokenize(ids[1:]) == text
    assert m.tokenize("") == [0]
    assert len(m.tokenize(text, special=False)) > len(ids)
    long = "the cat sat on the mat " * 200
    assert m.detokenize(m.tokenize(long, bos=False)) == long
    odd = "Zürich 😀\x00 日本"
    assert m.detokenize(m.tokenize(odd, bos=False)) == odd
    assert m.piece(m.tokenize("😀", bos=False)[0]) == "<0xF0>"


def test_there_is_one_bos(llama: Tiny, reopen: Any, tmp_path: Path) -> None:
    m = llama.model
    assert (m.adds_bos, m.bos_token) == (True, 0)
    assert m.tokenize("The", bos=False) == m.tokenize("The")[1:] == [m.token_id("The")]
    twice = m.tokenize("<|endoftext|>The", bos=True)
    assert twice == m.tokenize("The") == [0, m.token_id("The")]
    assert m.tokenize("<|endoftext|><|endoftext|>The")[:2] == [0, 0]  # as written
    assert reopen(llama, bos=False).model.tokenize("The") == m.tokenize("The")[1:]
    path = write_tiny(tmp_path / "no.gguf", "llama", add_bos=False)
    with Model(path, threads=1) as without, Model(path, threads=1, bos=True) as asked:
        assert not without.adds_bos
        assert len(without.tokenize("The")) == 1
        assert without.tokenize("The", bos=True) == asked.tokenize("The") == m.tokenize("The")


def test_words_that_are_one_token(llama: Tiny) -> None:
    m = llama.model
    assert m.piece(m.token_id(" Paris")) == " Paris"
    assert m.token_id("<|im_start|>") == 1
    with pytest.raises(
        UsageError, match=r"'Paris' is 5 tokens \('P' 'a' 'r' 'i' 's'\), not one; .*' Paris'"
    ):
        m.token_id("Paris")
    with pytest.raises(UsageError, match=r"' Paris sky' is 2 tokens \(' Paris' ' sky'\), not one$"):
        m.token_id(" Paris sky")
    with pytest.raises(UsageError, match=r"'' is 0 tokens"):
        m.token_id("")


@pytest.mark.parametrize("token", [-1, 328, 10**9])
def test_ids_that_are_no_token(llama: Tiny, token: int) -> None:
    for read in (llama.model.piece, lambda t: llama.model.detokenize([5, t])):
        with pytest.raises(RangeError, match=f"token id {token} .* vocabulary has 0 to 327"):
            read(token)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
    "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}{{ bos_token }}{{ eos_token }}"
)


def test_conversations(llama: Tiny, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "chat.gguf", "llama", chat_template=TEMPLATE)
    end = "<|endoftext|>" * 2
    with Model(path, threads=1) as m:
        asked = "<|im_start|>user the sky<|im_end|>\n<|im_start|>assistant " + end
        assert m.chat("the sky") == asked
        assert m.chat([{"role": "user", "content": "the sky"}]) == asked
        assert m.chat("x", system="be") == "<|im_start|>system be<|im_end|>\n" + m.chat("x")
        with pytest.raises(UsageError, match="the chat template of chat says: no clowns"):
            m.chat([{"role": "clown", "content": ""}])
        assert m.tokenize(m.chat("the"))[1] == 1
    path = write_tiny(tmp_path / "broken.gguf", "llama", chat_template="{% if %}")
    with (
        Model(path, threads=1) as m,
        pytest.raises(UsageError, match="chat template of broken fails"),
    ):
        m.chat("x")
    with pytest.raises(UsageError, match="llama has no chat template"):
        llama.model.chat("x")


# -- runs ------------------------------------------------------------------------------------------


def test_nothing_asked_is_nothing_done(llama: Tiny, decoded: list[int]) -> None:
    assert llama.model.run([]) == []
    assert llama.model.run(iter(())) == []
    assert decoded == []


def test_requests_may_be_any_iterable_and_tokens_any_integers(llama: Tiny) -> None:
    prompt = llama.prompt(6)
    forms: list[Any] = [prompt, tuple(prompt), np.array(prompt), np.array(prompt, np.int32)]
    results = llama.model.run(Request(p, logits="all") for p in forms)
    for result in results:
        check(result, Request(prompt, logits="all"), llama.oracle)


@pytest.mark.parametrize("logits", ["last", "all", None, 2, -3, [0, -1, 0], slice(1, 4), []])
def test_logits_of_the_positions_asked_for(llama: Tiny, logits: Any) -> None:
    request = Request(llama.prompt(6), logits=logits)
    result = llama.model.run([request])[0]
    if logits is None or logits == []:
        assert result.logits is None
    else:
        check(result, request, llama.oracle)


def test_a_metric_takes_the_logits(llama: Tiny) -> None:
    prompt, shapes = llama.prompt(6), []

    def metric(logits: np.ndarray) -> float:
        shapes.append(logits.shape)
        return float(logits[:, 7].sum())

    requests = [Request(prompt, logits=which, metric=metric) for which in ("last", "all", [1, 2])]
    want = llama.oracle.run(prompt)["logits"][:, 7]
    results = llama.model.run(requests)
    assert sorted(shapes) == [(1, 328), (2, 328), (6, 328)]
    assert [r.logits for r in results] == [None] * 3
    values = [want[-1], want.sum(), want[1] + want[2]]
    np.testing.assert_allclose([r.value for r in results], values, rtol=0, atol=1e-4)


def test_what_a_metric_raises_comes_out(llama: Tiny) -> None:
    def metric(_: np.ndarray) -> None:
        raise ZeroDivisionError("mine")

    prompt = llama.prompt(6)
    with pytest.raises(ZeroDivisionError, match="mine"):
        llama.model.run([Request(prompt, metric=metric, n_predict=2), Request(prompt[:3])])
    check(llama.model.run([Request(prompt)])[0], Request(prompt), llama.oracle)


def test_progress_counts_requests(llama: Tiny) -> None:
    calls: list[tuple[int, int]] = []
    requests = [Request(llama.prompt(4, seed=s), n_predict=s % 3) for s in range(5)]
    llama.model.run(requests, progress=lambda *x: calls.append(x))
    assert calls == [(i, 5) for i in range(1, 6)]


def test_captures_are_found_by_any_spelling(llama: Tiny) -> None:
    captures = [Capture(["q.1", "l_out-1..2"]), Capture("blocks.0.hook_resid_post", tokens=[2, 0])]
    result = llama.model.run([Request(llama.prompt(4), captures=captures)])[0]
    assert list(map(str, result.captures)) == [
        "q.1",
        "resid_post.1",
        "resid_post.2",
        "resid_post.0",
    ]
    a = result["resid_post.2"]
    for spelling in ("l_out-2", "blocks.2.hook_resid_post", Site("resid_post", 2)):
        assert result[spelling] is a
    assert result["l_out-0"].shape == (2, 48)
    for missing in ("k.1", "l_out-7", "nonsense"):
        with pytest.raises(
            SiteError, match=f"no capture of {missing}; captured: q.1, resid_post.1"
        ):
            result[missing]
    with pytest.raises(SiteError, match="captured: nothing"):
        Result()["l_out-0"]


@pytest.mark.parametrize("n_predict", [0, 4])
def test_several_captures_of_one_site(case: Tiny, n_predict: int) -> None:
    """Each has its own rows; by site, each token comes once."""
    both = ["l_out-1", "attn_pattern.1", "attn_scores.0"]
    captures = [
        Capture(both, tokens=[0, 1, 2]),
        Capture(["l_out-1", "q.0"], tokens=[-1, 2, 2]),
        Capture([*both, "logits"], tokens=[1], generated=True),
        Capture("q.0", tokens=-1),
    ]
    other = Request(case.prompt(5, seed=7), captures=[Capture(both)])
    request = Request(
        case.prompt(6), captures=captures, logits="all", n_predict=n_predict, stop_at_eog=False
    )
    result = case.model.run([request, other])[0]
    want = check(result, request, case.oracle)
    later = list(range(6, 6 + max(n_predict - 1, 0)))
    for site, tokens in (("l_out-1", [0, 1, 2, 5]), ("attn_pattern.1", [0, 1, 2])):
        rows = [*tokens, *later]
        key = site.replace("l_out-", "resid_post.")
        np.testing.assert_allclose(result[site], want[key][rows], rtol=0, atol=1e-4)
    np.testing.assert_allclose(result["q.0"], want["q.0"][[5, 2]], rtol=0, atol=1e-4)
    assert result.of(captures[1])[Site("q", 0)].shape[0] == 3
    assert [c for c, _ in result.by_capture] == captures
    with pytest.raises(UsageError, match=r"the request had no Capture\(sites='k.0'"):
        result.of(Capture("k.0"))


def test_the_same_capture_twice_is_one(llama: Tiny) -> None:
    capture = Capture("l_out")
    one, two = (
        llama.model.run([Request(llama.prompt(), captures=[capture] * n)])[0] for n in (1, 2)
    )
    for site, a in one.captures.items():
        np.testing.assert_array_equal(two.captures[site], a)


def test_a_capture_beside_others_as_activations(llama: Tiny) -> None:
    ids, captures = llama.prompt(), [Capture("l_out", tokens=[1, 2]), Capture("l_out-1", tokens=-1)]
    result = llama.model.run([Request(ids, captures=captures)])[0]
    for capture, tokens in zip(captures, ([1, 2], [-1]), strict=True):
        activations = llama.model.activations(ids, result, capture)
        want = llama.model.look(ids, "l_out-1", tokens=tokens).arrays["resid_post.1"]
        np.testing.assert_allclose(activations.arrays["resid_post.1"], want, rtol=0, atol=1e-5)


def test_no_tokens_captured_are_no_rows(llama: Tiny) -> None:
    sites = ["l_out-1", "head_out.0", "attn_pattern.2", "logits"]
    captures = [Capture(sites, tokens=[], generated=g) for g in (False, True)]
    for capture in captures:
        for n_predict, rows in ((0, 0), (1, 0), (3, 2 * capture.generated)):
            request = Request([5, 6, 7], captures=[capture], n_predict=n_predict, stop_at_eog=False)
            result = llama.model.run([request])[0]
            check(result, request, llama.oracle)
            keys = 3 + max(n_predict - 1, 0) * capture.generated
            shapes = [a.shape for a in result.captures.values()]
            assert shapes == [(rows, 48), (rows, 48), (rows, 6, keys), (rows, 328)]


def test_longer_and_longer_prompts_in_one_model(llama: Tiny, reopen: Any) -> None:
    """The context grows with what is asked; reads and plain runs have one each."""
    t = reopen(llama, ctx=2000)
    for n in (3, 200, 300, 40, 520):
        prompt = t.prompt(n, seed=n)
        plain, read = (
            t.model.run([Request(prompt, captures=c)])[0] for c in ([], [Capture("l_out-2")])
        )
        check_same(plain, Result(logits=read.logits))
        if n <= 200:
            check(read, Request(prompt, captures=[Capture("l_out-2")]), t.oracle)
    assert {key: s.context.params.n_ctx for key, s in t.model._engine.sessions.open.items()} == {
        (False, False): 768,
        (True, False): 768,
    }


def test_one_request_in_place_of_a_list_while_steered(llama: Tiny, reopen: Any) -> None:
    model = reopen(llama).model
    model.standing_edits.append(Edit("l_out-1", "add", llama.vector()))
    with pytest.raises(UsageError, match=r"a list of requests; for one: run\(\[request\]\)\[0\]"):
        model.run(Request([5, 6]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Request([]), UsageError, "the prompt is empty; give at least one token"),
        (lambda: Request([1], logits="first"), UsageError, 'logits is \'first\'; "last", "all"'),
        (lambda: Request([5] * 257), RangeError, "a prompt of 257 tokens is longer than .* of 256"),
        (lambda: Request([5, 328]), RangeError, "token id 328 is out of range; .* has 0 to 327"),
        (lambda: Request([5, -1, 9]), RangeError, "token id -1 is out of range"),
        (lambda: Request([5], logits=[1]), RangeError, "token index 1 .* has 1 tokens, 0 to 0"),
        (
            lambda: Request([5], captures=[Capture("l_out", tokens=-2)]),
            RangeError,
            "token index -2 is out of range",
        ),
        (lambda: Request([5], captures=[Capture("l_oot")]), SiteError, "did you mean l_out"),
        (lambda: Request([5], captures=[Capture("l_out-3")]), RangeError, "layer 3 .* 0 to 2"),
    ],
)
def test_a_request_that_does_not_fit(
    llama: Tiny, make: Any, error: type[UsageError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        llama.model.run([Request([5, 6]), make()])
    assert type(caught.value) is error
    check(llama.model.run([Request([5, 6])])[0], Request([5, 6]), llama.oracle)


# -- look and generate -----------------------------------------------------------------------------


def test_look_reads_sites_of_a_text_or_of_ids(case: Tiny) -> None:
    m, tokens = case.model, case.prompt(6)
    sites = case.oracle.run(tokens)
    a = m.look(tokens, ["l_out", "q.1"], tokens=[-1, 2])
    assert [str(s) for s in a.sites] == ["resid_post.0", "resid_post.1", "resid_post.2", "q.1"]
    for name in a.arrays:
        np.testing.assert_allclose(a[name], sites[name][[5, 2]], atol=1e-4)
    assert a.tokens == tokens and [t.text for t in a.prompt] == [m.piece(t) for t in tokens]
    text = "The capital of France"
    read = m.look(text, "l_out-1", bos=True)
    assert read.tokens == m.tokenize(text, bos=True)
    np.testing.assert_array_equal(read[:], m.look(read.tokens, "l_out-1")[:])


def test_look_at_a_changed_run(llama: Tiny) -> None:
    tokens, v = llama.prompt(5), llama.vector()
    a = llama.model.look(tokens, "l_out", edits=[Edit("l_out-1", "add", v, tokens=2)])

    def edit(h: np.ndarray) -> np.ndarray:
        h[2] += v
        return h

    sites = llama.oracle.run(tokens, {"resid_post.1": edit})
    for layer in range(3):
        np.testing.assert_allclose(a.layer(layer), sites[f"resid_post.{layer}"], atol=1e-4)


def test_generate_gives_text_tokens_and_log_probabilities(case: Tiny) -> None:
    m, tokens = case.model, case.prompt(6)
    g = m.generate(tokens, 4)
    whole = list(tokens)
    for token, piece, logprob in zip(g.tokens, g.pieces, g.logprobs, strict=True):
        logits = case.oracle.run(whole)["logits"][-1]
        assert token == logits.argmax() and piece == m.piece(token)
        assert abs(logprob - (logits.max() - np.log(np.exp(logits).sum()))) < 1e-4
        whole.append(token)
    assert len(g.tokens) == 4 or g.result.tokens[-1] == g.tokens[-1]
    assert str(g) == g.text == m.text(g.tokens)
    assert g.rows()[0] == {
        "id": g.tokens[0],
        "text": g.pieces[0],
        "logprob": round(g.logprobs[0], 6),
    }
    assert g.document()["output"] == g.text and g.document()["output_tokens"] == g.rows()
    assert "baseline" not in g.document() and [t.id for t in g.prompt] == tokens


def test_generate_with_a_change_beside_the_baseline(llama: Tiny) -> None:
    m, tokens, v = llama.model, llama.prompt(6), 9 * llama.vector()
    edit = Edit("l_out-1", "replace", v, tokens=-1)
    g = m.generate(tokens, 3, edits=[edit], captures=[Capture("l_out-1")], baseline=True)
    assert g.baseline is not None and g.baseline.text == m.generate(tokens, 3).text
    assert g.text == m.generate(tokens, 3, edits=[edit]).text != g.baseline.text
    assert str(g) == f"baseline: {g.baseline.text}\nchanged:  {g.text}"
    assert g.document()["baseline"] == g.baseline.text
    np.testing.assert_allclose(g.result["l_out-1"][5], v, rtol=1e-6)
    assert not g.baseline.result.captures
    assert m.generate(tokens, 3, baseline=True).baseline is None  # there is nothing to compare


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "plain.gguf", "llama", add_bos=False)
    with Model(path, threads=1) as m:
        for read in (m.ids, m.look, m.generate):
            with pytest.raises(UsageError, match="the prompt is empty"):
                read("")
        assert len(m.ids("", bos=True)) == 1


# -- control vectors ------------------------------------------------------------------------------


@pytest.fixture
def vectors_set(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The vectors that contexts were given."""
    calls: list[Any] = []
    plain = Context.set_control_vector

    def spy(self: Context, directions: Any) -> None:
        if directions is not None:
            calls.append(directions)
        plain(self, directions)

    monkeypatch.setattr(Context, "set_control_vector", spy)
    return calls


def test_steering_all_tokens_is_llama_cpp_s_control_vector(
    case: Tiny, vectors_set: list[Any]
) -> None:
    v, w = case.vector(), case.vector(seed=5)
    edits = [
        Edit("l_out-1", "add", v, coeff=1.5),
        Edit("resid_post.2", "add", w),
        Edit("resid_post.1", "add", w, coeff=-0.5, generated=True),
    ]
    requests = [
        Request(case.prompt(n, seed=n), edits, logits="all", n_predict=p, stop_at_eog=False)
        for n, p in ((9, 0), (5, 4), (7, 1))
    ]
    fast = case.model.run(requests)
    assert len(vectors_set) == 1
    np.testing.assert_allclose(vectors_set[0], [1.5 * v - 0.5 * w, w], rtol=1e-6)
    vectors_set.clear()
    read = [
        Request(
            r.tokens, edits, [Capture("l_out")], "all", n_predict=r.n_predict, stop_at_eog=False
        )
        for r in requests
    ]
    slow = case.model.run(read)  # by the callback
    assert vectors_set == []
    for request, again, a, b in zip(requests, read, fast, slow, strict=True):
        check(a, request, case.oracle)
        check(b, again, case.oracle)
        np.testing.assert_allclose(logits(a), logits(b), rtol=0, atol=1e-5)
        assert a.tokens == b.tokens
    plain = Request(case.prompt(9, seed=9), logits="all")
    check(case.model.run([plain])[0], plain, case.oracle)  # it is off again


def test_edits_that_a_control_vector_cannot_do(llama: Tiny, vectors_set: list[Any]) -> None:
    prompt, v = llama.prompt(6), llama.vector()
    shared = Edit("l_out-1", "add", v)
    cases: list[list[list[Edit]]] = [
        [[Edit("l_out-0", "add", v)]],  # llama.cpp has none for the first block
        [[Edit("mlp_out.1", "add", v)]],
        [[Edit("l_out-1", "replace", v)]],
        [[Edit("l_out-1", "add", v, tokens=slice(None))]],  # not the generated ones
        [[Edit("l_out-1", "add", v, generated=False)]],
        [[Edit("l_out-1", "add", v[:2], dims=[3, 9])]],
        [[Edit("l_out-1", "add", v, keep_norm=True)]],
        [[Edit("l_out-1", "add", v, coeff=[1.0, 2.0])]],
        [[Edit("l_out-1", "add", v[None])]],
        [[shared], []],
        [[shared], [shared, Edit("l_out-2", "add", v)]],
        [[shared], [Edit("l_out-1", "add", v)]],  # another edit, of the same numbers
        [[shared, Edit("q.0", "scale", coeff=2.0)]],
    ]
    for sets in cases:
        requests = [Request(prompt, e, n_predict=3, stop_at_eog=False) for e in sets]
        for request, result in zip(requests, llama.model.run(requests), strict=True):
            check(result, request, llama.oracle)
    assert vectors_set == []


def test_a_control_vector_is_taken_off_whatever_happens(
    llama: Tiny, vectors_set: list[Any]
) -> None:
    def metric(_: np.ndarray) -> None:
        raise ZeroDivisionError

    prompt, edit = llama.prompt(6), Edit("l_out-1", "add", llama.vector())
    with pytest.raises(ZeroDivisionError):
        llama.model.run([Request(prompt, [edit], metric=metric)])
    assert len(vectors_set) == 1
    check(llama.model.run([Request(prompt)])[0], Request(prompt), llama.oracle)
    with pytest.raises(
        UsageError, match=r"resid_post\.1 has rows of 48 here, the edit's value has 47"
    ):
        llama.model.run([Request(prompt, [Edit("l_out-1", "add", np.ones(47))])])


def test_a_control_vector_stays_until_another_is_wanted(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp plans its buffers anew at every change; the range is that of the blocks steered."""
    t = reopen(llama)
    ranges: list[Any] = []
    plain = library().L.llama_set_adapter_cvec

    def spy(*args: Any) -> int:
        ranges.append(args[-2:])
        return plain(*args)

    monkeypatch.setattr(library().L, "llama_set_adapter_cvec", spy)
    v, w = t.vector(), t.vector(seed=5)
    first = [Edit("l_out-1", "add", v)]
    both = [*first, Edit("l_out-2", "add", w)]
    nothing = [Edit("l_out-2", "add", w, coeff=0)]
    for edits in ([], first, first, [Edit("l_out-1", "add", v)], both, [], nothing, both[1:]):
        request = Request(t.prompt(6), edits, logits="all", n_predict=2, stop_at_eog=False)
        check(t.model.run([request])[0], request, t.oracle)
    assert ranges == [(1, 1), (1, 2), (-1, -1), (2, 2)]


@pytest.mark.parametrize("on", [True, False])
def test_a_control_vector_that_was_cut_short_is_set_again(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    t = reopen(llama)
    steered = Request(t.prompt(6), [Edit("l_out-1", "add", t.vector())])
    plain = Request(t.prompt(6))
    first, then = (plain, steered) if on else (steered, plain)
    t.model.run([first])
    real = library().L.llama_set_adapter_cvec

    def interrupted(*args: Any) -> int:
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(library().L, "llama_set_adapter_cvec", interrupted)
        with pytest.raises(KeyboardInterrupt):
            t.model.run([then])
    check(t.model.run([first])[0], first, t.oracle)


def test_what_is_no_request_is_named(llama: Tiny) -> None:
    with pytest.raises(UsageError, match=r"run takes a list of requests"):
        llama.model.run(Request([1]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not a text"):
        Request("The cat")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="whole numbers"):
        Request([1.5, 2])  # type: ignore[list-item]


def test_one_edit_or_capture_by_itself_is_a_list_of_one(llama: Tiny) -> None:
    m, ids = llama.model, llama.prompt()
    edit, capture = Edit("l_out-1", "zero", tokens=-1), Capture("l_out-2")
    (alone,) = m.run([Request(ids, edit, capture)])  # type: ignore[arg-type]
    (listed,) = m.run([Request(ids, [edit], [capture])])
    np.testing.assert_array_equal(logits(alone), logits(listed))
    np.testing.assert_array_equal(alone["l_out-2"], listed["l_out-2"])
    assert (
        m.generate(ids, 3, edits=edit, captures=capture).tokens
        == m.generate(ids, 3, edits=[edit]).tokens
    )
    np.testing.assert_array_equal(m.look(ids, "l_out-2", edits=edit)["l_out-2"], listed["l_out-2"])
