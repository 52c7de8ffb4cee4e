"""Why: the effect of each span equals the oracle's; sinks, long answers, parts, the page."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_prompt import Function
from tiny import Tiny

from mia.engine.decode import Decoder
from mia.errors import UsageError
from mia.methods.why import first_word, why
from mia.methods.why_findings import CausalMap, Components, LensAtEnd
from mia.model import Model

TOLERANCE = 1e-4


def log_prob(logits: np.ndarray, answer: list[int]) -> float:
    """Of an answer whose tokens the last rows of logits (n, n_vocab) predict."""
    rows = logits[-len(answer) :]
    lse = np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1)) + rows.max(-1)
    return float(sum(rows[i, t] - lse[i] for i, t in enumerate(answer)))


def hidden(keys: list[int], first: int) -> Function:
    """Nobody from `first` on attends to the keys."""

    def put(scores: np.ndarray) -> np.ndarray:
        for q in range(first, len(scores)):
            scores[q][:, keys] = -np.inf
        return scores

    return put


def truth(t: Tiny, whole: list[int], answer: list[int], keys: list[int], first: int) -> float:
    edits = {f"attn_scores.{i}": hidden(keys, first) for i in range(t.oracle.n_layer)}
    return log_prob(t.oracle.run(whole, edits)["logits"], answer)


@pytest.mark.parametrize("n_answer", [1, 3])
def test_effects_are_the_oracles(case: Tiny, n_answer: int) -> None:
    ids, answer = case.prompt(12), case.prompt(3, seed=8)[:n_answer]
    model = case.model
    found = why(model, ids, answer=answer, spans="0..2,3..6,7..8", parts=False)
    assert [t.id for t in found.answer] == answer
    whole = [*ids, *answer[:-1]]
    clean = log_prob(case.oracle.run(whole)["logits"], answer)
    bare = log_prob(case.oracle.run(whole[9:])["logits"], answer)
    assert found.clean == pytest.approx(clean, abs=TOLERANCE)
    assert found.bare == pytest.approx(bare, abs=TOLERANCE)
    assert found.asking == range(9, 12) and found.floor < 1e-3
    sinks = {a.position for a in found.apart}
    assert len(found.spans) == 3
    for e in found.spans:
        keys = [i for i in e.span.positions if i not in sinks]
        blocked = truth(case, whole, answer, keys, e.span.end) - clean
        kept = [whole[i] for i in sorted({*keys, *sinks} - set(range(9, 12)))]
        alone = log_prob(case.oracle.run([*kept, *whole[9:]])["logits"], answer) - bare
        if sinks:
            alone = e.alone  # `bare` has them as well
        assert e.blocked == pytest.approx(blocked, abs=TOLERANCE)
        assert e.alone == pytest.approx(alone, abs=TOLERANCE)
        assert e.score == (e.alone - e.blocked) / 2
    assert abs(found.ranked[0].blocked) > 10 * TOLERANCE  # it is no test of zeros


def test_a_bos_is_apart(llama: Tiny) -> None:
    """It is in every run, in no span, and its effect is the oracle's."""
    model = llama.model
    ids = [model.bos_token, *llama.prompt(9)]
    found = why(model, ids, spans="3", parts=False)
    assert [a.position for a in found.apart] == [0]
    assert [(e.span.first, e.span.end) for e in found.spans] == [(1, 4), (4, 7)]
    answer = [t.id for t in found.answer]
    whole = [*ids, *answer[:-1]]
    clean = log_prob(llama.oracle.run(whole)["logits"], answer)
    blocked = truth(llama, whole, answer, [0], 1) - clean
    assert found.apart[0].blocked == pytest.approx(blocked, abs=TOLERANCE)
    bare = log_prob(llama.oracle.run([ids[0], *whole[7:]])["logits"], answer)
    assert found.bare == pytest.approx(bare, abs=TOLERANCE)
    alone = log_prob(llama.oracle.run([ids[0], *ids[1:4], *whole[7:]])["logits"], answer)
    assert found.spans[0].alone == pytest.approx(alone - bare, abs=TOLERANCE)
    assert "is an attention sink" in found.plain()


def test_a_sink_inside_a_span_stays(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mia.methods.why.SINK", 0.0)  # every token is one
    with pytest.raises(UsageError, match="the prompt is one token, which asks"):
        why(llama.model, llama.prompt(6), spans="tokens", parts=False)


def test_one_span_is_refused(llama: Tiny) -> None:
    with pytest.raises(UsageError, match="the prompt is one line, which asks: there is no other"):
        why(llama.model, "the cat sat", spans="lines")
    with pytest.raises(UsageError, match="the prompt is one range, which asks"):
        why(llama.model, llama.prompt(5), spans="0..4")
    with pytest.raises(UsageError, match="the prompt is one run of 99 tokens, which asks"):
        why(llama.model, llama.prompt(5), spans="99")


def test_token_forwards_are_counted(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama.model, [llama.model.bos_token, *llama.prompt(12)]
    rows = [0]
    decode = Decoder.decode

    def counted(self: Decoder, batch: Any) -> None:
        rows.append(len(batch.rows))
        decode(self, batch)

    answer = [5, 9]
    first = why(model, ids, answer=answer, spans="3", parts=False)
    monkeypatch.setattr(Decoder, "decode", counted)
    found = why(model, ids, answer=answer, spans="3", parts=False)
    assert found.document() == first.document()
    # the first look at the prompt is a run of its own
    assert sum(rows) - len(ids) == found.token_forwards


class Pieces:
    """Tokens by their bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def token_bytes(self, token: int) -> bytes:
        return self._pieces[token]

    def piece(self, token: int) -> str:
        return self._pieces[token].decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "word"),
    [
        ([b" Rome", b".", b" He"], b" Rome"),
        ([b" 7", b"4", b"2", b"1", b"."], b" 7421"),
        ([b" don", b"'t", b" go"], b" don't"),
        ([b" ", b"Os", b"lo", b" is"], b" Oslo"),
        ([b"\n", b"Os", b"lo", b","], b"\nOslo"),
        ([b"!", b" No"], b"!"),
        ([b" \xe6\x9d", b"\xb1", b" x"], " 東".encode()),
        ([b" Paris"], b" Paris"),
    ],
)
def test_the_answer_is_a_whole_word(pieces: list[bytes], word: bytes) -> None:
    model: Model = Pieces(*pieces)  # type: ignore[assignment]
    chosen = first_word(model, range(len(pieces)))
    assert b"".join(pieces[i] for i in chosen) == word


def test_the_answer_is_what_the_model_says(llama: Tiny) -> None:
    ids = llama.prompt(8)
    found = why(llama.model, ids, spans="2", parts=False)
    assert found.said and found.answer[0].id == int(llama.oracle.run(ids)["logits"][-1].argmax())


def test_parts(llama: Tiny, tmp_path: Path) -> None:
    """The map's last layer restores all at the last token; shares of the logit add up; the lens's
    last layer is the model."""
    model, ids = llama.model, llama.prompt(9)
    answer = int(llama.oracle.run(ids)["logits"][-1].argmax())
    found = why(model, ids, answer=[answer], spans="3", k=2)
    assert isinstance(found.map, CausalMap) and isinstance(found.lens, LensAtEnd)
    assert [t.id for t in found.answer] == [answer]
    shares = found.map.restored(found.clean)
    assert found.map.layers == list(range(model.n_layer)) and shares.shape == (model.n_layer, 9)
    assert shares[-1, -1] == pytest.approx(1, abs=1e-3)
    assert np.abs(shares[-1, :-1]).max() < 1e-3  # other tokens are not read any more
    assert found.lens.prob[-1] == pytest.approx(math.exp(found.clean), abs=1e-5)
    assert found.lens.rank[-1] == 1
    c = found.components
    assert isinstance(c, Components)
    s = c.shares
    assert s.embed + s.attn.sum() + s.mlp.sum() + s.bias == pytest.approx(s.logit, abs=1e-3)
    whole = llama.oracle.run(ids)
    for x in c.listed:
        place = f"head_out.{x.layer}" if x.head is not None else f"mlp_out.{x.layer}"

        def zero(rows: np.ndarray, head: int | None = x.head) -> np.ndarray:
            width = rows.shape[1] if head is None else rows.shape[1] // llama.oracle.n_head
            start = 0 if head is None else head * width
            rows[-1, start : start + width] = 0
            return rows

        without = log_prob(llama.oracle.run(ids, {place: zero})["logits"], [answer])
        assert x.drop == pytest.approx(found.clean - without, abs=TOLERANCE)
        if x.head is not None:
            assert x.reading is not None
            weights = whole[f"attn_pattern.{x.layer}"][-1, x.head]
            span = found.spans[x.reading.span].span
            assert x.reading.weight == pytest.approx(
                weights[span.first : span.end].sum(), abs=TOLERANCE
            )
            assert x.reading.weight + x.reading.asking + x.reading.sinks <= 1 + TOLERANCE
    found.plot(tmp_path / "why.png")
    found.save(tmp_path / "why.html")
    page = (tmp_path / "why.html").read_text()
    assert page.count("<h2") == 4 and "http" not in page.replace("http-equiv", "")
    found.save(tmp_path / "why.json")
    assert json.loads((tmp_path / "why.json").read_text()) == json.loads(
        json.dumps(found.document())
    )
    assert len(found.rows()) == 2


def test_it_is_read_without_colour(llama: Tiny) -> None:
    import io

    from mia.show.terminal import SafeConsole

    found = why(llama.model, llama.prompt(9), spans="3")
    out = io.StringIO()
    console = SafeConsole(file=out, width=120, no_color=True)
    console.print(found.table(120))
    shown = out.getvalue()
    assert (
        "█" in shown
        and "[1]" in shown
        and " 1. " in shown
        and f"{found.ranked[0].score:+.3f}" in shown
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["code", "cloze"])
def test_the_needle_is_first(smollm2: Model, form: str) -> None:
    """Short prompts that the model answers; scripts/experiments/why_needles.py tries a hundred, long
    ones too."""
    from experiments.why_needles import answered

    chosen, _ = answered(smollm2, form, 3, 2, fillers=3)
    for needle in chosen:
        ids = smollm2.ids(needle.prompt, bos=True)
        found = why(smollm2, ids, parts=False, null=0)
        assert found.answer_text == needle.answer
        assert found.ranked[0].span.text.strip() == needle.sentence
