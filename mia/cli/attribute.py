"""The command `attribute`: what each part of the model writes into the answer's logit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mia.cli import _work
from mia.cli._options import ChangeOptions, ModelOptions, OutputOptions, PromptOptions, command
from mia.cli._output import finish, model_facts, notice, token_list, visible
from mia.cli.heads import AnswerOption, DrawOption, TopOption, largest, number, numbers
from mia.errors import UsageError

if TYPE_CHECKING:
    from typing import Any

    from mia.methods.attribution import Attribution
    from mia.model import Model


def register(app: typer.Typer) -> None:
    command(app, name="attribute")(attribute)


def attribute(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    answer: AnswerOption,
    against: Annotated[
        str | None, typer.Option("--against", help='Attribute the difference to this: " Rome".')
    ] = None,
    token_idx: Annotated[
        str, typer.Option("--token-idx", help="At which token of the prompt.")
    ] = "-1",
    top_k: TopOption = 10,
    draw: DrawOption = None,
) -> None:
    """What each layer's attention and MLP, and each head, writes into the answer's logit.

    Through the final norm as it divides this residual. The parts and the embedding add up to
    the logit (before soft-capping, in models that do that); this is checked and shown.
    """
    from mia.methods.attribution import attribute as attribute_logit
    from mia.show import plots

    if draw is not None:
        plots.check_picture(draw)
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        at = _work.token_indices(token_idx, len(ids), "--token-idx")
        if len(at) != 1:
            raise UsageError(
                f"--token-idx {token_idx!r} is {len(at)} tokens; one logit is attributed"
            )
        target = m.token_id(answer)
        other = None if against is None else m.token_id(against)
        edits = _work.change_edits(m, changes, ids, output)
        found = attribute_logit(m, ids, target, against=other, token=at[0], edits=edits)
        document = {
            "model": model_facts(m),
            "tokens": token_list(m, ids),
            "answer": {"id": target, "text": m.piece(target)},
            "against": None if other is None else {"id": other, "text": m.piece(other)},
            "logit": number(found.logit),
            "sum": number(found.total),
            "sum_after_capping": number(found.recomputed),
            "soft_capped": m.lens.capped,
            "embed": number(found.embed),
            "bias": number(found.bias),
            "attn": numbers(found.attn),
            "mlp": numbers(found.mlp),
            "heads": numbers(found.heads),
            "attn_bias": numbers(found.attn_bias),
            "rest": numbers(found.rest),
            "top": largest(found.heads, top_k),
        }
        if draw is not None:
            _draw_attribution(m, found, answer, against, draw)
            notice(f"wrote {draw}", output)
        finish(document, output, lambda: _print_attribution(document, found))


def _draw_attribution(
    m: Model, found: Attribution, answer: str, against: str | None, file: str
) -> None:
    from mia.show import plots

    than = "" if against is None else f" over {visible(against)!r}"
    fig = plots.heatmap(
        found.heads,
        x="head",
        y="layer",
        bar="logit",
        title=f"{m.name} · what each head writes for {visible(answer)!r}{than}",
        diverging=True,
    )
    plots.save(fig, file)


def _print_attribution(document: dict[str, Any], found: Attribution) -> None:
    print(f"{'embed':<9s} {found.embed:9.4f}")
    print(f"{'layer':<9s} {'attention':>9s} {'MLP':>9s}")
    for i, (a, b) in enumerate(zip(found.attn, found.mlp, strict=True)):
        print(f"{i:<9d} {a:9.4f} {b:9.4f}")
    print(f"{'biases':<9s} {found.bias:9.4f}")
    what = "logit" if document["against"] is None else "difference"
    capped = f"; after soft-capping {found.recomputed:.4f}" if document["soft_capped"] else ""
    print(f"{'sum':<9s} {found.total:9.4f}{capped} (the model's own {what}: {found.logit:.4f})")
    listed = " | ".join(f"{t['layer']}.{t['head']} {t['value']:+.4f}" for t in document["top"])
    print(f"heads: {listed}")
    print(f"rounding not given to any head: {abs(found.rest).sum():.4f} in all")
