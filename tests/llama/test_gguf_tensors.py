"""Tensors of files: the table, and every stored type as float32."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import write_tiny

from mia.errors import EngineError, ModelError
from mia.llama import (
    dequantize,
    file_strings,
    file_tensors,
    type_bytes,
)


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_stored_types_are_read_as_gguf_reads_them(qtype: str) -> None:
    kind = gguf.GGMLQuantizationType[qtype]
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    stored = np.ascontiguousarray(gguf.quants.quantize(x, kind))
    assert type_bytes(kind, 96) * 5 == stored.nbytes
    got = dequantize(stored.ctypes.data, kind, 5, 96)
    np.testing.assert_allclose(got, gguf.quants.dequantize(stored, kind), rtol=0, atol=1e-6)


#: where the scales (half floats) of a block of 256 lie
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("qtype", SCALES)
def test_k_quants_are_read_as_gguf_reads_them(qtype: str) -> None:
    """Random bytes, with scales that are numbers: gguf-py cannot write these."""
    kind = gguf.GGMLQuantizationType[qtype]
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (6, size), dtype=np.uint8)
    for at in SCALES[qtype]:
        scale = rng.uniform(0.001, 0.01, 6).astype(np.float16)
        blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
    stored = np.ascontiguousarray(blocks.reshape(3, 2 * size))
    want = gguf.quants.dequantize(stored, kind)
    got = dequantize(stored.ctypes.data, kind, 3, 512)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert np.ptp(want) > 0.01


def test_a_type_that_is_no_number_is_refused() -> None:
    with pytest.raises(EngineError, match="ggml type i32 cannot be converted to float"):
        dequantize(0, 26, 1, 1)


@pytest.mark.parametrize("qtype", ["F32", "Q4_1"])
def test_rows_of_a_matrix(tmp_path: Path, qtype: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", qtype=qtype)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    tensors = {t.name: t for t in file_tensors(path)}
    assert tensors.keys() == stored.keys()
    raw = np.fromfile(path, np.uint8)
    for name, t in tensors.items():
        want = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        want = want.reshape(-1, t.ne[0])
        row = type_bytes(t.type, t.ne[0])
        for start, stop in ((0, len(want)), (len(want) // 2, len(want) // 2 + 1)):
            source = raw[t.offset + start * row :].ctypes.data
            got = dequantize(source, t.type, stop - start, t.ne[0])
            np.testing.assert_allclose(got, want[start:stop], rtol=0, atol=1e-6)


def test_a_file_without_a_tensor_table(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(ModelError, match=r"other\.gguf cannot be read as GGUF: \S+"):
        file_strings(other)
    with pytest.raises(ModelError, match=r"other\.gguf is cut short: its header has no end"):
        file_tensors(other)
