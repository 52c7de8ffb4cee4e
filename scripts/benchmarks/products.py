"""The `products` group: how fast ggml multiplies matrices of each type on this machine, on one thread,
beside numpy's BLAS and others.

`rows @ W.T` with W of smollm2's MLP and of a 1B Llama's, at the numbers of rows that sweeps have. ggml's
products are those of the library that mia runs on, in its plain buffers (no repacking, no AMX).
"""

from __future__ import annotations

import ctypes as C
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.harness import ONE_THREAD, Bench

#: ggml's types, by their numbers
TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q4_k": 12}
_LONG_BLOCKS = ("q4_k",)
#: n_in, n_out
SHAPES = ((576, 1536), (2048, 8192))
ROWS = (45, 128, 300)
_SECONDS = 0.3


def products(bench: Bench, libraries: Sequence[Path]) -> None:
    argv = [sys.executable, "-m", "benchmarks.products", str(bench.rounds), *map(str, libraries)]
    env = {**os.environ, **ONE_THREAD}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=env, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            what, values = json.loads(line)
            bench.add(what, values, unit="")
    if child.returncode:
        raise SystemExit(f"bench: exit status {child.returncode} from: {' '.join(argv)}")


# -- in the process ------------------------------------------------------------------------------


def main(rounds: int, libraries: Sequence[str]) -> None:
    ggml, rng = Ggml(), np.random.default_rng(0)
    for n_in, n_out in SHAPES:
        w = rng.normal(size=(n_out, n_in)).astype(np.float32)
        for n_rows in ROWS:
            x = rng.normal(size=(n_rows, n_in)).astype(np.float32)
            work = dict(both(ggml, w, x, libraries))
            speed: dict[str, list[float]] = {name: [] for name in work}
            for _ in range(rounds):  # in turns
                for name, product in work.items():
                    speed[name].append(2e-9 * n_rows * n_in * n_out / seconds(product))
            for name, values in speed.items():
                what = f"{name}, {n_rows} rows × ({n_in}, {n_out}), GFLOP/s"
                print(json.dumps([what, values]), flush=True)
            ggml.clear()


def both(
    ggml: Ggml, w: np.ndarray, x: np.ndarray, libraries: Sequence[str]
) -> Iterator[tuple[str, Callable[[], object]]]:
    expected = x @ w.T
    for name, number in TYPES.items():
        if name in _LONG_BLOCKS and w.shape[1] % 256:
            continue
        run, result = ggml.product(number, w, x)
        run()
        off = np.linalg.norm(result - expected) / np.linalg.norm(expected)
        assert off < 0.15, f"{name} is off by {off:.2g}"
        yield f"ggml {name}", run
    out = np.empty_like(expected)
    yield "numpy f32", lambda: np.matmul(x, w.T, out=out)
    for path in libraries:
        yield f"{Path(path).name.split('.')[0]} f32", sgemm(path, w, x, expected)


def sgemm(path: str, w: np.ndarray, x: np.ndarray, expected: np.ndarray) -> Callable[[], object]:
    """The same by a library's cblas_sgemm."""
    function, out = C.CDLL(path).cblas_sgemm, np.zeros_like(expected)
    function.restype = None
    function.argtypes = [*[C.c_int] * 6, C.c_float, C.c_void_p, C.c_int, C.c_void_p, C.c_int]
    function.argtypes += [C.c_float, C.c_void_p, C.c_int]
    n, k, m = len(x), x.shape[1], len(w)

    def run() -> object:  # row by row, x as it is, w transposed
        a, b, c = (array.ctypes.data for array in (x, w, out))
        return function(101, 111, 112, n, m, k, 1.0, a, k, b, k, 0.0, c, m)

    run()
    assert np.allclose(out, expected, atol=1e-2), path
    return run


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, for one call."""
    work()
    times: list[float] = []
    while sum(times) < _SECONDS:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


class Ggml:
    """ggml of llama-cpp-python, with a graph of one product."""

    def __init__(self) -> None:
        from mia.llama.library import InitParams, library

        self._params, base = InitParams, library().base
        p, n = C.c_void_p, C.c_int64
        for name, result, arguments in (
            ("ggml_new_graph", p, [p]),
            ("ggml_build_forward_expand", None, [p, p]),
            ("ggml_get_data", p, [p]),
            ("ggml_nbytes", C.c_size_t, [p]),
            ("ggml_quantize_chunk", C.c_size_t, [C.c_int, p, p, n, n, n, p]),
        ):
            function = getattr(base, name)
            function.restype, function.argtypes = result, arguments
        self._base, self._contexts = base, list[int]()

    def product(
        self, number: int, w: np.ndarray, x: np.ndarray
    ) -> tuple[Callable[[], object], np.ndarray]:
        """What computes x @ w.T with w in a type, and where the result lies."""
        b, (n_out, n_in), n_rows = self._base, w.shape, len(x)
        context = b.ggml_init(self._params(3 * w.nbytes + (64 << 20), None, False))
        self._contexts.append(context)
        stored = b.ggml_new_tensor_2d(context, number, n_in, n_out)
        rows = b.ggml_new_tensor_2d(context, 0, n_in, n_rows)
        C.memmove(b.ggml_get_data(rows), x.ctypes.data, x.nbytes)
        data = b.ggml_get_data(stored)
        if number == 0:
            C.memmove(data, w.ctypes.data, w.nbytes)
        else:
            b.ggml_quantize_chunk(number, w.ctypes.data, data, 0, n_out, n_in, None)
        out, graph = b.ggml_mul_mat(context, stored, rows), b.ggml_new_graph(context)
        b.ggml_build_forward_expand(graph, out)
        numbers = (C.c_float * (n_rows * n_out)).from_address(b.ggml_get_data(out))
        result = np.frombuffer(numbers, np.float32).reshape(n_rows, n_out)
        return _Plan(b, graph).run, result

    def clear(self) -> None:
        while self._contexts:
            self._base.ggml_free(self._contexts.pop())


class _CPlan(C.Structure):
    """struct ggml_cplan of ggml-cpu.h"""

    _fields_ = (
        ("work_size", C.c_size_t),
        ("work_data", C.c_void_p),
        ("n_threads", C.c_int),
        ("threadpool", C.c_void_p),
        ("abort_callback", C.c_void_p),
        ("abort_callback_data", C.c_void_p),
        ("use_ref", C.c_bool),
    )


class _Plan:
    """A graph planned once, for one thread."""

    def __init__(self, base: C.CDLL, graph: int):
        base.ggml_graph_plan.restype = _CPlan
        base.ggml_graph_plan.argtypes = [C.c_void_p, C.c_int, C.c_void_p]
        base.ggml_graph_compute.restype = C.c_int
        base.ggml_graph_compute.argtypes = [C.c_void_p, C.POINTER(_CPlan)]
        self._compute, self._graph = base.ggml_graph_compute, graph
        self._plan = base.ggml_graph_plan(graph, 1, None)
        self._work = C.create_string_buffer(max(int(self._plan.work_size), 1) + 64)
        self._plan.work_data = -(-C.addressof(self._work) // 64) * 64

    def run(self) -> object:
        code = self._compute(self._graph, C.byref(self._plan))
        assert code == 0
        return code


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
