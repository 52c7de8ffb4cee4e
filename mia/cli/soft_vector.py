"""soft-vector: heads blended with their task means, weights learned without gradients."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _icl, _work
from mia.cli._icl import MatchOption, TaskArgument, TaskOptions
from mia.cli._options import ModelOptions, OutputOptions, command
from mia.cli._output import finish, model_facts, notice, progress
from mia.cli.vector import FileOption, JsonOption, QuietOption
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.methods.soft_vectors import Evaluation, SoftVector


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True, help="Soft task vectors: every head blended with its task mean."
    )
    command(group, name="train")(train)
    command(group, name="eval")(evaluate)
    app.add_typer(group, name="soft-vector")


def train(
    model: ModelOptions,
    task: TaskOptions,
    name: TaskArgument,
    out: FileOption,
    optimiser: Annotated[
        str, typer.Option("--optimiser", help="reinforce (hard gates), es, or cma (mia\\[soft]).")
    ] = "reinforce",
    evaluations: Annotated[
        int, typer.Option("--evaluations", help="Candidates times minibatches, at most.", min=1)
    ] = 2000,
    population: Annotated[
        int, typer.Option("--population", help="Candidates of one step.", min=2)
    ] = 32,
    batch: Annotated[
        int, typer.Option("--batch", help="Training queries of a minibatch.", min=1)
    ] = 16,
    patience: Annotated[
        int, typer.Option("--patience", help="Tries on dev without a better one, then stop.", min=1)
    ] = 5,
    prompts: Annotated[
        int, typer.Option("--prompts", help="Prompts that mean head outputs are over.", min=1)
    ] = 100,
    start: Annotated[
        float | None,
        typer.Option(
            "--start",
            help="Weight that every head begins with; default: the best run of layers, tried.",
        ),
    ] = None,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the learning curve (mia\\[plots]).")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Learn one weight in [0, 1] per head; the best on dev is kept."""
    from mia.datasets import tasks
    from mia.methods import soft_vectors as sv

    output = OutputOptions(json=json, quiet=quiet)
    _icl.check_plot(plot)
    (out,) = _icl.files(out, [name])
    tasks.load(name)
    how = sv.Training(
        optimiser, evaluations, population, batch, patience=patience, prompts=prompts, start=start
    )
    with _work.open_model(model) as m:
        ex = _icl.extractor(m, name, task, output)
        with progress(f"training {ex.task.name}", output) as bar:
            done = sv.train(ex, how, progress=bar)
        done.soft.save(out)
        notice(f"wrote {out}", output)
        document = {
            "model": model_facts(m),
            **ex.facts,
            "training": asdict(how),
            "file": out,
            "evaluations": done.evaluations,
            "dev_accuracy": round(done.dev, 4),
            "n_active": done.soft.n_active,
            "weights": done.soft.weights.round(4).tolist(),
            "curve": [asdict(s) for s in done.curve],
        }
    if plot is not None:
        _plot_curve(plot, done.curve, ex.task.name)
        notice(f"wrote {plot}", output)

    def human() -> None:
        for s in done.curve:
            if s.dev is not None:
                print(f"{s.evaluations:5d} evaluations: reward {s.reward:7.3f}, dev {s.dev:.2f}")
        print(
            f"{ex.task.name}: {done.dev:.2f} on dev after {done.evaluations} evaluations, "
            f"{done.soft.n_active} heads; {out}"
        )

    finish(document, output, human)


def _plot_curve(path: str, curve: Any, name: str) -> None:
    """Dev is tried only every few steps: its line has points of its own."""
    from mia.show import plots

    tried = [s for s in curve if s.dev is not None]
    spent = [s.evaluations for s in tried]
    logprob = [
        plots.Line(
            name="training: mean of the candidates",
            x=[s.evaluations for s in curve],
            y=[s.reward for s in curve],
        ),
    ]
    shown = [plots.Panel(lines=logprob, y_label="log-probability of the answer")]
    if tried:  # a short training ends before the first
        dev = "dev: the current weights"
        logprob.append(plots.Line(name=dev, x=spent, y=[s.dev_logprob for s in tried]))
        right = [plots.Line(name=dev, x=spent, y=[s.dev for s in tried])]
        shown.append(plots.Panel(lines=right, y_label="dev accuracy", share=True))
    figure = plots.panels(
        shown, title=f"soft vector, learning curve: {name}", x_label="candidate evaluations"
    )
    plots.save(figure, path)


def evaluate(
    model: ModelOptions,
    task: TaskOptions,
    output: OutputOptions,
    name: TaskArgument,
    file: Annotated[str, typer.Argument(help="A soft vector (mia soft-vector train).")],
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Also with the fewest heads that keep --keep of dev.")
    ] = False,
    keep: Annotated[
        float | None, typer.Option("--keep", help="Share of the accuracy to keep; default 0.95.")
    ] = None,
    sparse_out: Annotated[
        str | None, typer.Option("--sparse-out", help="Save the sparse one.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="The plain task vector too, extracted here.")
    ] = False,
    match: MatchOption = "first",
) -> None:
    """Without examples, with them, and with the soft vector in their place."""
    from mia.methods import soft_vectors as sv
    from mia.methods import task_vectors as tv

    if keep is not None and not (sparse or sparse_out):
        raise UsageError("--keep is for --sparse or --sparse-out")
    if sparse_out is not None:
        (sparse_out,) = _icl.files(sparse_out, [name])
    soft = sv.load(file)
    with _work.open_model(model) as m:
        sv.check(soft, m)
        ex = _icl.extractor(m, name, task, output)
        _icl.say_where_from(soft.metadata, ex, file, "soft vector", output)
        with progress(f"evaluating {ex.task.name}", output) as bar:
            ex.progress = bar
            rows = [_row("soft vector", soft, sv.evaluate(ex, soft, match=match))]
            if sparse or sparse_out is not None:
                few = sv.sparsify(ex, soft, keep=0.95 if keep is None else keep)
                rows.append(_row("sparse", few, sv.evaluate(ex, few, match=match)))
                if sparse_out is not None:
                    few.save(sparse_out)
                    notice(f"wrote {sparse_out}", output)
            plain = None
            if compare:
                theta = tv.extract(ex)
                plain = tv.evaluate(ex, theta, match=match).vector.document()
        document = {"model": model_facts(m), **ex.facts, "match": match, "file": file, "rows": rows}
        if plain is not None:
            document["task_vector"] = plain

    def human() -> None:
        table = [[f"{r['name']} ({r['n_active']} heads)", _icl.share(r["soft"])] for r in rows]
        if plain is not None:
            table.append(["task vector", _icl.share(plain)])
        table.append(["in-context", _icl.share(rows[0]["icl"])])
        table.append(["zero-shot", _icl.share(rows[0]["zero_shot"])])
        _icl.print_table((f"{ex.task.name}, n = {rows[0]['soft']['n']}", "accuracy"), table)

    finish(document, output, human)


def _row(name: str, soft: SoftVector, e: Evaluation) -> dict[str, Any]:
    return {
        "name": name,
        "n_active": soft.n_active,
        "zero_shot": e.zero_shot.document(),
        "icl": e.icl.document(),
        "soft": e.soft.document(),
    }
