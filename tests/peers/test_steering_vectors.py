"""mia against the steering-vectors package: one tiny llama in float32 in both."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, logits

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch", reason="torch is not installed (tests/peers/requirements.txt)")
sv = pytest.importorskip(
    "steering_vectors", reason="steering-vectors is not installed (tests/peers/requirements.txt)"
)

from hf_llama import Tokenizer, as_transformers  # noqa: E402

from mia.methods import contrast  # noqa: E402
from mia.request import Request  # noqa: E402
from mia.vectors import Vector  # noqa: E402

#: theirs -> ours
LAYER_TYPES = {
    "decoder_block": "resid_post",
    "self_attn": "attn_out",
    "mlp": "mlp_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
}
PAIRS = [
    ("The cat sat on the mat", "The dog sat on the mat"),
    ("sky is blue", "sky is red"),
    ("The capital of France is Paris", "The capital of Italy is Paris"),
    ("yes and yes", "no and no"),
    ("in the sky the cat is red", "in the sky the cat is blue"),
    ("Paris yes", "Rome no"),
    ("the dog is in Paris", "the dog is in Rome"),
    ("of the red cat", "of the red dog"),
]
PROMPT = "The capital of Italy is in the"


@pytest.fixture(scope="module")
def theirs(tiny: Callable[[str], Tiny]) -> Any:
    return as_transformers(tiny("llama").path)


def _logits(theirs: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits[0].numpy()


def test_the_two_models_are_the_same(llama: Tiny, theirs: Any) -> None:
    ids = llama.model.tokenize(PROMPT)
    ours = llama.model.run([Request(ids, logits="all")])[0].logits
    assert ours is not None
    np.testing.assert_allclose(ours, _logits(theirs, ids), atol=1e-4)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("method", ["mean", "pca", "logistic"])
def test_vectors_agree(llama: Tiny, theirs: Any, layer_type: str, method: str) -> None:
    aggregator = getattr(sv, f"{method}_aggregator")()
    want = sv.train_steering_vector(
        theirs, Tokenizer(llama.model), PAIRS, layer_type=layer_type, aggregator=aggregator
    )
    got = contrast.train(llama.model, PAIRS, site=LAYER_TYPES[layer_type], method=method)
    assert got.layers == sorted(want.layer_activations)
    for layer in got.layers:
        a, b = got[layer], want.layer_activations[layer].numpy()
        assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.9999, (method, layer)
        np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(b), rtol=1e-3)


def test_a_token_in_the_middle_is_read_alike(llama: Tiny, theirs: Any) -> None:
    want = sv.train_steering_vector(theirs, Tokenizer(llama.model), PAIRS, read_token_index=2)
    got = contrast.train(llama.model, PAIRS, read="2")
    for layer in got.layers:
        np.testing.assert_allclose(got[layer], want.layer_activations[layer].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("op", "operator"),
    [
        ("add", "addition"),
        ("project_out", "ablation"),
        ("project_out_add", "ablation_then_addition"),
    ],
)
@pytest.mark.parametrize("start", [0, 3])
def test_steered_logits_agree(llama: Tiny, theirs: Any, op: str, operator: str, start: int) -> None:
    ids = llama.model.tokenize(PROMPT)
    v = contrast.train(llama.model, PAIRS, layers=[1])
    patch = sv.SteeringVector({i: torch.tensor(v[i]) for i in v.layers})
    plain = _logits(theirs, ids)
    with patch.apply(
        theirs,
        operator=getattr(sv, f"{operator}_operator")(),
        multiplier=2.5,
        min_token_index=start,
    ):
        want = _logits(theirs, ids)
    tokens = slice(start, None) if start else None
    with llama.model.steered(v, op=op, coeff=2.5, tokens=tokens, generated=True):
        got = llama.model.run([Request(ids, logits="all")])[0].logits
    assert got is not None
    np.testing.assert_allclose(got, want, atol=1e-3)
    np.testing.assert_allclose(got[:start], plain[:start], atol=1e-4)
    assert np.abs(want[start:] - plain[start:]).max() > 0.1


def test_they_steer_with_a_vector_file_of_ours(llama: Tiny, theirs: Any, tmp_path: Any) -> None:
    from mia.vectors import load

    contrast.train(llama.model, PAIRS).save(tmp_path / "v.gguf")
    v = load(tmp_path / "v.gguf")
    assert isinstance(v, Vector) and v.layers == [1, 2]
    ids = llama.model.tokenize(PROMPT)
    patch = sv.SteeringVector({i: torch.tensor(v[i]) for i in v.layers})
    with patch.apply(theirs, multiplier=-1.0):
        want = _logits(theirs, ids)
    with llama.model.steered(v, coeff=-1.0):
        got = logits(llama.model.run([Request(ids, logits="all")])[0])
    np.testing.assert_allclose(got, want, atol=1e-3)
