"""A tiny GGUF llama as a transformers model with the same float32 weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracle import Oracle
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from mia.model import Model


def as_transformers(path: Path) -> LlamaForCausalLM:
    """Copies every tensor; rows of Q and K go from interleaved to half-split rotation."""
    o = Oracle(path)
    config = LlamaConfig(
        vocab_size=o.n_vocab,
        hidden_size=o.n_embd,
        intermediate_size=len(o.weights["blk.0.ffn_up.weight"]),
        num_hidden_layers=o.n_layer,
        num_attention_heads=o.n_head,
        num_key_value_heads=o.n_head_kv,
        head_dim=o.head_dim,
        rms_norm_eps=o.eps,
        rope_theta=o.rope_base,
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().float()
    state: dict[str, Any] = {
        "model.embed_tokens.weight": o.weights["token_embd.weight"],
        "model.norm.weight": o.weights["output_norm.weight"],
        "lm_head.weight": o.weights["output.weight"],
    }
    for i in range(o.n_layer):
        names = {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
        for theirs, ours in names.items():
            w = o.weights[f"blk.{i}.{ours}.weight"]
            if ours in ("attn_q", "attn_k"):
                w = _half_split(w, o.head_dim)
            state[f"model.layers.{i}.{theirs}.weight"] = w
    tensors = {k: torch.tensor(np.asarray(v, np.float32)) for k, v in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model


def _half_split(w: np.ndarray, head_dim: int) -> np.ndarray:
    """(n_heads * head_dim, n_in): pairs (2j, 2j+1) become (j, j + head_dim/2)."""
    pairs = w.reshape(-1, head_dim // 2, 2, w.shape[1])
    return pairs.swapaxes(1, 2).reshape(w.shape)


class Tokenizer:
    """mia's own tokens in the shape that transformers' users expect, padded on the right."""

    pad_token_id = 0
    padding_side = "right"

    def __init__(self, model: Model):
        self.model = model

    def __call__(self, texts: list[str], **_: Any) -> BatchEncoding:
        ids = [self.model.tokenize(t) for t in texts]
        n = max(map(len, ids))
        padded = torch.tensor([x + [0] * (n - len(x)) for x in ids])
        mask = torch.tensor([[1] * len(x) + [0] * (n - len(x)) for x in ids])
        return BatchEncoding({"input_ids": padded, "attention_mask": mask})
