"""The boundary to llama.cpp: layouts, tensors, stored types, graphs that come unexpected."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from reference import check, check_same
from tiny import Tiny
from tiny_gguf import write_tiny

from mia.edits import Edit
from mia.engine.session import Session, Variant
from mia.engine.visits import Visits
from mia.errors import EngineError, ModelError
from mia.llama import ggml
from mia.llama.ggml import (
    Context,
    LlamaModel,
    Tracer,
    dequantize,
    describe,
    file_tensors,
    library,
    library_info,
    read_array,
    rows_of,
    type_bytes,
)
from mia.request import Capture, Request
from mia.sites import Site

# -- the library ----------------------------------------------------------------------------------


def test_another_layout_of_tensors_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(ggml._Tensor._fields_)

    def check_with(changed: list[Any]) -> None:
        other = type("Other", (ctypes.Structure,), {"_fields_": tuple(changed)})
        monkeypatch.setattr(ggml, "_Tensor", other)
        library()._check_layout()

    check_with(fields)
    names = [name for name, _ in fields]
    swapped = [*fields]
    a, b = names.index("ne"), names.index("nb")
    swapped[a], swapped[b] = swapped[b], swapped[a]
    src = names.index("src")
    longer = [*fields[:src], ("more", ctypes.c_void_p * 2), *fields[src:]]
    for changed in (swapped, longer, fields[1:]):
        with pytest.raises(
            EngineError, match="lays out its tensors in a way that mia does not know"
        ):
            check_with(changed)


def test_a_library_without_a_function_is_noticed() -> None:
    empty = object.__new__(ggml._Library)
    empty.version, empty.base = "0.0.1", SimpleNamespace()
    with pytest.raises(
        EngineError, match=r"0\.0\.1 does not export ggml_backend_tensor_get; mia needs"
    ):
        empty._declare()


def test_what_the_library_says_of_itself() -> None:
    info = library_info()
    assert info["llama_cpp_python"].startswith("0.3.")
    assert info["gpu"] in ("yes", "no")
    assert "=" in info["features"]


def test_errors_of_the_library_are_told_once() -> None:
    lib = library()
    lib.last_error()
    lib._on_log(2, b"chatter\n", None)
    lib._on_log(4, b"trouble\n", None)
    lib._on_log(4, b"more\n", None)
    assert lib.last_error() == "trouble; more"
    assert lib.last_error() == ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_there_is_one_ggml_in_the_process() -> None:
    """Wheels hold copies of libggml-base under three names; a second one has a log of its own."""
    library()
    maps = Path("/proc/self/maps").read_text().split()
    assert len({word for word in maps if "libggml-base" in word}) == 1


@pytest.mark.parametrize("kept", [100, 20_000, -1])
def test_a_file_that_the_library_cannot_load(llama: Tiny, tmp_path: Path, kept: int) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(llama.path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"llama.cpp cannot load .*short\.gguf: \S+"):
        LlamaModel(short)


# -- tensors of files ---------------------------------------------------------------------------------


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
        file_tensors(other)


# -- tensors of graphs ----------------------------------------------------------------------------------


def test_a_tensor_is_described_and_read(llama: Tiny) -> None:
    t = llama.model.topology
    product = next(n for n in t.nodes if n.op == "MUL_MAT")
    again = describe(product.addr)
    assert (again.name, again.op, again.src) == (product.name, product.op, product.src)
    weight = t.node(product.src[0])
    assert (weight.op, weight.type) == ("NONE", "f32")
    assert weight.shape == tuple(weight.ne[1::-1])
    stored = llama.oracle.weights[weight.name]
    np.testing.assert_array_equal(read_array(weight.addr)[0, 0], stored.astype(np.float32))
    copy = read_array(weight.addr)
    copy[:] = 0
    np.testing.assert_array_equal(read_array(weight.addr)[0, 0], stored.astype(np.float32))
    norm = next(n for n in t.nodes if n.op == "RMS_NORM")
    assert norm.param_f32(0) == np.float32(1e-5)


def test_a_tensor_off_the_host_is_copied_and_sent_back(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: every edit and capture by way of ggml's get and set."""
    prompt, v = llama.prompt(), llama.vector()
    q = llama.vector("q.1")[:16]
    edits = [Edit("mlp_out.0", "add", v, tokens=[2, 5]), Edit("q.1", "replace", q, heads=[1, 4])]
    everything = Capture(list(llama.model.topology.sites))
    request = Request(
        prompt, [*edits, Edit("attn_pattern.2", "zero", heads=[0])], [everything], "all"
    )
    monkeypatch.setattr(ggml, "_is_host", lambda t: False)
    check(llama.model.run([request, Request(prompt)])[0], request, llama.oracle)


def test_quantized_tensors_are_not_read_as_floats(tmp_path: Path, reopen: Any) -> None:
    path = write_tiny(tmp_path / "q.gguf", "llama", qtype="Q8_0")
    t = reopen(Tiny("q", path, None)).model.topology  # type: ignore[arg-type]
    weight = next(n.src[0] for n in t.nodes if n.op == "MUL_MAT")
    with pytest.raises(EngineError, match="is not of a float type"):
        read_array(weight)
    with pytest.raises(EngineError, match="is not of a float type"), rows_of(weight, write=False):
        pass


# -- graphs that come unexpected ---------------------------------------------------------------------------


def _spoil(session: Session, how: str, other: Session) -> None:
    first = session.variants[0]
    addrs = first.addrs
    wrong = {
        "first": [addrs[0] + 8, *addrs[1:]],
        "middle": [*addrs[: len(addrs) // 2], 8, *addrs[len(addrs) // 2 + 1 :]],
        "last": [*addrs[:-1], 8],
        "longer": [*addrs, 8, 16],
        "turned": addrs[7:] + addrs[:7],
    }
    if how == "another model's":
        session.variants[:] = list(other.variants)
    elif how == "many":
        session.variants[:] = [Variant([i, *addrs], first.topology) for i in range(8)]
    else:
        session.variants[:] = [Variant(wrong[how], first.topology)]


@pytest.mark.parametrize(
    "how",
    ["first", "middle", "last", "longer", "turned", "another model's", "many"],
)
def test_the_tracer_learns_a_graph_that_it_did_not_expect(
    llama: Tiny, tiny: Any, reopen: Any, how: str
) -> None:
    t, other = reopen(llama), reopen(tiny("gpt2"))
    assert other.model.topology
    v = t.vector()
    edits = [[], [Edit("resid_mid.1", "add", v)], [Edit("mlp_out.2", "add", v, tokens=-1)]]
    requests = [
        Request(
            t.prompt(), e, [Capture(["l_out", "q.1", "attn_pattern"], generated=True)], n_predict=3
        )
        for e in edits
    ]
    t.model.run(requests[:1])
    (session,) = t.model._sessions.values()
    _spoil(session, how, *other.model._sessions.values())
    for request, result in zip(requests, t.model.run(requests), strict=True):
        check(result, request, t.oracle)
    assert len(session.variants) <= 8
    _spoil(session, how, *other.model._sessions.values())
    for request in requests:
        check(t.model.run([request])[0], request, t.oracle)


def test_a_graph_that_never_comes_back_is_given_up(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    request = Request(t.prompt(), captures=[Capture("l_out")])
    want = t.model.run([request])[0]

    def forget(self: Session) -> None:
        first = self.variants[0]
        self.variants = [Variant([0, *first.addrs[1:]], first.topology)]

    with monkeypatch.context() as m:
        m.setattr(Session, "learn", forget)
        (session,) = t.model._sessions.values()
        session.learn()
        with pytest.raises(
            EngineError, match="builds another graph each time; mia cannot follow it"
        ):
            t.model.run([request])
    check_same(t.model.run([request])[0], want)


def test_known_graphs_are_few(llama: Tiny) -> None:
    """Batches of any size, with and without outputs, come as a handful of graphs."""
    for n in (1, 2, 3, 9, 40):
        for logits in (None, "last", "all"):
            llama.model.run(
                [Request(llama.prompt(n), captures=[Capture("l_out-1")], logits=logits)]
            )
    for (callback, _), session in llama.model._sessions.items():
        if callback:
            assert len({id(v.topology) for v in session.variants}) <= 2


# -- decodes that fail ---------------------------------------------------------------------------------------


def test_what_the_library_refuses_is_an_engine_error(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    t.model.run([Request([1, 2, 3], captures=[Capture("embed")])])
    (session,) = t.model._sessions.values()
    context = session.context
    context.clear()
    full = np.arange(256, dtype=np.int32)
    one, none = np.ones(1, np.int32), np.zeros(256, np.int8)
    context.decode(full, full, np.zeros(256, np.int32), none)
    with pytest.raises(EngineError, match="the context of 256 tokens is full"):
        context.decode(one, np.array([256], np.int32), 0 * one, none[:1])
    with pytest.raises(EngineError, match=r"failed to decode \(-1\): .*seq"):
        context.decode(one, np.array([2], np.int32), 0 * one, none[:1])
    with monkeypatch.context() as m:
        m.setattr(context.lib.L, "llama_set_adapter_cvec", lambda *_: -1)
        with pytest.raises(EngineError, match="refuses the control vector"):
            context.set_control_vector(np.ones((2, 48), np.float32))
    check(t.model.run([Request([1, 2])])[0], Request([1, 2]), t.oracle)


def test_ctrl_c_between_two_nodes_is_not_lost(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no Python frame to raise it in: ctypes would print it and go on."""

    class Wanted(dict[int, Any]):
        def __contains__(self, i: object) -> bool:
            if i == 20:
                signal.raise_signal(signal.SIGINT)
            return super().__contains__(i)

    monkeypatch.setattr(ggml, "_native_watch", lambda: None)
    t = reopen(llama)
    request = Request(t.prompt(), captures=[Capture("l_out")])
    plain = Tracer.expect
    with monkeypatch.context() as m:
        m.setattr(
            Tracer, "expect", lambda self, a, wanted, *rest: plain(self, a, Wanted(wanted), *rest)
        )
        with pytest.raises(KeyboardInterrupt):
            t.model.run([request])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check(t.model.run([request])[0], request, t.oracle)


def test_ctrl_c_at_a_node_is_not_lost(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(llama.prompt(), captures=[Capture("l_out")])
    plain = Visits.visit
    with monkeypatch.context() as m:
        m.setattr(
            Visits,
            "visit",
            lambda self, i, addr: (signal.raise_signal(signal.SIGINT), plain(self, i, addr)),
        )
        with pytest.raises(KeyboardInterrupt):
            llama.model.run([request])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check(llama.model.run([request])[0], request, llama.oracle)


def test_runs_in_another_thread(llama: Tiny) -> None:
    """Signals belong to the main thread; elsewhere a decode does without them."""
    request, results = Request(llama.prompt(), captures=[Capture("l_out")]), []
    worker = threading.Thread(target=lambda: results.extend(llama.model.run([request])))
    worker.start()
    worker.join()
    check(results[0], request, llama.oracle)


def test_a_context_that_cannot_be_is_an_engine_error(
    llama: Tiny, reopen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = reopen(llama)
    monkeypatch.setattr(ggml, "library", library)
    model = t.model._llama
    monkeypatch.setattr(model.lib.L, "llama_init_from_model", lambda *_: None)
    with pytest.raises(EngineError, match="cannot open a context of 256 tokens"):
        t.model.run([Request([1, 2])])
    monkeypatch.undo()
    check(t.model.run([Request([1, 2])])[0], Request([1, 2]), t.oracle)
    assert isinstance(next(iter(t.model._sessions.values())).context, Context)
    assert Site("logits") in t.model.topology.sites


def test_the_registry_and_the_library_know_the_same_cache_types() -> None:
    from mia.models import registry

    assert set(registry.KV_TYPES) == set(ggml.GGML_TYPES)


def test_graphs_with_and_without_outputs_are_both_remembered(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp keeps one of each; going from one to the other is no surprise."""
    tokens = llama.prompt(7)
    silent = Request(tokens, captures=[Capture("l_out-0")], logits=None)
    spoken = Request(tokens, captures=[Capture("l_out-0")])
    for request in (silent, spoken):
        llama.model.run([request])
    surprises: list[int] = []
    monkeypatch.setattr(Session, "learn", lambda self: surprises.append(1))
    for request in (silent, spoken, silent, spoken):
        llama.model.run([request])
    assert not surprises


def test_waiting_threads_do_not_spin_for_long() -> None:
    code = "import os; from mia.llama.ggml import library; library(); print(os.environ.get('GOMP_SPINCOUNT'))"
    for given, expected in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ):
        env = {
            k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        out = subprocess.run(
            [sys.executable, "-c", code],
            env=env | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == expected
