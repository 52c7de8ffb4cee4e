"""Names of Hugging Face's modules as spellings of sites."""

import warnings

import pytest

from mia.errors import SiteError
from mia.notices import MiaWarning
from mia.sites import parse_many


@pytest.mark.parametrize(
    ("text", "sites"),
    [
        ("model.layers.3", ["resid_post.3"]),
        ("model.layers.3.input_layernorm", ["attn_norm.3"]),
        ("model.layers.1..2.input_layernorm", ["attn_norm.1", "attn_norm.2"]),
        ("model.layers.0,-1.self_attn.v_proj", ["v.0", "v.4"]),
        ("model.layers.*.pre_feedforward_layernorm", [f"mlp_norm.{i}" for i in range(5)]),
        ("model.language_model.layers.3", ["resid_post.3"]),
        ("transformer.h.3.ln_1", ["attn_norm.3"]),
        ("transformer.h.3.ln_2", ["mlp_norm.3"]),
        ("transformer.h.3.post_attention_layernorm", ["mlp_norm.3"]),
        ("gpt_neox.layers.3.post_attention_layernorm", ["mlp_norm.3"]),
        ("gpt_neox.layers.3", ["resid_post.3"]),
        ("input_layernorm", [f"attn_norm.{i}" for i in range(5)]),
        ("input_layernorm.3", ["attn_norm.3"]),
        ("ln_1-3", ["attn_norm.3"]),
        ("v_proj.1,2", ["v.1", "v.2"]),
        ("model.embed_tokens", ["embed"]),
        ("transformer.wte", ["embed"]),
        ("model.norm", ["final_norm"]),
        ("transformer.ln_f", ["final_norm"]),
    ],
)
def test_a_modules_name_is_the_site_of_its_output(text: str, sites: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [str(s) for s in parse_many(text, 5)] == sites


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("model.layers.3.self_attn", "attn_out.3"),
        ("model.layers.3.self_attn.o_proj", "attn_out.3"),
        ("transformer.h.3.attn.c_proj", "attn_out.3"),
        ("gpt_neox.layers.3.attention.dense", "attn_out.3"),
        ("model.layers.3.mlp", "mlp_out.3"),
        ("model.layers.3.mlp.down_proj", "mlp_out.3"),
        ("transformer.h.3.mlp", "mlp_out.3"),
        ("lm_head", "logits"),
    ],
)
def test_a_site_that_differs_in_some_models_says_so(text: str, site: str) -> None:
    with pytest.warns(MiaWarning, match=f"{text} is read as {site.split('.')[0]}: "):
        assert [str(s) for s in parse_many(text, 5)] == [site]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model.layers.3.self_attn.q_proj", "gives q before its rotation"),
        ("model.layers.3.self_attn.k_norm", "gives k before its rotation"),
        ("q_proj", "gives q before its rotation"),
        ("model.layers.3.post_attention_layernorm", "mlp_norm.*Gemma 2"),
        ("post_attention_layernorm.3", "mlp_norm.*Gemma 2"),
        ("transformer.h.3.attn.c_attn", "as q, k and v"),
        ("gpt_neox.layers.3.attention.query_key_value", "as q, k and v"),
        ("model.layers.3.mlp.gate_proj", "inside the MLP"),
    ],
)
def test_a_module_that_is_no_site_says_why(text: str, reason: str) -> None:
    with pytest.raises(SiteError, match=f"'{text}' is no site: .*{reason}"):
        parse_many(text, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.layers.3.input_layernrm", "did you mean input_layernorm"),
        ("model.layers.3.self_attn.o_proj.weight", "did you mean self_attn.o_proj"),
        ("inputlayernorm", "did you mean input_layernorm"),
    ],
)
def test_near_names_of_modules(text: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        parse_many(text, 5)
