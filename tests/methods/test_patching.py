"""Patches against the oracle: modes, several tokens, several sources, tokens taken out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import check_edits
from tiny import Tiny
from tiny_gguf import write_tiny

from mia.errors import FileError, UsageError
from mia.io.activations import Activations
from mia.methods.patching import (
    patch_edits,
    patches,
    today,
    token_removal_edits,
    warn_of_first_tokens,
)
from mia.model import Model
from mia.notices import MiaWarning


@pytest.mark.parametrize("mode", ["replace", "add", "subtract", "average"])
def test_modes(case: Tiny, mode: Any) -> None:
    source, tokens = case.prompt(5, seed=4), case.prompt(6)
    p = case.oracle.run(source)["resid_post.1"][3]

    def edit(h: np.ndarray) -> np.ndarray:
        h[2] = {
            "replace": p,
            "add": h[2] + p,
            "subtract": h[2] - p,
            "average": (h[2] + p) / 2,
        }[mode]
        return h

    activations = case.model.look(source, "l_out")
    edits = patch_edits(
        case.model, "l_out-1", [activations], 6, from_tokens="3", to_tokens="2", mode=mode
    )
    check_edits(case, tokens, edits, {"resid_post.1": edit})


def test_ranges_go_token_by_token_and_one_goes_to_many(llama: Tiny) -> None:
    source, tokens = llama.prompt(5, seed=4), llama.prompt(6)
    theirs = llama.oracle.run(source)
    activations = llama.model.look(source, ["l_out-0", "l_out-2"])

    def put(layer: int, to: list[int], rows: list[int]) -> Any:
        def edit(h: np.ndarray) -> np.ndarray:
            h[to] = theirs[f"resid_post.{layer}"][rows]
            return h

        return edit

    edits = patch_edits(
        llama.model, "l_out-0", [activations], 6, from_tokens="1..2", to_tokens="3,0"
    )
    edits += patch_edits(llama.model, "l_out-2", [activations], 6, to_tokens="4..")
    truth = {"resid_post.0": put(0, [3, 0], [1, 2]), "resid_post.2": put(2, [4, 5], [4, 4])}
    check_edits(llama, tokens, edits, truth)


def test_the_average_of_several_sources_is_their_mean(llama: Tiny, tmp_path: Path) -> None:
    sources = [llama.prompt(4, seed=s) for s in (4, 5, 6)]
    files: list[Any] = [llama.model.look(s, "l_out-1") for s in sources]
    files[0].save(tmp_path / "a.safetensors")
    files[0] = tmp_path / "a.safetensors"
    mean = np.mean([llama.oracle.run(s)["resid_post.1"][-1] for s in sources], axis=0)

    def edit(h: np.ndarray) -> np.ndarray:
        h[-1] = mean
        return h

    edits = patch_edits(llama.model, "l_out-1", files, 6, mode="average")
    check_edits(llama, llama.prompt(6), edits, {"resid_post.1": edit})


def test_a_token_is_taken_out_of_a_residual(llama: Tiny) -> None:
    """Projected out along the direction in which the lens reads it."""
    token = llama.model.token_id(" France")
    w = llama.oracle.weights
    u = w["output_norm.weight"] * w["output.weight"][token]
    u /= np.linalg.norm(u)

    def edit(h: np.ndarray) -> np.ndarray:
        h[3] -= (h[3] @ u) * u
        return h

    edits = token_removal_edits(llama.model, "l_out-1", [" France"], 6, tokens="3")
    check_edits(llama, llama.prompt(6), edits, {"resid_post.1": edit})
    with pytest.raises(UsageError, match="a token is removed from residuals"):
        token_removal_edits(llama.model, "q.1", [" France"], 6)


def test_the_old_kqv_out() -> None:
    assert today("l_out-3") == "l_out-3"
    with pytest.warns(MiaWarning, match="heads are at head_out"):
        assert today("kqv_out-3") == "attn_out-3"


def test_the_start_of_a_prompt_without_a_bos_is_warned_of(llama: Tiny) -> None:
    m = llama.model
    activations = m.look(llama.prompt(3), "l_out-1")
    edits = patch_edits(m, "l_out-1", [activations], 4, to_tokens="1")
    plain = llama.prompt(4)
    with pytest.warns(MiaWarning, match="token 1 is at the start of a prompt without a BOS"):
        warn_of_first_tokens(m, plain, edits)
    warn_of_first_tokens(m, [m.bos_token, *plain[1:]], edits)
    later = patch_edits(m, "l_out-1", [activations], 4, to_tokens="2")
    warn_of_first_tokens(m, plain, later)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "swap"}, UsageError, "unknown mode 'swap'; known: replace, add"),
        ({"sources": 2}, UsageError, "got 2 files; only the mode average takes several"),
        ({"site": "attn_pattern.1"}, UsageError, "attn_pattern.1 cannot be patched from a file"),
        ({"site": "l_out-0"}, UsageError, "has no resid_post.0; it has resid_post.1"),
        ({"from_tokens": "9"}, UsageError, "token index 9 is out of range; there are 0 to 2"),
        (
            {"from_tokens": "0..2", "to_tokens": "0..1"},
            UsageError,
            "3 tokens are taken from the capture of llama, but 2 are to be changed",
        ),
    ],
)
def test_what_is_refused(
    llama: Tiny, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    activations = llama.model.look(llama.prompt(3), "l_out-1")
    site, n = options.pop("site", "l_out-1"), options.pop("sources", 1)
    with pytest.raises(error, match=message):
        patch_edits(llama.model, site, [activations] * n, 4, **options)


def test_activations_of_another_kind_of_model_are_refused(llama: Tiny, tmp_path: Path) -> None:
    with Model(write_tiny(tmp_path / "wide.gguf", "llama", qtype="Q8_0"), threads=1) as wide:
        other = wide.look([5, 6], "l_out-1")
        with pytest.raises(UsageError, match="of width 64"):
            patch_edits(llama.model, "l_out-1", [other], 4)
    with pytest.raises(FileError, match="there is no file"):
        patch_edits(llama.model, "l_out-1", [tmp_path / "none.safetensors"], 4)
    rows = Activations({"": np.ones((1, 48), np.float32)})
    assert patch_edits(llama.model, "l_out-1", [rows], 4)[0].positions(4) == [3]


def test_patches_are_activations_then_tokens_projected_out(llama: Tiny) -> None:
    ids = llama.prompt(6)
    a = llama.model.look(ids, "l_out-1")
    edits = patches(llama.model, ids, "l_out-1", [a], to_tokens="3", subtract_tokens=[" France"])
    assert [e.op for e in edits] == ["replace", "project_out"]
    assert [e.positions(6) for e in edits] == [[3], [3]]
    with pytest.raises(UsageError, match="nothing to patch"):
        patches(llama.model, ids, "l_out-1")
