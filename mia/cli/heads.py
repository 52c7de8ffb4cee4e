"""Commands about single heads: heads (scores) and ablate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import (
    OUTPUT,
    ChangeOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
)
from mia.cli._output import (
    console,
    finish,
    model_facts,
    notice,
    on_terminal,
    progress,
    token_list,
    visible,
)
from mia.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mia.edits import Edit
    from mia.methods.ablation import Sweep
    from mia.methods.heads import HeadScores
    from mia.model import Model

    Array = npt.NDArray[np.float32]

DrawOption = Annotated[
    str | None,
    typer.Option(
        "--draw",
        help="Draw a layer × head heatmap: .png, .svg or .pdf.",
        rich_help_panel=OUTPUT,
    ),
]
TopOption = Annotated[int, typer.Option("-k", "--top-k", help="Heads to list.", min=1)]
AnswerOption = Annotated[
    str, typer.Option("--answer", help='What should follow the prompt, like " Paris".')
]


def register(app: typer.Typer) -> None:
    command(app, name="heads")(heads)
    command(app, name="ablate")(ablate)


# -- scores --------------------------------------------------------------------------


def heads(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    repeat_random: Annotated[
        int | None,
        typer.Option("--repeat-random", help="Score on N random tokens said twice, BOS in front."),
    ] = None,
    prompts: Annotated[
        int, typer.Option("--prompts", help="Random prompts to average over.", min=1)
    ] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of the random tokens.", min=0)] = 0,
    ablate_top: Annotated[
        int,
        typer.Option(
            "--ablate-top",
            help="Also the loss on the second copy without the K best induction heads, and without K random ones.",
            min=0,
        ),
    ] = 0,
    draws: Annotated[
        int, typer.Option("--draws", help="How often K random heads are drawn.", min=1)
    ] = 5,
    score: Annotated[
        str,
        typer.Option("--score", help="To draw: induction, previous, duplicate or entropy."),
    ] = "induction",
    top_k: TopOption = 10,
    draw: DrawOption = None,
) -> None:
    """Previous-token, duplicate-token and induction scores of every head, and entropy (Olsson 2022).

    Scores are mean attention weights from 0 to 1; entropy is in nats.
    """
    import numpy as np

    from mia.methods.heads import SCORES, head_scores, repeated_random
    from mia.show import plots

    if score not in SCORES:
        raise UsageError(f"unknown score {score!r}; known: {', '.join(SCORES)}")
    given = prompt.prompt is not None or prompt.prompt_file is not None
    if given == (repeat_random is not None):
        raise UsageError("give either a prompt (-p, -f) or --repeat-random N")
    if ablate_top and repeat_random is None:
        raise UsageError("--ablate-top needs --repeat-random N: the loss is that of copying")
    if draw is not None:
        plots.check_picture(draw)
    with _work.open_model(model) as m:
        rng = np.random.default_rng(seed)
        if repeat_random is None:
            texts = [_work.prompt_tokens(m, prompt)]
        else:
            bos = prompt.bos is not False
            texts = [repeated_random(m, repeat_random, rng=rng, bos=bos) for _ in range(prompts)]
        edits = _work.change_edits(m, changes, texts[0], output)
        with progress("scoring", output) as bar:
            found = head_scores(m, texts, edits=edits, progress=bar)
        document: dict[str, Any] = {
            "model": model_facts(m),
            "tokens": token_list(m, texts[0]),
            "prompts": len(texts),
            "scores": {name: numbers(getattr(found, name)) for name in SCORES},
            "top": {
                name: [_head(found, name, *t) for t in found.top(name, top_k)] for name in SCORES
            },
        }
        if ablate_top:
            document["copying"] = _copying(m, texts, found, (ablate_top, draws), edits, rng)
        if draw is not None:
            title = f"{m.name} · {score}"
            if repeat_random is not None:
                title += f" · {repeat_random} random tokens twice, {len(texts)} prompts"
            fig = plots.heatmap(getattr(found, score), x="head", y="layer", bar=score, title=title)
            plots.save(fig, draw)
            notice(f"wrote {draw}", output)
        finish(document, output, lambda: _print_scores(document, getattr(found, score), score))


def _head(found: HeadScores, name: str, layer: int, head: int, value: float) -> dict[str, Any]:
    spread = float(found.spread[name][layer, head])
    return {"layer": layer, "head": head, "score": number(value), "sd": number(spread)}


def _copying(
    m: Model,
    texts: list[list[int]],
    found: HeadScores,
    sizes: tuple[int, int],
    edits: list[Edit],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Loss on the second copy: whole, without the best induction heads, without random others."""
    import numpy as np

    from mia.methods.ablation import head_edits
    from mia.methods.heads import copy_loss

    n, draws = sizes
    best = [(layer, head) for layer, head, _ in found.top("induction", n)]
    others = [(i, h) for i in range(m.n_layer) for h in range(m.n_head) if (i, h) not in best]
    if not 0 < n <= len(others):
        raise UsageError(f"--ablate-top {n}: the model has {m.n_layer * m.n_head} heads")
    sets = [best]
    sets += [
        [others[i] for i in sorted(rng.choice(len(others), n, replace=False))] for _ in range(draws)
    ]

    def without(chosen: list[tuple[int, int]]) -> list[Edit]:
        by_layer: dict[int, list[int]] = {}
        for layer, head in chosen:
            by_layer.setdefault(layer, []).append(head)
        return [*edits, *head_edits(m, by_layer)]

    loss = copy_loss(m, texts, [edits, *map(without, sets)]).mean(1)
    factors = loss[2:] / loss[0]
    names = ["whole model", f"without the top {n}", *[f"without {n} random" for _ in sets[1:]]]
    return {
        "loss": [
            {"what": what, "heads": heads, "nats": number(x), "factor": number(x / loss[0])}
            for what, heads, x in zip(names, [[], *sets], loss.tolist(), strict=True)
        ],
        "random_factor": {
            "least": number(factors.min()),
            "median": number(float(np.median(factors))),
            "most": number(factors.max()),
        },
    }


def _print_scores(document: dict[str, Any], shown: Array, score: str) -> None:
    if on_terminal():
        print_grid(shown, score)
    for name, top in document["top"].items():
        listed = " | ".join(
            f"{t['layer']}.{t['head']} {t['score']:.3f}" for t in top if t["score"] is not None
        )
        print(f"{name}: {listed or 'no token of the prompt is repeated'}")
    copying = document.get("copying", {"loss": []})
    for row in copying["loss"]:
        which = " ".join(f"{i}.{h}" for i, h in row["heads"])
        print(
            f"loss on the copy, {row['what']}: {row['nats']:.3f} (×{row['factor']:.2f}) {which}".rstrip()
        )
    if copying["loss"]:
        random = copying["random_factor"]
        print(
            f"factor of the random ones: {random['least']:.2f} to {random['most']:.2f}, median {random['median']:.2f}"
        )


# -- ablation ------------------------------------------------------------------------


def ablate(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    answer: AnswerOption,
    heads: Annotated[
        str | None, typer.Option("--heads", help="Only these, as LAYER.HEAD: 3.5,7.*; default all.")
    ] = None,
    token_idx: Annotated[
        str | None,
        typer.Option(
            "--token-idx",
            help="Where heads are silenced; default: the tokens that predict the answer. * for all (slower).",
        ),
    ] = None,
    top_k: TopOption = 10,
    draw: DrawOption = None,
) -> None:
    """Silence every head in turn, in one planned run: how much less likely the answer becomes.

    --ablate-with and --ablate-attention say how; --ablate, --select, --block, --patch and
    --steer are made in every run, the one it is compared with too.
    """
    from mia.methods import ablation
    from mia.show import plots

    if draw is not None:
        plots.check_picture(draw)
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        wanted = m.continuation(m.piece(ids[-1]), answer)
        if not wanted:
            raise UsageError("the answer is empty")
        whole = [*ids, *wanted[:-1]]
        at: Any = list(range(len(ids) - 1, len(whole)))
        if token_idx is not None:
            at = _work.token_indices(token_idx, len(ids), "--token-idx")
            at = None if token_idx in ("*", "all") else at
        every = {i: list(range(m.n_head)) for i in range(m.n_layer)}
        chosen = (
            every if heads is None else ablation.parse_heads(heads, m.n_layer, m.n_head, "--heads")
        )
        change = _work.head_changer(m, changes, whole, list(chosen), at)
        fixed = replace(changes, ablate_with=None, ablate_attention=False)
        edits = _work.change_edits(m, fixed, ids, output)
        with progress("ablating", output) as bar:
            sweep = ablation.head_sweep(
                m,
                ids,
                wanted,
                heads=chosen,
                edits_of=lambda layer, head: change({layer: [head]}),
                edits=edits,
                progress=bar,
            )
        document = {
            "model": model_facts(m),
            "tokens": token_list(m, ids),
            "answer": token_list(m, wanted),
            "ablated_at": "all" if at is None else at,
            "logprob": number(sweep.clean),
            "drop": numbers(sweep.drop),
            "top": largest(sweep.drop, top_k),
        }
        if draw is not None:
            title = f"{m.name} · drop in the log-probability of {visible(answer)!r} without a head"
            fig = plots.heatmap(
                sweep.drop, x="head", y="layer", bar="drop (nats)", title=title, diverging=True
            )
            plots.save(fig, draw)
            notice(f"wrote {draw}", output)
        finish(document, output, lambda: _print_sweep(document, sweep, answer))


def largest(a: Array, n: int) -> list[dict[str, Any]]:
    """The n heads that matter most, either way."""
    import numpy as np

    order = np.argsort(-np.nan_to_num(np.abs(a)), axis=None, kind="stable")[:n]
    pairs = [(int(i) // a.shape[1], int(i) % a.shape[1]) for i in order]
    return [
        {"layer": i, "head": h, "value": number(float(a[i, h]))}
        for i, h in pairs
        if a[i, h] == a[i, h]
    ]


def _print_sweep(document: dict[str, Any], sweep: Sweep, answer: str) -> None:
    if on_terminal():
        print_grid(sweep.drop, "drop in log-probability", diverging=True)
    print(f"log-probability of {visible(answer)!r}: {sweep.clean:.4f}")
    for t in document["top"]:
        print(
            f"without {t['layer']}.{t['head']}: {sweep.clean - t['value']:.4f} (drop {t['value']:+.4f})"
        )


# -- shared ----------------------------------------------------------------------------


def number(x: float) -> float | None:
    """Six decimals; JSON has no NaN."""
    return None if x != x else round(float(x), 6)


def numbers(a: Array) -> Any:
    return [numbers(x) if x.ndim else number(float(x)) for x in a]


def print_grid(a: Array, title: str, *, diverging: bool = False) -> None:
    """Layers down, heads across, as coloured cells with their numbers where these fit."""
    import numpy as np
    from rich.text import Text

    from mia.cli.attention import inferno

    screen = console()
    top = float(np.nanmax(np.abs(a))) if np.isfinite(a).any() else 1.0
    wide = 6 if 6 * a.shape[1] + 6 <= screen.width else 2
    screen.print(f"{title} (layers down, heads across)", style="bold")
    screen.print(" " * 5 + "".join(f"{h:>{wide}d}" for h in range(a.shape[1])), style="dim")
    for i, row in enumerate(a):
        line = Text().append(f"{i:4d} ", style="dim")
        for x in row:
            text = f"{x:{wide}.2f}" if wide > 2 else "  "
            share = abs(x) / (top or 1.0)
            if not np.isfinite(x):
                line.append(" " * wide)
            elif diverging:
                r, g, b = (220, 50, 47) if x > 0 else (38, 110, 210)
                base = [round(40 + (c - 40) * share) for c in (r, g, b)]
                line.append(text, style=f"rgb(255,255,255) on rgb({base[0]},{base[1]},{base[2]})")
            else:
                ink = 0 if share > 0.6 else 255
                line.append(text, style=f"rgb({ink},{ink},{ink}) {inferno(share)}")
        screen.print(line)
