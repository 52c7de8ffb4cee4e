"""The oracle against llama.cpp itself, through the low-level bindings only (no mia)."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lc
import numpy as np
import pytest
from oracle import Oracle
from tiny_gguf import write_tiny

Array = np.ndarray
N_TOKENS = 12
TOLERANCE = 1e-4  # absolute; the worst of 200 seeds at any site is 3.5e-5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "qwen2": ("qwen2", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-window": ("gemma2", {"window": 4}),
    "gpt2": ("gpt2", {}),
    "gpt2-tied": ("gpt2", {"tied": True}),
    "mixtral": ("mixtral", {}),
    "qwen2moe": ("qwen2moe", {}),
    "dots1": ("dots1", {}),
}
# Names of llama.cpp's graph nodes for the sites of layer {i}. A name that several nodes share
# means the last of them: Qcur is named before its bias, before and after rotation.
NODES = {
    "attn_norm": "attn_norm-{i}",
    "q": "Qcur-{i}",
    "k": "Kcur-{i}",
    "v": "Vcur-{i}",
    "attn_pattern": "kq_soft_max-{i}",
    "head_out": "kqv_out-{i}",
    "resid_mid": "ffn_inp-{i}",
    "mlp_norm": "ffn_norm-{i}",
    "mlp_out": "ffn_out-{i}",
    "resid_post": "l_out-{i}",
}
ARCH_NODES = {
    "llama": {"attn_out": "attn_out-{i}"},
    "qwen2": {},  # what attention adds has no name here, nor in gpt2
    "gemma2": {
        "attn_out": "attn_post_norm-{i}",
        "resid_mid": "sa_out-{i}",
        "mlp_out": "ffn_post_norm#{i}",  # named without its layer: the i-th of that name
    },
    "gpt2": {},
    "mixtral": {
        "attn_out": "attn_out-{i}",
        "router": "ffn_moe_logits-{i}",
        "mlp_out": "ffn_moe_out-{i}",
    },
    "qwen2moe": {"router": "ffn_moe_logits-{i}"},
    "dots1": {"router": "ffn_moe_logits-{i}", "router_choice": "ffn_moe_probs_biased-{i}"},
}
FIRST_RESID = {"gemma2": "inp_scaled", "gpt2": "inpL"}  # elsewhere embd


class _Tensor(ctypes.Structure):
    """The head of ggml's `struct ggml_tensor`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )

    def view(self) -> Array:
        """Return the tensor's own memory as a writable float32 array, (ne3, ne2, ne1, ne0)."""
        ne, nb = self.ne[::-1], self.nb[::-1]
        n_bytes = 4 + sum((n - 1) * step for n, step in zip(ne, nb, strict=True))
        memory = (ctypes.c_char * n_bytes).from_address(self.data)
        return np.ndarray(ne, np.float32, memory, strides=nb)


class _Watch:
    """An eval callback that copies float32 nodes by name and overwrites some of them."""

    def __init__(self, overwrite: dict[str, Array]) -> None:
        self.overwrite = overwrite
        self.nodes: dict[str, Array] = {}
        self.unnumbered = 0

    def __call__(self, address: int, ask: bool, _user_data: int | None) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
        if ask or tensor.type != lc.GGML_TYPE_F32:
            return True
        name, x = tensor.name.decode(), tensor.view()
        if name == "ffn_post_norm":
            name = f"ffn_post_norm#{self.unnumbered}"
            self.unnumbered += 1
        if name in self.overwrite:
            _put(x, self.overwrite[name])
        self.nodes[name] = x.copy()
        return True


def _put(x: Array, new: Array) -> None:
    """Write new, in the oracle's shape, into node memory x."""
    if new.ndim == 3:  # (n_tokens, n_head, n_tokens) into (1, n_head, n_tokens, n_kv)
        x[0, :, :, : new.shape[2]] = new.transpose(1, 0, 2)
    else:
        x[...] = new.reshape(x.shape)


def _take(x: Array, like: Array) -> Array:
    """Return node values x in the shape of the oracle's array."""
    if like.ndim == 3:
        return x[0, :, :, : like.shape[2]].transpose(1, 0, 2)
    return x.reshape(like.shape)


def _decode(path: Path, tokens: list[int], watch: _Watch | None = None) -> Array:
    """Run llama.cpp once and return the logits of every token, (n_tokens, n_vocab)."""
    model = lc.llama_model_load_from_file(str(path).encode(), lc.llama_model_default_params())
    assert model
    params = lc.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1  # a watched node costs a barrier of all threads
    params.type_k = params.type_v = lc.GGML_TYPE_F32
    params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if watch is not None:
        params.cb_eval = lc.ggml_backend_sched_eval_callback(watch)
    ctx = lc.llama_init_from_model(model, params)
    assert ctx
    n_vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))
    batch = lc.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    assert lc.llama_decode(ctx, batch) == 0
    logits = np.ctypeslib.as_array(lc.llama_get_logits(ctx), (len(tokens), n_vocab)).copy()
    lc.llama_batch_free(batch)
    lc.llama_free(ctx)
    lc.llama_model_free(model)
    return logits


def _node_names(arch: str, n_layer: int) -> dict[str, str]:
    """Return the node name of every site that has one."""
    names = {"embed": "embd", "resid_pre.0": FIRST_RESID.get(arch, "embd")}
    for i in range(n_layer):
        for site, node in {**NODES, **ARCH_NODES[arch]}.items():
            names[f"{site}.{i}"] = node.format(i=i)
        if i:
            names[f"resid_pre.{i}"] = f"l_out-{i - 1}"
    return {**names, "final_norm": "result_norm", "logits": "result_output"}


def _close(got: Array, want: Array, what: str) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=what)


def _say_nothing(_level: int, _text: bytes, _user_data: int | None) -> None:
    pass


_silent = lc.llama_log_callback(_say_nothing)


def _always(x: Array) -> Callable[[Array], Array]:
    """An edit that puts x in place of what it is given."""
    return lambda _: x


@pytest.fixture(autouse=True, scope="module")
def quiet_llama() -> Iterator[None]:
    """Silence llama.cpp's log for this module, then give it back."""
    before, user_data = lc.llama_log_callback(), ctypes.c_void_p()
    lc.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))
    lc.llama_log_set(_silent, ctypes.c_void_p())
    lc.llama_backend_init()
    yield
    lc.llama_log_set(before, user_data)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, list[int]]:
    """One tiny model and a random prompt: (arch, path, tokens)."""
    arch, options = CASES[request.param]
    path = write_tiny(tmp_path / "tiny.gguf", arch, **options)
    tokens = np.random.default_rng(1).integers(0, 320, N_TOKENS).tolist()
    return arch, path, tokens


def test_logits_are_those_of_llama_cpp(case: tuple[str, Path, list[int]]) -> None:
    _, path, tokens = case
    want = Oracle(path).run(tokens)["logits"]
    assert want.std(axis=0).min() > 0.1  # they tell positions apart
    _close(_decode(path, tokens), want, "logits")


def test_every_named_site_is_llama_cpps(case: tuple[str, Path, list[int]]) -> None:
    arch, path, tokens = case
    oracle, watch = Oracle(path), _Watch({})
    want = oracle.run(tokens)
    _decode(path, tokens, watch)
    for site, node in _node_names(arch, oracle.n_layer).items():
        if site not in want:  # dots1's first block has no experts
            assert site in ("router.0", "router_choice.0")
            continue
        _close(_take(watch.nodes[node], want[site]), want[site], site)
    for i in range(oracle.n_layer):  # what has no name follows from what has
        add = want[f"resid_mid.{i}"] - want[f"resid_pre.{i}"]
        np.testing.assert_allclose(want[f"attn_out.{i}"], add, rtol=0, atol=1e-12)


def test_edits_do_in_llama_cpp_what_they_do_in_the_oracle(
    case: tuple[str, Path, list[int]],
) -> None:
    arch, path, tokens = case
    oracle = Oracle(path)
    plain, names = oracle.run(tokens), _node_names(arch, oracle.n_layer)
    rng = np.random.default_rng(2)
    for site in (key for key in names if key.endswith((".1", "embed", "final_norm"))):
        new = plain[site] * rng.uniform(0.5, 1.5, plain[site].shape)
        want = oracle.run(tokens, {site: _always(new)})["logits"]
        assert np.abs(want - plain["logits"]).max() > 50 * TOLERANCE, site
        got = _decode(path, tokens, _Watch({names[site]: new.astype(np.float32)}))
        _close(got, want, site)


def test_identity_edits_change_nothing(case: tuple[str, Path, list[int]]) -> None:
    _, path, tokens = case
    oracle = Oracle(path)
    plain = oracle.run(tokens)
    edited = oracle.run(tokens, {key: lambda x: x for key in plain})
    assert edited.keys() == plain.keys()
    for key, want in plain.items():
        np.testing.assert_array_equal(edited[key], want, err_msg=key)


def test_an_edit_moves_what_is_downstream_and_nothing_else(tmp_path: Path) -> None:
    oracle = Oracle(write_tiny(tmp_path / "tiny.gguf", "llama"))
    plain = oracle.run(range(9))

    def zero_last(x: Array) -> Array:
        x[-1] = 0.0
        return x

    edited = oracle.run(range(9), {"head_out.1": zero_last})
    moved = {key for key in plain if not np.array_equal(edited[key], plain[key])}
    keys = list(plain)
    assert moved == {*keys[keys.index("head_out.1") :]} | {"head_out.1"}
    for key in moved:  # earlier tokens see nothing of it
        np.testing.assert_array_equal(edited[key][:-1], plain[key][:-1], err_msg=key)
    np.testing.assert_array_equal(edited["head_out.1"][-1], 0.0)
    assert np.abs(edited["logits"][-1] - plain["logits"][-1]).max() > 0.1


def test_two_names_of_one_tensor_are_edited_in_order(tmp_path: Path) -> None:
    oracle = Oracle(write_tiny(tmp_path / "tiny.gguf", "llama"))
    plain = oracle.run(range(5))["resid_post.0"]
    edits = {"resid_pre.1": lambda x: x + 1.0, "resid_post.0": lambda x: x * 2.0}
    edited = oracle.run(range(5), edits)
    np.testing.assert_array_equal(edited["resid_pre.1"], plain * 2.0 + 1.0)
    np.testing.assert_array_equal(edited["resid_post.0"], edited["resid_pre.1"])


def test_lens_of_the_last_layer_is_the_output(case: tuple[str, Path, list[int]]) -> None:
    _, path, tokens = case
    oracle = Oracle(path)
    sites = oracle.run(tokens)
    last = sites[f"resid_post.{oracle.n_layer - 1}"]
    np.testing.assert_array_equal(oracle.lens(last), sites["logits"])


def test_a_wrong_edit_is_refused(tmp_path: Path) -> None:
    oracle = Oracle(write_tiny(tmp_path / "tiny.gguf", "gpt2"))
    with pytest.raises(KeyError, match=r"no such site: q\.9"):
        oracle.run([1, 2], {"q.9": lambda x: x})
    with pytest.raises(ValueError, match=r"'q\.0': \(2, 48\) became \(1, 48\)"):
        oracle.run([1, 2], {"q.0": lambda x: x[:1]})


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_0", "F16"])
def test_quantized_models_load_and_agree_roughly(tmp_path: Path, qtype: str) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", qtype=qtype)
    tokens = list(range(20, 32))
    got, want = _decode(path, tokens), Oracle(path).run(tokens)["logits"]
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.99


def test_words_are_single_tokens_and_bos_is_optional(tmp_path: Path) -> None:
    text = b"The capital of France is Paris<|im_end|>"
    ids = (ctypes.c_int32 * 32)()
    for add_bos in (True, False):
        path = write_tiny(tmp_path / "tiny.gguf", "llama", add_bos=add_bos)
        model = lc.llama_model_load_from_file(str(path).encode(), lc.llama_model_default_params())
        vocab = lc.llama_model_get_vocab(model)
        n = lc.llama_tokenize(vocab, text, len(text), ids, len(ids), True, True)
        pieces = [lc.llama_vocab_get_text(vocab, token).decode() for token in ids[:n]]
        lc.llama_model_free(model)
        bos = ["<|endoftext|>"] if add_bos else []
        assert pieces == [*bos, "The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", "<|im_end|>"]
