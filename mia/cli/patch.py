"""patch: bring captured activations into a run, or take a direction out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mia.cli import _work
from mia.cli._options import (
    ChangeOptions,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    command,
)
from mia.cli._output import finish
from mia.cli.run import BaselineOption, generate, print_generation
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.edits import Edit
    from mia.model import Model


def register(app: typer.Typer) -> None:
    command(app, name="patch")(patch)


def patch(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: GenerationOptions,
    changes: ChangeOptions,
    output: OutputOptions,
    site: Annotated[str, typer.Argument(help="Where: l_out-14, l_out-10..20, kqv_out-3 …")],
    files: Annotated[
        list[str] | None, typer.Argument(help="Capture files (mia save), or .npy.")
    ] = None,
    from_token_idx: Annotated[
        str, typer.Option("--from-token-idx", help="Tokens of the capture: 13, -1, 3..7.")
    ] = "-1",
    to_token_idx: Annotated[
        str, typer.Option("--to-token-idx", help="Tokens of this prompt.")
    ] = "-1",
    subtract_token: Annotated[
        list[str] | None,
        typer.Option(
            "--subtract-token", help="Remove this token's unembedding direction from the site."
        ),
    ] = None,
    baseline: BaselineOption = True,
) -> None:
    """Run a prompt with activations of another run in it (activation patching by token index)."""
    if not files and not subtract_token:
        raise UsageError("give a capture file (mia save makes one), or --subtract-token")
    with _work.open_model(model) as m:
        ids = _work.prompt_tokens(m, prompt)
        edits: list[Edit] = []
        if files:
            edits += _work.patch_edits(
                m,
                site,
                files,
                from_token_idx,
                to_token_idx,
                mode=changes.patch_mode,
                n_tokens=len(ids),
                output=output,
            )
        edits += _subtractions(m, site, subtract_token or [], to_token_idx, len(ids), output)
        _work.warn_first_tokens(m, ids, [i for e in edits for i in e.positions(len(ids))], output)
        edits += _work.change_edits(m, changes, ids, output)
        document, _ = generate(m, ids, edits, generation, baseline=baseline, output=output)
        finish(document, output, lambda: print_generation(document))


def _subtractions(
    m: Model, site: str, texts: list[str], to: str, n_tokens: int, output: OutputOptions
) -> list[Edit]:
    """Projects out, at each site, the direction in which the lens reads the token."""
    from mia.edits import Edit
    from mia.sites import RESIDUAL, parse_many

    at = _work.token_indices(to, n_tokens, "--to-token-idx")
    edits = []
    for text in texts:
        direction = m.lens.direction(m.token_id(text))
        for s in parse_many(_work.edit_site(site, output), m.n_layer):
            if s.name not in RESIDUAL:
                raise UsageError(
                    f"--subtract-token works on residuals ({', '.join(RESIDUAL)}), not on {s}"
                )
            edits.append(Edit(s, "project_out", direction, tokens=at))
    return edits
