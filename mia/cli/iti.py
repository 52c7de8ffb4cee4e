"""iti: inference-time intervention on attention heads, trained and evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import ModelOptions, OutputOptions, command
from mia.cli._output import finish, model_facts, progress
from mia.cli._vectors import (
    BosOption,
    SeedOption,
    check_vector_file,
    item_range,
    load_vector,
    made_of,
    numbers,
    rounded,
    save_vector,
    say_where_from,
    span,
)
from mia.cli.caa import ItemsOption
from mia.cli.vector import (
    FileOption,
    JsonOption,
    QuietOption,
    facts,
)
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.methods.iti import Question
    from mia.model import Model
    from mia.vectors import Vector

DataArgument = Annotated[
    str,
    typer.Argument(
        help="JSONL with question, correct_answers, incorrect_answers, perhaps best_answer; or a "
        "shipped A/B set, "
        "whose matching answers count as incorrect."
    ),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Inference-time intervention (Li et al. 2023).")
    command(group, name="train")(train)
    command(group, name="eval")(evaluate)
    app.add_typer(group, name="iti")


def train(
    model: ModelOptions,
    data: DataArgument,
    out: FileOption,
    heads: Annotated[int, typer.Option("--heads", help="How many heads, the K best.", min=1)] = 16,
    folds: Annotated[int, typer.Option("--folds", help="Of the cross-validation.", min=2)] = 2,
    items: ItemsOption = None,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the heads' accuracies into an image file.")
    ] = None,
    bos: BosOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Probe every head, choose the best, and write what to add there (.safetensors)."""
    import numpy as np

    from mia.methods import caa, iti
    from mia.show import plots

    output = OutputOptions(json=json, quiet=quiet)
    check_vector_file(out, "head_out")
    if plot is not None:
        plots.check_picture(plot)
    found = iti.load_questions(data)
    at = item_range(items, range(len(found)))
    questions = [found[i] for i in at]
    with _work.open_model(model) as m, progress("reading", output) as bar:
        rng = np.random.default_rng(seed)
        vector, accuracy = iti.train(
            m, questions, k=heads, rng=rng, folds=folds, bos=bos, progress=bar
        )
        vector = made_of(vector, [caa.find_items(data)], at)
        document: dict[str, Any] = {
            "model": model_facts(m),
            "file": out,
            "seed": seed,
            "n_questions": len(questions),
            "heads": [f"{a}.{b}" for a, b in iti.top_heads(accuracy, heads)],
            "accuracy": rounded(accuracy, 4),
            **facts(vector),
        }
    save_vector(vector, out, output)

    def human() -> None:
        print(f"probe accuracy of {accuracy.size} heads: median {np.median(accuracy):.2f}")
        for layer, head in iti.top_heads(accuracy, heads):
            print(f"  {layer}.{head}  {accuracy[layer, head]:.3f}")

    finish(document, output, human)
    if plot is not None:
        figure = plots.heatmap(accuracy, x="head", y="layer", title="probe accuracy of heads")
        plots.save(figure, plot)


def evaluate(
    model: ModelOptions,
    output: OutputOptions,
    vector: Annotated[str, typer.Argument(help="What mia iti train wrote.")],
    data: DataArgument,
    alpha: Annotated[str, typer.Option("--alpha", help="Strengths: 5,15 …")] = "15",
    items: ItemsOption = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Score answers by their mean log-probability.")
    ] = False,
    generate: Annotated[
        int, typer.Option("--generate", help="Also show answers to the first N questions.")
    ] = 0,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="Tokens of an answer.")] = 32,
    bos: BosOption = None,
    seed: SeedOption = 0,
) -> None:
    """Multiple choice (MC1, MC2) with and without, and generated answers beside each other."""
    import numpy as np

    from mia.measure.estimates import bootstrap, format_estimate
    from mia.methods import caa, iti
    from mia.methods.steering import check_fits

    v = load_vector(vector)
    alphas = [0.0, *[a for a in numbers(alpha, "--alpha") if a]]
    found = iti.load_questions(data)
    at = item_range(items, range(len(found)))
    if len(at) < 2:
        raise UsageError("one question has no interval; give at least two by --items")
    questions = [found[i] for i in at]
    with _work.open_model(model) as m:
        check_fits(m, v, vector)
        say_where_from(v, vector, caa.find_items(data), at, m, output)
        scores = []
        for a in alphas:
            with progress(f"alpha {a:g}", output) as bar:
                scores.append(
                    iti.multiple_choice(
                        m, questions, [(v, a)], per_token=per_token, bos=bos, progress=bar
                    )
                )
        rng = np.random.default_rng(seed)
        rows: list[dict[str, Any]] = [
            {
                "alpha": a,
                "mc1": bootstrap(s.mc1, rng).document(),
                "mc2": bootstrap(s.mc2, rng).document(),
                "mc2_change": bootstrap(s.mc2 - scores[0].mc2, rng).document(),
            }
            for a, s in zip(alphas, scores, strict=True)
        ]
        document: dict[str, Any] = {
            "model": model_facts(m),
            "vector": vector,
            "data": data,
            "n_questions": len(questions),
            "items": span(at),
            "bos": m.wants_bos(bos),
            "per_token": per_token,
            "seed": seed,
            "scores": rows,
        }
        if generate:
            document["answers"] = _answers(m, v, questions[:generate], alphas, n_predict, bos)

        def human() -> None:
            print("alpha  MC1 [95 %]              MC2 [95 %]              change of MC2 [95 %]")
            for r in rows:
                cells = [format_estimate(r[k], sign="+") for k in ("mc1", "mc2", "mc2_change")]
                print(f"{r['alpha']:<6g} {cells[0]}  {cells[1]}  {cells[2]}")
            for a in document.get("answers", []):
                print(f"\n{a['question']}")
                for row in a["answers"]:
                    print(f"  {row['alpha']:<6g} {row['text']}")

        finish(document, output, human)


def _answers(
    m: Model,
    v: Vector,
    questions: list[Question],
    alphas: list[float],
    n_predict: int,
    bos: bool | None,
) -> list[dict[str, Any]]:
    from mia.methods import iti
    from mia.request import Request

    requests = [
        Request(
            iti.question_tokens(m, q.question, bos=bos),
            iti.generation_edits(v, a),
            logits=None,
            n_predict=n_predict,
        )
        for q in questions
        for a in alphas
    ]
    texts = iter([m.text(r.tokens) for r in m.run(requests)])
    return [
        {"question": q.question, "answers": [{"alpha": a, "text": next(texts)} for a in alphas]}
        for q in questions
    ]
