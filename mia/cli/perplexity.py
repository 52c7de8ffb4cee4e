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
    for_sweep = {"--plus": plus, "--minus": minus, "--on": on, "--off": off, "--plot": plot}
    if sweep is not None:
        if sweep != "layers":
            raise UsageError(f"--sweep {sweep!r} is not known; known: layers")
        _refuse(
            {"--window": window, "--stride": stride, **_not_swept(prompt, changes)},
            "does nothing with --sweep",
        )
        if plus is None:
            _refuse({"--minus": minus}, "needs --plus")
        minus = " " if minus is None else minus
        return _sweep(model, prompt, changes, output, on, off, plus, minus, plot, seed)
    _refuse(for_sweep, "needs --sweep layers")
    if not changes.steer:
        coeff = changes.coeff if changes.coeff != 1 else None
        _refuse({"--coeff": coeff, "--steer-layers": changes.steer_layers}, "needs --steer")
    from mia.methods.perplexity import perplexity as measure

    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        edits = _work.change_edits(m, changes, ids, output)
        steered = _steered(m, changes, output)
        how: dict[str, Any] = {"window": 256 if window is None else window, "stride": stride}
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
        }
        if steered:
            document |= {"steer": steered, "coeff": changes.coeff}
        if changed is not None:
            document["changed"] = rounded(changed.value)
            document["ratio"] = rounded(changed.value / plain.value)

        def human() -> None:
            windows = f", {plain.n_windows} windows of up to {plain.window}"
            print(
                f"perplexity {plain.value:.3f} over {len(plain.nll)} tokens"
                f"{windows if plain.n_windows > 1 else ''}"
            )
            if changed is not None:
                print(
                    f"changed    {document['changed']:.3f}, {document['ratio']:.3f} times as much"
                )

        finish(document, output, human)


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


def _steered(m: Model, changes: ChangeOptions, output: OutputOptions) -> list[dict[str, Any]]:
    """The vectors of --steer as a document has them, with notices about them."""
    found = []
    for text in changes.steer or []:
        vector = load_vector(text, m, output)
        layers = steered_layers(vector, changes.steer_layers, m, text, output)
        found.append(described(text, vector, layers))
    return found


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

    from mia import plots
    from mia.methods.perplexity import by_layer
    from mia.shipped import read_lines

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
            texts = [m.tokenize(t, bos=prompt.bos) for t in lines]
            _check_lengths(m, texts, files[name])
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
            "coeff": changes.coeff,
            "layers": layers,
            "sweep": rows,
        }

        def human() -> None:
            print("layer  " + "  ".join(f"{name + ' ratio [95 %]':<26s}" for name in rows))
            for i, layer in enumerate(layers):
                cells = [
                    f"{r['ratio'][i]:.3f} [{r['interval'][i][0]:.3f}, {r['interval'][i][1]:.3f}]"
                    for r in rows.values()
                ]
                print(f"{layer:5d}  " + "  ".join(f"{c:<26s}" for c in cells))

        finish(document, output, human)
    if plot is not None:
        figure = plots.curves(
            layers,
            {k: r["ratio"] for k, r in rows.items()},
            intervals={k: tuple(np.transpose(r["interval"])) for k, r in rows.items()},
            x_label="injection layer",
            y_label="perplexity, steered / plain",
        )
        plots.save(figure, plot)


def _check_lengths(m: Model, texts: list[list[int]], source: str) -> None:
    """Raises `UsageError` naming the line that the context does not hold."""
    from mia.shipped import read_text

    numbers = [i for i, x in enumerate(read_text(source).splitlines(), 1) if x.strip()]
    for line, tokens in zip(numbers, texts, strict=True):
        if len(tokens) > m.n_ctx:
            raise UsageError(
                f"{source}, line {line}: {len(tokens)} tokens; the context holds {m.n_ctx}"
            )


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

    if plus is not None:
        layers = layer_list(changes.steer_layers, m, range(m.n_layer))
        h = actadd.difference(m, actadd.Addition(plus, minus), layers, bos=bos)

        def front(layer: int, n: int) -> list[Edit]:
            # where a text is shorter than the addition, its first rows
            return [actadd.front_edit(h[layer][:n], changes.coeff, layer, n)]

        return front, layers, {"plus": plus, "minus": minus}
    assert changes.steer
    if len(changes.steer) > 1:
        raise UsageError(
            "--sweep layers takes one --steer; mia vector combine makes one of several"
        )
    text = changes.steer[0]
    vector = load_vector(text, m, output)
    check_fits(m, vector, text)
    layers = steered_layers(vector, changes.steer_layers, m, text, output)
    by_layer = {i: vector.edits(coeff=changes.coeff, layers=[i]) for i in layers}
    injected = {"steer": [described(text, vector, layers)]}
    return lambda layer, n: by_layer[layer], layers, injected
