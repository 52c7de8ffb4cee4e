"""llama.cpp's shared libraries: loaded once, their functions declared, their structs checked."""

from __future__ import annotations

import ctypes as C
import os
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from mia.errors import EngineError
from mia.llama.interrupts import Held
from mia.llama.watch import native_watch


class Tensor(C.Structure):
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


class TypeTraits(C.Structure):
    _fields_ = (
        ("type_name", C.c_char_p),
        ("blck_size", C.c_int64),
        ("blck_size_interleave", C.c_int64),
        ("type_size", C.c_size_t),
        ("is_quantized", C.c_bool),
        ("to_float", C.c_void_p),
        ("from_float_ref", C.c_void_p),
    )


class InitParams(C.Structure):
    _fields_ = (("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool))


class GgufParams(C.Structure):
    _fields_ = (("no_alloc", C.c_bool), ("ctx", C.c_void_p))


#: `enum ggml_log_level` of ggml.h
_LOG_ERROR, _LOG_CONTINUED = 4, 5
#: what llama.cpp logs of each buffer that a model's weights lie in: "load_tensors: CPU_REPACK model buffer
#: size = 12.34 MiB"
_BUFFER = re.compile(rb"(\S+) +model buffer size = +([\d.]+) MiB")
_MESSAGES = 8
#: `enum ggml_backend_dev_type` of ggml-backend.h: a GPU with memory of its own, or the host's
GPUS = 1, 2


class Library:
    """llama.cpp's two libraries, loaded once, checked once."""

    def __init__(self) -> None:
        # GNU's OpenMP lets a waiting thread spin for milliseconds by default. Where another program
        # wants the processor, that makes every barrier of every node wait for it: decodes took 4 to
        # 19 times as long in a measured case. A short spin costs an idle machine nothing.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")
        try:
            import llama_cpp
            from llama_cpp import _ctypes_extensions, llama_cpp as L
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
        self._log_goes_on = False
        #: bytes of the weights of the model that was loaded last, by the name of the buffer
        self.weight_buffers: dict[str, int] = {}
        #: threads that are inside the library, and all that ever were
        self.at_work: set[int] = set()
        self._users: set[int] = set()
        #: whether the process ends
        self.exiting = False
        #: the most threads that the library has started, and whether a device is in use
        self._threads, self._on_device = 1, False
        #: why a forked child cannot use the library, with how many threads
        self._forked_at_work, self._forked_threads = False, 0
        # llama.cpp prints pages while it loads; errors are kept for our own message
        self._log = L.llama_log_callback(self._on_log)
        with Held():
            L.llama_log_set(self._log, C.c_void_p(0))
            L.llama_backend_init()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

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
        fn("ggml_backend_dev_by_type", p, C.c_int)
        fn("ggml_backend_reg_count", size)
        fn("ggml_backend_reg_get", p, size)
        fn("ggml_backend_reg_name", C.c_char_p, p)
        fn("ggml_nbytes", size, p)
        fn("ggml_op_desc", C.c_char_p, p)
        fn("ggml_type_name", C.c_char_p, C.c_int)
        fn("ggml_get_type_traits", C.POINTER(TypeTraits), C.c_int)
        fn("ggml_init", p, InitParams)
        fn("ggml_free", None, p)
        fn("ggml_new_tensor_2d", p, p, C.c_int, C.c_int64, C.c_int64)
        fn("ggml_mul_mat", p, p, p, p)
        fn("ggml_set_name", p, p, C.c_char_p)
        fn("ggml_view_1d", p, p, p, C.c_int64, size)
        fn("ggml_quantize_requires_imatrix", C.c_bool, C.c_int)
        fn(
            "ggml_quantize_chunk", size,
            C.c_int, C.POINTER(C.c_float), p, C.c_int64, C.c_int64, C.c_int64, p,
        )  # fmt: skip
        fn("gguf_init_from_file", p, C.c_char_p, GgufParams)
        fn("gguf_free", None, p)
        fn("gguf_get_n_kv", C.c_int64, p)
        fn("gguf_get_key", C.c_char_p, p, C.c_int64)
        fn("gguf_get_kv_type", C.c_int, p, C.c_int64)
        fn("gguf_get_val_str", C.c_char_p, p, C.c_int64)

    def _check_layout(self) -> None:
        """Builds three tensors of known shape and reads every field back."""
        b = self.base
        ctx = b.ggml_init(InitParams(1 << 16, None, False))
        try:
            w = b.ggml_new_tensor_2d(ctx, 0, 3, 5)
            x = b.ggml_new_tensor_2d(ctx, 0, 3, 7)
            y = b.ggml_mul_mat(ctx, w, x)
            v = b.ggml_view_1d(ctx, x, 4, 8)
            b.ggml_set_name(y, b"mia-layout-check")
            t, tx, tv = (Tensor.from_address(a) for a in (y, x, v))
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

    # -- calls that take long or come back into Python ---------------------------------------

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        threads: int = 1,
        device: bool = False,
        stop: Callable[[BaseException], None] | None = None,
        wrap: Callable[[Any], Any] = lambda result: result,
    ) -> Any:
        """Calls a function of the library that may come back into Python: every function that logs.

        Args:
            threads: how many it computes with; device: whether a GPU computes.
            stop: told of a Ctrl-C at once, so that the library can be made to end early.
            wrap: takes what is returned into care before a Ctrl-C is raised.

        Raises:
            EngineError: this is a forked process that cannot use the library.
        """
        self._check_process(threads)
        self._threads = max(self._threads, threads)
        self._on_device |= device
        thread = threading.get_ident()
        outermost = thread not in self.at_work
        self.at_work.add(thread)  # before it asks, so that the end of the process sees it
        self._users.add(thread)
        if outermost and self.exiting and threading.current_thread() is not threading.main_thread():
            self.at_work.discard(thread)
            threading.Event().wait()  # a daemon, which ends with the process
        if outermost:
            self._messages.clear()  # what is said from here on is about this call
        try:
            with Held(stop):
                return wrap(function(*args))
        finally:
            if outermost:
                self.at_work.discard(thread)

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU; `llama_supports_gpu_offload` says so of a build with RPC too."""
        return any(self.base.ggml_backend_dev_by_type(kind) for kind in GPUS)

    def used_by_others(self) -> bool:
        """Whether another living thread has used the library: it may hold pointers of it."""
        living = {t.ident for t in threading.enumerate()}
        return bool(self._users & living - {threading.get_ident()})

    def _after_fork(self) -> None:
        """A child has this one thread only. GNU's OpenMP would wait for the others for ever, and a
        device does not know the child."""
        if self.at_work or self._on_device:
            self._forked_at_work = True
        if self._threads > 1:
            self._forked_threads = self._threads
        self.at_work.clear()

    def _check_process(self, threads: int) -> None:
        if self._forked_at_work:
            raise EngineError(
                "this process was forked from one in which llama.cpp was at work or used a GPU; "
                'start processes with multiprocessing\'s "spawn" instead'
            )
        if self._forked_threads and threads > 1:
            raise EngineError(
                f"this process was forked from one in which llama.cpp ran {self._forked_threads} "
                "threads, which a fork does not copy: it would wait for them for ever; start "
                'processes with multiprocessing\'s "spawn", or open models in them with one thread'
            )

    # -- what the library says ---------------------------------------------------------------

    def _on_log(self, level: int, text: bytes, _: Any) -> None:
        """Keeps errors. A message may come in pieces; the first has the level."""
        if level == _LOG_CONTINUED:
            if self._log_goes_on and self._messages:
                self._messages[-1] += text.decode(errors="replace")
            return
        if (buffer := _BUFFER.search(text)) is not None:
            self._note_buffer(*buffer.groups())
        self._log_goes_on = level == _LOG_ERROR
        if self._log_goes_on:
            self._messages.append(text.decode(errors="replace"))
            del self._messages[:-_MESSAGES]

    def _note_buffer(self, name: bytes, megabytes: bytes) -> None:
        n, known = int(float(megabytes) * (1 << 20)), self.weight_buffers
        known[name.decode(errors="replace")] = known.get(name.decode(errors="replace"), 0) + n

    def last_error(self) -> str:
        """llama.cpp's complaints since last asked, for a message of ours: one line, without dots
        of progress, and none twice."""
        lines = (" ".join(line.split()) for text in self._messages for line in text.splitlines())
        text = "; ".join(dict.fromkeys(line for line in lines if line.strip(". ")))
        self._messages.clear()
        return text


_loading = threading.Lock()


def library() -> Library:
    """llama.cpp, loaded at first use. Raises `EngineError` if it is missing or too different."""
    with _loading:  # two would each set a log callback, and one would go away
        return _library()


@cache
def _library() -> Library:
    return Library()


def give_back_memory() -> None:
    """Returns to the system what was freed in small pieces, which glibc keeps."""
    trim = getattr(library().base, "malloc_trim", None)
    if trim is not None:
        trim(C.c_size_t(0))


def library_info() -> dict[str, str]:
    """Version, build features, backends and devices of llama.cpp, as `mia doctor` and provenance
    show them."""
    lib = library()
    backends = (lib.base.ggml_backend_reg_get(i) for i in range(lib.base.ggml_backend_reg_count()))
    return {
        "llama_cpp_python": lib.version,
        "features": lib.L.llama_print_system_info().decode().strip(),
        "gpu": "yes" if lib.has_gpu else "no",
        "rpc": "yes" if lib.L.llama_supports_rpc() else "no",
        "backends": ", ".join(lib.base.ggml_backend_reg_name(b).decode() for b in backends),
        "callback": "Python" if native_watch() is None else "compiled",
    }
