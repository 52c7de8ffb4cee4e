"""What the writer writes, gguf-py and llama.cpp read to the last bit."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mia.errors import FileError
from mia.llama.gguf_write import RawTensor, Value, write_gguf
from mia.llama.weights import Weights
from mia.models.registry import check_gguf

METADATA: dict[str, Value] = {
    "general.architecture": "controlvector",
    "text": "naïve ☃",
    "empty": "",
    "count": 7,
    "below": -3,
    "large": 1 << 40,
    "small": -(1 << 40),
    "share": 0.5,
    "yes": True,
    "names": ["a", "bc"],
    "numbers": [1, 2, 3],
    "none": [],
}


def test_every_kind_of_value_is_read_back(tmp_path: Path) -> None:
    write_gguf(tmp_path / "f.gguf", METADATA, {})
    fields = gguf.GGUFReader(tmp_path / "f.gguf").fields
    assert {k: fields[k].contents() for k in METADATA} == METADATA
    types = {k: fields[k].types[0].name for k in METADATA}
    assert types["count"] == "UINT32" and types["below"] == "INT32"
    assert types["large"] == "UINT64" and types["small"] == "INT64"
    assert types["yes"] == "BOOL" and types["share"] == "FLOAT32"


def test_tensors_are_aligned_and_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"t.{n}": rng.standard_normal(n).astype(np.float32) for n in (1, 5, 48)}
    arrays["matrix"] = rng.standard_normal((3, 7)).astype(np.float32)
    write_gguf(tmp_path / "f.gguf", {"general.architecture": "x"}, arrays)
    check_gguf(tmp_path / "f.gguf")
    reader = gguf.GGUFReader(tmp_path / "f.gguf")
    weights = Weights(tmp_path / "f.gguf")
    for t in reader.tensors:
        assert t.data_offset % 32 == 0
        np.testing.assert_array_equal(t.data, arrays[t.name])
    assert weights.shape("matrix") == (3, 7)
    np.testing.assert_array_equal(weights.matrix("matrix"), arrays["matrix"])


def test_blocks_of_another_type_go_through_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    q8 = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    write_gguf(
        tmp_path / "f.gguf",
        {"general.architecture": "x"},
        {"w": RawTensor(8, (2, 64), q8.tobytes())},
    )
    want = gguf.quants.dequantize(q8, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(Weights(tmp_path / "f.gguf").matrix("w"), want)


def test_a_mixed_list_is_refused_and_no_file_is_left(tmp_path: Path) -> None:
    mixed: list[Any] = [1, "a"]
    with pytest.raises(TypeError, match="one kind"):
        write_gguf(tmp_path / "f.gguf", {"k": mixed}, {})
    with pytest.raises(FileError, match="no folder"):
        write_gguf(tmp_path / "no" / "f.gguf", {}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_is_new_for_who_opens_it_anew(tmp_path: Path) -> None:
    path, facts = tmp_path / "f.gguf", {"general.architecture": "x"}
    write_gguf(path, facts, {"t": np.ones(4)})
    first = Weights(path)
    np.testing.assert_array_equal(first.vector("t"), np.ones(4))
    write_gguf(path, facts, {"t": np.zeros(4)})
    np.testing.assert_array_equal(Weights(path).vector("t"), np.zeros(4))
    np.testing.assert_array_equal(first.vector("t"), np.ones(4))


def test_a_tensor_in_pieces_and_numbers_with_a_sign(tmp_path: Path) -> None:
    data = np.arange(8, dtype="<f4").tobytes()
    pieces: list[bytes | memoryview] = [memoryview(data)[:5], data[5:]]
    kinds = np.asarray([1, -3], np.int32)
    write_gguf(tmp_path / "f.gguf", {"kinds": kinds}, {"a": RawTensor(0, (2, 4), pieces)})
    reader = gguf.GGUFReader(tmp_path / "f.gguf")
    assert reader.fields["kinds"].contents() == [1, -3]
    assert reader.fields["kinds"].types[1].name == "INT32"
    assert reader.tensors[0].data.tobytes() == data
