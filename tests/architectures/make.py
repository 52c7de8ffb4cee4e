"""Makes the tiny models: transformers draws the weights, llama.cpp's own converter writes the GGUF.

Runs in an environment with torch and transformers, and reads the converter from the source
release of llama-cpp-python (`converter_source`).
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_vocabulary import SPECIALS, gpt2_vocabulary

from .converter import converter
from .recipes import RECIPES, Recipe, Settings

SEED = 5
#: matrices at the end of an MLP with GELU
_LAST_OF_MLP = ("mlp.c_proj", "4h_to_h", "down_proj", "fc2")


def make(names: Iterable[str], folder: Path, source: Path) -> None:
    """Writes the models of some recipes as NAME.gguf.

    Args:
        source: a folder with the converter's `conversion` and `gguf-py`.
    """
    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    for name in names:
        write(RECIPES[name], build(RECIPES[name]), folder / f"{name}.gguf", source)


def build(recipe: Recipe) -> Any:
    """The reference: transformers' model with random weights, in float32."""
    cls = getattr(transformers, recipe.cls)
    tokens, _ = gpt2_vocabulary()
    n = len(tokens)
    config = cls.config_class(
        **{"vocab_size": n, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        **recipe.config,
        attn_implementation="eager",
    )
    torch.manual_seed(SEED)
    model = cls(config).eval().float()
    if recipe.adapt:
        recipe.adapt(model)
    draw(model, softly=recipe.gelu)
    if recipe.finish:
        recipe.finish(model)
    return model


@torch.no_grad()  # type: ignore[untyped-decorator]
def draw(model: Any, *, softly: bool = False) -> None:
    """Random weights such that a forgotten norm, bias or scale shows: activations of order 1,
    logits a few units wide, attention far from uniform.

    Args:
        softly: MLPs add little. llama.cpp's GELU is a table of half floats, whose steps would
            otherwise be all that a comparison shows.
    """
    torch.manual_seed(SEED)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    for name, p in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        noise = torch.randn_like(p)
        if p is embedding:
            p.copy_(0.5 * noise)
        elif head is not None and p is head.weight:
            p.copy_(noise * 3.0 / p.shape[1] ** 0.5)
        elif (
            last in ("A_log", "dt_bias", "D", "x_bias", "e_score_correction_bias")
            or "dt_proj.bias" in name
        ):
            p.add_(0.1 * noise)
        elif p.ndim == 1 and "bias" in last:
            p.copy_(0.2 * noise)
        elif p.ndim == 1:
            p.copy_(
                p.mean().nan_to_num().round() + 0.2 * noise
            )  # norms around 1 (or 0, as gemma's)
        elif last.endswith("bias"):
            p.copy_(0.2 * noise)
        else:
            gain = 1.6 if any(x in name for x in ("q_proj", "k_proj", "query_key", "qkv")) else 1.0
            fan_in = p.shape[-1] if p.ndim < 4 else p.shape[-2]
            if "experts" in name and p.ndim == 3:
                fan_in = p.shape[-1]
            if softly and ("mlp" in name or "ffn" in name):
                gain = 0.2 if any(x in name for x in _LAST_OF_MLP) else 0.4
            p.copy_(noise * gain / fan_in**0.5)
    for name, b in model.named_buffers():
        if "correction_bias" in name or name.endswith("expert_bias"):
            b.copy_(0.1 * torch.randn_like(b))


def write(recipe: Recipe, model: Any, path: Path, source: Path) -> Path:
    """Converts a reference to a GGUF with llama.cpp's converter.

    Args:
        source: a folder with the converter's `conversion` and `gguf-py`.
    """
    _on_path(source)
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        _save(recipe, model, Path(folder))
        hparams = _published(recipe, ModelBase.load_hparams(Path(folder), False))
        cls = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        import gguf

        cls.no_mtp = cls.supports_mtp_export  # no heads that guess several tokens
        path.parent.mkdir(parents=True, exist_ok=True)
        converter = cls(
            Path(folder), gguf.LlamaFileType.ALL_F32, path, model_name="tiny", hparams=hparams
        )
        converter = getattr(converter, "impl", converter)  # Mistral 3's stands before two others
        converter.set_vocab = _vocabulary_of(converter)
        converter.write()
    return path


def _save(recipe: Recipe, model: Any, folder: Path) -> None:
    if recipe.export is None:
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        _write_config(folder, _published(recipe, config))
        return
    from safetensors.torch import save_file

    tensors, config = recipe.export(dict(model.state_dict()), model.config.to_dict())
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    _write_config(folder, _published(recipe, config))


def _published(recipe: Recipe, config: Settings) -> Settings:
    return {k: v for k, v in {**config, **recipe.published}.items() if v is not None}


def _write_config(folder: Path, config: Settings) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    # gemma3's converter asks how many tokens there are
    words = {"model": {"vocab": dict.fromkeys(gpt2_vocabulary()[0])}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(words))


def _vocabulary_of(converter: Any) -> Callable[[], None]:
    """In place of the tokenizer that a random model does not have."""

    def write() -> None:
        import gguf

        tokens, merges = gpt2_vocabulary()
        kinds = gguf.TokenType
        w = converter.gguf_writer
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list(tokens)
        w.add_token_types([kinds.CONTROL if t in SPECIALS else kinds.NORMAL for t in tokens])
        w.add_token_merges(merges)
        w.add_bos_token_id(0)
        w.add_eos_token_id(0)
        w.add_eot_token_id(2)
        w.add_add_bos_token(True)

    return write


def _on_path(source: Path) -> None:
    for folder in (source / "gguf-py", source):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


if __name__ == "__main__":
    # a process of its own: the converter brings a gguf package of another version
    make(sys.argv[2:] or RECIPES, Path(sys.argv[1]), converter(Path(sys.prefix)))
