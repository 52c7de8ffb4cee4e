"""From options to what the library takes: models, prompts, changes, sampling, vectors."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from mia.cli._command import split_words
from mia.cli._groups import ChangeOptions, GenerationOptions, ModelOptions, PromptOptions
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.methods.changes import Changes
    from mia.model import Model
    from mia.request import Sampling

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def open_model(o: ModelOptions) -> Model:
    from mia.model import Model

    return Model(o.model, ctx=o.ctx, threads=o.threads, gpu_layers=o.gpu_layers)


def unescaped(text: str) -> str:
    """A text as typed, with \\n, \\t and \\\\ read."""
    return re.sub(r"\\([nt\\])", lambda m: _ESCAPES[m[1]], text)


def prompt_text(o: PromptOptions) -> str:
    """The prompt as typed (escapes read) or as the file has it."""
    if (o.prompt is None) == (o.prompt_file is None):
        raise UsageError("give the prompt once: -p TEXT, or -f FILE (- for stdin)")
    if o.prompt is not None:
        return unescaped(o.prompt)
    assert o.prompt_file is not None
    if o.prompt_file == "-":
        return sys.stdin.read()
    from mia.io.files import read_utf8

    return read_utf8(o.prompt_file, f"the prompt from {o.prompt_file}")


def prompt_ids(model: Model, o: PromptOptions) -> list[int]:
    """Token ids of the prompt, chat template and BOS applied."""
    return model.ids(prompt_text(o), bos=o.bos, chat=o.chat)


def changes(o: ChangeOptions, *, patched: bool = False) -> Changes:
    """What the options change. `patched`: the command itself patches, in the mode of
    --patch-mode."""
    from mia.methods.changes import Changes

    if o.patch_mode is not None and not o.patch and not patched:
        raise UsageError("--patch-mode needs --patch")
    if not o.steer and (o.steer_coeff is not None or o.steer_layers is not None):
        raise UsageError("--steer-coeff and --steer-layers need --steer")
    return Changes(
        patch=split_words(o.patch),
        patch_mode=o.patch_mode or "replace",
        ablate=o.ablate,
        select=o.select,
        ablate_with=None if o.ablate_with is None else split_words([o.ablate_with])[0],
        ablate_attention=o.ablate_attention,
        ablate_seed=o.ablate_seed,
        block=o.block or (),
        steer=o.steer or (),
        steer_coeff=o.steer_coeff,
        steer_layers=o.steer_layers,
    )


def sampling(o: GenerationOptions) -> Sampling:
    from mia.request import Sampling

    return Sampling(
        temperature=o.temperature,
        top_k=o.sample_top_k,
        top_p=o.top_p,
        min_p=o.min_p,
        repeat_penalty=o.repeat_penalty,
        frequency_penalty=o.frequency_penalty,
        seed=o.seed,
    )
