"""Options of the commands about in-context tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mia.cli._build import unescaped
from mia.cli._command import OUTPUT, option

if TYPE_CHECKING:
    from mia.methods.icl import TaskSetup

TASK, PANEL = "Task", "In-context tasks"

TaskArgument = Annotated[
    str, typer.Argument(help="A task (mia tasks), or a .json or .jsonl file of pairs.")
]
TasksArgument = Annotated[
    list[str], typer.Argument(help="Tasks (mia tasks), files of pairs, or all.")
]
TaskFileOption = Annotated[str, typer.Option("-o", "--out", help="The .safetensors file to write.")]
TaskFilesOption = Annotated[
    str,
    typer.Option(
        "-o",
        "--out",
        help="The .safetensors file to write; {name} stands for the task's name.",
    ),
]
SavedVectorOption = Annotated[
    str | None,
    typer.Option("--vector", help="A saved vector, {name} for the task's; default: train one."),
]
VectorLayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="Layers: 3,7 or 10..20; default: all, tried on dev (a saved vector's own).",
    ),
]
ByLayerOption = Annotated[
    bool, typer.Option("--by-layer", help="Accuracy with the vector at every layer too.")
]
CurvesPlotOption = Annotated[
    str | None,
    option("--plot", help="Draw accuracy by layer: .png, .svg or .pdf.", panel=OUTPUT),
]
MatchOption = Annotated[
    Literal["first", "exact"],
    typer.Option(
        "--match",
        help="Score the answer's first token, or the whole generated answer.",
    ),
]
FormatOption = Annotated[
    str,
    option(
        "--format",
        help="qa, arrow, or a text with {input} and {output}; \\n and \\t are read.",
        panel=TASK,
    ),
]


@dataclass
class TaskOptions:
    format: FormatOption = "qa"
    shots: Annotated[
        int | None,
        option(
            "--shots",
            help="Examples in a prompt; default 5, function vectors 10.",
            panel=TASK,
            min=1,
        ),
    ] = None
    bos: Annotated[
        bool,
        option(
            "--bos/--no-bos",
            help="Put the BOS token in front (default), if the vocabulary has one.",
            panel=TASK,
        ),
    ] = True
    seed: Annotated[
        int, option("--seed", help="Seed of everything that is drawn.", panel=TASK, min=0)
    ] = 0
    known: Annotated[
        bool,
        option(
            "--known",
            help="Only pairs that the model answers right after at least half of 5 other sets of "
            "examples.",
            panel=TASK,
        ),
    ] = False
    n_test: Annotated[
        int, option("--test", help="Test queries, at most 60 % of the pairs.", panel=TASK, min=1)
    ] = 100
    n_dev: Annotated[
        int,
        option("--dev", help="Development queries, at most 20 % of the pairs.", panel=TASK, min=1),
    ] = 40

    def setup(self) -> TaskSetup:
        from mia.methods.icl import TaskSetup

        return TaskSetup(
            format=unescaped(self.format),
            shots=self.shots,
            bos=self.bos,
            seed=self.seed,
            known=self.known,
            n_test=self.n_test,
            n_dev=self.n_dev,
        )


def layers_to_try(text: str | None, n_layer: int) -> list[int] | None:
    """The layers of `--layers`, None for all."""
    from mia.ranges import parse_layers

    return None if text is None else parse_layers(text, n_layer, "--layers")


def layer_of_saved(text: str | None, n_layer: int) -> int | None:
    """The one layer of `--layers` beside a saved vector, None for its own."""
    from mia.errors import UsageError

    layers = layers_to_try(text, n_layer)
    if layers is None:
        return None
    if len(layers) != 1:
        raise UsageError(f"--layers {text!r}: a saved vector is used at one layer")
    return layers[0]
