"""The one file that knows ctypes: tensors, the eval callback, models and contexts.

llama.cpp's scheduler asks for every node of the graph "do you want to see this
one?" (`ask`), computes up to it where the answer is yes, and calls again with
the node's data in place. `Tracer` answers from a list made beforehand, so a
node that nobody wants costs one comparison, in compiled code where there is
some. What the tracer hands out are plain integers (addresses); `describe` turns
one into a `Node`, `rows_of` into a numpy array that lies in the tensor's own
memory, or in a copy of it on a GPU.

The file is long because nothing outside it may hold a pointer.

Everything that the library holds a pointer to (callbacks, batches, the log
callback) is kept alive by the object that made it.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import importlib.machinery
import os
import signal
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.errors import EngineError, ModelError

F32 = np.float32
Array = npt.NDArray[np.float32]

# no quantized caches: llama.cpp rotates their values, and with them what `kqv_out` shows
GGML_TYPES = {"f32": 0, "f16": 1, "bf16": 30}
_FLAG_COMPUTE = 16


class _Tensor(C.Structure):
    """struct ggml_tensor of ggml.h; `_check_layout` proves it against the library."""

    _fields_ = (
        ("type", C.c_int),
        ("buffer", C.c_void_p),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
        ("op", C.c_int),
        ("op_params", C.c_int32 * 16),
        ("flags", C.c_int32),
        ("src", C.c_void_p * 10),
        ("view_src", C.c_void_p),
        ("view_offs", C.c_size_t),
        ("data", C.c_void_p),
        ("name", C.c_char * 64),
        ("extra", C.c_void_p),
    )


class _TypeTraits(C.Structure):
    _fields_ = (
        ("type_name", C.c_char_p),
        ("blck_size", C.c_int64),
        ("blck_size_interleave", C.c_int64),
        ("type_size", C.c_size_t),
        ("is_quantized", C.c_bool),
        ("to_float", C.c_void_p),
        ("from_float_ref", C.c_void_p),
    )


class _InitParams(C.Structure):
    _fields_ = (("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool))


class _GgufParams(C.Structure):
    _fields_ = (("no_alloc", C.c_bool), ("ctx", C.c_void_p))


_TO_FLOAT = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_int64)


@dataclass(frozen=True, slots=True)
class Node:
    """What a graph node or weight says of itself. `ne` and `nb` as in ggml: innermost first."""

    addr: int
    name: str
    op: str
    type: str
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    src: tuple[int, ...]
    view_src: int
    params: bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Numpy's order, outermost first, leading ones dropped."""
        ne = list(self.ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        return tuple(reversed(ne))

    def param_f32(self, index: int) -> float:
        return float(np.frombuffer(self.params, np.float32)[index])


# ---------------------------------------------------------------------------
# the libraries


class _Library:
    """llama.cpp's two libraries, loaded once, checked once."""

    def __init__(self) -> None:
        # GNU's OpenMP lets a waiting thread spin for milliseconds by default. Where another program
        # wants the processor, that makes every barrier of every node wait for it: decodes took 4 to
        # 19 times as long in a measured case. A short spin costs an idle machine nothing.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            import llama_cpp
            from llama_cpp import _ctypes_extensions
            from llama_cpp import llama_cpp as L
        except (ImportError, OSError, RuntimeError) as err:
            raise EngineError(f"llama-cpp-python cannot be loaded: {err}") from err
        self.version: str = llama_cpp.__version__
        self.L: Any = L
        # through libllama's own handle, which finds what it was linked with: its folder holds copies of
        # ggml-base under other names, and loading one of these gives a second ggml with its own state
        self.base: Any = C.CDLL(L._lib._name)
        if not hasattr(self.base, "ggml_backend_tensor_get"):  # Windows looks into one file only
            folder = Path(llama_cpp.__file__).parent / "lib"
            try:
                self.base = _ctypes_extensions.load_shared_library("ggml-base", folder)
            except (FileNotFoundError, RuntimeError) as err:
                raise EngineError(
                    f"llama-cpp-python {self.version} has no ggml-base library beside it: {err}"
                ) from err
        self._declare()
        self._check_layout()
        self._messages: list[str] = []
        # llama.cpp prints pages while it loads; errors are kept for our own message
        self._log = L.llama_log_callback(self._on_log)
        L.llama_log_set(self._log, C.c_void_p(0))
        L.llama_backend_init()

    def _declare(self) -> None:
        def fn(name: str, result: Any, *args: Any) -> None:
            try:
                f = getattr(self.base, name)
            except AttributeError as err:
                raise EngineError(
                    f"llama-cpp-python {self.version} does not export {name}; "
                    "mia needs 0.3.36 or a later 0.3"
                ) from err
            f.restype, f.argtypes = result, list(args)

        p, size = C.c_void_p, C.c_size_t
        fn("ggml_backend_tensor_get", None, p, p, size, size)
        fn("ggml_backend_tensor_set", None, p, p, size, size)
        fn("ggml_backend_buffer_is_host", C.c_bool, p)
        fn("ggml_backend_buffer_name", C.c_char_p, p)
        fn("ggml_nbytes", size, p)
        fn("ggml_op_desc", C.c_char_p, p)
        fn("ggml_type_name", C.c_char_p, C.c_int)
        fn("ggml_get_type_traits", C.POINTER(_TypeTraits), C.c_int)
        fn("ggml_init", p, _InitParams)
        fn("ggml_free", None, p)
        fn("ggml_new_tensor_2d", p, p, C.c_int, C.c_int64, C.c_int64)
        fn("ggml_mul_mat", p, p, p, p)
        fn("ggml_set_name", p, p, C.c_char_p)
        fn("ggml_view_1d", p, p, p, C.c_int64, size)
        fn("gguf_init_from_file", p, C.c_char_p, _GgufParams)
        fn("gguf_free", None, p)
        fn("gguf_get_data_offset", size, p)
        fn("gguf_get_n_tensors", C.c_int64, p)
        fn("gguf_get_tensor_name", C.c_char_p, p, C.c_int64)
        fn("gguf_get_tensor_offset", size, p, C.c_int64)
        fn("gguf_get_tensor_type", C.c_int, p, C.c_int64)
        fn("gguf_get_tensor_ne", C.POINTER(C.c_int64), p, C.c_int64)
        fn("gguf_get_n_kv", C.c_int64, p)
        fn("gguf_get_key", C.c_char_p, p, C.c_int64)
        fn("gguf_get_kv_type", C.c_int, p, C.c_int64)
        fn("gguf_get_val_str", C.c_char_p, p, C.c_int64)

    def _check_layout(self) -> None:
        """Builds three tensors of known shape and reads every field back."""
        b = self.base
        ctx = b.ggml_init(_InitParams(1 << 16, None, False))
        try:
            w = b.ggml_new_tensor_2d(ctx, 0, 3, 5)
            x = b.ggml_new_tensor_2d(ctx, 0, 3, 7)
            y = b.ggml_mul_mat(ctx, w, x)
            v = b.ggml_view_1d(ctx, x, 4, 8)
            b.ggml_set_name(y, b"mia-layout-check")
            t, tx, tv = (_Tensor.from_address(a) for a in (y, x, v))
            ok = (
                t.name == b"mia-layout-check"
                and list(t.ne) == [5, 7, 1, 1]
                and list(t.nb) == [4, 20, 140, 140]
                and (t.src[0], t.src[1], t.src[2]) == (w, x, None)
                and b.ggml_op_desc(y) == b"MUL_MAT"
                and tv.view_src == x
                and tv.view_offs == 8
                and tv.data == tx.data + 8
                and b.ggml_nbytes(x) == 84
            )
        finally:
            b.ggml_free(ctx)
        if not ok:
            raise EngineError(
                f"llama-cpp-python {self.version} lays out its tensors in a way that mia does not "
                "know; install llama-cpp-python 0.3.36"
            )

    def _on_log(self, level: int, text: bytes, _: Any) -> None:
        if level >= 4:  # GGML_LOG_LEVEL_ERROR
            self._messages.append(text.decode(errors="replace").strip())
            del self._messages[:-8]

    def last_error(self) -> str:
        """llama.cpp's complaints since last asked, for a message of ours."""
        text = "; ".join(self._messages)
        self._messages.clear()
        return text


@cache
def library() -> _Library:
    """llama.cpp, loaded at first use. Raises `EngineError` where it is missing or too different."""
    return _Library()


def library_info() -> dict[str, str]:
    """Version, build features and devices of llama.cpp, as `mia doctor` and provenance show them."""
    lib = library()
    return {
        "llama_cpp_python": lib.version,
        "features": lib.L.llama_print_system_info().decode().strip(),
        "gpu": "yes" if lib.L.llama_supports_gpu_offload() else "no",
        "callback": "Python" if _native_watch() is None else "compiled",
    }


# ---------------------------------------------------------------------------
# tensors


def describe(addr: int) -> Node:
    """Reads the tensor at `addr`."""
    t = _Tensor.from_address(addr)
    base = library().base
    return Node(
        addr=addr,
        name=t.name.decode(errors="replace"),
        op=base.ggml_op_desc(addr).decode(),
        type=base.ggml_type_name(t.type).decode(),
        ne=tuple(t.ne),
        nb=tuple(t.nb),
        src=tuple(s for s in t.src if s),
        view_src=t.view_src or 0,
        params=bytes(t.op_params),
    )


class _Memory:
    """Lets numpy see foreign memory without copying it."""

    def __init__(
        self, addr: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, kind: str
    ):
        self.__array_interface__ = {
            "data": (addr, False),
            "shape": shape,
            "strides": strides,
            "typestr": kind,
            "version": 3,
        }


def _is_host(t: _Tensor) -> bool:
    return bool(t.buffer) and bool(library().base.ggml_backend_buffer_is_host(t.buffer))


_KINDS = {0: "<f4", 1: "<f2", 26: "<i4", 27: "<i8"}


_HEADER = _Tensor.op.offset  # type, buffer, ne and nb: what an array's shape hangs on
_views: dict[int, tuple[bytes, int, npt.NDArray[Any]]] = {}


def host_array(addr: int) -> npt.NDArray[Any] | None:
    """The tensor as an array over its own memory (outermost axis first, 4 axes), or None
    where it lies on a device or is quantized.

    A reused graph shows the same tensors at every token, so the arrays are kept.
    """
    header = C.string_at(addr, _HEADER)
    data = C.c_void_p.from_address(addr + _Tensor.data.offset).value or 0
    known = _views.get(addr)
    if known is not None and known[0] == header and known[1] == data:
        return known[2]
    t = _Tensor.from_address(addr)
    kind = _KINDS.get(t.type)
    if kind is None or not _is_host(t):
        return None
    ne, nb = tuple(t.ne), tuple(t.nb)
    array = np.asarray(_Memory(data, ne[::-1], nb[::-1], kind))
    _views[addr] = (header, data, array)
    return array


def read_array(addr: int) -> npt.NDArray[Any]:
    """A copy of the tensor, wherever it lies. Raises `EngineError` for quantized tensors."""
    host = host_array(addr)
    if host is not None:
        return host.copy()
    t = _Tensor.from_address(addr)
    kind = _KINDS.get(t.type)
    if kind is None:
        raise EngineError(f"tensor {t.name.decode()!r} is not of a float type")
    base = library().base
    raw = np.empty(base.ggml_nbytes(addr), np.uint8)
    base.ggml_backend_tensor_get(addr, raw.ctypes.data, 0, raw.nbytes)
    ne, nb = tuple(t.ne), tuple(t.nb)
    return np.ndarray(ne[::-1], np.dtype(kind), raw, strides=nb[::-1]).copy()


@contextlib.contextmanager
def rows_of(addr: int, *, write: bool) -> Iterator[npt.NDArray[Any]]:
    """The tensor as an array to read, or to change in place when `write`.

    On the host this is the tensor's own memory; on a device a copy, sent back
    at the end when `write`.
    """
    host = host_array(addr)
    if host is not None:
        yield host
        return
    t = _Tensor.from_address(addr)
    kind = _KINDS.get(t.type)
    if kind is None:
        raise EngineError(f"tensor {t.name.decode()!r} is not of a float type")
    base = library().base
    raw = np.empty(base.ggml_nbytes(addr), np.uint8)
    base.ggml_backend_tensor_get(addr, raw.ctypes.data, 0, raw.nbytes)
    yield np.ndarray(tuple(t.ne)[::-1], np.dtype(kind), raw, strides=tuple(t.nb)[::-1])
    if write:
        base.ggml_backend_tensor_set(addr, raw.ctypes.data, 0, raw.nbytes)


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of a GGUF file: where its bytes begin, ggml's type, `ne` innermost first."""

    name: str
    offset: int
    type: int
    ne: tuple[int, ...]


def file_tensors(path: Path) -> list[FileTensor]:
    """The tensor table of a GGUF file. Raises `ModelError` where it cannot be read."""
    base = library().base
    ctx = base.gguf_init_from_file(str(path).encode(), _GgufParams(True, None))
    if not ctx:
        raise ModelError(f"{path} cannot be read as GGUF: {library().last_error()}")
    try:
        start = base.gguf_get_data_offset(ctx)
        return [
            FileTensor(
                base.gguf_get_tensor_name(ctx, i).decode(),
                start + base.gguf_get_tensor_offset(ctx, i),
                base.gguf_get_tensor_type(ctx, i),
                tuple(base.gguf_get_tensor_ne(ctx, i)[:4]),
            )
            for i in range(base.gguf_get_n_tensors(ctx))
        ]
    finally:
        base.gguf_free(ctx)


def file_strings(path: Path) -> dict[str, str]:
    """The key-value pairs of a GGUF file that are texts. Raises `ModelError` where it cannot be read."""
    base = library().base
    ctx = base.gguf_init_from_file(str(path).encode(), _GgufParams(True, None))
    if not ctx:
        raise ModelError(f"{path} cannot be read as GGUF: {library().last_error()}")
    try:
        return {
            base.gguf_get_key(ctx, i).decode(): base.gguf_get_val_str(ctx, i).decode(
                errors="replace"
            )
            for i in range(base.gguf_get_n_kv(ctx))
            if base.gguf_get_kv_type(ctx, i) == 8
        }
    finally:
        base.gguf_free(ctx)


def dequantize(source: int, ggml_type: int, n_rows: int, n_in: int) -> Array:
    """`n_rows` rows of `n_in` values stored at address `source` as `ggml_type`, as float32."""
    out = np.empty((n_rows, n_in), F32)
    if ggml_type == 0:
        C.memmove(out.ctypes.data, source, out.nbytes)
        return out
    traits = library().base.ggml_get_type_traits(ggml_type).contents
    if not traits.to_float:
        raise EngineError(f"ggml type {traits.type_name.decode()} cannot be converted to float")
    _TO_FLOAT(traits.to_float)(source, out.ctypes.data, n_rows * n_in)
    return out


def type_bytes(ggml_type: int, n: int) -> int:
    """Bytes that `n` values of a ggml type take."""
    traits = library().base.ggml_get_type_traits(ggml_type).contents
    return int(n // traits.blck_size * traits.type_size)


# ---------------------------------------------------------------------------
# the callback


class _Watch(C.Structure):
    """What mia/_watch.c works on."""

    _fields_ = (
        ("index", C.c_int64),
        ("n", C.c_int64),
        ("addrs", C.c_void_p),
        ("wanted", C.c_void_p),
        ("python", C.c_void_p),
    )


_ASK_PYTHON = 2  # in `_Watch.wanted`


@cache
def _native_watch() -> C.CDLL | None:
    """mia/_watch.c as setuptools has built it; None where there was no compiler, and with
    MIA_NATIVE=0, by which one can see whether it is to blame for something."""
    if os.environ.get("MIA_NATIVE") == "0":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        built = Path(__file__).with_name(f"_watch{suffix}")
        if built.is_file():
            with contextlib.suppress(OSError, ValueError):  # not for this machine, or an old one
                watch = C.CDLL(str(built))
                if C.c_int64.in_dll(watch, "mia_watch_size").value == C.sizeof(_Watch):
                    return watch
    return None


class Tracer:
    """Answers the scheduler while one decode runs.

    The caller gives what it expects: the nodes' addresses in graph order, and which of
    them are wanted. Should another graph come by, nothing more is computed in this
    decode, every node is recorded in `seen`, and the caller looks at them, makes new
    expectations, and decodes again.

    Compiled code, where there is some, answers the questions about expected nodes; all
    else comes to `_answer`.
    """

    def __init__(self) -> None:
        self.addrs: Sequence[int] = ()
        self.skip: Sequence[int] = ()
        self.wanted: Container[int] = ()
        self.on_data: Callable[[int, int], None] = lambda index, addr: None
        self.seen: list[int] = []
        self.error: BaseException | None = None
        self._index = 0
        self._n = 0
        self._muted: list[int] = []
        watch = _native_watch()
        kind = library().L.ggml_backend_sched_eval_callback
        self._watch: _Watch | None = None
        self._addrs = np.empty(0, np.uint64)
        if watch is None:
            self.callback, self.user_data = kind(self._answer), None
            return
        self._python = kind(self._answer_watch)
        self._watch = _Watch(python=C.cast(self._python, C.c_void_p))
        self.callback = kind(("mia_watch", watch))
        self.user_data = C.addressof(self._watch)

    def expect(
        self,
        addrs: Sequence[int],
        wanted: Mapping[int, object],
        skip: Sequence[int],
        on_data: Callable[[int, int], None],
    ) -> None:
        """`wanted`: indices of the nodes that `on_data(index, address)` is to be called with, once
        they are computed; `skip`: of those that are not to be computed in this decode."""
        if self._watch is not None:
            known = addrs is self.addrs
            self.addrs = ()  # nothing is expected, should Ctrl-C cut this short
            nodes = self._addrs if known else np.array(addrs, np.uint64)
            flags = np.zeros(len(addrs), np.uint8)
            flags[list(wanted)] = 1
            if skip:
                flags[0] = _ASK_PYTHON  # which mutes them then
            self._watch.addrs, self._watch.wanted = nodes.ctypes.data, flags.ctypes.data
            self._addrs, self._flags = nodes, flags  # kept alive
        self.addrs, self.wanted, self.skip, self.on_data = addrs, wanted, skip, on_data

    def begin(self) -> None:
        self._index, self._n, self.error = 0, len(self.addrs), None
        if self._watch is not None:
            self._watch.index, self._watch.n = 0, self._n
        self.seen.clear()

    def end(self) -> bool:
        """True where the graph was the expected one, to the last node."""
        if self._watch is not None:
            self._index = self._watch.index
        for addr in self._muted:
            _Tensor.from_address(addr).flags |= _FLAG_COMPUTE
        self._muted.clear()
        expected = not self.seen and self._index == len(self.addrs)
        if not expected and not self.seen:  # it ended early: these nodes were all
            self.seen.extend(self.addrs[: self._index])
        return expected

    def stop(self, error: BaseException) -> None:
        """Ends the decode at the next node; the error is raised when the library has returned."""
        if self.error is None:
            self.error = error
        self._n = 0
        if self._watch is not None:
            self._watch.n = 0

    def _answer_watch(self, addr: int, ask: bool, _: Any) -> bool:
        watch = self._watch
        assert watch is not None
        self._index = watch.index
        answer = self._answer(addr, ask, None)
        watch.index, watch.n = self._index, self._n
        return answer

    def _answer(self, addr: int, ask: bool, _: Any) -> bool:
        if ask:
            i = self._index
            if i < self._n and self.addrs[i] == addr:
                self._index = i + 1
                if i == 0 and self.skip:
                    for skipped in self.skip:
                        self._mute(self.addrs[skipped])
                return i in self.wanted
            return self._unexpected(addr)
        if self.error is not None:
            return False
        try:
            if not self.seen:
                self.on_data(self._index - 1, addr)
        except BaseException as err:
            self.stop(err)
            return False
        return True

    def _unexpected(self, addr: int) -> bool:
        if self.error is not None:
            return True  # so that we are called with the data, and can say stop
        if not self.seen:
            # the nodes before this one were the expected ones, and are already decided
            self.seen.extend(self.addrs[: self._index])
            self._n = 0
        self.seen.append(addr)
        self._mute(addr)
        return False

    def _mute(self, addr: int) -> None:
        """Takes a node out of this decode: every ggml backend passes over nodes without the flag."""
        t = _Tensor.from_address(addr)
        if t.flags & _FLAG_COMPUTE:
            t.flags &= ~_FLAG_COMPUTE
            self._muted.append(addr)


# ---------------------------------------------------------------------------
# model and context


@dataclass(frozen=True, slots=True)
class ContextParams:
    """What a context is made with. `n_seq` sequences share one cache of `n_ctx` cells."""

    n_ctx: int
    n_ubatch: int
    n_seq: int
    flash: bool
    kv_type: str
    threads: int
    callback: bool


class LlamaModel:
    """A loaded model file and its vocabulary."""

    def __init__(self, path: Path, *, gpu_layers: int = 0, extra_bufts: bool = True):
        self.lib = library()
        L = self.lib.L
        params = L.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = extra_bufts
        self.handle = L.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            why = self.lib.last_error()
            raise ModelError(f"llama.cpp cannot load {path}" + (f": {why}" if why else ""))
        self.vocab = L.llama_model_get_vocab(self.handle)
        self.n_layer = int(L.llama_model_n_layer(self.handle))
        self.n_embd = int(L.llama_model_n_embd(self.handle))
        self.n_head = int(L.llama_model_n_head(self.handle))
        self.n_head_kv = int(L.llama_model_n_head_kv(self.handle))
        self.n_vocab = int(L.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(L.llama_model_n_ctx_train(self.handle))
        # a recurrent state cannot be cut at a position, so prefixes cannot be shared
        self.recurrent = bool(
            L.llama_model_is_recurrent(self.handle) or L.llama_model_is_hybrid(self.handle)
        )
        if L.llama_model_has_encoder(self.handle) or not L.llama_model_has_decoder(self.handle):
            self.close()
            raise ModelError(f"{path} is an encoder model; mia runs decoder-only models")

    def close(self) -> None:
        if self.handle:
            self.lib.L.llama_model_free(self.handle)
            self.handle = None

    def metadata(self) -> dict[str, str]:
        L, out = self.lib.L, {}
        buf = C.create_string_buffer(1 << 16)
        for i in range(L.llama_model_meta_count(self.handle)):
            L.llama_model_meta_key_by_index(self.handle, i, buf, len(buf))
            key = buf.value.decode(errors="replace")
            n = L.llama_model_meta_val_str_by_index(self.handle, i, buf, len(buf))
            if n >= len(buf):
                big = C.create_string_buffer(n + 1)
                L.llama_model_meta_val_str_by_index(self.handle, i, big, len(big))
                out[key] = big.value.decode(errors="replace")
            else:
                out[key] = buf.value.decode(errors="replace")
        return out

    def chat_template(self) -> str | None:
        text = self.lib.L.llama_model_chat_template(self.handle, None)
        return text.decode() if text else None

    def special(self, which: str) -> int:
        """Token id of "bos", "eos", "eot" …, -1 where the vocabulary has none."""
        return int(getattr(self.lib.L, f"llama_vocab_{which}")(self.vocab))

    def add_bos(self) -> bool:
        return bool(self.lib.L.llama_vocab_get_add_bos(self.vocab))

    def is_eog(self, token: int) -> bool:
        return bool(self.lib.L.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids, no BOS or EOS added; `special` reads `<|…|>` as control tokens."""
        raw = text.encode()
        n = len(raw) + 8
        out = (C.c_int32 * n)()
        count = self.lib.L.llama_tokenize(self.vocab, raw, len(raw), out, n, False, special)
        if count < 0:
            n = -count
            out = (C.c_int32 * n)()
            count = self.lib.L.llama_tokenize(self.vocab, raw, len(raw), out, n, False, special)
        return list(out[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, control tokens spelled out."""
        buf = C.create_string_buffer(64)
        n = self.lib.L.llama_token_to_piece(self.vocab, token, buf, len(buf), 0, True)
        if n < 0:
            buf = C.create_string_buffer(-n)
            n = self.lib.L.llama_token_to_piece(self.vocab, token, buf, len(buf), 0, True)
        return buf.raw[:n]

    def vocab_text(self) -> Iterator[bytes]:
        """Every token's text as the file spells it."""
        for i in range(self.n_vocab):
            yield self.lib.L.llama_vocab_get_text(self.vocab, i) or b""


#: names of whole-file types -> llama_ftype
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q4_0": 2,
    "q4_1": 3,
    "q4_k_m": 15,
    "q6_k": 18,
}


def convert_file(source: Path, target: Path, kind: str, threads: int) -> None:
    """llama.cpp's own quantizer: writes `source` with its weights as `kind` (see `FILE_TYPES`).

    To f32 nothing is lost. Raises `EngineError` where llama.cpp refuses.
    """
    lib = library()
    p = lib.L.llama_model_quantize_default_params()
    p.ftype, p.nthread, p.allow_requantize = FILE_TYPES[kind], threads, True
    if lib.L.llama_model_quantize(str(source).encode(), str(target).encode(), C.byref(p)) != 0:
        raise EngineError(f"llama.cpp cannot convert {source} to {kind}: {lib.last_error()}")


class Context:
    """A KV cache and the compute buffers. One `decode` is one micro-batch, so that the rows
    of every node are the rows of the batch, in order."""

    def __init__(self, model: LlamaModel, params: ContextParams):
        self.model, self.params, self.lib = model, params, model.lib
        L = self.lib.L
        p = L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = params.n_ctx, params.n_ubatch, params.n_ubatch
        p.n_seq_max = params.n_seq
        p.n_threads = p.n_threads_batch = params.threads
        p.flash_attn_type = 1 if params.flash else 0
        p.type_k = p.type_v = GGML_TYPES[params.kv_type]
        p.kv_unified = True
        p.swa_full = True  # a sliding window that was cut cannot serve another suffix
        p.no_perf = True
        self.tracer = Tracer() if params.callback else None
        if self.tracer is not None:
            p.cb_eval = self.tracer.callback
            p.cb_eval_user_data = self.tracer.user_data
        self.handle = L.llama_init_from_model(model.handle, p)
        if not self.handle:
            why = self.lib.last_error()
            raise EngineError(f"llama.cpp cannot open a context of {params.n_ctx} tokens: {why}")
        self.memory = L.llama_get_memory(self.handle)
        self.n_ctx = int(L.llama_n_ctx(self.handle))
        self._n_outputs = 0
        self._directions: Array | None = None
        self._logits: tuple[int, Array] = (0, np.empty((0, 0), F32))
        self._make_batch(params.n_ubatch)

    def _make_batch(self, n: int) -> None:
        """One batch that every decode fills anew: making its pointers takes longer than that."""
        L = self.lib.L
        self._tokens, self._positions, self._seqs = (np.zeros(n, np.int32) for _ in range(3))
        self._outputs = np.zeros(n, np.int8)
        self._one = np.ones(n, np.int32)  # how many sequences each row belongs to
        self._seq_lists = self._seqs.ctypes.data + np.arange(n, dtype=np.uintp) * 4

        def ptr(a: npt.NDArray[Any], kind: Any) -> Any:
            return C.cast(a.ctypes.data, C.POINTER(kind))

        self._batch = L.llama_batch(
            n,
            ptr(self._tokens, C.c_int32),
            None,
            ptr(self._positions, C.c_int32),
            ptr(self._one, C.c_int32),
            ptr(self._seq_lists, C.POINTER(C.c_int32)),
            ptr(self._outputs, C.c_int8),
        )

    def close(self) -> None:
        if self.handle:
            self.lib.L.llama_free(self.handle)
            self.handle = None
            self._logits = 0, np.empty((0, 0), F32)
            _views.clear()

    def clear(self, data: bool = False) -> None:
        """Forgets all cells; `data` also overwrites with zeros what they held."""
        self.lib.L.llama_memory_clear(self.memory, data)

    def seq_cp(self, src: int, dst: int, end: int) -> None:
        """Sequence `dst` gets the cells of `src` at positions 0 to end-1; nothing is copied."""
        self.lib.L.llama_memory_seq_cp(self.memory, src, dst, 0, end)

    def seq_rm(self, seq: int, start: int = 0) -> bool:
        return bool(self.lib.L.llama_memory_seq_rm(self.memory, seq, start, -1))

    def set_control_vector(self, directions: Array | None) -> None:
        """`directions`: (n_layer - 1, n_embd), added at the end of blocks 1 …; None takes it off.

        It stays until the next call: llama.cpp plans its buffers anew at every change.
        """
        L, n_embd = self.lib.L, self.model.n_embd
        if directions is not None and not directions.any():
            directions = None
        last = self._directions
        if last is directions or (
            last is not None and directions is not None and np.array_equal(last, directions)
        ):
            return
        self._directions = np.full((1, 1), np.nan, F32)  # equals nothing, should this be cut short
        if directions is None:
            L.llama_set_adapter_cvec(self.handle, None, 0, n_embd, -1, -1)
            self._directions = None
            return
        data = np.array(directions, F32)
        pointer = data.ctypes.data_as(C.POINTER(C.c_float))
        # each block in the range gets an addition, whether there is something to add or not
        used = np.flatnonzero(data.any(1)) + 1
        size, ends = data.size, (int(used[0]), int(used[-1]))
        if L.llama_set_adapter_cvec(self.handle, pointer, size, n_embd, *ends) != 0:
            raise EngineError(f"llama.cpp refuses the control vector: {self.lib.last_error()}")
        self._directions = data

    def decode(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        positions: Sequence[int] | npt.NDArray[np.integer[Any]],
        seqs: Sequence[int] | npt.NDArray[np.integer[Any]],
        outputs: Sequence[bool] | npt.NDArray[np.integer[Any]],
    ) -> bool:
        """Runs one micro-batch: for each row its token, position, sequence, and whether its logits
        are wanted. False where the graph was not the expected one (see `Tracer`):
        nothing was computed, the caller looks at `tracer.seen` and decodes again.

        Raises `EngineError` where llama.cpp fails, and what the callback's code raised.
        """
        n = len(tokens)
        if n > len(self._tokens):
            raise EngineError(f"{n} rows are more than the {len(self._tokens)} of a micro-batch")
        self._tokens[:n], self._positions[:n] = tokens, positions
        self._seqs[:n], self._outputs[:n] = seqs, outputs
        L, batch = self.lib.L, self._batch
        batch.n_tokens = n
        self._n_outputs = int(np.count_nonzero(self._outputs[:n]))
        tracer, expected = self.tracer, True
        if tracer is None:
            code = L.llama_decode(self.handle, batch)
        else:
            tracer.begin()
            with _interrupt_to(tracer.stop):
                code = L.llama_decode(self.handle, batch)
            expected = tracer.end()
            if tracer.error is not None:
                raise tracer.error
        if code == 1:
            raise EngineError(f"the context of {self.n_ctx} tokens is full")
        if code != 0:
            raise EngineError(f"llama.cpp failed to decode ({code}): {self.lib.last_error()}")
        return expected

    def logits(self) -> Array:
        """(n_outputs, n_vocab) of the last decode, in batch order; valid until the next one."""
        p = self.lib.L.llama_get_logits(self.handle)
        addr = C.cast(p, C.c_void_p).value
        if not addr:
            raise EngineError("llama.cpp gave no logits")
        known, array = self._logits
        if known != addr or len(array) != self._n_outputs:
            shape = (self._n_outputs, self.model.n_vocab)
            array = np.asarray(_Memory(addr, shape, None, "<f4"))
            self._logits = addr, array
        return array


@contextlib.contextmanager
def _interrupt_to(stop: Callable[[BaseException], None]) -> Iterator[None]:
    """Ctrl-C during a decode must not become an exception inside a C callback, which Python
    can only print: it ends the decode, and is raised after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.getsignal(signal.SIGINT)
    if old is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: stop(KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


class Sampler:
    """llama.cpp's own sampler chain: penalties, top-k, top-p, min-p, temperature, seed."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        frequency_penalty: float,
        presence_penalty: float,
        seed: int,
    ):
        L = self.L = model.lib.L
        self.chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            L.llama_sampler_chain_add(self.chain, sampler)

        if (repeat_penalty, frequency_penalty, presence_penalty) != (1.0, 0.0, 0.0):
            add(
                L.llama_sampler_init_penalties(
                    model.n_vocab, 64, repeat_penalty, frequency_penalty, presence_penalty
                )
            )
        if temperature <= 0:
            add(L.llama_sampler_init_greedy())
        else:
            if top_k > 0:
                add(L.llama_sampler_init_top_k(top_k))
            if top_p < 1:
                add(L.llama_sampler_init_top_p(top_p, 1))
            if min_p > 0:
                add(L.llama_sampler_init_min_p(min_p, 1))
            add(L.llama_sampler_init_temp(temperature))
            add(L.llama_sampler_init_dist(seed))

    def accept(self, token: int) -> None:
        self.L.llama_sampler_accept(self.chain, token)

    def sample(self, context: Context, row: int) -> int:
        """Samples from the logits of batch row `row`, and remembers the token."""
        return int(self.L.llama_sampler_sample(self.chain, context.handle, row))

    def close(self) -> None:
        if self.chain:
            self.L.llama_sampler_free(self.chain)
            self.chain = None
