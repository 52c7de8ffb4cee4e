"""A forward pass in float64 numpy, read from the same GGUF file: what llama.cpp should compute.

It shares nothing with mia and knows four architectures: llama, qwen2, gemma2 and gpt2, and three
mixtures of experts: llama with experts (Mixtral), qwen2moe and dots1. One
block, in the usual symbols (Vaswani et al. 2017; Elhage et al. 2021 for the residual stream):

    x                resid_pre.i    (n_tokens, n_embd)   gemma2: token rows * sqrt(n_embd);
                                                         gpt2: token rows + position rows
    a = norm(x)      attn_norm.i    (n_tokens, n_embd)
    q = R(a Wq)      q.i            (n_tokens, n_head * head_dim)     R: rotary positions
    k = R(a Wk)      k.i            (n_tokens, n_head_kv * head_dim)
    v = a Wv         v.i            (n_tokens, n_head_kv * head_dim)
    S                attn_scores.i  (n_tokens, n_head, n_tokens)      scaled and capped; 0 where the mask hides the key
    A                attn_pattern.i (n_tokens, n_head, n_tokens)      softmax, row = query
    z = A v          head_out.i     (n_tokens, n_head * head_dim)     heads side by side
    o = z Wo         attn_out.i     (n_tokens, n_embd)   gemma2: after its post-norm
    m = x + o        resid_mid.i    (n_tokens, n_embd)
    b = norm(m)      mlp_norm.i     (n_tokens, n_embd)
    f = MLP(b)       mlp_out.i      (n_tokens, n_embd)   gemma2: after its post-norm
    y = m + f        resid_post.i   (n_tokens, n_embd)   the same tensor as resid_pre.(i+1)

In a block with experts (Shazeer et al. 2017; Jiang et al. 2024) the MLP is, for each token,

    l = b Wr         router.i         (n_tokens, n_expert)
    s = softmax(l)                    dots1: sigmoid(l)
    c = s + bias     router_choice.i  (n_tokens, n_expert)        dots1 alone
    E = top-k(c)     experts.i        (n_tokens, n_expert_used)   dots1: in the best groups only
    w = s_E / sum    expert_weights.i (n_tokens, n_expert)        0 if not chosen; qwen2moe: s_E
    f = sum_e w_e MLP_e(b)            and the shared expert's output, qwen2moe: times a sigmoid

around it 'embed' (token rows as stored, (n_tokens, n_embd)), 'final_norm' (n_tokens, n_embd)
and 'logits' (n_tokens, n_vocab, after soft-capping). Biases apply wherever the file has them.

Weights of block-quantized files are dequantized, but llama.cpp also rounds the *inputs* of such
a product, so there the two agree only roughly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray
Edits = Mapping[str, Callable[[Array], Array]]


def rms_norm(x: Array, eps: float) -> Array:
    """Divide each row of x (rows, n) by its root mean square (Zhang & Sennrich 2019)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def layer_norm(x: Array, eps: float) -> Array:
    """Centre each row of x (rows, n) and divide it by its deviation (Ba et al. 2016)."""
    return rms_norm(x - x.mean(axis=-1, keepdims=True), eps)


def silu(x: Array) -> Array:
    """Return x * sigmoid(x) (Elfwing et al. 2017)."""
    return x / (1.0 + np.exp(-x))


def gelu(x: Array) -> Array:
    """Return the tanh GELU (Hendrycks & Gimpel 2016) as ggml's CPU has it: by way of half floats.

    ggml looks inputs between -10 and 10 up in a table of half floats; what lies below gives 0
    and what lies above passes through.
    """
    h = np.clip(x, -10.0, 10.0).astype(np.float32).astype(np.float16).astype(np.float64)
    y = 0.5 * h * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * h * (1.0 + 0.044715 * h * h)))
    y = y.astype(np.float16).astype(np.float64)
    return np.where(x <= -10.0, 0.0, np.where(x >= 10.0, x, y))


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), for -inf too."""
    return 0.5 + 0.5 * np.tanh(x / 2)


def softmax(x: Array) -> Array:
    """Normalise the last axis of x."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def soft_cap(x: Array, cap: float | None) -> Array:
    """Squeeze x smoothly into (-cap, cap); None leaves it alone."""
    return x if cap is None else cap * np.tanh(x / cap)


def rope(x: Array, base: float, *, interleaved: bool) -> Array:
    """Rotate x (n_tokens, heads, head_dim) by its positions (Su et al. 2021, eq. 34).

    Pair j turns by position * base^(-2j/head_dim). It is elements (2j, 2j+1) when interleaved
    (llama.cpp's NORM), else (j, j + head_dim/2) (its NEOX).
    """
    half = x.shape[-1] // 2
    angle = np.outer(np.arange(len(x)), base ** (-np.arange(half) / half))  # (n_tokens, half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]  # (n_tokens, 1, half)
    first, second = slice(half), slice(half, None)
    if interleaved:
        first, second = slice(0, None, 2), slice(1, None, 2)
    out = np.empty_like(x)  # (n_tokens, heads, head_dim)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


@dataclass(frozen=True)
class Spec:
    """What the tensors of a file do not tell about its architecture."""

    norm: Callable[[Array, float], Array] = rms_norm
    act: Callable[[Array], Array] = silu
    rope_interleaved: bool | None = False  # None: no rotation
    scale_embed: bool = False
    window_every: int = 0  # 2: all layers but each second have a sliding window
    norm_experts: bool = False  # weights of experts are divided by their sum


SPECS = {
    "llama": Spec(rope_interleaved=True, norm_experts=True),
    "qwen2": Spec(),
    "gemma2": Spec(act=gelu, scale_embed=True, window_every=2),
    "gpt2": Spec(norm=layer_norm, act=gelu, rope_interleaved=None),
    "starcoder": Spec(norm=layer_norm, act=gelu, rope_interleaved=None),
    "qwen2moe": Spec(),
    "dots1": Spec(),
}


class Oracle:
    """One GGUF model, computed in float64.

    Attributes:
        n_layer, n_head, n_head_kv, head_dim, n_embd, n_vocab: sizes of the model.
        weights: every tensor of the file by name; matrices are (n_out, n_in).
    """

    def __init__(self, path: Path | str) -> None:
        reader = gguf.GGUFReader(path)
        self.arch: str = reader.fields["general.architecture"].contents()
        self.spec = SPECS[self.arch]

        def meta(key: str, default: Any = None) -> Any:
            field = reader.fields.get(f"{self.arch}.{key}")
            return default if field is None else field.contents()

        self.weights = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
            for t in reader.tensors
        }
        self.n_vocab = len(self.weights["token_embd.weight"])
        self.n_embd = int(meta("embedding_length"))
        self.n_layer = int(meta("block_count"))
        self.n_head = int(meta("attention.head_count"))
        self.n_head_kv = int(meta("attention.head_count_kv", self.n_head))
        self.head_dim = int(meta("attention.key_length", self.n_embd // self.n_head))
        self.rope_base = float(meta("rope.freq_base", 10000.0))
        rms_eps = meta("attention.layer_norm_rms_epsilon")
        self.eps = float(rms_eps or meta("attention.layer_norm_epsilon"))
        self.score_cap = meta("attn_logit_softcapping")
        self.logit_cap = meta("final_logit_softcapping")
        self.window = meta("attention.sliding_window")
        self.n_expert_used = int(meta("expert_used_count", 0))
        self.experts_sigmoid = meta("expert_gating_func") == 2
        self.experts_norm = self.spec.norm_experts or bool(meta("expert_weights_norm"))
        self.experts_scale = float(meta("expert_weights_scale", 1.0))
        self.n_group = int(meta("expert_group_count", 0))
        self.n_group_used = int(meta("expert_group_used_count", 0))

    def run(self, tokens: Sequence[int], edits: Edits | None = None) -> dict[str, Array]:
        """Run the model on tokens and return every site by key, after its edit.

        Args:
            tokens: (n_tokens,) token ids, taken as they are (no BOS is added).
            edits: from a site key to a function of that site's whole array; what it returns
                replaces the array before anything downstream reads it.

        Returns:
            The arrays of the table above. Two keys that name one tensor (resid_post.i and
            resid_pre.(i+1); embed and resid_pre.0 unless gemma2 scales it or gpt2 adds
            positions) are edited in that order and return the same, final array.

        Raises:
            KeyError: an edit names no site.
            ValueError: an edit changes a shape.
        """
        run = _Run(edits or {})
        x = run.at("embed", self.weights["token_embd.weight"][list(tokens)])  # (T, n_embd)
        same: str | None = "embed"  # the site that is the same tensor as the next resid_pre
        if self.spec.scale_embed:
            x, same = x * np.sqrt(self.n_embd), None
        if "position_embd.weight" in self.weights:
            x, same = x + self.weights["position_embd.weight"][: len(x)], None
        for i in range(self.n_layer):
            x = run.at(f"resid_pre.{i}", x)  # (T, n_embd)
            if same:
                run.sites[same] = x
            mid = run.at(f"resid_mid.{i}", x + self._attention(run, i, x))  # (T, n_embd)
            x = run.at(f"resid_post.{i}", mid + self._mlp(run, i, mid))  # (T, n_embd)
            same = f"resid_post.{i}"
        final = run.at("final_norm", self._norm("output_norm", x))  # (T, n_embd)
        run.at("logits", self._unembed(final))  # (T, n_vocab)
        run.check_all_used()
        return run.sites

    def lens(self, h: Array) -> Array:
        """Read residual rows h (rows, n_embd) as logits (rows, n_vocab): final norm, unembed."""
        return self._unembed(self._norm("output_norm", np.asarray(h, dtype=np.float64)))

    def _attention(self, run: "_Run", i: int, x: Array) -> Array:
        """Return what attention i adds to the residual x (T, n_embd)."""
        n_tokens, n_q = len(x), self.n_head * self.head_dim
        a = run.at(f"attn_norm.{i}", self._norm(f"blk.{i}.attn_norm", x))  # (T, n_embd)
        if f"blk.{i}.attn_qkv.weight" in self.weights:
            qkv = self._linear(f"blk.{i}.attn_qkv", a)  # (T, (n_head + 2 n_head_kv) * head_dim)
            n_kv = self.n_head_kv * self.head_dim
            q, k, v = np.split(qkv, [n_q, n_q + n_kv], axis=1)
        else:
            q, k, v = (self._linear(f"blk.{i}.attn_{part}", a) for part in "qkv")
        q, k = (self._head_norm(f"blk.{i}.attn_{n}_norm", x) for n, x in (("q", q), ("k", k)))
        q = self._heads(run.at(f"q.{i}", self._rope(q)))  # (T, n_head, head_dim)
        k = self._heads(run.at(f"k.{i}", self._rope(k)))  # (T, n_head_kv, head_dim)
        v = self._heads(run.at(f"v.{i}", v))  # (T, n_head_kv, head_dim)

        group = self.n_head // self.n_head_kv  # query heads per key head
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # (T, n_head, head_dim)
        scores = np.einsum("qhd,khd->qhk", q, k) / np.sqrt(self.head_dim)  # (T, n_head, T)
        scores = soft_cap(scores, self.score_cap)
        seen = self._visible(i, n_tokens)[:, None]
        scores = run.at(f"attn_scores.{i}", np.ascontiguousarray(np.where(seen, scores, 0.0)))
        scores = np.where(seen, scores, -np.inf)
        pattern = run.at(f"attn_pattern.{i}", softmax(scores))  # (T, n_head, T)
        z = np.einsum("qhk,khd->qhd", pattern, v).reshape(n_tokens, n_q)
        z = run.at(f"head_out.{i}", z)  # (T, n_head * head_dim)
        out = self._linear(f"blk.{i}.attn_output", z)  # (T, n_embd)
        out = self._post_norm(f"blk.{i}.post_attention_norm", out)
        return run.at(f"attn_out.{i}", out)  # (T, n_embd)

    def _mlp(self, run: "_Run", i: int, mid: Array) -> Array:
        """Return what MLP i adds to the residual mid (T, n_embd)."""
        b = run.at(f"mlp_norm.{i}", self._norm(f"blk.{i}.ffn_norm", mid))  # (T, n_embd)
        if f"blk.{i}.ffn_gate_inp.weight" in self.weights:
            return run.at(f"mlp_out.{i}", self._experts(run, i, b))  # (T, n_embd)
        up = self._linear(f"blk.{i}.ffn_up", b)  # (T, n_ff)
        if f"blk.{i}.ffn_gate.weight" in self.weights:  # gated: Shazeer 2020
            hidden = self.spec.act(self._linear(f"blk.{i}.ffn_gate", b)) * up  # (T, n_ff)
        else:
            hidden = self.spec.act(up)  # (T, n_ff)
        out = self._linear(f"blk.{i}.ffn_down", hidden)  # (T, n_embd)
        out = self._post_norm(f"blk.{i}.post_ffw_norm", out)
        return run.at(f"mlp_out.{i}", out)  # (T, n_embd)

    def _experts(self, run: "_Run", i: int, b: Array) -> Array:
        """Return the sum of the chosen experts of layer i on rows b (T, n_embd)."""
        blk = f"blk.{i}"
        logits = run.at(f"router.{i}", self._linear(f"{blk}.ffn_gate_inp", b))  # (T, n_expert)
        scores = sigmoid(logits) if self.experts_sigmoid else softmax(logits)  # (T, n_expert)
        choice = scores
        if f"{blk}.exp_probs_b.bias" in self.weights:
            choice = scores + self.weights[f"{blk}.exp_probs_b.bias"]
            choice = run.at(f"router_choice.{i}", choice)
        choice = self._in_best_groups(choice)
        chosen = np.argsort(-choice, axis=1, kind="stable")[:, : self.n_expert_used]
        run.at(f"experts.{i}", chosen.astype(np.float64))
        weights = np.zeros_like(scores)  # (T, n_expert)
        np.put_along_axis(weights, chosen, np.take_along_axis(scores, chosen, 1), 1)
        is_chosen = np.zeros(scores.shape, bool)
        np.put_along_axis(is_chosen, chosen, True, 1)
        if self.experts_norm:
            weights /= np.maximum(weights.sum(1, keepdims=True), 6.103515625e-5)
        weights = run.at(f"expert_weights.{i}", weights * self.experts_scale) * is_chosen
        run.sites[f"expert_weights.{i}"] = weights
        out = np.zeros_like(b)
        for e in range(scores.shape[1]):
            part = {
                n: self.weights[f"{blk}.ffn_{n}_exps.weight"][e] for n in ("gate", "up", "down")
            }
            hidden = self.spec.act(b @ part["gate"].T) * (b @ part["up"].T)  # (T, n_ff)
            out += weights[:, e : e + 1] * (hidden @ part["down"].T)
        return out + self._shared_expert(blk, b)

    def _shared_expert(self, blk: str, b: Array) -> Array | float:
        if f"{blk}.ffn_up_shexp.weight" not in self.weights:
            return 0.0
        hidden = self.spec.act(self._linear(f"{blk}.ffn_gate_shexp", b))
        out = self._linear(f"{blk}.ffn_down_shexp", hidden * self._linear(f"{blk}.ffn_up_shexp", b))
        gate = self.weights.get(f"{blk}.ffn_gate_inp_shexp.weight")
        return out if gate is None else sigmoid(b @ gate)[:, None] * out

    def _in_best_groups(self, choice: Array) -> Array:
        """Return choice (T, n_expert) with -inf outside the groups whose best two sum to most."""
        if self.n_group < 2:
            return choice
        groups = choice.reshape(len(choice), self.n_group, -1)  # (T, n_group, per group)
        best = np.sort(groups, axis=2)[:, :, -2:].sum(2)  # (T, n_group)
        used = np.argsort(-best, axis=1, kind="stable")[:, : self.n_group_used]
        out = np.full_like(groups, -np.inf)
        for t, g in enumerate(used):
            out[t, g] = groups[t, g]
        return out.reshape(choice.shape)

    def _head_norm(self, name: str, x: Array) -> Array:
        """Return x (T, heads * head_dim) with each head normed, where the file has such a norm."""
        if f"{name}.weight" not in self.weights:
            return x
        return self._norm(name, self._heads(x)).reshape(x.shape)

    def _visible(self, i: int, n_tokens: int) -> Array:
        """Return which keys each query of layer i sees, (n_tokens, n_tokens) of bool."""
        distance = np.subtract.outer(np.arange(n_tokens), np.arange(n_tokens))  # query - key
        seen = distance >= 0
        every = self.spec.window_every
        if every and i % every < every - 1:
            seen &= distance < self.window
        return seen

    def _heads(self, x: Array) -> Array:
        return x.reshape(len(x), -1, self.head_dim)  # (T, heads, head_dim)

    def _rope(self, x: Array) -> Array:
        if self.spec.rope_interleaved is None:
            return x
        turned = rope(self._heads(x), self.rope_base, interleaved=self.spec.rope_interleaved)
        return turned.reshape(x.shape)  # (T, heads * head_dim)

    def _norm(self, name: str, x: Array) -> Array:
        y = self.spec.norm(x, self.eps) * self.weights[f"{name}.weight"]  # (T, n_embd)
        return y + self.weights.get(f"{name}.bias", 0.0)

    def _post_norm(self, name: str, x: Array) -> Array:
        return self._norm(name, x) if f"{name}.weight" in self.weights else x  # (T, n_embd)

    def _linear(self, name: str, x: Array) -> Array:
        y = x @ self.weights[f"{name}.weight"].T  # (T, n_out)
        return y + self.weights.get(f"{name}.bias", 0.0)

    def _unembed(self, x: Array) -> Array:
        name = "output" if "output.weight" in self.weights else "token_embd"
        return soft_cap(self._linear(name, x), self.logit_cap)  # (T, n_vocab)


class _Run:
    """The sites of one forward pass, edited as they come by."""

    def __init__(self, edits: Edits) -> None:
        self.edits = edits
        self.sites: dict[str, Array] = {}

    def at(self, key: str, x: Array) -> Array:
        if key in self.edits:
            edited = np.asarray(self.edits[key](x.copy()), dtype=np.float64)
            if edited.shape != x.shape:
                raise ValueError(f"edit of {key!r}: {x.shape} became {edited.shape}")
            x = edited
        self.sites[key] = x
        return x

    def check_all_used(self) -> None:
        unknown = set(self.edits) - set(self.sites)
        if unknown:
            raise KeyError(f"no such site: {', '.join(sorted(unknown))}")
