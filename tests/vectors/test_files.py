"""Vector files: every bit comes back, others read them, and damage is one clear line."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from random_vectors import WIDTH, make

from mia.errors import FileError, MiaError, UsageError
from mia.llama.gguf_write import write_gguf
from mia.llama.library import library
from mia.vectors import Vector, load


@pytest.mark.parametrize("name", ["v.gguf", "v.safetensors"])
def test_files_give_back_every_bit(tmp_path: Path, name: str) -> None:
    v = make(1, 2, 5, name="mine", model="m", architecture="llama", note="é")
    assert v.save(tmp_path / name) == []
    back = load(tmp_path / name)
    assert back.metadata == v.metadata and back.site == "resid_post"
    assert back.layers == v.layers
    for i in v.layers:
        np.testing.assert_array_equal(back[i], v[i])


def test_a_control_vector_is_what_llama_cpp_documents(tmp_path: Path) -> None:
    v = make(1, 3, architecture="llama")
    v.save(tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.3"]


def test_llama_cpps_loader_reads_it(tmp_path: Path) -> None:
    v = make(0, 1, 3, name="v")
    assert v.save(tmp_path / "v.gguf") == [0]
    data = _as_llama_cpp_loads(tmp_path / "v.gguf")  # (n_layers, n_embd), layer 1 first
    np.testing.assert_array_equal(data, [v[1], np.zeros(WIDTH), v[3]])
    assert v.save(tmp_path / "v.gguf", layer_zero=True) == []
    with pytest.raises(ValueError, match="zero"):
        _as_llama_cpp_loads(tmp_path / "v.gguf")
    np.testing.assert_array_equal(load(tmp_path / "v.gguf")[0], v[0])


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


def _as_llama_cpp_loads(path: Path) -> np.ndarray:
    """common_control_vector_load_one, its checks and its steps, on llama.cpp's own library."""
    base = ctypes.CDLL(library().base._name)
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    for name, result, *args in (
        ("gguf_init_from_file", p, ctypes.c_char_p, _Params),
        ("gguf_get_n_tensors", i64, p),
        ("gguf_get_tensor_name", ctypes.c_char_p, p, i64),
        ("gguf_get_tensor_type", ctypes.c_int, p, i64),
        ("ggml_get_tensor", p, p, ctypes.c_char_p),
        ("ggml_n_dims", ctypes.c_int, p),
        ("ggml_nelements", i64, p),
        ("ggml_get_data_f32", ctypes.POINTER(ctypes.c_float), p),
        ("gguf_free", None, p),
        ("ggml_free", None, p),
    ):
        f = getattr(base, name)
        f.restype, f.argtypes = result, args
    ctx = ctypes.c_void_p()
    file = base.gguf_init_from_file(str(path).encode(), _Params(False, ctypes.pointer(ctx)))
    assert file
    data = np.zeros((0, 0), np.float32)
    try:
        for i in range(base.gguf_get_n_tensors(file)):
            name = base.gguf_get_tensor_name(file, i)
            prefix, _, number = name.decode().partition(".")
            assert prefix == "direction"
            layer = int(number)
            if layer == 0:
                raise ValueError("zero layer")
            tensor = base.ggml_get_tensor(ctx, name)
            assert base.gguf_get_tensor_type(file, i) == 0 and base.ggml_n_dims(tensor) == 1
            n = base.ggml_nelements(tensor)
            more = np.zeros((max(layer, len(data)), n), np.float32)
            more[: len(data)] = data.reshape(len(data), n)
            more[layer - 1] += np.ctypeslib.as_array(base.ggml_get_data_f32(tensor), (n,))
            data = more
    finally:
        base.gguf_free(file)
        base.ggml_free(ctx)
    return data


def test_another_site_needs_safetensors(tmp_path: Path) -> None:
    v = Vector({0: np.ones(4, np.float32), 2: np.zeros(4, np.float32)}, "mlp_out", {"name": "v"})
    with pytest.raises(UsageError, match=r"belongs to mlp_out, which \.safetensors can hold"):
        v.save(tmp_path / "v.gguf")
    v.save(tmp_path / "v.safetensors")
    back = load(tmp_path / "v.safetensors")
    assert back.site == "mlp_out" and back.layers == [0, 2] and "site" not in back.metadata
    with pytest.raises(UsageError, match="only layer 0"):
        make(0).save(tmp_path / "v.gguf")
    with pytest.raises(UsageError, match=r"ends in .gguf or .safetensors"):
        v.save(tmp_path / "v.npy")


def test_numpy_files_are_read(tmp_path: Path) -> None:
    a = np.zeros((4, 6), np.float64)
    a[2] = np.arange(6)
    np.save(tmp_path / "v.npy", a)
    v = load(tmp_path / "v.npy")
    assert v.layers == [2] and v.name == "v"
    np.testing.assert_array_equal(v[2], np.arange(6, dtype=np.float32))


def test_a_half_float_control_vector_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_tensor("direction.4", np.arange(8, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(load(tmp_path / "v.gguf")[4], np.arange(8, dtype=np.float32))


def _nan(tmp: Path) -> Path:
    write_gguf(
        tmp / "nan.gguf",
        {"general.architecture": "controlvector"},
        {"direction.2": np.full(4, np.nan)},
    )
    return tmp / "nan.gguf"


def _model(tmp: Path) -> Path:
    write_gguf(tmp / "m.gguf", {"general.architecture": "llama"}, {"output.weight": np.ones(4)})
    return tmp / "m.gguf"


def _widths(tmp: Path) -> Path:
    both = {"direction.1": np.ones(4), "direction.2": np.ones(5)}
    write_gguf(tmp / "w.gguf", {"general.architecture": "controlvector"}, both)
    return tmp / "w.gguf"


def _cut(tmp: Path) -> Path:
    make(1, 2).save(tmp / "full.gguf")
    (tmp / "cut.gguf").write_bytes((tmp / "full.gguf").read_bytes()[:-20])
    return tmp / "cut.gguf"


def _text(tmp: Path) -> Path:
    (tmp / "t.safetensors").write_text("hello")
    return tmp / "t.safetensors"


def _mixed(tmp: Path) -> Path:
    from safetensors.numpy import save_file

    rows = np.ones(4, np.float32)
    save_file({"direction.1": rows, "mlp_out.2": rows}, tmp / "x.safetensors")
    return tmp / "x.safetensors"


def _complex(tmp: Path) -> Path:
    np.save(tmp / "c.npy", np.ones((2, 4), np.complex64))
    return tmp / "c.npy"


def _huge(tmp: Path) -> Path:
    np.save(tmp / "h.npy", np.full((2, 4), 1e300))
    return tmp / "h.npy"


def _huge_tensor(tmp: Path) -> Path:
    from safetensors.numpy import save_file

    save_file({"direction.1": np.full(4, 1e300)}, tmp / "h.safetensors")
    return tmp / "h.safetensors"


def _flat(tmp: Path) -> Path:
    np.save(tmp / "f.npy", np.ones(4))
    return tmp / "f.npy"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_nan, "layer 2 has numbers that are not finite"),
        (_model, "is a model .* a vector is needed"),
        (_widths, "layer 2 has shape"),
        (_cut, "cut.gguf"),
        (_text, "not a safetensors file"),
        (_mixed, r"x.safetensors mixes direction.1 and mlp_out.2"),
        (_complex, "c.npy has numbers of type complex64, which are not real"),
        (_huge, "layer 0 has numbers that are not finite"),
        (_huge_tensor, "layer 1 has numbers that are not finite"),
        (_flat, r"shape \(4,\)"),
        (lambda tmp: tmp / "gone.gguf", "there is no file"),
    ],
)
def test_damaged_files_are_one_clear_line(tmp_path: Path, damage: object, message: str) -> None:
    with pytest.raises(MiaError, match=message) as err:
        load(damage(tmp_path))  # type: ignore[operator]
    assert "\n" not in str(err.value)


def test_nan_in_safetensors_is_a_file_error(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"direction.1": np.array([1, np.inf], np.float32)}, tmp_path / "v.safetensors")
    with pytest.raises(FileError, match="not finite"):
        load(tmp_path / "v.safetensors")
