"""From options to the library: models, prompts, edits, sampling."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from mia.cli._options import (
    _JOINT,
    ChangeOptions,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    split_words,
)
from mia.cli._output import notice
from mia.errors import RangeError, UsageError
from mia.sites import BY_KEY, parse_many, reads_as_attn_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from mia.edits import Edit, Tokens
    from mia.methods.ablation import Heads
    from mia.model import Model
    from mia.request import Sampling

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
PATCH_MODES = ("replace", "add", "subtract", "average")


def open_model(o: ModelOptions) -> Model:
    from mia.model import Model

    return Model(o.model, ctx=o.ctx, threads=o.threads, gpu_layers=o.gpu_layers)


def prompt_text(o: PromptOptions) -> str:
    """The prompt as typed (escapes read) or as the file has it."""
    if (o.prompt is None) == (o.prompt_file is None):
        raise UsageError("give the prompt once: -p TEXT, or -f FILE (- for stdin)")
    if o.prompt is not None:
        return re.sub(r"\\([nt\\])", lambda m: _ESCAPES[m[1]], o.prompt)
    assert o.prompt_file is not None
    if o.prompt_file == "-":
        return sys.stdin.read()
    from mia.io.files import read_utf8

    return read_utf8(o.prompt_file, f"the prompt from {o.prompt_file}")


def prompt_tokens(model: Model, o: PromptOptions) -> list[int]:
    """Token ids of the prompt, chat template and BOS applied."""
    text = prompt_text(o)
    tokens = model.tokenize(model.chat(text) if o.chat else text, bos=o.bos)
    if not tokens:
        raise UsageError("the prompt is empty")
    return tokens


def warn_first_tokens(
    model: Model, tokens: list[int], edited: list[int], output: OutputOptions
) -> None:
    """The first token of a prompt draws attention to itself, and says little else."""
    if model.bos_token >= 0 and tokens[0] != model.bos_token and any(i < 2 for i in edited):
        notice(
            f"token {min(edited)} is at the very start of a prompt without a BOS, where models read a token as a "
            f"mere beginning; --bos puts {model.piece(model.bos_token)} in front",
            output,
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


def token_indices(text: str, n_tokens: int, what: str = "token index") -> list[int]:
    """`13`, `-1`, `3..7`, `1,4`, `*`; negative ones count from the end. Raises `RangeError`."""
    out: list[int] = []
    for part in text.split(","):
        part = part.strip()
        if part in ("*", "all"):
            out.extend(range(n_tokens))
            continue
        m = re.fullmatch(r"(-?\d+)(?:(?:\.\.|:)(-?\d+))?", part)
        if m is None:
            raise RangeError(
                f"{what} {text!r}: {part!r} is not an index, a range like 3..7 or a list like 1,4"
            )
        ends = [int(m[1]), int(m[1] if m[2] is None else m[2])]
        for i in ends:
            if not -n_tokens <= i < n_tokens:
                raise RangeError(
                    f"{what} {i} is out of range; there are {n_tokens} tokens, 0 to {n_tokens - 1}"
                )
        first, last = (i % n_tokens for i in ends)
        if last < first:
            raise RangeError(f"{what} {text!r}: the range {part} runs backwards")
        out.extend(range(first, last + 1))
    return out


def edit_site(text: str, output: OutputOptions) -> str:
    """A site as a command reads it: `kqv_out` in the old sense, with a notice."""
    if not reads_as_attn_out(text):
        return text
    notice(
        "kqv_out is read as attn_out, what attention adds to the residual; heads are at head_out",
        output,
    )
    return text.replace("kqv_out", "attn_out", 1)


def patch_edits(
    model: Model,
    site_text: str,
    files: list[str],
    from_text: str,
    to_text: str,
    *,
    mode: str,
    n_tokens: int,
    output: OutputOptions,
) -> list[Edit]:
    """Edits that bring captured activations into a run.

    `replace`: they take the place of the run's own; `add`, `subtract`: they are added or
    taken away; `average`: of one file, the mean of it and the run's own takes its place, of
    several the mean of the files.
    """
    import numpy as np

    from mia.edits import Edit
    from mia.io import activations

    if mode not in PATCH_MODES:
        raise UsageError(f"unknown mode {mode!r}; known: {', '.join(PATCH_MODES)}")
    if len(files) > 1 and mode != "average":
        raise UsageError(f"{len(files)} files are given; only --mode average takes more than one")
    loaded = [activations.load(f) for f in files]
    for c in loaded:
        c.check(model)
    to = token_indices(to_text, n_tokens, "--to-token-idx")
    edits: list[Edit] = []
    for site in parse_many(edit_site(site_text, output), model.n_layer):
        if site.name in BY_KEY:
            raise UsageError(
                f"{site} cannot be patched from a file; its keys are those of one prompt"
            )
        rows = []
        for c in loaded:
            every = c.at(site)
            taken = every[token_indices(from_text, len(every), "--from-token-idx")]
            if len(taken) not in (1, len(to)):
                raise UsageError(
                    f"{len(taken)} tokens are taken from {c.source}, but {len(to)} are to be changed"
                )
            rows.append(np.broadcast_to(taken, (len(to), taken.shape[-1])))
        value = np.mean(rows, axis=0, dtype=np.float32)
        op, coeff = {
            "replace": ("replace", 1.0),
            "add": ("add", 1.0),
            "subtract": ("add", -1.0),
            "average": ("blend", 0.5) if len(files) == 1 else ("replace", 1.0),
        }[mode]
        edits.append(Edit(site, op, value, tokens=to, coeff=coeff))
    return edits


def ablation_edits(model: Model, o: ChangeOptions, tokens: list[int]) -> list[Edit]:
    """Edits of --ablate, --select and what goes with them."""
    from mia.methods import ablation

    heads: dict[int, set[int]] = {}
    sizes = (model.n_layer, model.n_head)
    if o.ablate is not None:
        for layer, h in ablation.parse_heads(o.ablate, *sizes, "--ablate").items():
            heads.setdefault(layer, set()).update(h)
    if o.select is not None:
        kept = ablation.parse_heads(o.select, *sizes, "--select")
        for layer, h in ablation.all_but(kept, model.n_head).items():
            heads.setdefault(layer, set()).update(h)
    if not heads:
        if o.ablate_with is not None or o.ablate_attention:
            raise UsageError("--ablate-with and --ablate-attention need --ablate or --select")
        return []
    return head_changer(model, o, tokens, sorted(heads))(
        {i: sorted(heads[i]) for i in sorted(heads)}
    )


def head_changer(
    model: Model, o: ChangeOptions, tokens: list[int], layers: list[int], at: Tokens = None
) -> Callable[[Heads], list[Edit]]:
    """From heads to the edits that silence them as --ablate-with and --ablate-attention say."""
    import numpy as np

    from mia.io import activations
    from mia.methods import ablation
    from mia.sites import Site

    how, *files = (o.ablate_with or "zero").split(_JOINT)
    known = ("zero", "mean FILE", "resample", "resample-from FILE")
    if how not in {k.split()[0] for k in known}:
        raise UsageError(f"--ablate-with {how!r} is not known; known: {', '.join(known)}")
    if o.ablate_attention:
        if how != "zero":
            raise UsageError(f"--ablate-attention zeroes the attention weights; it takes no {how}")
        return lambda heads: ablation.pattern_edits(heads, tokens=at)
    source = None
    if files:
        loaded = activations.load(files[0])
        loaded.check(model)
        source = {layer: loaded.at(Site("head_out", layer)) for layer in layers}
    elif how == "resample":
        source = ablation.head_outputs(model, tokens, layers)
    rng = np.random.default_rng(o.ablate_seed)

    def change(heads: Heads) -> list[Edit]:
        return ablation.head_edits(
            model,
            heads,
            how=how.removesuffix("-from"),
            source=source,
            tokens=at,
            n_tokens=len(tokens),
            rng=rng,
        )

    return change


def block_edits(model: Model, o: ChangeOptions, tokens: list[int]) -> list[Edit]:
    """Edits of --block."""
    from mia.methods import ablation

    blocks = [
        ablation.parse_block(text, len(tokens), model.n_layer, model.n_head)
        for text in o.block or []
    ]
    return [edit for b in blocks for edit in ablation.block_edits(model, b)]


def change_edits(
    model: Model, o: ChangeOptions, tokens: list[int], output: OutputOptions
) -> list[Edit]:
    """All edits that the options of a command ask for."""
    return [*prompt_edits(model, o, tokens, output), *steer_edits(model, o, output)[0]]


def prompt_edits(
    model: Model, o: ChangeOptions, tokens: list[int], output: OutputOptions
) -> list[Edit]:
    """Those of --patch, --ablate, --select and --block."""
    edits: list[Edit] = []
    for site, file, from_text, to_text in split_words(o.patch):
        edits += patch_edits(
            model,
            site,
            [file],
            from_text,
            to_text,
            mode=o.patch_mode,
            n_tokens=len(tokens),
            output=output,
        )
    touched = [i for e in edits for i in e.positions(len(tokens))]
    warn_first_tokens(model, tokens, touched, output)
    return [*edits, *ablation_edits(model, o, tokens), *block_edits(model, o, tokens)]


def steer_edits(
    model: Model, o: ChangeOptions, output: OutputOptions
) -> tuple[list[Edit], dict[str, Any]]:
    """Those of --steer, and what a document says of them."""
    from mia.cli._vectors import described, load_vector, steered_layers
    from mia.methods.steering import check_fits

    if not o.steer:
        for name, value in (("--coeff", o.coeff), ("--steer-layers", o.steer_layers)):
            if value is not None:
                raise UsageError(f"{name} needs --steer")
        return [], {}
    coeff = 1.0 if o.coeff is None else o.coeff
    edits, vectors = [], []
    for text in o.steer:
        vector = load_vector(text, model, output)
        check_fits(model, vector, text)
        layers = steered_layers(vector, o.steer_layers, model, text, output)
        edits += vector.edits(coeff=coeff, layers=layers)
        vectors.append(described(text, vector, layers))
    return edits, {"steer": vectors, "coeff": coeff}
