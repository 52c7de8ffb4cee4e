"""Attention maps against the oracle: patterns, value-weighted patterns, many prompts at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_prompt import patterns, without_head
from safetensors import safe_open
from tiny import Tiny

from mia.errors import RangeError, UsageError
from mia.methods.attention import attention, attention_maps, maps_of, maps_request, value_norms
from mia.methods.head_ablation import head_edits
from mia.ranges import Head
from mia.show.text import visible
from mia.sites import Site

TOLERANCE = 1e-4


def test_patterns_agree_with_the_oracle_and_rows_sum_to_one(case: Tiny) -> None:
    tokens = case.prompt()
    maps = attention_maps(case.model, tokens)
    o = case.oracle
    assert maps.weights.shape == (o.n_layer, o.n_head, len(tokens), len(tokens))
    assert np.abs(maps.weights - patterns(case.oracle, tokens)).max() < TOLERANCE
    assert np.abs(maps.weights.sum(-1) - 1).max() < 1e-5
    assert (maps.weights[..., ~np.tri(len(tokens), dtype=bool)] == 0).all()
    assert maps.tokens == tokens and maps.layers == list(range(o.n_layer))


def test_value_weighted_is_weight_times_norm_of_the_shared_value(case: Tiny) -> None:
    """Grouped queries: head h moves the values of head h // (n_head / n_head_kv)."""
    tokens, o = case.prompt(), case.oracle
    maps = attention_maps(case.model, tokens, value_weighted=True)
    sites = o.run(tokens)
    expected = np.empty(maps.weights.shape)
    for i in range(o.n_layer):
        v = sites[f"v.{i}"].reshape(len(tokens), o.n_head_kv, o.head_dim)
        for h in range(o.n_head):
            norms = np.linalg.norm(v[:, h // (o.n_head // o.n_head_kv)], axis=1)  # (n_key,)
            expected[i, h] = sites[f"attn_pattern.{i}"][:, h] * norms
    assert np.abs(maps.weights - expected).max() < TOLERANCE
    assert maps.value_weighted


def test_many_prompts_in_one_cache_give_what_each_gives_alone(case: Tiny) -> None:
    """Prompts that share a beginning, one twice, one changed: keys come back by position."""
    start = case.prompt(9)
    prompts = [start + case.prompt(n, seed=n) for n in (5, 1, 7, 5)] + [start]
    zero = head_edits(case.model, [Head(1, 0)])
    requests = [maps_request(case.model, p, values=True) for p in prompts]
    requests.append(maps_request(case.model, prompts[0], edits=zero))
    results = case.model.run(requests)
    for tokens, request, result in zip(prompts, requests, results, strict=False):
        maps = maps_of(case.model, request, result)
        assert np.abs(maps.weights - patterns(case.oracle, tokens)).max() < TOLERANCE
        sites = case.oracle.run(tokens)
        for i in range(case.oracle.n_layer):
            v = result.captures[Site("v", i)]
            assert np.abs(v - sites[f"v.{i}"]).max() < TOLERANCE

    changed = maps_of(case.model, requests[-1], results[-1]).weights
    without = patterns(case.oracle, prompts[0], {"head_out.1": without_head(case.oracle, 0)})
    assert np.abs(changed - without).max() < TOLERANCE
    assert np.abs(without - patterns(case.oracle, prompts[0])).max() > 0.01


def test_layers_and_heads_are_picked_by_number(llama: Tiny) -> None:
    tokens = llama.prompt(6)
    maps = attention_maps(llama.model, tokens, layers=[2, 0])
    assert maps.layers == [2, 0] and len(maps.weights) == 2
    assert np.abs(maps[2, 3] - patterns(llama.oracle, tokens)[2, 3]).max() < TOLERANCE
    with pytest.raises(UsageError, match="no map of layer 1, head 0; layers 2, 0, heads 0 to 5"):
        maps[1, 0]
    with pytest.raises(UsageError, match="no map of layer 2, head 6"):
        maps[2, 6]
    with pytest.raises(RangeError, match="layer 3 is out of range"):
        attention_maps(llama.model, tokens, layers=[3])


def test_value_norms_repeat_for_the_heads_that_share() -> None:
    v = np.asarray([[3, 4, 0, 1], [0, 0, 6, 8]], np.float32)  # two tokens, two heads of two
    assert value_norms(v, 2, 4).tolist() == [[5, 0], [5, 0], [1, 10], [1, 10]]


def test_flash_attention_is_off_only_where_patterns_are_read(
    llama: Tiny, reopen: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mia.engine.session import Sessions
    from mia.methods.head_ablation import pattern_edits
    from mia.methods.knockout import block_edits, parse_block
    from mia.request import Capture, Request

    model = reopen(llama, kv_type="f16").model
    assert model.topology  # the checks of its sites look at both graphs
    used: list[bool] = []
    plain = Sessions.get

    def get(self: Sessions, *, flash: bool, **options: Any) -> object:
        used.append(flash)
        return plain(self, flash=flash, **options)

    monkeypatch.setattr(Sessions, "get", get)
    tokens = llama.prompt(5)
    model.run([Request(tokens)])
    model.run([Request(tokens, head_edits(model, [Head(0, 1)]), [Capture("head_out")])])
    assert set(used) == {True}
    for request in (
        maps_request(model, tokens),
        Request(tokens, pattern_edits([Head(0, 1)])),
        Request(tokens, block_edits(model, parse_block("4->0", 5, model.n_layer, model.n_head))),
    ):
        used.clear()
        model.run([request])
        assert used and not any(used)


# -- the report -------------------------------------------------------------------------


def test_a_report_of_chosen_heads(llama: Tiny) -> None:
    tokens = llama.prompt(6)
    report = attention(llama.model, tokens, layers="1..2", heads="0.5,1.4,2.0", token=-2, k=2)
    truth = patterns(llama.oracle, tokens)
    assert (report.layers, report.heads) == ([1, 2], [0, 4])
    assert report.chosen == [Head(1, 4), Head(2, 0)] and report.query == 4
    assert np.abs(report.weights - truth[1:][:, [0, 4]]).max() < TOLERANCE
    assert np.array_equal(report[1, 4], report.weights[0, 1])
    assert report.document()["weights"] == report.weights.astype(float).round(6).tolist()
    row = truth[2, 0, 4]
    first, second = np.argsort(-row)[:2]
    pieces = [visible(llama.model.piece(t)) for t in tokens]
    keys = f"{first}:{pieces[first]} {row[first]:.2f}|{second}:{pieces[second]} {row[second]:.2f}"
    assert report.plain().splitlines()[2] == f"2.0: {keys}"


def test_records_of_a_report_are_what_queries_see(llama: Tiny) -> None:
    report = attention(llama.model, llama.prompt(4), heads="1.2")
    rows = report.rows()
    assert [(r["query"], r["key"]) for r in rows] == [
        (q, k) for q in range(4) for k in range(q + 1)
    ]
    assert all(r["weight"] == report[1, 2][r["query"], r["key"]] for r in rows)
    assert {(r["layer"], r["head"]) for r in rows} == {(1, 2)}


def test_a_report_writes_its_weights_or_its_document(llama: Tiny, tmp_path: Path) -> None:
    tokens = llama.prompt(4)
    report = attention(llama.model, tokens, layers="0,2", heads="*.1,*.3", value_weighted=True)
    report.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as f:
        np.testing.assert_array_equal(f.get_tensor("value_weighted"), report.weights)
        metadata = f.metadata()
    assert json.loads(metadata["tokens"]) == tokens
    assert (metadata["layers"], metadata["heads"]) == ("[0, 2]", "[1, 3]")
    expected = llama.model.file_metadata(tokens=tokens, layers=[0, 2], heads=[1, 3])
    assert metadata == expected
    report.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == report.document()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": "0.1", "layers": "1"}, UsageError, "no head of 0.1 is in layers 1"),
        ({"layers": "3"}, RangeError, "layers '3': layer 3 is out of range; there are 0 to 2"),
        ({"token": 4}, RangeError, "token index 4 is out of range"),
    ],
)
def test_a_report_refuses(
    llama: Tiny, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attention(llama.model, llama.prompt(4), **options)


def test_layers_and_heads_may_be_numbers(llama: Tiny) -> None:
    tokens = llama.prompt(5)
    assert attention(llama.model, tokens, layers=[2]).layers == [2]
    assert attention(llama.model, tokens, layers=0).layers == [0]
    assert attention(llama.model, tokens, heads=[Head(1, 2)]).chosen == [Head(1, 2)]
    with pytest.raises(RangeError, match="layer 3 is out of range"):
        attention(llama.model, tokens, layers=[3])


def test_one_edit_by_itself_is_a_change(llama: Tiny) -> None:
    tokens, (edit,) = llama.prompt(5), head_edits(llama.model, [Head(0, 1)])
    alone, listed = (attention(llama.model, tokens, edits=e) for e in (edit, [edit]))
    np.testing.assert_array_equal(alone.weights, listed.weights)
