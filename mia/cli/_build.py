"""From options to what the library takes: models, prompts, changes, sampling, vectors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mia.cli._command import given, refuse, split_words
from mia.cli._groups import ChangeOptions, GenerationOptions, ModelOptions, PromptOptions
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.methods.changes import Changes
    from mia.model import Model
    from mia.request import Sampling

_PENALTIES = ("repeat_penalty", "frequency_penalty")
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def open_model(o: ModelOptions, *, small_effects: bool = False) -> Model:
    """`small_effects`: what is measured can drown in rounding; a notice says if --as would help."""
    from mia.llama import library_info
    from mia.model import Model
    from mia.notices import notice

    m = Model(
        o.model,
        ctx=o.ctx,
        threads=o.threads,
        gpu_layers=o.gpu_layers,
        rpc=o.rpc,
        as_type=o.as_type,
        lora=o.lora,
    )
    if o.gpu_layers and not m.rpc and library_info()["gpu"] == "no":
        notice("--gpu-layers does nothing: this llama.cpp was built for the CPU alone")
    if small_effects and o.as_type is None:
        from mia.models.advice import advice

        if text := advice(m):
            notice(f"{text}: --as f16")
    return m


def unescaped(text: str) -> str:
    """A text as typed, with \\n, \\t and \\\\ read."""
    return re.sub(r"\\([nt\\])", lambda m: _ESCAPES[m[1]], text)


def prompt_text(o: PromptOptions) -> str:
    """The prompt as typed (escapes read), or as the file has it without a newline at its end."""
    if (o.prompt is None) == (o.prompt_file is None):
        raise UsageError("give the prompt once: -p TEXT, or -f FILE (- for stdin)")
    if o.prompt is not None:
        refuse(("keep_newline",), "is for a prompt from a file or stdin (-f)")
        return unescaped(o.prompt)
    assert o.prompt_file is not None
    if o.prompt_file == "-":
        from mia.io.runs import read_stdin

        text = read_stdin()
    else:
        from mia.io.files import read_utf8

        text = read_utf8(o.prompt_file, f"the prompt from {o.prompt_file}")
    return text if o.keep_newline else text.removesuffix("\n")


def prompt_ids(model: Model, o: PromptOptions) -> list[int]:
    """Token ids of the prompt, chat template and BOS applied. A notice says if the model makes an
    attention sink of its first token, because nobody decided whether it has a BOS."""
    from mia.measure.prompts import first_token_is_sink
    from mia.notices import MissingBos, notice

    ids = model.ids(prompt_text(o), bos=o.bos, chat=o.chat)
    undecided = o.bos is None and not o.chat and model.bos_token >= 0 and not model.has_bos(ids)
    if undecided and first_token_is_sink(model):
        notice(
            f"no BOS in front: the model makes an attention sink of the first token "
            f"{model.piece(ids[0])!r} and hardly reads it; --bos puts {model.piece(model.bos_token)} "
            "there (--no-bos: leave it)",
            MissingBos,
        )
    return ids


def changes(o: ChangeOptions, *, patched: bool = False) -> Changes:
    """What the options change. `patched`: the command itself patches, in the mode of
    --patch-mode."""
    from mia.methods.changes import Changes

    if o.patch_mode is not None and not o.patch and not patched:
        raise UsageError("--patch-mode needs --patch")
    if not o.steer and (o.steer_coeff is not None or o.steer_layers is not None):
        raise UsageError("--steer-coeff and --steer-layers need --steer")
    if not (o.ablate_with or "").startswith("resample"):
        refuse(("ablate_seed",), "needs --ablate-with resample or resample-from FILE")
    return Changes(
        patch=split_words(o.patch),
        patch_mode=o.patch_mode or "replace",
        ablate=o.ablate,
        select=o.select,
        ablate_with=None if o.ablate_with is None else split_words([o.ablate_with])[0],
        ablate_attention=o.ablate_attention,
        ablate_seed=o.ablate_seed,
        ablate_experts=o.ablate_experts,
        zero_experts=o.zero_experts,
        force_experts=o.force_experts,
        block=o.block or (),
        steer=o.steer or (),
        steer_coeff=o.steer_coeff,
        steer_layers=o.steer_layers,
    )


def check_layer_zero(layer_zero: bool, file: str) -> None:
    """Refuses --layer-zero for a file that keeps layer 0 anyway."""
    if layer_zero and not file.endswith(".gguf"):
        raise UsageError(f"--layer-zero is for a .gguf; {file} keeps layer 0 anyway")


def sampling(o: GenerationOptions) -> Sampling:
    from mia.notices import notice
    from mia.request import Sampling

    sampling = Sampling(
        temperature=o.temperature,
        top_k=o.sample_top_k,
        top_p=o.top_p,
        min_p=o.min_p,
        repeat_penalty=o.repeat_penalty,
        frequency_penalty=o.frequency_penalty,
        seed=o.seed,
    )
    drawing = ("sample_top_k", "top_p", "min_p", "seed")
    idle = [n for n in drawing if given(n)] if o.temperature == 0 else []
    if o.n_predict == 0:
        idle = [n for n in ("temperature", *drawing, *_PENALTIES) if given(n)]
    if idle:
        names = " and ".join(f"--{n.replace('_', '-')}" for n in idle)
        why = "-n 0 generates nothing" if o.n_predict == 0 else "at temperature 0 nothing is drawn"
        notice(f"{names} does nothing: {why}" if len(idle) == 1 else f"{names} do nothing: {why}")
    return sampling
