"""Commands that run a prompt: run, save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import (
    CHANGES,
    OUTPUT,
    ChangeOptions,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
    split_words,
)
from mia.cli._output import finish, model_facts, notice, progress, token_list

if TYPE_CHECKING:
    from mia.edits import Edit
    from mia.model import Model
    from mia.request import Capture, Result

BaselineOption = Annotated[
    bool,
    typer.Option(
        "--baseline/--no-baseline",
        help="Run the prompt unchanged as well.",
        rich_help_panel=CHANGES,
    ),
]


def register(app: typer.Typer) -> None:
    command(app, name="run")(run)
    command(app, name="save")(save)


def run(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    save: Annotated[
        list[str] | None,
        typer.Option(
            "--save",
            help="SITE FILE: save activations of the changed run.",
            metavar="SITE FILE",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    baseline: BaselineOption = True,
) -> None:
    """Continue a prompt, with any changes and captures together."""
    from mia.io.files import check_writable
    from mia.request import Capture
    from mia.sites import parse_many

    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        edits = _work.change_edits(m, changes, ids, output)
        captures, saves = [], split_words(save)
        for site, file in saves:
            check_writable(file)
            captures.append(Capture(parse_many(_work.edit_site(site, output), m.n_layer)))
        document, result = generate(
            m, ids, edits, generation, baseline=baseline, output=output, captures=captures
        )
        for (_, file), capture in zip(saves, captures, strict=True):
            write_captures(m, ids, result, capture, file, output)
        finish(document, output, lambda: print_generation(document))


def save(
    model: ModelOptions,
    prompt: PromptOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    site: Annotated[
        str, typer.Argument(help="l_out-14, kqv_out, head_out-3,7 …; several joined by +.")
    ],
    file: Annotated[str, typer.Argument(help="The safetensors file to write.")],
) -> None:
    """Save activations of a prompt: one tensor per site, a row per token."""
    from mia.io.files import check_writable
    from mia.request import Capture, Request
    from mia.sites import parse_many

    check_writable(file)
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        wanted = [
            s
            for part in site.split("+")
            for s in parse_many(_work.edit_site(part, output), m.n_layer)
        ]
        capture = Capture(wanted)
        edits = _work.change_edits(m, changes, ids, output)
        result = m.run([Request(ids, edits, [capture], logits=None)])[0]
        shapes = write_captures(m, ids, result, capture, file, output)
        document = {
            "model": model_facts(m),
            "tokens": token_list(m, ids),
            "file": file,
            "sites": shapes,
        }

        def human() -> None:
            for s in shapes:
                print(f"{s['site']}  {' × '.join(map(str, s['shape']))}  {s['dtype']}")

        finish(document, output, human)


def write_captures(
    m: Model, ids: list[int], result: Result, capture: Capture, file: str, output: OutputOptions
) -> list[dict[str, Any]]:
    """Writes the sites of one capture; returns what stands in the file."""
    from mia.io.activations import Activations
    from mia.io.provenance import file_metadata
    from mia.sites import parse_many

    arrays = {str(s): result.captures[s] for s in parse_many(capture.sites, m.n_layer)}
    has_bos = m.bos_token >= 0 and ids[0] == m.bos_token
    Activations(arrays, file_metadata(m, tokens=ids, bos=has_bos)).save(file)
    notice(f"wrote {file}", output)
    return [{"site": k, "shape": list(a.shape), "dtype": "float32"} for k, a in arrays.items()]


def generate(
    m: Model,
    ids: list[int],
    edits: list[Edit],
    generation: GenerationOptions,
    *,
    baseline: bool,
    output: OutputOptions,
    captures: list[Capture] | None = None,
) -> tuple[dict[str, Any], Result]:
    """Runs the changed prompt and, where there are changes, the unchanged one beside it."""
    from mia.request import Request

    def request(edits: list[Edit], captures: list[Capture]) -> Request:
        return Request(
            ids,
            edits,
            captures,
            logits=None,
            n_predict=generation.n_predict,
            sampling=_work.sampling(generation),
            logprobs=True,
        )

    requests = [request(edits, captures or [])]
    if edits and baseline:
        requests.append(request([], []))
    with progress("running", output) as bar:
        results = m.run(requests, progress=bar)
    result = results[0]
    document: dict[str, Any] = {
        "model": model_facts(m),
        "tokens": token_list(m, ids),
        "output": m.text(result.tokens),
        "output_tokens": [
            {"id": t, "text": m.piece(t), "logprob": round(p, 6)}
            for t, p in zip(result.tokens, result.logprobs, strict=True)
        ],
    }
    if len(results) > 1:
        document["baseline"] = m.text(results[1].tokens)
    return document, result


def print_generation(document: dict[str, Any]) -> None:
    if "baseline" in document:
        print(f"baseline: {document['baseline']}")
        print(f"changed:  {document['output']}")
    else:
        print(document["output"])
