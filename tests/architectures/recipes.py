"""One tiny random model per architecture: the reference in transformers, and how llama.cpp reads it.

A recipe names transformers' own model class and the sizes of its configuration. Where the
published weights come with code of their own (InternLM2, EXAONE, Baichuan, ...), the reference is
the class of transformers that computes the same, and `export` gives its weights the names that
llama.cpp's converter knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: sizes shared by all; head_dim is not n_embd / n_head where the architecture allows that
LAYERS, EMBD, FF, HEADS, KV, HEAD_DIM, CONTEXT = 4, 48, 80, 4, 2, 16, 256
EXPERTS, CHOSEN, EXPERT_FF = 8, 2, 32
_OF_EXPERTS = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": EXPERT_FF,
}

Tensors = dict[str, Any]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How to make one model.

    Attributes:
        name: of the file.
        cls: transformers' class of the reference.
        config: settings of its configuration.
        adapt: changes the built reference before its weights are drawn.
        finish: changes them after they are drawn.
        export: gives weights and configuration the names of published files, where those differ
            from transformers' own.
        published: settings of config.json that published files have and transformers does not write;
            None takes one out.
        layout: where the parts of a block are, for `reference.py`; what is left out is named as
            in llama.
        gelu: llama.cpp looks the activation up in a table of half floats.
    """

    name: str
    cls: str
    config: Settings
    adapt: Callable[[Any], None] | None = None
    finish: Callable[[Any], None] | None = None
    export: Callable[[Tensors, Settings], tuple[Tensors, Settings]] | None = None
    published: Settings = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    gelu: bool = False


def sizes(**more: Any) -> Settings:
    """The sizes of a decoder in the words of LlamaConfig, and whatever else is given; a size
    that is given as None is left out."""
    base: Settings = {
        "hidden_size": EMBD,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }
    left_out = {k for k in more if k in (*base, *_OF_EXPERTS) and more[k] is None}
    return {k: v for k, v in {**base, **more}.items() if k not in left_out}


def experts(**more: Any) -> Settings:
    """As `sizes`, with a mixture of experts in the words of Qwen3MoeConfig."""
    return sizes(**{**_OF_EXPERTS, **more})


RECIPES: dict[str, Recipe] = {}


# -- published names of models whose code is not in transformers ---------------------------------


def _renamed(tensors: Tensors, *names: tuple[str, str]) -> Tensors:
    """Replaces parts of names, in order."""
    out = {}
    for name, x in tensors.items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        out[name] = x
    return out


def _internlm2(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    """Queries, keys and values of one group of heads lie together."""
    import torch

    for i in range(LAYERS):
        part = f"model.layers.{i}.self_attn"
        rows = (KV, -1, EMBD // HEADS, EMBD)
        q, k, v = (tensors.pop(f"{part}.{x}_proj.weight").reshape(rows) for x in "qkv")
        tensors[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat([q, k, v], 1).reshape(
            -1, EMBD
        )
    tensors = _renamed(
        tensors,
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    )
    return tensors, {**config, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}


def _xverse(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    return tensors, {**config, "architectures": ["XverseForCausalLM"], "model_type": "xverse"}


def _orion(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    return tensors, {**config, "architectures": ["OrionForCausalLM"], "model_type": "orion"}


def _layer_norms(model: Any) -> None:
    """Orion is llama with LayerNorm."""
    import torch

    for block in model.model.layers:
        block.input_layernorm = torch.nn.LayerNorm(EMBD, eps=1e-6)
        block.post_attention_layernorm = torch.nn.LayerNorm(EMBD, eps=1e-6)
    model.model.norm = torch.nn.LayerNorm(EMBD, eps=1e-6)


_H = (
    ("model.layers.", "transformer.h."),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
)


def _exaone(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    tensors = _renamed(
        tensors,
        *_H,
        ("self_attn.o_proj", "attn.attention.out_proj"),
        ("self_attn.", "attn.attention."),
        ("mlp.gate_proj", "mlp.c_fc_0"),
        ("mlp.up_proj", "mlp.c_fc_1"),
        ("mlp.down_proj", "mlp.c_proj"),
        ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
    )
    names = {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone"}
    return tensors, {**config, **names, "activation_function": "silu"}


def _qwen(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    """The first Qwen: Qwen2 with fused queries, keys and values, as many as heads."""
    import torch

    for i in range(LAYERS):
        for x in ("weight", "bias"):
            part = f"model.layers.{i}.self_attn"
            qkv = [tensors.pop(f"{part}.{name}_proj.{x}") for name in "qkv"]
            tensors[f"transformer.h.{i}.attn.c_attn.{x}"] = torch.cat(qkv)
    tensors = _renamed(
        tensors,
        *_H,
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.gate_proj", "mlp.w2"),
        ("mlp.up_proj", "mlp.w1"),
        ("mlp.down_proj", "mlp.c_proj"),
        ("model.embed_tokens", "transformer.wte"),
        ("model.norm", "transformer.ln_f"),
    )
    names = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen"}
    # published files count gate and up together
    return tensors, {**config, **names, "intermediate_size": 2 * FF, "layer_norm_epsilon": 1e-6}


def _bitnet(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    return _renamed(
        tensors,
        ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"),
        ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"),
    ), {**config, "architectures": ["BitnetForCausalLM"]}


def _signs(model: Any) -> None:
    """The converter rounds weights to -a, 0 and a; these are so rounded already."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_proj" in name:
                p.copy_(torch.where(p < 0, -1.0, 1.0) / p.shape[1] ** 0.5)


def _minicpm(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    """MiniCPM scales as Granite does, under other names."""
    scales = {
        "scale_emb": config["embedding_multiplier"],
        "scale_depth": config["residual_multiplier"] * LAYERS**0.5,
        "dim_model_base": EMBD / config["logits_scaling"],
    }
    names = {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"}
    return tensors, {**config, **names, **scales}


def _deepseek(tensors: Tensors, config: Settings) -> tuple[Tensors, Settings]:
    out = {}
    for name, x in tensors.items():
        if ".experts.gate_up_proj" in name:
            for e, both in enumerate(x):
                stem = name.replace("gate_up_proj", f"{e}")
                out[f"{stem}.gate_proj.weight"], out[f"{stem}.up_proj.weight"] = both.chunk(2)
        elif ".experts.down_proj" in name:
            for e, one in enumerate(x):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = one
        else:
            out[name] = x
    names = {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"}
    return out, {**config, **names, **_DEEPSEEK}


_DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": EXPERT_FF,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}


def _plain_routes(model: Any) -> None:
    """llama.cpp reads Phi-3.5-MoE as a Phi-3 with experts: RMS norms (with a bias) where the
    model has LayerNorm, and a plain softmax where it has SparseMixer."""
    import torch

    class Norm(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(EMBD))
            self.bias = torch.nn.Parameter(torch.zeros(EMBD))

        def forward(self, x: Any) -> Any:
            rms = torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)
            return x / rms * self.weight + self.bias

    model.model.norm = Norm()

    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = Norm(), Norm()
        router = block.mlp.router

        def forward(x: Any, router: Any = router) -> Any:
            logits = x @ router.weight.T
            weights, chosen = torch.softmax(logits, -1).topk(router.top_k)
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        router.forward = forward


def _mixtures(model: Any) -> None:
    """The first DeepSeek is llama with the mixture of the second from its second block on."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = DeepseekV2Config(
        hidden_size=EMBD,
        num_attention_heads=HEADS,
        intermediate_size=FF,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        **{k: v for k, v in _DEEPSEEK.items() if k not in ("scoring_func",)},
    )
    config._experts_implementation = "eager"
    for block in model.model.layers[1:]:
        block.mlp = DeepseekV2Moe(config)


def _add(name: str, cls: str, config: Settings, **more: Any) -> None:
    RECIPES[name] = Recipe(name, cls, config, **more)


# -- one block after another, RMS norms, gated MLP --------------------------------------------
_add("llama", "LlamaForCausalLM", sizes())
_add(
    "llama3-scaled",
    "LlamaForCausalLM",
    sizes(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
)
_add("mistral", "MistralForCausalLM", sizes(sliding_window=None))
_add("ministral3", "Ministral3ForCausalLM", sizes())
_add("qwen2", "Qwen2ForCausalLM", sizes(head_dim=None))
_add("qwen3", "Qwen3ForCausalLM", sizes())
_add("smollm3", "SmolLM3ForCausalLM", sizes(head_dim=None, no_rope_layer_interval=4))
_add("seed-oss", "SeedOssForCausalLM", sizes())
_add("ernie4_5", "Ernie4_5ForCausalLM", sizes())
_add("arcee", "ArceeForCausalLM", sizes())
_add(
    "granite",
    "GraniteForCausalLM",
    sizes(
        head_dim=None,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    layout={"scale": 0.4},
)
_add("olmo", "OlmoForCausalLM", sizes(head_dim=None, clip_qkv=2.5))
_add(
    "olmo2",
    "Olmo2ForCausalLM",
    sizes(head_dim=None),
    layout={
        "attn_norm": None,
        "mlp_norm": None,
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
)
_add(
    "olmo3",
    "Olmo3ForCausalLM",
    sizes(head_dim=None, sliding_window=6),
    layout={
        "attn_norm": None,
        "mlp_norm": None,
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
)
_add(
    "apertus",
    "ApertusForCausalLM",
    sizes(head_dim=None),
    layout={"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
)
_add("hunyuan-dense", "HunYuanDenseV1ForCausalLM", sizes())
_add(
    "exaone4",
    "Exaone4ForCausalLM",
    sizes(head_dim=None, sliding_window=None, layer_types=["full_attention"] * LAYERS),
    layout={
        "attn_norm": None,
        "mlp_norm": None,
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
)
_add("glm", "GlmForCausalLM", sizes(rms_norm_eps=1e-5, head_dim=EMBD // HEADS))
_add(
    "glm4",
    "Glm4ForCausalLM",
    sizes(),
    layout={"attn_out": "post_self_attn_layernorm", "mlp_out": "post_mlp_layernorm"},
)
_add("phi3", "Phi3ForCausalLM", sizes(head_dim=None, sliding_window=None))
_add("nemotron", "NemotronForCausalLM", sizes(head_dim=None))
_add("jais2", "Jais2ForCausalLM", sizes(head_dim=None))
_add(
    "bitnet",
    "BitNetForCausalLM",
    sizes(head_dim=None, hidden_act="silu", tie_word_embeddings=True),
    finish=_signs,
    export=_bitnet,
)
_add(
    "youtu",
    "YoutuForCausalLM",
    sizes(
        head_dim=None,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
    ),
)
_add(
    "minicpm3",
    "MiniCPM3ForCausalLM",
    sizes(
        head_dim=None,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
    ),
    layout={"scale": 0.7},
)
_add("gemma", "GemmaForCausalLM", sizes(tie_word_embeddings=True), gelu=True)
_add(
    "gemma2",
    "Gemma2ForCausalLM",
    sizes(
        tie_word_embeddings=True,
        sliding_window=6,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    gelu=True,
    layout={
        "mlp_norm": "pre_feedforward_layernorm",
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
)
_add(
    "gemma3",
    "Gemma3ForCausalLM",
    sizes(tie_word_embeddings=True, sliding_window=6, query_pre_attn_scalar=16),
    gelu=True,
    layout={
        "mlp_norm": "pre_feedforward_layernorm",
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
)

# -- LayerNorm, GELU, biases ------------------------------------------------------------------
_add(
    "gpt2",
    "GPT2LMHeadModel",
    {"n_embd": EMBD, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT},
    published={"n_ctx": CONTEXT},
    gelu=True,
    layout={"attn_norm": "ln_1", "mlp_norm": "ln_2"},
)
_add(
    "gptneox",
    "GPTNeoXForCausalLM",
    sizes(head_dim=None, num_key_value_heads=None, use_parallel_residual=True, rotary_pct=0.5),
    published={"rotary_pct": 0.5, "rotary_emb_base": 10000},
    gelu=True,
    layout={"parallel": True},
)
_add(
    "gptneox-serial",
    "GPTNeoXForCausalLM",
    sizes(head_dim=None, num_key_value_heads=None, use_parallel_residual=False, rotary_pct=0.5),
    published={"rotary_pct": 0.5, "rotary_emb_base": 10000},
    gelu=True,
)
_add(
    "phi2",
    "PhiForCausalLM",
    sizes(
        intermediate_size=4 * EMBD,
        num_key_value_heads=HEADS,
        head_dim=None,
        partial_rotary_factor=0.5,
    ),
    gelu=True,
    layout={"parallel": True, "mlp_norm": None},
)
_add(
    "falcon-7b",
    "FalconForCausalLM",
    {
        "hidden_size": EMBD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
    },
    published={"num_kv_heads": 1},
    gelu=True,
    layout={"parallel": True, "mlp_norm": None, "attention": "falcon"},
)
_add(
    "falcon-40b",
    "FalconForCausalLM",
    {
        "hidden_size": EMBD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_kv_heads": KV,
        "new_decoder_architecture": True,
        "bias": False,
        "alibi": False,
    },
    gelu=True,
    layout={"parallel": True, "attn_norm": "ln_attn", "mlp_norm": "ln_mlp", "attention": "falcon"},
)
_add(
    "bloom",
    "BloomForCausalLM",
    {"hidden_size": EMBD, "n_layer": LAYERS, "n_head": HEADS},
    gelu=True,
    layout={
        "attention": "bloom",
        "attn_out": "self_attention.dense",
        "mlp_out": "mlp.dense_4h_to_h",
    },
)
_add(
    "mpt",
    "MptForCausalLM",
    {
        "d_model": EMBD,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "max_seq_len": CONTEXT,
        "expansion_ratio": 2,
    },
    published={"architectures": ["MPTForCausalLM"]},
    gelu=True,
    layout={
        "attention": "mpt",
        "attn_norm": "norm_1",
        "mlp_norm": "norm_2",
        "mlp_out": "ffn.down_proj",
    },
)
_add(
    "starcoder",
    "GPTBigCodeForCausalLM",
    {
        "n_embd": EMBD,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": CONTEXT,
        "n_inner": 4 * EMBD,
        "multi_query": True,
    },
    gelu=True,
    layout={"attn_norm": "ln_1", "mlp_norm": "ln_2"},
)
_add(
    "starcoder2",
    "Starcoder2ForCausalLM",
    sizes(head_dim=None, sliding_window=None, use_bias=True),
    gelu=True,
)
_add(
    "stablelm",
    "StableLmForCausalLM",
    sizes(head_dim=None, use_qkv_bias=True, partial_rotary_factor=0.5),
)
_add(
    "stablelm-parallel",
    "StableLmForCausalLM",
    sizes(head_dim=None, use_parallel_residual=True, partial_rotary_factor=0.5),
    layout={"parallel": True, "mlp_norm": None},
)
_add(
    "cohere",
    "CohereForCausalLM",
    sizes(head_dim=None, tie_word_embeddings=True, logit_scale=0.5),
    layout={"parallel": True, "mlp_norm": None},
)
_add(
    "cohere2",
    "Cohere2ForCausalLM",
    sizes(head_dim=None, tie_word_embeddings=True, logit_scale=0.5, sliding_window=6),
    published={"rotary_pct": 1.0},
    layout={"parallel": True, "mlp_norm": None},
)

# -- mixtures of experts ----------------------------------------------------------------------
_add("mixtral", "MixtralForCausalLM", sizes(num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN))
_add("qwen2moe", "Qwen2MoeForCausalLM", experts(head_dim=None, shared_expert_intermediate_size=40))
_add("qwen3moe", "Qwen3MoeForCausalLM", experts(norm_topk_prob=True))
_add(
    "olmoe",
    "OlmoeForCausalLM",
    experts(
        num_key_value_heads=HEADS,
        head_dim=None,
        moe_intermediate_size=None,
        intermediate_size=EXPERT_FF,
    ),
)
_add(
    "granitemoe",
    "GraniteMoeForCausalLM",
    sizes(
        head_dim=None,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    layout={"scale": 0.4, "mlp_out": "block_sparse_moe"},
)
_add(
    "granitemoe-shared",
    "GraniteMoeSharedForCausalLM",
    sizes(
        head_dim=None,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        shared_intermediate_size=40,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    layout={"scale": 0.4, "mlp_out": ("block_sparse_moe", "shared_mlp")},
)
_add(
    "phimoe",
    "PhimoeForCausalLM",
    sizes(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        head_dim=None,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=None,
        attention_bias=True,
        lm_head_bias=True,
        original_max_position_embeddings=CONTEXT,
    ),
    adapt=_plain_routes,
    published={
        "architectures": ["PhiMoEForCausalLM"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": CONTEXT,
        },
    },
)
_add(
    "gpt-oss",
    "GptOssForCausalLM",
    sizes(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        sliding_window=6,
    ),
)
_add(
    "dbrx",
    "DbrxForCausalLM",
    {
        "d_model": EMBD,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": KV, "clip_qkv": 2.5, "rope_theta": 10000.0},
        "ffn_config": {
            "ffn_hidden_size": EXPERT_FF,
            "moe_num_experts": EXPERTS,
            "moe_top_k": CHOSEN,
            "hidden_size": EMBD,
        },
    },
    layout={
        "attn_norm": "norm_attn_norm.norm_1",
        "attn": "norm_attn_norm.attn",
        "mlp_norm": "norm_attn_norm.norm_2",
    },
)
_add(
    "llama4",
    "Llama4ForCausalLM",
    sizes(
        intermediate_size=EXPERT_FF,
        intermediate_size_mlp=FF,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=128,
    ),
)
_add(
    "deepseek2",
    "DeepseekV2ForCausalLM",
    sizes(
        head_dim=None,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        n_shared_experts=1,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
)
_add(
    "deepseek3",
    "DeepseekV3ForCausalLM",
    sizes(
        head_dim=None,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
    ),
    published={"scoring_func": "sigmoid"},
)
_add(
    "glm4moe",
    "Glm4MoeForCausalLM",
    sizes(
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        n_shared_experts=1,
        first_k_dense_replace=1,
        use_qk_norm=True,
        n_group=1,
        topk_group=1,
    ),
)
_add(
    "glm4moe-lite",
    "Glm4MoeLiteForCausalLM",
    sizes(
        head_dim=None,
        num_key_value_heads=HEADS,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    published={"scoring_func": "sigmoid"},
)
_add(
    "dots1",
    "Dots1ForCausalLM",
    sizes(
        num_key_value_heads=HEADS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    published={"scoring_func": "sigmoid"},
)
_add(
    "ernie4_5-moe",
    "Ernie4_5_MoeForCausalLM",
    sizes(
        intermediate_size=64,
        head_dim=None,
        moe_num_experts=EXPERTS,
        moe_k=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
)
_add(
    "hunyuan-moe",
    "HunYuanMoEV1ForCausalLM",
    sizes(num_experts=EXPERTS, moe_topk=CHOSEN, num_shared_expert=1, moe_intermediate_size=FF),
    published={
        "moe_topk": [CHOSEN] * LAYERS,
        "num_shared_expert": [1] * LAYERS,
        "moe_intermediate_size": [FF] * LAYERS,
    },
)
_add(
    "exaone-moe",
    "ExaoneMoeForCausalLM",
    sizes(
        sliding_window=6,
        sliding_window_pattern=4,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        num_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    published={"scoring_func": "sigmoid"},
)
_add(
    "minimax-m2",
    "MiniMaxM2ForCausalLM",
    sizes(intermediate_size=EXPERT_FF, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN),
    published={"rotary_dim": HEAD_DIM, "scoring_func": "sigmoid"},
)
_add(
    "afmoe",
    "AfmoeForCausalLM",
    experts(
        mup_enabled=True,
        num_shared_experts=1,
        num_dense_layers=1,
        sliding_window=6,
        n_group=1,
        topk_group=1,
    ),
    published={"score_func": "sigmoid", "route_norm": True},
    layout={
        "mlp_norm": "pre_mlp_layernorm",
        "attn_out": "post_attention_layernorm",
        "mlp_out": "post_mlp_layernorm",
    },
)

# -- hybrid and recurrent -------------------------------------------------------------------
_add(
    "qwen3next",
    "Qwen3NextForCausalLM",
    experts(
        shared_expert_intermediate_size=40,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
)
_add(
    "qwen3_5",
    "Qwen3_5ForCausalLM",
    sizes(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
)
_add(
    "lfm2",
    "Lfm2ForCausalLM",
    sizes(
        tie_word_embeddings=True,
        head_dim=None,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    layout={"attn_norm": "operator_norm", "mlp_norm": "ffn_norm"},
)
_add(
    "lfm2moe",
    "Lfm2MoeForCausalLM",
    experts(
        tie_word_embeddings=True,
        head_dim=None,
        num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    layout={"attn_norm": "operator_norm", "mlp_norm": "ffn_norm"},
)
_add(
    "falcon-h1",
    "FalconH1ForCausalLM",
    sizes(
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
    ),
    layout={
        "mlp_norm": "pre_ff_layernorm",
        "attn_out": "self_attn",
        "norm_of_attention_only": True,
    },
)
_add(
    "granitehybrid",
    "GraniteMoeHybridForCausalLM",
    sizes(
        head_dim=None,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        shared_intermediate_size=40,
        layer_types=["mamba", "attention", "mamba", "attention"],
        mamba_n_heads=6,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    published={"layer_types": ["mamba", "attention", "mamba", "attention"]},
    layout={"scale": 0.4, "mlp_out": ("block_sparse_moe", "shared_mlp")},
)
_add(
    "jamba",
    "JambaForCausalLM",
    sizes(
        head_dim=None,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=3,
        use_mamba_kernels=False,
    ),
    layout={"mlp_norm": "pre_ff_layernorm"},
)
_add(
    "nemotron-h",
    "NemotronHForCausalLM",
    sizes(
        time_step_min=1e-9,
        layers_block_type=["mamba", "attention", "mlp", "mamba"],
        mamba_num_heads=2,
        mamba_head_dim=64,
        n_groups=1,
        ssm_state_size=16,
        conv_kernel=4,
        expand=2,
    ),
    published={
        "hybrid_override_pattern": "M*-M",
        "num_experts_per_tok": None,
        "n_routed_experts": None,
        "num_experts": None,
        "n_group": None,
        "topk_group": None,
    },
    layout={"attn_norm": "norm", "mlp_norm": None, "attn": "mixer", "parallel": True},
)
_add(
    "mamba",
    "MambaForCausalLM",
    {
        "hidden_size": EMBD,
        "num_hidden_layers": LAYERS,
        "state_size": 8,
        "time_step_rank": 3,
        "tie_word_embeddings": False,
    },
    layout={"attn_norm": "norm", "mlp_norm": None, "attn": "mixer", "parallel": True},
)
_add(
    "falcon-mamba",
    "FalconMambaForCausalLM",
    {
        "mixer_rms_eps": 1e-5,
        "hidden_size": EMBD,
        "num_hidden_layers": LAYERS,
        "state_size": 8,
        "time_step_rank": 3,
        "tie_word_embeddings": False,
    },
    layout={"attn_norm": "norm", "mlp_norm": None, "attn": "mixer", "parallel": True},
)
_add(
    "mamba2",
    "Mamba2ForCausalLM",
    {
        "hidden_size": EMBD,
        "num_hidden_layers": LAYERS,
        "state_size": 16,
        "num_heads": 6,
        "head_dim": 16,
        "n_groups": 1,
        "tie_word_embeddings": False,
    },
    layout={"attn_norm": "norm", "mlp_norm": None, "attn": "mixer", "parallel": True},
)

# -- code that is not in transformers -------------------------------------------------------
_add("internlm2", "LlamaForCausalLM", sizes(head_dim=None), export=_internlm2)
_add("xverse", "LlamaForCausalLM", sizes(head_dim=None), export=_xverse)
_add("orion", "LlamaForCausalLM", sizes(head_dim=None), adapt=_layer_norms, export=_orion)
_add("exaone", "LlamaForCausalLM", sizes(head_dim=None), export=_exaone)
_add(
    "qwen",
    "Qwen2ForCausalLM",
    sizes(head_dim=None, num_key_value_heads=HEADS),
    adapt=None,
    export=_qwen,
)
_add(
    "minicpm",
    "GraniteForCausalLM",
    sizes(
        head_dim=None,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=(HEADS / EMBD) ** 0.5,
        logits_scaling=2.0,
    ),
    export=_minicpm,
    layout={"scale": 0.4},
)
_add(
    "deepseek",
    "LlamaForCausalLM",
    sizes(head_dim=None, num_key_value_heads=HEADS),
    adapt=_mixtures,
    export=_deepseek,
)
_add(
    "gemma3n",
    "Gemma3nForCausalLM",
    sizes(
        intermediate_size=2048,
        tie_word_embeddings=True,
        sliding_window=6,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=328,
        laurel_rank=64,
        activation_sparsity_pattern=[0.95] * 4,
    ),
    gelu=True,
    layout={"streams": True, "mlp_norm": "pre_feedforward_layernorm"},
)
_add(
    "mellum",
    "MellumForCausalLM",
    experts(
        rope_parameters={
            x: {"rope_type": "default", "rope_theta": 10000.0}
            for x in ("full_attention", "sliding_attention")
        },
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
)
_add(
    "solar-open",
    "SolarOpenForCausalLM",
    sizes(
        n_routed_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_FF,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
    ),
    published={"partial_rotary_factor": 1.0},
)
_add(
    "qwen3_5moe",
    "Qwen3_5MoeForCausalLM",
    experts(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        shared_expert_intermediate_size=40,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
)

#: what cannot be compared, and why
LEFT_OUT = {
    "gptj": "llama.cpp has no such architecture",
    "baichuan": "llama.cpp's converter calls itself without end",
    "bamba": "llama.cpp's converter reorders whole heads, of which half is rotated",
    "mistral with a window": "llama.cpp lets every token see all before it",
    "command-r with norms of q and k": "llama.cpp reads them in models of 64 blocks only",
    "stablelm with norms of q and k": "llama.cpp's converter loses them",
    "rwkv": "transformers has version 4, llama.cpp has 6 and 7",
    "t5, bert and other encoders": "mia reads decoders",
}
