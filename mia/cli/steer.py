"""steer: run a prompt with vectors pushed in, beside the unsteered run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import (
    CHANGES,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
)
from mia.cli._output import finish, model_facts, notice, progress, token_list
from mia.cli._vectors import described, load_vector, numbers, steered_layers
from mia.cli.run import BaselineOption
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.edits import Edit, Tokens
    from mia.model import Model
    from mia.request import Result, Sampling


def _change(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=CHANGES)


def register(app: typer.Typer) -> None:
    command(app, name="steer")(steer)


def steer(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    output: OutputOptions,
    vectors: Annotated[
        list[str], typer.Argument(help='Vector files, or arithmetic: "a.gguf - 0.5*b.gguf".')
    ],
    coeff: Annotated[
        str | None,
        _change("--coeff", help="How much; several (0.5,1,2) are shown side by side. Default 1."),
    ] = None,
    layers: Annotated[
        str | None, _change("--layers", help="10-16, 3,7 …; default: all that the vector has.")
    ] = None,
    operator: Annotated[
        str,
        _change(
            "--operator",
            help="add, ablate, ablate-add, replace, clamp, cap, or your module:function.",
        ),
    ] = "add",
    from_token_idx: Annotated[
        int | None, _change("--from-token-idx", help="Only this token and later ones.")
    ] = None,
    prompt_only: Annotated[
        bool, _change("--prompt-only", help="Not the generated tokens.")
    ] = False,
    generated_only: Annotated[
        bool, _change("--generated-only", help="Only the generated tokens.")
    ] = False,
    normalize: Annotated[
        bool, _change("--normalize", help="Keep the norm of the residual.")
    ] = False,
    kl_budget: Annotated[
        float | None,
        _change(
            "--kl-budget",
            help="Choose, of the coefficients of --coeff (default 0.25 to 16), the one of largest "
            "size whose mean KL from the unsteered run is at most this (nats per token).",
        ),
    ] = None,
    explain: Annotated[
        bool, _change("--explain", help="Say which path each edit takes, and run nothing.")
    ] = False,
    words: Annotated[
        str | None,
        _change(
            "--words",
            help="A word list, or a shipped one (french_words): its share of the words of --samples texts.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        _change("--samples", help="Texts to measure, with seeds that follow --seed. Default 20."),
    ] = None,
    baseline: BaselineOption = True,
) -> None:
    """Continue a prompt while vectors are added to what the model computes."""
    from mia.methods import steering

    _check(operator, coeff, kl_budget, words, samples, baseline)
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        tokens, generated = _when(from_token_idx, prompt_only, generated_only, len(ids))
        steerings, found = [], []
        for text in vectors:
            vector = load_vector(text, m, output)
            steering.check_fits(m, vector, text)
            chosen = steered_layers(vector, layers, m, text, output)
            found.append(described(text, vector, chosen))
            steerings.append(
                steering.Steering(
                    vector, operator, 1.0, chosen, tokens, generated, keep_norm=normalize
                )
            )
        document: dict[str, Any] = {
            "model": model_facts(m),
            "tokens": token_list(m, ids),
            "steering": {
                "vectors": found,
                "operator": operator,
                "tokens": "prompt" if prompt_only else "generated" if generated_only else "all",
                "from_token_idx": from_token_idx,
                "normalize": normalize,
            },
        }
        coeffs = numbers(coeff or "1", "--coeff")
        if kl_budget is not None and not explain:
            candidates = steering.CANDIDATES if coeff is None else tuple(coeffs)
            choice = steering.choose_coefficient(
                m, [ids], steerings, kl_budget, candidates=candidates
            )
            coeffs = [choice.coeff]
            document["kl"] = [{"coeff": c, "kl": round(k, 6)} for c, k in choice.kl.items()]
            document["coeff"] = choice.coeff
            notice(f"coefficient {choice.coeff:g}: mean KL {choice.kl[choice.coeff]:.3f}", output)
        edits = [[e for s in steerings for e in replace(s, coeff=c).edits()] for c in coeffs]
        if explain:
            # what a budget chooses, and each coefficient of --words, runs by itself
            alone = len(edits) == 1 or words is not None or kl_budget is not None
            return _explain(m, document, edits[0], alone, output)
        if words is not None:
            n = 20 if samples is None else samples
            return _measure(m, ids, document, coeffs, edits, generation, words, n, output)
        with progress("running", output) as bar:
            results, plain = _run(m, ids, edits, generation, baseline, bar)
        document |= _outputs(m, coeffs, results, plain)
        finish(document, output, lambda: _print(document))


def _check(
    operator: str,
    coeff: str | None,
    kl_budget: float | None,
    words: str | None,
    samples: int | None,
    baseline: bool,
) -> None:
    """Raises `UsageError` where an option would do nothing."""
    from mia.methods.steering import WITHOUT_COEFF

    if operator in WITHOUT_COEFF:
        for name, value in (("--coeff", coeff), ("--kl-budget", kl_budget)):
            if value is not None:
                raise UsageError(f"--operator {operator} has no coefficient; run it without {name}")
    if samples is not None and words is None:
        raise UsageError("--samples is for --words")
    if words is not None and not baseline:
        raise UsageError("--words measures beside the unsteered run; it takes no --no-baseline")


def _when(
    first: int | None, prompt_only: bool, generated_only: bool, n_tokens: int
) -> tuple[Tokens, bool | None]:
    """Which tokens: (of the prompt, whether the generated ones too)."""
    if prompt_only and generated_only:
        raise UsageError("--prompt-only and --generated-only leave no token to steer")
    if generated_only:
        if first is not None:
            raise UsageError(
                "--from-token-idx is about the prompt; --generated-only leaves it alone"
            )
        return (), True
    if first is None:
        return None, not prompt_only
    at = _work.token_indices(str(first), n_tokens, "--from-token-idx")[0]
    return slice(at, None), not prompt_only


def _run(
    m: Model,
    ids: list[int],
    edits: list[list[Edit]],
    generation: GenerationOptions,
    baseline: bool,
    bar: Any,
) -> tuple[list[Result], Result | None]:
    """One coefficient runs by itself, so that the control vector can be used; several run as
    sequences of one batch, with the unsteered run among them."""
    from mia.request import Request

    def request(e: list[Edit]) -> Request:
        return Request(
            ids,
            e,
            logits=None,
            n_predict=generation.n_predict,
            sampling=_work.sampling(generation),
            logprobs=True,
        )

    if len(edits) == 1:
        plain = m.run([request([])])[0] if baseline else None
        return m.run([request(edits[0])], progress=bar), plain
    requests = [request(e) for e in edits]
    results = m.run([*requests, request([])] if baseline else requests, progress=bar)
    return results[: len(edits)], results[-1] if baseline else None


def _outputs(
    m: Model, coeffs: list[float], results: list[Result], plain: Result | None
) -> dict[str, Any]:
    def output(r: Result) -> dict[str, Any]:
        return {
            "output": m.text(r.tokens),
            "output_tokens": [
                {"id": t, "text": m.piece(t), "logprob": round(p, 6)}
                for t, p in zip(r.tokens, r.logprobs, strict=True)
            ],
        }

    document = output(results[0])
    if plain is not None:
        document["baseline"] = m.text(plain.tokens)
    document["steered"] = [{"coeff": c, **output(r)} for c, r in zip(coeffs, results, strict=True)]
    return document


def _print(document: dict[str, Any]) -> None:
    if "baseline" in document:
        print(f"{'baseline:':<10s} {document['baseline']}")
    for row in document["steered"]:
        print(f"{format(row['coeff'], 'g') + ':':<10s} {row['output']}")


def _explain(
    m: Model, document: dict[str, Any], edits: list[Edit], alone: bool, output: OutputOptions
) -> None:
    from mia.methods.steering import explain

    document["explain"] = explain(m, edits, alone=alone)

    def human() -> None:
        for row in document["explain"]:
            why = f"  ({row['why']})" if row["why"] else ""
            print(f"{row['site']:<16s} {row['operator']:<16s} {row['path']}{why}")

    finish(document, output, human)


def _measure(
    m: Model,
    ids: list[int],
    document: dict[str, Any],
    coeffs: list[float],
    edits: list[list[Edit]],
    generation: GenerationOptions,
    words: str,
    samples: int,
    output: OutputOptions,
) -> None:
    """The share of listed words in sampled texts, with and without steering."""
    import numpy as np

    from mia.datasets.shipped import read_lines
    from mia.measure.estimates import bootstrap, format_estimate
    from mia.measure.metrics import word_share

    if samples < 2:
        raise UsageError(f"--samples {samples}: an interval needs two texts or more")
    if generation.temperature == 0:
        raise UsageError(
            "--words measures sampled texts; give --temperature (1 is the model's own)"
        )
    listed = {w.strip().lower() for w in read_lines(words).values()}

    sampling = _work.sampling(generation)
    with progress("sampling", output) as bar:
        texts = [
            _sample(m, ids, e, sampling, generation.n_predict, samples, bar) for e in [[], *edits]
        ]
    shares = np.array([[word_share(t, listed) for t in row] for row in texts])
    rng = np.random.default_rng(generation.seed)
    rows: list[dict[str, Any]] = []
    for c, row, some in zip([0.0, *coeffs], shares, texts, strict=True):
        entry: dict[str, Any] = {"coeff": c, "share": bootstrap(row, rng).document(), "texts": some}
        if c:
            entry["change"] = bootstrap(row - shares[0], rng).document()
        rows.append(entry)
    document |= {"words": words, "samples": samples, "seed": generation.seed, "measure": rows}

    def human() -> None:
        print("coeff   share of listed words [95 %]    change [95 %]")
        for row in rows:
            cells = [row["share"], row.get("change")]
            shown = [format_estimate(c) if c else "" for c in cells]
            print(f"{row['coeff']:<7g} {shown[0]:<31s} {shown[1]}")

    finish(document, output, human)


def _sample(
    m: Model, ids: list[int], e: list[Edit], s: Sampling, n_predict: int, n: int, bar: Any
) -> list[str]:
    from mia.request import Request

    requests = [
        Request(ids, e, logits=None, n_predict=n_predict, sampling=replace(s, seed=s.seed + i))
        for i in range(n)
    ]
    return [m.text(r.tokens) for r in m.run(requests, progress=bar)]
