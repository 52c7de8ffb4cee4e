"""Options that mean the same everywhere, declared once.

A command takes dataclasses of options (`ModelOptions`, `PromptOptions`, …) as
parameters; `command` unfolds their fields into options of the command line and folds
the values back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
import typer.core

from mia.errors import MiaError

MODEL, PROMPT, GENERATION, CHANGES, OUTPUT = (
    "Model",
    "Prompt",
    "Generation",
    "Changes while it runs",
    "Output",
)


#: options that take several words each time they are given; typer has none of these
_SEVERAL = {"--patch": 4, "--save": 2}
#: and one whose first word tells how many there are
_BY_FIRST = {"--ablate-with": {"mean": 2, "resample-from": 2}}
_JOINT = "\x1f"


class _Command(typer.core.TyperCommand):
    """Joins the words of such an option into one, which `split_words` takes apart."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            out.append(word)
            n = _SEVERAL.get(word)
            if word in _BY_FIRST and rest:
                n = _BY_FIRST[word].get(rest[0], 1)
            if n is not None and any(word in p.opts for p in self.params):
                values, rest = rest[:n], rest[n:]
                if len(values) < n:
                    print(f"mia: {word} takes {n} values, {len(values)} are given", file=sys.stderr)
                    raise typer.Exit(2)
                out.append(_JOINT.join(values))
        return super().parse_args(ctx, out)


def split_words(values: list[str] | None) -> list[list[str]]:
    """The words of each time an option of several words was given."""
    return [v.split(_JOINT) for v in values or []]


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


@dataclass
class ModelOptions:
    model: Annotated[
        str,
        _option(
            "-m",
            "--model",
            help="A .gguf file, or a name (mia models).",
            panel=MODEL,
            envvar="MIA_MODEL",
        ),
    ] = "smollm2"
    threads: Annotated[
        int | None, _option("-t", "--threads", help="Processors to use.", panel=MODEL, min=1)
    ] = None
    gpu_layers: Annotated[
        int | None, _option("--gpu-layers", help="Blocks on the GPU, -1 for all.", panel=MODEL)
    ] = None
    ctx: Annotated[
        int | None,
        _option("--ctx", help="Longest prompt with its continuation.", panel=MODEL, min=1),
    ] = None


@dataclass
class PromptOptions:
    prompt: Annotated[
        str | None,
        _option("-p", "--prompt", help="The prompt. \\n, \\t and \\\\ are read.", panel=PROMPT),
    ] = None
    prompt_file: Annotated[
        str | None,
        _option("-f", "--file", help="Read the prompt from a file, - for stdin.", panel=PROMPT),
    ] = None
    bos: Annotated[
        bool | None,
        _option(
            "--bos/--no-bos",
            help="Put the BOS token in front; default: what the model asks for.",
            panel=PROMPT,
        ),
    ] = None
    chat: Annotated[
        bool,
        _option("--chat", help="The prompt is a user's turn: use the chat template.", panel=PROMPT),
    ] = False


@dataclass
class GenerationOptions:
    n_predict: Annotated[
        int, _option("-n", "--n-predict", help="Tokens to generate.", panel=GENERATION, min=0)
    ] = 32
    temperature: Annotated[
        float, _option("--temperature", help="0 is greedy.", panel=GENERATION)
    ] = 0.0
    sample_top_k: Annotated[
        int, _option("--sample-top-k", help="Sample from the k best, 0 for all.", panel=GENERATION)
    ] = 0
    top_p: Annotated[float, _option("--top-p", help="Nucleus sampling.", panel=GENERATION)] = 1.0
    min_p: Annotated[
        float,
        _option("--min-p", help="Least share of the best token's probability.", panel=GENERATION),
    ] = 0.0
    repeat_penalty: Annotated[
        float, _option("--repeat-penalty", help="1 is off.", panel=GENERATION)
    ] = 1.0
    frequency_penalty: Annotated[
        float, _option("--frequency-penalty", help="0 is off.", panel=GENERATION)
    ] = 0.0
    seed: Annotated[int, _option("--seed", help="Of the sampler.", panel=GENERATION)] = 0


@dataclass
class ChangeOptions:
    patch: Annotated[
        list[str] | None,
        _option(
            "--patch",
            help="SITE FILE FROM TO: put the activations of token FROM in a capture file at token TO. "
            "Tokens may be ranges (3..7), lists (1,4) and negative. May be given several times.",
            panel=CHANGES,
            metavar="SITE FILE FROM TO",
        ),
    ] = None
    patch_mode: Annotated[
        str,
        _option(
            "--mode",
            help="How patches act: replace, add, subtract, average (of one file and the run's own, or of several files).",
            panel=CHANGES,
        ),
    ] = "replace"
    ablate: Annotated[
        str | None,
        _option("--ablate", help="Heads to silence, as LAYER.HEAD: 3.5,4.0,7.*", panel=CHANGES),
    ] = None
    select: Annotated[
        str | None,
        _option(
            "--select",
            help="Heads to keep; the others of their layers are silenced.",
            panel=CHANGES,
        ),
    ] = None
    ablate_with: Annotated[
        str | None,
        _option(
            "--ablate-with",
            help="What silenced heads give instead: zero; mean FILE (of a capture of head_out); resample "
            "(what they give at other tokens of the prompt); resample-from FILE.",
            panel=CHANGES,
            metavar="zero|mean FILE|resample",
        ),
    ] = None
    ablate_attention: Annotated[
        bool,
        _option(
            "--ablate-attention",
            help="Silence heads at their attention weights, not at head_out (turns flash attention off).",
            panel=CHANGES,
        ),
    ] = False
    ablate_seed: Annotated[
        int, _option("--ablate-seed", help="Of resampling.", panel=CHANGES, min=0)
    ] = 0
    block: Annotated[
        list[str] | None,
        _option(
            "--block",
            help='QUERIES->KEYS: these tokens may not look at those, like "5->0", "3..7->0,1", "5..->0" (5 and '
            'all after it); "5->0@2..4" in some layers, "5->0@3.2,4.*" in some heads. Several times; '
            "turns flash attention off.",
            panel=CHANGES,
            metavar="QUERIES->KEYS",
        ),
    ] = None
    steer: Annotated[
        list[str] | None,
        _option("--steer", help="A vector file to add while running.", panel=CHANGES),
    ] = None
    coeff: Annotated[
        float | None, _option("--coeff", help="How much of it; default 1.", panel=CHANGES)
    ] = None
    steer_layers: Annotated[
        str | None,
        _option(
            "--steer-layers", help="Layers to steer at; default: all the vector has.", panel=CHANGES
        ),
    ] = None


@dataclass
class OutputOptions:
    json: Annotated[bool, _option("--json", help="Print one JSON document.", panel=OUTPUT)] = False
    out: Annotated[
        str | None, _option("-o", "--out", help="Write the JSON document to a file.", panel=OUTPUT)
    ] = None
    quiet: Annotated[bool, _option("-q", "--quiet", help="No notices on stderr.", panel=OUTPUT)] = (
        False
    )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What mia raises on purpose is one line on stderr, and exit code 1."""
    try:
        yield
    except MiaError as err:
        print(f"mia: {err}", file=sys.stderr)
        raise typer.Exit(1) from err


@functools.cache
def _unfolded(group: type) -> list[inspect.Parameter]:
    """A dataclass's fields as parameters; most commands have the same groups."""
    types = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
        )
        for f in fields(group)
    ]


def command(
    app: typer.Typer, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose dataclass parameters become options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, type] = {}
        required: list[inspect.Parameter] = []
        optional: list[inspect.Parameter] = []
        for name, p in inspect.signature(function).parameters.items():
            kind = hints[name]
            if is_dataclass(kind):
                groups[name] = kind  # type: ignore[assignment]
                continue
            p = p.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY)
            (required if p.default is inspect.Parameter.empty else optional).append(p)
        for group in groups.values():
            optional.extend(_unfolded(group))

        @functools.wraps(function)
        def call(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
            with one_line_errors():
                function(**values)

        parameters = [*required, *optional]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        del call.__wrapped__  # typer would look through to the dataclasses
        app.command(cls=_Command, **settings)(call)
        return function

    return register
