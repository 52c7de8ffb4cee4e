"""perplexity: of a text, with and without changes; or against the layer of an injection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import (
    ChangeOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
)
from mia.cli._output import finish, model_facts, notice, progress
from mia.cli._vectors import (
    SeedOption,
    described,
    layer_list,
    load_vector,
    rounded,
    steered_layers,
)
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.edits import Edit
    from mia.model import Model


def register(app: typer.Typer) -> None:
    command(app, name="perplexity")(perplexity)


def perplexity(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            help="Tokens read at a time; default 256, at most the context. Windows do not overlap, "
            "and all their tokens but the first are scored (llama-perplexity: the second half of "
            "windows of 512).",
            min=2,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            help="Sliding windows: each this many tokens after the last, scoring only its last N.",
            metavar="N",
            min=1,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", help="layers: steered over plain perplexity, by injection layer."),
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="On-topic texts for --sweep, one per line.")
    ] = None,
    off: Annotated[
        str | None, typer.Option("--off", help="Off-topic texts for --sweep, one per line.")
    ] = None,
    plus: Annotated[
        str | None, typer.Option("--plus", help="For --sweep: an activation addition …")
    ] = None,
    minus: Annotated[
        str | None,
        typer.Option("--minus", help="… and what it is contrasted with; default a space."),
    ] = None,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Draw the sweep into an image file.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """How surprised the model is by a text, plain and under --steer, --ablate or --patch."""
    if sweep is None:
        for_sweep = {"--plus": plus, "--minus": minus, "--on": on, "--off": off, "--plot": plot}
        _refuse(for_sweep, "needs --sweep layers")
        return _one_text(model, prompt, changes, output, window, stride)
    if sweep != "layers":
        raise UsageError(f"--sweep {sweep!r} is not known; known: layers")
    _refuse(
        {"--window": window, "--stride": stride, **_not_swept(prompt, changes)},
        "does nothing with --sweep",
    )
    if plus is None:
        _refuse({"--minus": minus}, "needs --plus")
    minus = " " if minus is None else minus
    _sweep(model, prompt, changes, output, on, off, plus, minus, plot, seed)


def _one_text(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    window: int | None,
    stride: int | None,
) -> None:
    from mia.methods.perplexity import perplexity as measure

    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        steering, steered = _work.steer_edits(m, changes, output)
        edits = [*_work.prompt_edits(m, changes, ids, output), *steering]
        how: dict[str, Any] = {"window": window or 256, "stride": stride}
        if how["window"] > m.n_ctx:
            notice(f"a window is no longer than the context; {m.n_ctx} is used", output)
        # the changed one first: what cannot be measured is refused before any work
        changed = None
        if edits:
            with progress("reading, changed", output) as bar:
                changed = measure(m, ids, edits=edits, progress=bar, **how)
        with progress("reading", output) as bar:
            plain = measure(m, ids, progress=bar, **how)
        document: dict[str, Any] = {
            "model": model_facts(m),
            "n_tokens": len(ids),
            "n_scored": len(plain.nll),
            "window": plain.window,
            "stride": stride,
            "n_windows": plain.n_windows,
            "perplexity": rounded(plain.value),
            **steered,
        }
        if changed is not None:
            document["changed"] = rounded(changed.value)
            document["ratio"] = rounded(changed.value / plain.value)
        finish(document, output, lambda: _print_one(document))


def _print_one(d: dict[str, Any]) -> None:
    windows = f", {d['n_windows']} windows of up to {d['window']}" if d["n_windows"] > 1 else ""
    print(f"perplexity {d['perplexity']:.3f} over {d['n_scored']} tokens{windows}")
    if "changed" in d:
        print(f"changed    {d['changed']:.3f}, {d['ratio']:.3f} times as much")


def _refuse(given: dict[str, Any], why: str) -> None:
    """Raises `UsageError` about the first option that is given and would do nothing."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UsageError(f"{name} {why}")


def _not_swept(prompt: PromptOptions, o: ChangeOptions) -> dict[str, Any]:
    """The options that choose a text or a change otherwise than --sweep does."""
    return {
        "-p": prompt.prompt,
        "-f": prompt.prompt_file,
        "--chat": prompt.chat,
        "--patch": o.patch,
        "--mode": o.patch_mode if o.patch_mode != "replace" else None,
        "--ablate": o.ablate,
        "--select": o.select,
        "--ablate-with": o.ablate_with,
        "--ablate-attention": o.ablate_attention,
        "--block": o.block,
    }


def _sweep(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    on: str | None,
    off: str | None,
    plus: str | None,
    minus: str,
    plot: str | None,
    seed: int,
) -> None:
    import numpy as np

    from mia.datasets.shipped import read_lines
    from mia.methods.perplexity import by_layer
    from mia.show import plots

    if plot is not None:
        plots.check_picture(plot)

    groups = {"on-topic": on, "off-topic": off}
    files = {k: v for k, v in groups.items() if v is not None}
    given = {k: read_lines(v) for k, v in files.items()}
    if not given:
        raise UsageError("--sweep layers needs texts: --on FILE, --off FILE or both")
    if (plus is None) == (not changes.steer):
        raise UsageError("--sweep layers injects one thing: --steer FILE, or --plus TEXT")
    with _work.open_model(model) as m:
        edits, layers, injected = _injection(m, changes, plus, minus, prompt.bos, output)
        rng = np.random.default_rng(seed)
        rows: dict[str, Any] = {}
        for name, lines in given.items():
            texts = _texts(m, lines, prompt.bos, files[name])
            with progress(name, output) as bar:
                found = by_layer(m, texts, edits, layers, progress=bar)
            if found.skipped:
                notice(
                    f"{files[name]}: {found.skipped} of {len(texts)} lines have no token to score "
                    "and are left out",
                    output,
                )
            rows[name] = {
                "ratio": rounded(found.ratio),
                "interval": rounded(found.interval(rng)),
                "n_texts": found.n_texts,
                "n_skipped": found.skipped,
            }
        document = {
            "model": model_facts(m),
            "seed": seed,
            **injected,
            "layers": layers,
            "sweep": rows,
        }

        finish(document, output, lambda: _print_sweep(document))
    if plot is not None:
        figure = plots.curves(
            layers,
            {k: r["ratio"] for k, r in rows.items()},
            intervals={k: tuple(np.transpose(r["interval"])) for k, r in rows.items()},
            x_label="injection layer",
            y_label="perplexity, steered / plain",
        )
        plots.save(figure, plot)


def _print_sweep(d: dict[str, Any]) -> None:
    rows = d["sweep"].values()
    print("layer  " + "  ".join(f"{name + ' ratio [95 %]':<26s}" for name in d["sweep"]))
    for i, layer in enumerate(d["layers"]):
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(r["ratio"][i], *r["interval"][i]) for r in rows]
        print(f"{layer:5d}  " + "  ".join(f"{c:<26s}" for c in cells))


def _texts(m: Model, lines: dict[int, str], bos: bool | None, source: str) -> list[list[int]]:
    """Tokens of each line. Raises `UsageError` naming a line that the context does not hold."""
    texts = []
    for n, line in lines.items():
        tokens = m.tokenize(line, bos=bos)
        if len(tokens) > m.n_ctx:
            raise UsageError(
                f"{source}, line {n}: {len(tokens)} tokens; the context holds {m.n_ctx}"
            )
        texts.append(tokens)
    return texts


def _injection(
    m: Model,
    changes: ChangeOptions,
    plus: str | None,
    minus: str,
    bos: bool | None,
    output: OutputOptions,
) -> tuple[Callable[[int, int], Sequence[Edit]], list[int], dict[str, Any]]:
    """(layer, n_tokens) -> edits, the layers, and what is injected as a document has it."""
    from mia.methods import actadd
    from mia.methods.steering import check_fits

    coeff = 1.0 if changes.coeff is None else changes.coeff
    if plus is not None:
        layers = layer_list(changes.steer_layers, m, range(m.n_layer))
        h = actadd.difference(m, actadd.Addition(plus, minus), layers, bos=bos)

        def front(layer: int, n: int) -> list[Edit]:
            # where a text is shorter than the addition, its first rows
            return [actadd.front_edit(h[layer][:n], coeff, layer, n)]

        return front, layers, {"plus": plus, "minus": minus, "coeff": coeff}
    assert changes.steer
    if len(changes.steer) > 1:
        raise UsageError(
            "--sweep layers takes one --steer; mia vector combine makes one of several"
        )
    text = changes.steer[0]
    vector = load_vector(text, m, output)
    check_fits(m, vector, text)
    layers = steered_layers(vector, changes.steer_layers, m, text, output)
    by_layer = {i: vector.edits(coeff=coeff, layers=[i]) for i in layers}
    injected = {"steer": [described(text, vector, layers)], "coeff": coeff}
    return lambda layer, n: by_layer[layer], layers, injected
