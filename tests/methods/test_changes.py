"""Changes that text describes, against the oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_prompt import without_head
from reference import check_edits
from tiny import Tiny

from mia.errors import UsageError
from mia.methods.changes import Changes
from mia.ranges import Head


def test_no_change_is_no_edit(llama: Tiny) -> None:
    assert Changes().edits(llama.model, llama.prompt(4)) == []


def test_all_changes_together(llama: Tiny, tmp_path: Path) -> None:
    source, tokens = llama.prompt(5, seed=4), llama.prompt(6)
    llama.model.look(source, "l_out-0").save(tmp_path / "a.safetensors")
    row = llama.oracle.run(source)["resid_post.0"][3]
    vector = np.zeros((3, 48), np.float32)
    vector[1:] = np.random.default_rng(0).normal(size=(2, 48))
    np.save(tmp_path / "v.npy", vector)

    def patch(h: np.ndarray) -> np.ndarray:
        h[2] = row
        return h

    def block(scores: np.ndarray) -> np.ndarray:
        scores[5, :, 0] = -np.inf
        return scores

    changes = Changes(
        patch=[("l_out-0", str(tmp_path / "a.safetensors"), "3", "2")],
        ablate="1.3",
        block=["5->0@1"],
        steer=[str(tmp_path / "v.npy")],
        steer_coeff=2,
        steer_layers="1",
    )
    truth = {
        "resid_post.0": patch,
        "head_out.1": without_head(llama.oracle, 3),
        "attn_scores.1": block,
        "resid_post.1": lambda h: h + 2 * vector[1],
    }
    check_edits(llama, tokens, changes.edits(llama.model, tokens), truth)


def test_heads_that_are_kept_ablate_the_others_of_their_layer(llama: Tiny) -> None:
    def keep(z: np.ndarray) -> np.ndarray:
        z.reshape(len(z), 6, -1)[:, [0, 2, 3, 4]] = 0
        return z

    tokens = llama.prompt(6)
    edits = Changes(select="1.1,1.5").edits(llama.model, tokens)
    check_edits(llama, tokens, edits, {"head_out.1": keep})
    both = Changes(select="1.1,1.5", ablate="1.0").edits(llama.model, tokens)
    check_edits(llama, tokens, both, {"head_out.1": keep})


@pytest.mark.parametrize("how", ["mean", "resample-from"])
def test_heads_are_ablated_with_a_file(llama: Tiny, tmp_path: Path, how: str) -> None:
    other, tokens = llama.prompt(5, seed=4), llama.prompt(6)
    file = str(tmp_path / "heads.safetensors")
    llama.model.look(other, "head_out").save(file)
    theirs = llama.oracle.run(other)["head_out.1"].reshape(5, 6, -1)[:, 2]
    # resampling draws a row for each token, and one more for generated tokens
    drawn = [int(i) for i in np.random.default_rng(3).integers(5, size=6)]

    def edit(z: np.ndarray) -> np.ndarray:
        z.reshape(6, 6, -1)[:, 2] = theirs.mean(0) if how == "mean" else theirs[drawn]
        return z

    changes = Changes(ablate="1.2", ablate_with=(how, file), ablate_seed=3)
    check_edits(llama, tokens, changes.edits(llama.model, tokens), {"head_out.1": edit})


def test_heads_are_ablated_at_their_attention(llama: Tiny) -> None:
    tokens = llama.prompt(6)
    edits = Changes(ablate="1.2", ablate_attention=True).edits(llama.model, tokens)
    assert [str(e.site) for e in edits] == ["attn_pattern.1"]
    check_edits(llama, tokens, edits, {"head_out.1": without_head(llama.oracle, 2)})


def test_the_method_can_be_left_out(llama: Tiny) -> None:
    changes = Changes(ablate="0.1", ablate_with=("resample",), ablate_attention=True)
    plain = changes.without_ablation_method()
    assert plain == Changes(ablate="0.1")
    change = Changes().head_ablation(llama.model, llama.prompt(4), [1], [3])
    (edit,) = change([Head(1, 2)])
    assert (edit.op, edit.positions(4), edit.heads) == ("zero", [3], [2])


def test_steering_is_described(llama: Tiny, tmp_path: Path) -> None:
    file = str(tmp_path / "v.npy")
    np.save(file, np.ones((3, 48), np.float32))
    edits, described = Changes(steer=[file], steer_layers="1..2").steering(llama.model)
    assert [str(e.site) for e in edits] == ["resid_post.1", "resid_post.2"]
    assert described == {
        "steer": [{"vector": file, "site": "resid_post", "layers": [1, 2]}],
        "coeff": 1.0,
    }
    assert Changes().steering(llama.model) == ([], {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ablate_with": ("resample",)}, "no heads to ablate: set ablate or select"),
        ({"ablate": "0.1", "ablate_with": ("noise",)}, "ablation with 'noise' is not known; known"),
        ({"ablate": "0.1", "ablate_with": ("mean",)}, "ablation with 'mean' is not known; known"),
        (
            {"ablate": "0.1", "ablate_with": ("resample",), "ablate_attention": True},
            "attention weights are ablated by zeroing them, not by resample",
        ),
        ({"steer_coeff": 2.0}, "steer_coeff and steer_layers need steer"),
        ({"block": ["5-0"]}, "'5-0' is not QUERIES->KEYS"),
        ({"ablate": "0.6"}, "heads to ablate '0.6': head 6 is out of range"),
    ],
)
def test_what_is_refused(llama: Tiny, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Changes(**changes).edits(llama.model, llama.prompt(4))


def test_one_by_itself_is_a_list_of_one(llama: Tiny, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((3, 48), np.float32))
    llama.model.look(llama.prompt(5), "l_out-0").save(tmp_path / "a.safetensors")
    vector, patch = str(tmp_path / "v.npy"), ("l_out-0", str(tmp_path / "a.safetensors"), "3", "2")
    alone = Changes(block="5->0", steer=vector, ablate_with="zero", patch=patch, ablate=Head(1, 3))
    assert alone == Changes(
        block=("5->0",), steer=(vector,), ablate_with=("zero",), patch=(patch,), ablate=Head(1, 3)
    )
    # patch, head, block of every layer, vector of every layer
    assert len(alone.edits(llama.model, llama.prompt(6))) == 1 + 1 + 3 + 3
