"""Contrastive activation addition against the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.datasets.choices import AbItem, select_items
from mia.errors import FileError, UsageError
from mia.methods import ab_prompts, caa, caa_evaluation
from mia.model import Model
from mia.notices import MiaWarning
from mia.request import Request
from mia.vectors import Vector, load

ITEMS = [
    AbItem("The cat is red?\n\nChoices:\n (A) yes\n (B) no", "A", "B"),
    AbItem("The sky is blue?\n\nChoices:\n (A) no\n (B) yes", "B", "A"),
    AbItem("Paris is in Rome?\n\nChoices:\n (A) no\n (B) yes", "A", "B"),
]


def test_prompts_end_in_an_open_bracket_and_steering_begins_after_the_message(
    llama: Tiny, tmp_path: Path
) -> None:
    plain = ab_prompts.prompt(llama.model, ITEMS[0])
    m = llama.model
    assert m.detokenize(plain.tokens) == f"<|endoftext|>{ITEMS[0].question}\n\nAnswer: ("
    assert m.detokenize(plain.tokens[: plain.steered]).endswith("(B) no")

    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
    path = write_tiny(tmp_path / "chat.gguf", "llama", add_bos=False, chat_template=template)
    with Model(path, threads=1) as chat:
        p = ab_prompts.prompt(chat, ITEMS[0])
        text = chat.detokenize(p.tokens)
        assert text == f"<|im_start|>user\n{ITEMS[0].question}<|im_end|>\n<|im_start|>assistant\n("
        assert chat.detokenize(p.tokens[p.steered :]) == "<|im_end|>\n<|im_start|>assistant\n("
        with_bos = ab_prompts.prompt(chat, ITEMS[0], bos=True)
        assert with_bos.steered == p.steered + 1


def test_a_template_that_does_not_end_a_line_is_followed_by_a_space(tmp_path: Path) -> None:
    template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    path = write_tiny(tmp_path / "chat.gguf", "llama", add_bos=False, chat_template=template)
    with Model(path, threads=1) as m:
        p = ab_prompts.prompt(m, ITEMS[0])
        assert m.detokenize(p.tokens[p.steered :]) == " [/INST] ("


def test_in_a_sentencepiece_vocabulary_nothing_gets_a_second_space(tmp_path: Path) -> None:
    with Model(write_tiny(tmp_path / "spm.gguf", "llama", spm=True), threads=1) as m:
        item = AbItem("cat?\n\nChoices:\n (A) dog\n (Q) cat", "A", "Q")
        p = ab_prompts.prompt(m, item)
        assert p.tokens == m.tokenize(f"{item.question}\n\nAnswer: (")
        assert m.piece(p.tokens[-1]) == " ("
        # the letters follow "(" without a space, as "Answer: (A" has them
        table = caa_evaluation.matching(m, _ones(m), [item] * 2, layers=[1], multipliers=[0.0])
        ids = [m.tokenize(f"{item.question}\n\nAnswer: ({x}")[-1] for x in "AQ"]
        assert [m.piece(i) for i in ids] == ["A", "Q"]
        x = logits(m.run([Request(p.tokens)])[0])[-1][ids]
        assert table.plain[0] == pytest.approx(1 / (1 + np.exp(x[1] - x[0])), abs=1e-5)
        with pytest.raises(UsageError, match=r"the letter '😀' after '\(' is 4 tokens, not one"):
            caa.train(m, [AbItem("cat?", "A", "😀")])


def _ones(m: Model) -> Vector:
    return Vector({i: np.ones(m.n_embd, np.float32) for i in range(m.n_layer)})


def _letter(t: Tiny, letter: str) -> int:
    (token,) = t.model.continuation("(", letter)
    return token


def test_the_vector_is_the_mean_difference_at_the_letter(case: Tiny) -> None:
    got = caa.train(case.model, ITEMS, name="b")
    assert got.metadata["n_items"] == "3" and got.name == "b"
    for layer in got.layers:
        deltas = []
        for item in ITEMS:
            begun = ab_prompts.prompt(case.model, item).tokens
            a, b = (
                case.oracle.run([*begun, _letter(case, x)])[f"resid_post.{layer}"][-1]
                for x in (item.matching, item.other)
            )
            deltas.append(a - b)
        np.testing.assert_allclose(got[layer], np.mean(deltas, 0), atol=1e-4)
    with pytest.raises(UsageError, match="no items"):
        caa.train(case.model, [])


def test_equal_norms(llama: Tiny) -> None:
    a, b = caa.train(llama.model, ITEMS[:1]), caa.train(llama.model, ITEMS[1:])
    x, y = caa.equal_norms([a, b])
    for i in a.layers:
        want = (a.norms[i] + b.norms[i]) / 2
        assert x.norms[i] == pytest.approx(want, rel=1e-5)
        assert y.norms[i] == pytest.approx(want, rel=1e-5)
        assert x.cosine(a)[i] == pytest.approx(1, abs=1e-5)
    with pytest.raises(UsageError, match="unequal layers"):
        caa.equal_norms([a, b.at([1])])


@pytest.mark.parametrize("together", [False, True])
def test_the_table_is_the_oracles(llama: Tiny, together: bool) -> None:
    v = caa.train(llama.model, ITEMS)
    layers, factors = [1, 0], [-2.0, 2.0]
    table = caa_evaluation.matching(
        llama.model, v, ITEMS, layers=layers, multipliers=factors, together=together
    )
    groups = [layers] if together else [[1], [0]]
    assert table.layers == [g[0] for g in groups] and table.p.shape == (len(groups), 2, 3)
    for k, item in enumerate(ITEMS):
        p = ab_prompts.prompt(llama.model, item)
        ids = [_letter(llama, item.matching), _letter(llama, item.other)]

        def share(edits: dict[str, Any], p: ab_prompts.AbPrompt = p, ids: list[int] = ids) -> float:
            x = llama.oracle.run(p.tokens, edits)["logits"][-1][ids]
            return float(1 / (1 + np.exp(x[1] - x[0])))

        assert table.plain[k] == pytest.approx(share({}), abs=1e-5)
        for i, group in enumerate(groups):
            for j, c in enumerate(factors):
                edits = {}
                for layer in group:

                    def add(
                        x: np.ndarray, layer: int = layer, c: float = c, p: ab_prompts.AbPrompt = p
                    ) -> np.ndarray:
                        x[p.steered :] += c * v[layer]
                        return x

                    edits[f"resid_post.{layer}"] = add
                assert table.p[i, j, k] == pytest.approx(share(edits), abs=1e-4)
    change = table.change(table.layers[0], 2.0, np.random.default_rng(0))
    assert change.value == pytest.approx(float((table.p[0, 1] - table.plain).mean()))
    assert change.low <= change.value <= change.high


TEXTS = [
    AbItem("The cat is red?\n\nChoices:\n (A) yes and yes\n (B) no", "A", "B"),
    AbItem("The sky is blue?\n\nChoices:\n (A) no and\n (B) yes", "B", "A"),
]


def test_by_text_the_answers_themselves_are_read(llama: Tiny) -> None:
    m, got = llama.model, caa.train(llama.model, TEXTS, by_text=True)
    head = "The cat is red?\n\nAnswer:"
    assert TEXTS[1].choices() == ("The sky is blue?", "yes", "no and")
    begun = m.tokenize(head)
    p = ab_prompts.prompt(m, TEXTS[0], by_text=True)
    assert p.tokens == begun and m.detokenize(begun[: p.steered]).endswith("red?")
    for layer in got.layers:
        deltas = []
        for head, a, b in map(AbItem.choices, TEXTS):
            n = len(m.tokenize(f"{head}\n\nAnswer:"))
            site = f"resid_post.{layer}"
            x, y = (
                llama.oracle.run(m.tokenize(f"{head}\n\nAnswer: {t}"))[site][n:].mean(0)
                for t in (a, b)
            )
            deltas.append(x - y)
        np.testing.assert_allclose(got[layer], np.mean(deltas, 0), atol=1e-4)
    with pytest.raises(UsageError, match=r"lists no choices \(A\) and \(B\)"):
        caa.train(m, [AbItem("no choices", "A", "B")], by_text=True)


def test_by_text_the_answers_themselves_are_scored(llama: Tiny) -> None:
    m, v = llama.model, caa.train(llama.model, TEXTS)
    table = caa_evaluation.matching(m, v, TEXTS, layers=[1], multipliers=[2.0], by_text=True)
    for k, item in enumerate(TEXTS):
        head, *texts = item.choices()
        begun = ab_prompts.prompt(m, item, by_text=True)
        n = len(begun.tokens)

        def add(x: np.ndarray, at: int = begun.steered) -> np.ndarray:
            x[at:] += 2 * v[1]
            return x

        for edits, got in ((None, table.plain[k]), ({"resid_post.1": add}, table.p[0, 0, k])):
            means = []
            for text in texts:
                ids = m.tokenize(f"{head}\n\nAnswer: {text}")
                x = llama.oracle.run(ids, edits)["logits"]
                x = x - np.log(np.exp(x).sum(-1, keepdims=True))
                means.append(np.mean([x[i - 1, ids[i]] for i in range(n, len(ids))]))
            want = np.exp(means[0]) / np.exp(means).sum()
            assert got == pytest.approx(want, abs=1e-4)


# -- experiments ---------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        {
            "question": item.question,
            "answer_matching_behavior": f"({item.matching})",
            "answer_not_matching_behavior": f"({item.other})",
        }
        for item in ITEMS
    ]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    return tmp_path / "b.json"


def test_vectors_of_behaviours_are_written(llama: Tiny, file: Path, tmp_path: Path) -> None:
    behaviours = [select_items(file), select_items("refuse_vs_comply", "0..1")]
    report = caa.learn(llama.model, behaviours, equal_norm=True)
    a, b = (v.vector for v in report.vectors)
    assert a.norms[1] == pytest.approx(b.norms[1], rel=1e-5)
    assert (a.name, a.metadata["items"], b.metadata["n_items"]) == ("b", "0..2", "2")
    files = caa.vector_files(str(tmp_path / "{name}.safetensors"), ["x/b.json", "c"])
    assert [Path(f).name for f in files] == ["b.safetensors", "c.safetensors"]
    with pytest.warns(MiaWarning, match="wrote "):
        written = report.write(files)
    assert written.plain().startswith(f"{files[0]}: 3 items, layers 0-2")
    np.testing.assert_array_equal(load(files[0])[1], a[1])
    with pytest.raises(UsageError, match="2 behaviours need 2 files"):
        caa.vector_files("v.gguf", ["a", "b"])


def test_an_evaluation_has_the_means_and_their_changes(llama: Tiny, file: Path) -> None:
    data = select_items(file)
    vector = caa.learn(llama.model, [data]).vectors[0].vector
    with pytest.warns(MiaWarning, match=r"trained on items 0..2 of this evaluation"):
        report = caa_evaluation.evaluate(
            llama.model, vector, data, layers="1,0", multipliers=[2.0], seed=3
        )
    table = caa_evaluation.matching(llama.model, vector, ITEMS, layers=[1, 0], multipliers=[2.0])
    rng = np.random.default_rng(3)
    document = report.document()
    assert document["p_matching_plain"] == pytest.approx(table.plain.mean(), abs=1e-5)
    for i, (layer, row) in enumerate(zip([1, 0], document["table"], strict=True)):
        assert row["layers"] == [layer] and row["multiplier"] == 2
        assert row["p_matching"] == pytest.approx(table.p[i, 0].mean(), abs=1e-5)
        assert row["change"] == pytest.approx(table.change(layer, 2.0, rng).document(), abs=1e-5)
    assert [r["layer"] for r in report.rows()] == [1, 0]
    with pytest.raises(UsageError, match="give at least two items"):
        caa_evaluation.evaluate(llama.model, vector, select_items(file, "1"))


def test_questions_may_be_a_file_or_a_name(llama: Tiny, file: Path) -> None:
    vector = caa.learn(llama.model, file).vectors[0].vector
    with pytest.warns(MiaWarning, match="was trained on items"):
        report = caa_evaluation.evaluate(llama.model, vector, file, layers=[1])
    assert report.document()["data"] == str(file) and report.matching.layers == [1]
    with pytest.raises(FileError, match="there is no file agree"):
        caa_evaluation.evaluate(llama.model, vector, "agree")
