"""Tiny random GGUF models of six architectures and three mixtures of experts, for tests that must run in milliseconds.

Every norm weight is random (around 1; less in gemma2's post-norms) and so is every bias, so that
a missed one shows. Sizes and scales are chosen so that activations are O(1), logits are a few
units wide, attention is far from uniform, and a float64 reading of the same file agrees with
llama.cpp to 1e-4 at every site. That last wish is why the MLPs speak softly where the activation
is GELU (they add a few hundredths, besides gpt2's bias): llama.cpp looks GELU up in a table of
half floats, so that a difference of 1e-7 in its input can become one half-float step in its
output (2^-11 of the value).
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tiny_vocabulary import SPECIALS, gpt2_vocabulary

N_CTX_TRAIN = 256


@dataclass(frozen=True)
class Experts:
    """What sets one mixture's choice of experts apart. `n_expert` experts of `n_ff` each."""

    n_expert: int
    n_used: int
    n_ff: int = 24
    shared: bool = False  # an expert of the same size that every token uses
    shared_gate: bool = False  # its output is multiplied by a sigmoid of its own
    sigmoid: bool = False  # scores are sigmoids of the router's logits; else a softmax of all
    bias: bool = False  # what the choice compares has a bias
    n_group: int = 0  # groups of experts; the choice is among the best `n_group_used`
    n_group_used: int = 0
    norm: bool = False  # in the file: divide weights by their sum
    scale: float = 0.0  # in the file: weights are multiplied by it
    n_dense: int = 0  # so many blocks at the start have a plain MLP


@dataclass(frozen=True)
class Arch:
    """What sets one architecture's tiny model apart. Sizes that are None follow n_embd."""

    n_head: int | None = None  # None: as many heads of head_dim as fill n_embd
    n_head_kv: int | None = 2  # None: as many as n_head
    head_dim: int = 8
    qkv_bias: bool = False
    post_norm: bool = False  # gemma2: norms after attention and MLP, capped scores and logits
    classic: bool = False  # gpt2: LayerNorm, learned positions, fused QKV, plain MLP, biases
    state_space: bool = False  # mamba: a recurrent state in place of attention and MLP
    embd_scale: float = 0.5  # standard deviation of an entry of the token table
    mlp_gain: float = 1.0  # how much larger than its input the output of an MLP matrix is
    mlp_post_norm: float = 0.0  # centre of the weights of the norm after the MLP
    file_arch: str | None = None  # the architecture that the file names, if it is another
    qk_norm: bool = False  # dots1: each query and key head is normed before rotation
    experts: Experts | None = None


ARCHS = {
    "llama": Arch(),
    "qwen2": Arch(qkv_bias=True),
    "gemma2": Arch(
        n_head=4, head_dim=24, post_norm=True, embd_scale=0.3, mlp_gain=0.5, mlp_post_norm=0.02
    ),
    "gpt2": Arch(n_head_kv=None, classic=True, mlp_gain=0.12),
    "starcoder": Arch(
        n_head_kv=1, classic=True, mlp_gain=0.12
    ),  # its keys and values are one head's
    "mamba": Arch(state_space=True),
    "mixtral": Arch(file_arch="llama", experts=Experts(6, 2, n_ff=80)),
    "qwen2moe": Arch(qkv_bias=True, experts=Experts(8, 3, shared=True, shared_gate=True)),
    "dots1": Arch(
        n_head_kv=None,
        qk_norm=True,
        experts=Experts(
            8,
            3,
            shared=True,
            sigmoid=True,
            bias=True,
            n_group=4,
            n_group_used=2,
            norm=True,
            scale=1.5,
            n_dense=1,
        ),
    ),
}
# Mamba's sizes in the words of Gu & Dao 2023; its inner width is 2 n_embd
D_CONV, D_STATE, DT_RANK = 4, 4, 3


@dataclass(frozen=True)
class Dims:
    """Every size of one tiny model."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int


def write_tiny(
    path: Path | str,
    arch: str,
    *,
    seed: int = 0,
    n_layer: int = 3,
    tied: bool = False,
    window: int = 128,
    add_bos: bool = True,
    chat_template: str | None = None,
    qtype: str = "F32",
    spm: bool = False,
) -> Path:
    """Write a tiny random model and return its path.

    Args:
        path: the file to write.
        arch: "llama", "qwen2", "gemma2", "gpt2", "starcoder" or "mamba" (F32 only); of experts "mixtral",
            "qwen2moe" or "dots1".
        seed: the same seed and arguments give the same bytes.
        n_layer: number of blocks.
        tied: leave out the output matrix, so that the token table unembeds too
            (gemma2 is always tied: llama.cpp reads no output matrix for it).
        window: positions a token sees in gemma2's even layers, itself included.
        add_bos: whether the tokenizer puts token 0 in front of a text.
        chat_template: a Jinja template to store, if any.
        qtype: type of the matrices, a name of `gguf.GGMLQuantizationType` that gguf-py can
            write ("F32", "F16", "Q8_0", "Q4_0", ...). Block types get wider models (n_embd
            64, n_ff 96), because their rows must be multiples of 32.
        spm: a SentencePiece vocabulary that puts a space in front of a text, as Llama 2 has.
    """
    path = Path(path)
    kind = ARCHS[arch]
    quant = gguf.GGMLQuantizationType[qtype]
    tokens, merges = (_spm_vocabulary(), []) if spm else gpt2_vocabulary()
    dims = _dims(kind, n_layer, len(tokens), wide=gguf.GGML_QUANT_SIZES[quant][0] > 1)

    writer = gguf.GGUFWriter(path, kind.file_arch or arch)
    _add_hyperparameters(writer, kind, dims, window)
    if spm:
        _add_spm_tokenizer(writer, tokens)
    else:
        _add_tokenizer(writer, tokens, merges, add_bos, chat_template)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if qtype == "F32" else f"MOSTLY_{qtype}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    rng = np.random.default_rng(seed)
    for name, x in _tensors(kind, dims, tied=tied or kind.post_norm, rng=rng).items():
        plain = name == "position_embd.weight" or "ffn_gate_inp" in name
        stored = quant if x.ndim == 2 and not plain else None
        data = gguf.quants.quantize(x, stored) if stored else x
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _dims(kind: Arch, n_layer: int, n_vocab: int, *, wide: bool) -> Dims:
    n_embd, n_ff = (64, 96) if wide else (48, 80)
    if kind.state_space:
        return Dims(n_layer, n_embd, 0, 0, 0, 0, n_vocab)
    n_head = kind.n_head or n_embd // kind.head_dim
    n_head_kv = kind.n_head_kv or n_head
    return Dims(n_layer, n_embd, n_ff, n_head, n_head_kv, kind.head_dim, n_vocab)


def _add_hyperparameters(w: gguf.GGUFWriter, kind: Arch, dims: Dims, window: int) -> None:
    w.add_name("tiny")
    w.add_context_length(N_CTX_TRAIN)
    w.add_embedding_length(dims.n_embd)
    w.add_block_count(dims.n_layer)
    w.add_feed_forward_length(dims.n_ff)
    w.add_head_count(dims.n_head)
    w.add_vocab_size(dims.n_vocab)
    if kind.classic:
        w.add_layer_norm_eps(1e-5)
        if dims.n_head_kv != dims.n_head:
            w.add_head_count_kv(dims.n_head_kv)
        return
    if kind.state_space:
        w.add_layer_norm_rms_eps(1e-5)
        w.add_ssm_conv_kernel(D_CONV)
        w.add_ssm_inner_size(2 * dims.n_embd)
        w.add_ssm_state_size(D_STATE)
        w.add_ssm_time_step_rank(DT_RANK)
        return
    w.add_head_count_kv(dims.n_head_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(dims.head_dim)
    if dims.head_dim * dims.n_head != dims.n_embd:
        w.add_key_length(dims.head_dim)
        w.add_value_length(dims.head_dim)
    if kind.experts is not None:
        _add_expert_hyperparameters(w, kind.experts)
    if kind.post_norm:
        w.add_attn_logit_softcapping(3.0)
        w.add_final_logit_softcapping(6.0)
        w.add_sliding_window(window)


def _add_expert_hyperparameters(w: gguf.GGUFWriter, experts: Experts) -> None:
    w.add_expert_count(experts.n_expert)
    w.add_expert_used_count(experts.n_used)
    w.add_expert_feed_forward_length(experts.n_ff)
    if experts.shared_gate:
        w.add_expert_shared_feed_forward_length(experts.n_ff)
    elif experts.shared:
        w.add_expert_shared_count(1)
    if experts.sigmoid:
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if experts.n_group:
        w.add_expert_group_count(experts.n_group)
        w.add_expert_group_used_count(experts.n_group_used)
    if experts.norm:
        w.add_expert_weights_norm(True)
    if experts.scale:
        w.add_expert_weights_scale(experts.scale)
    if experts.n_dense:
        w.add_leading_dense_block_count(experts.n_dense)


def _add_tokenizer(
    w: gguf.GGUFWriter,
    tokens: list[str],
    merges: list[str],
    add_bos: bool,
    chat_template: str | None,
) -> None:
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([control if token in SPECIALS else normal for token in tokens])
    w.add_token_merges(merges)
    w.add_bos_token_id(0)
    w.add_eos_token_id(0)
    w.add_eot_token_id(2)  # or llama.cpp picks one of two candidates in hash order
    w.add_add_bos_token(add_bos)
    if chat_template is not None:
        w.add_chat_template(chat_template)


def _spm_vocabulary() -> list[str]:
    """Bytes, and every piece of a few words with and without a space in front."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    for word in ("Q", "A", "(", "cat", "dog", "Paris", "France", "Rome", "Italy", ":", "\n", "▁"):
        for form in (word, "▁" + word):
            n = len(form)
            tokens += [form[a:b] for a in range(n) for b in range(a + 1, n + 1)]
    return list(dict.fromkeys(tokens))


def _add_spm_tokenizer(w: gguf.GGUFWriter, tokens: list[str]) -> None:
    kinds = gguf.TokenType
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_types(
        [kinds.UNKNOWN, *[kinds.CONTROL] * 2, *[kinds.BYTE] * 256]
        + [kinds.NORMAL] * (len(tokens) - 259)
    )
    w.add_token_scores([0.0] * 259 + [float(len(t)) for t in tokens[259:]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_space_prefix(True)


def _tensors(
    kind: Arch, dims: Dims, *, tied: bool, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return every tensor of the file by name; matrices are (n_out, n_in)."""
    draw = _Draw(rng, classic=kind.classic)
    embd, ff = dims.n_embd, dims.n_ff
    q, kv = dims.n_head * dims.head_dim, dims.n_head_kv * dims.head_dim
    draw.normal("token_embd.weight", dims.n_vocab, embd, scale=kind.embd_scale)
    if kind.classic:
        draw.normal("position_embd.weight", N_CTX_TRAIN, embd, scale=kind.embd_scale)
    for i in range(dims.n_layer):
        blk = f"blk.{i}"
        draw.norm(f"{blk}.attn_norm", embd)
        if kind.state_space:
            draw.state_space(blk, embd)
            continue
        if kind.classic:
            draw.linear(f"{blk}.attn_qkv", q + 2 * kv, embd, gain=1.4, bias=True)
        else:
            draw.linear(f"{blk}.attn_q", q, embd, gain=1.6, bias=kind.qkv_bias)
            draw.linear(f"{blk}.attn_k", kv, embd, gain=1.6, bias=kind.qkv_bias)
            draw.linear(f"{blk}.attn_v", kv, embd, bias=kind.qkv_bias)
        draw.linear(f"{blk}.attn_output", embd, q, bias=kind.classic)
        draw.norm(f"{blk}.ffn_norm", embd)
        if kind.qk_norm:
            draw.norm(f"{blk}.attn_q_norm", kind.head_dim)
            draw.norm(f"{blk}.attn_k_norm", kind.head_dim)
        if kind.experts is not None and i >= kind.experts.n_dense:
            draw.experts(blk, embd, kind.experts)
            continue
        if not kind.classic:
            draw.linear(f"{blk}.ffn_gate", ff, embd, gain=kind.mlp_gain)
        draw.linear(f"{blk}.ffn_up", ff, embd, gain=kind.mlp_gain, bias=kind.classic)
        draw.linear(f"{blk}.ffn_down", embd, ff, gain=kind.mlp_gain, bias=kind.classic)
        if kind.post_norm:
            draw.norm(f"{blk}.post_attention_norm", embd, centre=0.5)
            draw.norm(f"{blk}.post_ffw_norm", embd, centre=kind.mlp_post_norm)
    draw.norm("output_norm", embd)
    if not tied:
        draw.linear("output", dims.n_vocab, embd, gain=3.0)
    return draw.tensors


class _Draw:
    """Random float32 tensors by name, drawn in the order asked for."""

    def __init__(self, rng: np.random.Generator, *, classic: bool) -> None:
        self.rng = rng
        self.classic = classic  # norms have biases too
        self.tensors: dict[str, np.ndarray] = {}

    def normal(self, name: str, *shape: int, scale: float, centre: float = 0.0) -> None:
        x = centre + scale * self.rng.standard_normal(shape)  # shape
        self.tensors[name] = x.astype(np.float32)

    def norm(self, name: str, n: int, *, centre: float = 1.0) -> None:
        self.normal(f"{name}.weight", n, scale=0.2 * centre, centre=centre)
        if self.classic:
            self.normal(f"{name}.bias", n, scale=0.2)

    def linear(
        self, name: str, n_out: int, n_in: int, *, gain: float = 1.0, bias: bool = False
    ) -> None:
        self.normal(f"{name}.weight", n_out, n_in, scale=gain / n_in**0.5)
        if bias:
            self.normal(f"{name}.bias", n_out, scale=0.2)

    def experts(self, blk: str, embd: int, of: Experts) -> None:
        n, ff = of.n_expert, of.n_ff
        # far from even: the choices of two tokens differ, and no two scores are close
        self.linear(f"{blk}.ffn_gate_inp", n, embd, gain=2.0)
        if of.bias:
            self.normal(f"{blk}.exp_probs_b.bias", n, scale=0.3)
        self.normal(f"{blk}.ffn_gate_exps.weight", n, ff, embd, scale=embd**-0.5)
        self.normal(f"{blk}.ffn_up_exps.weight", n, ff, embd, scale=embd**-0.5)
        self.normal(f"{blk}.ffn_down_exps.weight", n, embd, ff, scale=2 * ff**-0.5)
        if of.shared:
            for part, n_out, n_in in (("gate", ff, embd), ("up", ff, embd), ("down", embd, ff)):
                self.linear(f"{blk}.ffn_{part}_shexp", n_out, n_in)
        if of.shared_gate:
            self.normal(f"{blk}.ffn_gate_inp_shexp.weight", embd, scale=embd**-0.5)

    def state_space(self, blk: str, embd: int) -> None:
        inner = 2 * embd
        self.linear(f"{blk}.ssm_in", 2 * inner, embd)
        self.normal(f"{blk}.ssm_conv1d.weight", inner, D_CONV, scale=0.5)
        self.normal(f"{blk}.ssm_conv1d.bias", inner, scale=0.2)
        self.linear(f"{blk}.ssm_x", DT_RANK + 2 * D_STATE, inner)
        self.linear(f"{blk}.ssm_dt", inner, DT_RANK, bias=True)
        self.normal(f"{blk}.ssm_a", inner, D_STATE, scale=0.5, centre=-1.5)
        self.tensors[f"{blk}.ssm_a"] = np.minimum(self.tensors[f"{blk}.ssm_a"], -0.1)
        self.normal(f"{blk}.ssm_d", inner, scale=0.2, centre=1.0)
        self.linear(f"{blk}.ssm_out", embd, inner)
