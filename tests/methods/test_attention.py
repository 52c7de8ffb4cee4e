"""Attention maps against the oracle: patterns, value-weighted patterns, many prompts at once."""

from collections.abc import Callable

import numpy as np
import pytest
from tiny import Tiny

from mia.errors import RangeError, UsageError
from mia.methods.ablation import head_edits
from mia.methods.attention import attention_maps, maps_of, maps_request, value_norms
from mia.sites import Site

TOLERANCE = 1e-4


def _truth(t: Tiny, tokens: list[int], **edits: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(n_layer, n_head, n_query, n_key)."""
    sites = t.oracle.run(tokens, {k.replace("_at_", "."): f for k, f in edits.items()})
    found = [sites[f"attn_pattern.{i}"] for i in range(t.oracle.n_layer)]
    return np.stack(found).swapaxes(1, 2)


def test_patterns_agree_with_the_oracle_and_rows_sum_to_one(case: Tiny) -> None:
    tokens = case.prompt()
    maps = attention_maps(case.model, tokens)
    o = case.oracle
    assert maps.weights.shape == (o.n_layer, o.n_head, len(tokens), len(tokens))
    assert np.abs(maps.weights - _truth(case, tokens)).max() < TOLERANCE
    assert np.abs(maps.weights.sum(-1) - 1).max() < 1e-5
    assert (maps.weights[..., ~np.tri(len(tokens), dtype=bool)] == 0).all()
    assert maps.tokens == tokens and maps.layers == list(range(o.n_layer))


def test_value_weighted_is_weight_times_norm_of_the_shared_value(case: Tiny) -> None:
    """Grouped queries: head h moves the values of head h // (n_head / n_head_kv)."""
    tokens, o = case.prompt(), case.oracle
    maps = attention_maps(case.model, tokens, value_weighted=True)
    sites = o.run(tokens)
    want = np.empty(maps.weights.shape)
    for i in range(o.n_layer):
        v = sites[f"v.{i}"].reshape(len(tokens), o.n_head_kv, o.head_dim)
        for h in range(o.n_head):
            norms = np.linalg.norm(v[:, h // (o.n_head // o.n_head_kv)], axis=1)  # (n_key,)
            want[i, h] = sites[f"attn_pattern.{i}"][:, h] * norms
    assert np.abs(maps.weights - want).max() < TOLERANCE
    assert maps.value_weighted


def test_many_prompts_in_one_cache_give_what_each_gives_alone(case: Tiny) -> None:
    """Prompts that share a beginning, one twice, one changed: keys come back by position."""
    start = case.prompt(9)
    prompts = [start + case.prompt(n, seed=n) for n in (5, 1, 7, 5)] + [start]
    zero = head_edits(case.model, {1: [0]})
    requests = [maps_request(case.model, p, values=True) for p in prompts]
    requests.append(maps_request(case.model, prompts[0], edits=zero))
    results = case.model.run(requests)
    for tokens, request, result in zip(prompts, requests, results, strict=False):
        maps = maps_of(case.model, request, result)
        assert np.abs(maps.weights - _truth(case, tokens)).max() < TOLERANCE
        sites = case.oracle.run(tokens)
        for i in range(case.oracle.n_layer):
            v = result.captures[Site("v", i)]
            assert np.abs(v - sites[f"v.{i}"]).max() < TOLERANCE

    def silence(z: np.ndarray) -> np.ndarray:
        z[:, : case.oracle.head_dim] = 0
        return z

    changed = maps_of(case.model, requests[-1], results[-1]).weights
    want = _truth(case, prompts[0], head_out_at_1=silence)
    assert np.abs(changed - want).max() < TOLERANCE
    assert np.abs(want - _truth(case, prompts[0])).max() > 0.01  # the edit does something


def test_layers_and_heads_are_picked_by_number(llama: Tiny) -> None:
    tokens = llama.prompt(6)
    maps = attention_maps(llama.model, tokens, layers=[2, 0])
    assert maps.layers == [2, 0] and len(maps.weights) == 2
    assert np.abs(maps[2, 3] - _truth(llama, tokens)[2, 3]).max() < TOLERANCE
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
    from mia.methods.ablation import block_edits, parse_block, pattern_edits
    from mia.request import Capture, Request

    model = reopen(llama, kv_type="f16").model
    used: list[bool] = []
    plain = type(model)._session

    def session(self: object, callback: bool, flash: bool, *size: int) -> object:
        used.append(flash)
        return plain(model, callback, flash, *size)

    monkeypatch.setattr(type(model), "_session", session)
    tokens = llama.prompt(5)
    model.run([Request(tokens)])
    model.run([Request(tokens, head_edits(model, {0: [1]}), [Capture("head_out")])])
    assert set(used) == {True}
    for request in (
        maps_request(model, tokens),
        Request(tokens, pattern_edits({0: [1]})),
        Request(tokens, block_edits(model, parse_block("4->0", 5, model.n_layer, model.n_head))),
    ):
        used.clear()
        model.run([request])
        assert used and not any(used)
