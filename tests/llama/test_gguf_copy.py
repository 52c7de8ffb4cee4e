"""A GGUF file copied with other tensors: ggml's own quantization, and what cannot be copied."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import write_tiny

from mia.errors import ModelError
from mia.llama import NewRows, copy_gguf
from mia.llama.gguf_write import RawTensor, write_gguf
from mia.llama.open_file import OpenFile


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_new_rows_are_quantized_as_ggml_does(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    rows = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    zeros = RawTensor(0, (8, 64), bytes(4 * 8 * 64))
    write_gguf(tmp_path / "a.gguf", {"general.name": "a", "n": 3}, {"w": zeros, "v": rows})
    blocks = NewRows(lambda: [rows[:3], rows[3:]], int(number))
    copy_gguf(
        OpenFile(tmp_path / "a.gguf"), tmp_path / "b.gguf", {"n": 4}, {"w": blocks}, {"u": "v"}
    )
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors) == ["w", "v", "u"] and tensors["w"].tensor_type == number
    got = gguf.quants.dequantize(tensors["w"].data, number)
    own = gguf.quants.dequantize(gguf.quants.quantize(rows, number), number)
    np.testing.assert_allclose(got, own, atol=1e-6)
    assert (tensors["u"].data == rows).all() and (tensors["v"].data == rows).all()
    assert reader.fields["n"].contents() == 4 and reader.fields["general.name"].contents() == "a"


def test_what_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    file = OpenFile(write_tiny(tmp_path / "m.gguf", "llama"))
    name = "blk.0.ffn_down.weight"
    with pytest.raises(ModelError, match=r"iq2_xxs, which cannot be made without an importance"):
        copy_gguf(file, tmp_path / "b.gguf", {}, {name: NewRows(list, 16)})
    for part in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        write_tiny(tmp_path / part, "llama")
    split = OpenFile(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelError, match="one of several parts; merge them"):
        copy_gguf(split, tmp_path / "b.gguf", {}, {})
    assert not (tmp_path / "b.gguf").exists()
