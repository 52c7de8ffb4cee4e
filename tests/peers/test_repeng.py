"""Control-vector files between mia and repeng, to the last bit."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# repeng 0.4.0 names a type that numpy 2 has no more
if not hasattr(np, "float_"):
    setattr(np, "float_", np.float64)  # noqa: B010
repeng = pytest.importorskip(
    "repeng", reason="repeng is not installed (tests/peers/requirements-no-deps.txt)"
)

from mia.vectors import Vector, load  # noqa: E402


def _directions(*layers: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(5)
    return {i: rng.standard_normal(48).astype(np.float32) for i in layers}


def test_repeng_reads_what_mia_wrote(tmp_path: Path) -> None:
    ours = Vector(_directions(1, 2, 7), metadata={"name": "v", "architecture": "llama"})
    ours.save(tmp_path / "v.gguf")
    theirs = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")
    assert theirs.model_type == "llama"
    assert sorted(theirs.directions) == [1, 2, 7]
    for layer, v in ours.directions.items():
        assert theirs.directions[layer].dtype == np.float32
        np.testing.assert_array_equal(theirs.directions[layer], v)


def test_mia_reads_what_repeng_wrote(tmp_path: Path) -> None:
    theirs = repeng.ControlVector("mistral", _directions(0, 1, 3))
    theirs.export_gguf(tmp_path / "v.gguf")
    ours = load(tmp_path / "v.gguf")
    assert ours.layers == [0, 1, 3] and ours.site == "resid_post"
    assert ours.metadata["architecture"] == "mistral"
    for layer, v in theirs.directions.items():
        np.testing.assert_array_equal(ours[layer], v)


def test_layer_zero_is_kept_for_repeng_where_asked(tmp_path: Path) -> None:
    ours = Vector(_directions(0, 1))
    assert ours.save(tmp_path / "v.gguf", layer_zero=True) == []
    theirs = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")
    np.testing.assert_array_equal(theirs.directions[0], ours[0])


def test_arithmetic_is_repengs(tmp_path: Path) -> None:
    a, b = _directions(1, 2), {i: 2 * v - 1 for i, v in _directions(2, 3).items()}
    theirs = (repeng.ControlVector("m", a) - repeng.ControlVector("m", b)) * 0.5
    ours = (Vector(a) - Vector(b)) * 0.5
    assert ours.layers == sorted(theirs.directions)
    for layer, v in theirs.directions.items():
        np.testing.assert_allclose(ours[layer], v, rtol=1e-6)
