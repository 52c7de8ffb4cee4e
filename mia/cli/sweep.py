"""The command `sweep`: one run changed along axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mia.cli._build import open_model, prompt_ids, prompt_text, unescaped
from mia.cli._command import command, option, refuse
from mia.cli._groups import (
    AgainstOption,
    CoeffOption,
    LayersOption,
    ModelOptions,
    NullOption,
    PromptOptions,
    SeedOption,
    TokensOption,
    TopOption,
)
from mia.errors import UsageError
from mia.show.report import Report

if TYPE_CHECKING:
    from mia.model import Model
    from mia.sweeps.experiments import Experiment

CHANGE = "What is changed: one of these"
PATCHING = "Patching"
LONG = "Long work"


@dataclass
class ExperimentOptions:
    corrupt: Annotated[
        str | None,
        option("--corrupt", help="Patch rows of -p's run into this prompt's run.", panel=CHANGE),
    ] = None
    swap: Annotated[
        list[str] | None,
        option(
            "--swap", help="Patch them into -p with texts replaced: 'France=Japan'.", panel=CHANGE
        ),
    ] = None
    noise_on: Annotated[
        str | None,
        option(
            "--noise-on",
            help="Patch them into -p with noise on the embeddings of these words.",
            panel=CHANGE,
        ),
    ] = None
    pairs: Annotated[
        str | None,
        option("--pairs", help="Patch for each pair of a file, instead of -p.", panel=CHANGE),
    ] = None
    paths_to: Annotated[
        str | None,
        option(
            "--paths-to",
            help="With --corrupt or --swap: heads of that run reach only these: logits, or "
            "q:9.6,9.9;v:7.* (path patching).",
            panel=PATCHING,
        ),
    ] = None
    zero: Annotated[bool, option("--zero", help="Rows become zero.", panel=CHANGE)] = False
    mean_of: Annotated[
        str | None,
        option("--mean-of", help="Rows become the mean over this prompt's rows.", panel=CHANGE),
    ] = None
    add: Annotated[
        str | None,
        option("--add", help="A vector is added: a file or arithmetic.", panel=CHANGE),
    ] = None
    block_keys: Annotated[
        bool,
        option(
            "--block-keys", help="Later tokens may not attend to a cell's tokens.", panel=CHANGE
        ),
    ] = False
    into: Annotated[
        Literal["corrupted", "clean"],
        option("--into", help="Which run is changed, by rows of the other.", panel=PATCHING),
    ] = "corrupted"
    align: Annotated[
        str | None,
        option(
            "--align",
            help="Prompts of two lengths: pair their tokens from the start or the end.",
            panel=PATCHING,
        ),
    ] = None
    noise: Annotated[
        float, option("--noise", help="Standard deviations of the noise.", panel=PATCHING)
    ] = 3.0
    noise_draws: Annotated[
        int, option("--noise-draws", help="Draws of the noise.", panel=PATCHING, min=1)
    ] = 10


@dataclass
class WorkOptions:
    explain: Annotated[
        bool,
        option("--explain", help="Say what it would cost, and run nothing.", panel=LONG),
    ] = False
    resume: Annotated[
        bool,
        option("--resume", help="Go on with the FILE.jsonl of -o, if it is there.", panel=LONG),
    ] = False
    shard: Annotated[
        str | None,
        option("--shard", help="Only one of several parts: 3/16 (see mia merge).", panel=LONG),
    ] = None
    batch_mem: Annotated[
        int,
        option(
            "--batch-mem", help="Memory for cells that run together, in MiB.", panel=LONG, min=1
        ),
    ] = 256
    dask: Annotated[
        str | None,
        option("--dask", help="Run on the workers of this scheduler: tcp://HOST:PORT.", panel=LONG),
    ] = None


def register(app: typer.Typer) -> None:
    prompt = "-p 'The Eiffel Tower is in the city of' --bos --answer ' Paris'"
    command(
        app,
        "sweep",
        panel="Look inside",
        plot=True,
        rows=True,
        examples=[
            f"mia sweep {prompt} --swap 'Eiffel Tower=Colosseum' --align end --against ' Rome'",
            f"mia sweep {prompt} --noise-on 'Eiffel Tower' --at mlp_out --layer-window 10",
            f"mia sweep {prompt} --zero --at head_out --over layer,head --token-idx -1",
            f"mia sweep {prompt} --block-keys --layer-window 5 --plot blocked.png",
            "mia sweep --pairs ioi.jsonl --bos -o rows.jsonl --resume",
        ],
    )(sweep)
    command(
        app,
        "merge",
        panel="Look inside",
        plot=True,
        examples=["mia merge 1.jsonl 2.jsonl 3.jsonl -o all.jsonl"],
    )(merge)


def sweep(
    model: ModelOptions,
    prompt: PromptOptions,
    change: ExperimentOptions,
    work: WorkOptions,
    over: Annotated[
        str, typer.Option("--over", help="Axes: layer, head, token, site, neuron, coeff.")
    ] = "layer,token",
    answer: Annotated[
        str, typer.Option("--answer", help='What should follow the prompt, like " Paris".')
    ] = "",
    against: AgainstOption = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="logprob, prob, logit, logit-diff, rank, kl or module:function; default: what the "
            "answers allow.",
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", help="Sites: resid_post (default), attn_out, mlp_out, head_out, q …"),
    ] = None,
    layers: LayersOption = None,
    token_idx: TokensOption = None,
    head_idx: Annotated[
        str | None, typer.Option("--head-idx", help="Heads of each layer: 0..3.")
    ] = None,
    neurons: Annotated[
        str | None, typer.Option("--neurons", help="Dimensions of a row or head: 0..9.")
    ] = None,
    coeff: CoeffOption = None,
    layer_window: Annotated[
        int,
        typer.Option(
            "--layer-window", help="How many layers around a cell's change with it.", min=1
        ),
    ] = 1,
    null: NullOption = 12,
    seed: SeedOption = 0,
    top_k: TopOption = 10,
    rows: str | None = None,
) -> Report:
    """Change one run along axes: a number for each cell, all cells of a prompt side by side.

    Some more cells, changed by 1e-5, measure the noise floor; cells within it are left blank.
    With -o FILE.jsonl each cell is written as a line of JSON as soon as it is known.
    """
    from mia.measure.answers import needs
    from mia.methods.sweep import explain, sweep as method
    from mia.ranges import parse_numbers
    from mia.sweeps.axes import axis_names

    kind = _kind(change)
    axis_names(over)
    if metric is not None:
        needs(metric)
    if work.explain:
        refuse(("resume", "dask", "plot"), "is of a sweep that runs, and --explain runs none")
        if rows is not None:
            raise UsageError("--explain writes no rows; give -o FILE.json, or none")
    asked: dict[str, Any] = {
        "over": over,
        "answer": unescaped(answer),
        "against": unescaped(against or ""),
        "metric": metric,
        "site": None if at is None else at.split(","),
        "layers": layers,
        "tokens": token_idx,
        "heads": head_idx,
        "neurons": neurons,
        "coeffs": None if coeff is None else parse_numbers(coeff, "--coeff"),
        "window": layer_window,
        "null": null,
        "memory": work.batch_mem << 20,
        "shard": work.shard,
    }
    with open_model(model, small_effects=True) as m:
        ids = None if kind == "pairs" else prompt_ids(m, prompt)
        experiment = _experiment(m, prompt, change, kind, seed)
        if work.explain:
            return explain(m, ids, experiment, **asked)
        long: dict[str, Any] = {"rows": rows, "resume": work.resume, "dask": work.dask}
        return method(m, ids, experiment, k=top_k, **asked, **long)


def merge(
    files: Annotated[list[str], typer.Argument(help="Files of mia sweep --shard I/N.")],
    out: Annotated[str, typer.Option("-o", "--out", help="Write this file.")],
) -> Report:
    """Join the shards of a sweep: the same file as if it had been written at once."""
    from mia.methods.sweep import merge as method
    from mia.show.report import check_ending

    check_ending(out, [".jsonl"])
    return method(files, out)


_KINDS = ("corrupt", "swap", "noise_on", "pairs", "zero", "mean_of", "add", "block_keys")


def _kind(o: ExperimentOptions) -> str:
    """Which of the changes is asked for. Raises `UsageError` for none, several, or an option that
    is of another."""
    kinds = [k for k in _KINDS if getattr(o, k) not in (None, False, [])]
    if len(kinds) != 1:
        names = ", ".join(f"--{k.replace('_', '-')}" for k in _KINDS)
        raise UsageError(f"give one of {names}")
    if kinds[0] != "noise_on":
        refuse(("noise", "noise_draws", "seed"), "needs --noise-on")
    if kinds[0] not in ("corrupt", "swap", "noise_on", "pairs"):
        refuse(("into", "align"), "needs --corrupt, --swap, --noise-on or --pairs")
    if kinds[0] not in ("corrupt", "swap"):
        refuse(("paths_to",), "needs --corrupt or --swap")
    if kinds[0] == "pairs":
        refuse(("prompt", "prompt_file", "keep_newline", "chat"), "is not for --pairs")
    if kinds[0] != "add":
        refuse(("coeff",), "needs --add")
    return kinds[0]


def _experiment(
    m: Model, prompt: PromptOptions, o: ExperimentOptions, kind: str, seed: int
) -> Experiment:
    from mia.sweeps.experiments import Ablation, Blocking, Patching, Steering
    from mia.vectors.expression import read

    if kind == "add":
        return Steering(read(o.add or "", m.facts))
    if kind == "block_keys":
        return Blocking()
    if kind in ("zero", "mean_of"):
        return Ablation(None if o.mean_of is None else _ids(m, prompt, unescaped(o.mean_of)))
    if kind == "noise_on":
        return Patching(
            noise_on=unescaped(o.noise_on or ""),
            noise=o.noise,
            draws=o.noise_draws,
            seed=seed,
            into=o.into,
            align=o.align,
        )
    return _patching(m, prompt, o)


def _patching(m: Model, prompt: PromptOptions, o: ExperimentOptions) -> Experiment:
    from mia.datasets.prompt_pairs import load_prompt_pairs
    from mia.sweeps.experiments import Patching, PatchingPairs, PathPatching, swapped

    if o.pairs is not None:
        pairs = load_prompt_pairs(o.pairs)
        return PatchingPairs(pairs, into=o.into, align=o.align, bos=prompt.bos)
    if o.swap:
        text = swapped(prompt_text(prompt), _swaps(o.swap))
    else:
        text = unescaped(o.corrupt or "")
    other = _ids(m, prompt, text)
    if o.paths_to is None:
        return Patching(other, into=o.into, align=o.align)
    refuse(("into",), "is not for --paths-to, which changes the clean run")
    return PathPatching(other, "" if o.paths_to == "logits" else o.paths_to, align=o.align)


def _ids(m: Model, prompt: PromptOptions, text: str) -> list[int]:
    return m.ids(text, bos=prompt.bos, chat=prompt.chat)


def _swaps(texts: Sequence[str]) -> dict[str, str]:
    swaps: dict[str, str] = {}
    for text in texts:
        word, equals, other = unescaped(text).partition("=")
        if not equals or not word:
            raise UsageError(f"--swap {text!r} is not WORD=OTHER")
        if word in swaps:
            raise UsageError(f"--swap replaces {word!r} twice")
        swaps[word] = other
    return swaps
