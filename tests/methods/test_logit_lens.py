"""The logit lens as an experiment: sites, layers, tokens and changes, against the oracle."""

import re
from typing import Any

import numpy as np
import pytest
from one_prompt import without_head
from tiny import Tiny

from mia.errors import RangeError, UsageError
from mia.methods.head_ablation import head_edits
from mia.methods.logit_lens import logit_lens
from mia.notices import MiaWarning
from mia.ranges import Head

TOLERANCE = 2e-4


def test_each_row_is_the_oracles(case: Tiny) -> None:
    tokens, o = case.prompt(6), case.oracle
    report = logit_lens(case.model, tokens, ["mlp_out.1", "l_out-2"], 3, tokens="-1,2")
    places = [("ffn_out-1", "mlp_out.1"), ("l_out-2", "resid_post.2")]
    sites = o.run(tokens)
    rows = iter(report.lens)
    for label, site in places:
        for token in (5, 2):
            row, scores = next(rows), o.lens(sites[site][[token]])[0]
            assert (row.site, row.layer, row.token_index) == (label, int(site[-1]), token)
            assert [t["id"] for t in row.top] == np.argsort(-scores)[:3].tolist()
            probs = np.exp(scores - scores.max())
            for t in row.top:
                assert abs(t["logit"] - scores[t["id"]]) < TOLERANCE
                assert abs(t["prob"] - probs[t["id"]] / probs.sum()) < TOLERANCE
                assert t["text"] == case.model.piece(t["id"])
    assert next(rows, None) is None
    assert [t.id for t in report.tokens] == tokens and report.n_tokens == 2


def test_a_changed_run_is_read_as_it_ran(llama: Tiny) -> None:
    tokens = llama.prompt(6)
    edits = head_edits(llama.model, [Head(1, 2)])
    report = logit_lens(llama.model, tokens, "l_out", 1, tokens="-1", edits=edits)
    sites = llama.oracle.run(tokens, {"head_out.1": without_head(llama.oracle, 2)})
    for i, row in enumerate(report.lens):
        scores = llama.oracle.lens(sites[f"resid_post.{i}"][[-1]])[0]
        assert abs(row.top[0]["logit"] - scores.max()) < TOLERANCE


def test_all_and_layers(llama: Tiny) -> None:
    report = logit_lens(llama.model, llama.prompt(3), "all", 1, layers="1")
    labels = list(dict.fromkeys(r.site for r in report.lens))
    assert set(labels) == {"inp_embd", "attn_out-1", "ffn_inp-1", "ffn_out-1", "l_out-1"}
    everywhere = logit_lens(llama.model, llama.prompt(3), "l_out", 1)
    assert [r.layer for r in everywhere.lens] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_old_kqv_out_is_read_as_attn_out(llama: Tiny) -> None:
    with pytest.warns(MiaWarning, match="kqv_out is read as attn_out"):
        old = logit_lens(llama.model, llama.prompt(3), "kqv_out-1", 2)
    new = logit_lens(llama.model, llama.prompt(3), "attn_out-1", 2)
    assert [r.site for r in old.lens] == ["kqv_out-1"] * 3
    assert [r.top for r in old.lens] == [r.top for r in new.lens]


def test_without_the_norm_only_its_weight_is_applied(llama: Tiny) -> None:
    tokens, o = llama.prompt(3), llama.oracle
    row = logit_lens(llama.model, tokens, "l_out-1", 1, tokens="-1", norm=False).lens[0]
    x = o.run(tokens)["resid_post.1"][-1] * o.weights["output_norm.weight"]
    scores = x @ o.weights["output.weight"].T
    assert row.top[0]["id"] == scores.argmax()
    assert abs(row.top[0]["logit"] - scores.max()) < 1e-3


@pytest.mark.parametrize(
    ("site", "options", "error", "message"),
    [
        ("head_out", {}, UsageError, "a lens does not read head_out.0; it reads "),
        ("l_out-1", {"layers": "2"}, UsageError, "no site of l_out-1 is in layers 2"),
        (
            "l_out",
            {"layers": "3"},
            RangeError,
            "layers '3': layer 3 is out of range; there are 0 to 2",
        ),
        ("l_out", {"tokens": "9"}, RangeError, "tokens '9': token index 9 is out of range"),
    ],
)
def test_what_it_refuses(
    llama: Tiny, site: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        logit_lens(llama.model, llama.prompt(3), site, **options)


def test_layers_and_tokens_may_be_numbers(llama: Tiny) -> None:
    tokens = llama.prompt(5)
    numbers = logit_lens(llama.model, tokens, "l_out", 2, layers=[2], tokens=-1)
    text = logit_lens(llama.model, tokens, "l_out", 2, layers="2", tokens="-1")
    assert numbers.document() == text.document()
    (edit,) = head_edits(llama.model, [Head(1, 2)])
    alone, listed = (
        logit_lens(llama.model, tokens, "l_out", 2, edits=e).document() for e in (edit, [edit])
    )
    assert alone == listed
