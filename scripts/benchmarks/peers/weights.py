"""A GGUF llama as a folder that transformers reads, with the same weights in float32.

The tokenizer in it knows a word for each token id ("t17 t4"), so that the libraries that read
texts see mia's own tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.peers.worker import Array
from mia.model import Model

#: of transformers -> of GGUF
_BLOCK = {
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


def export(model: Model, folder: Path) -> None:
    """Writes config.json, model.safetensors and a tokenizer. The file is the last thing written.

    Raises `SystemExit` if the model is no llama."""
    if model.architecture != "llama":
        raise SystemExit(f"bench peers: compares llamas only, not {model.architecture}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(model), indent=1))
    write_tokenizer(model, folder)
    from safetensors.numpy import save_file

    partial = folder / "partial"
    save_file(tensors(model), partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")


def config(model: Model) -> dict[str, object]:
    """A LlamaConfig; raises `SystemExit` where the file says what it has no field for here."""
    facts, prefix = model.metadata, "llama."
    if any(k.startswith(prefix + "rope.scaling") for k in facts) or "rope_freqs.weight" in (
        model.weights
    ):
        raise SystemExit("bench peers: compares no model with scaled rotations")
    base = float(facts.get(prefix + "rope.freq_base", "10000"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.n_vocab,
        "hidden_size": model.n_embd,
        "intermediate_size": model.weights.shape("blk.0.ffn_up.weight")[0],
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_head_kv,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": float(facts[prefix + "attention.layer_norm_rms_epsilon"]),
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "max_position_embeddings": model._llama.n_ctx_train,
        "tie_word_embeddings": "output.weight" not in model.weights,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }


def tensors(model: Model) -> dict[str, Array]:
    """Every tensor as float32; rows of Q and K go from interleaved to half-split rotation."""
    weights = model.weights
    out = {
        "model.embed_tokens.weight": weights.matrix("token_embd.weight"),
        "model.norm.weight": weights.vector("output_norm.weight"),
    }
    if "output.weight" in weights:
        out["lm_head.weight"] = weights.matrix("output.weight")
    for i in range(model.n_layer):
        for theirs, ours in _BLOCK.items():
            name = f"blk.{i}.{ours}.weight"
            w = weights.vector(name) if ours.endswith("norm") else weights.matrix(name)
            if ours in ("attn_q", "attn_k"):
                w = _half_split(w, model.head_dim)
            out[f"model.layers.{i}.{theirs}.weight"] = np.ascontiguousarray(w)
    return out


def _half_split(w: Array, head_dim: int) -> Array:
    """(n_heads * head_dim, n_in): pairs (2j, 2j+1) become (j, j + head_dim/2)."""
    pairs = w.reshape(-1, head_dim // 2, 2, w.shape[1])
    return pairs.swapaxes(1, 2).reshape(w.shape)


def write_tokenizer(model: Model, folder: Path) -> None:
    special = {"id": 2, "content": "<end>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**special, **flags}],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            # a special token is found within other words: it is none of them
            "vocab": {"<end>" if i == 2 else f"t{i}": i for i in range(model.n_vocab)},
            "unk_token": "t0",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "<end>",
        "unk_token": "t0",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
