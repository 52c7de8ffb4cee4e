"""The command `tune`: a search over operators, layers and strengths of a vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mia.cli._build import open_model, prompt_ids, sampling, unescaped
from mia.cli._command import command, option, refuse
from mia.cli._groups import (
    ALIASES,
    AgainstOption,
    ModelOptions,
    PromptOptions,
    SampledOptions,
)
from mia.show.report import Report

if TYPE_CHECKING:
    from mia.datasets.prompts import Prompt
    from mia.methods.tune_reports import Tuned
    from mia.model import Model
    from mia.tuning.scores import Answer, Words

SCORE, SPACE, COST = "What is made large: words or an answer", "What is tried", "What it may cost"


@dataclass
class ScoreOptions:
    words: Annotated[
        str | None,
        option("--words", help="A word list, or a shipped one (french_words).", panel=SCORE),
    ] = None
    samples: Annotated[
        int,
        option(
            "--samples",
            help="Texts to sample, with seeds that follow --seed; default none: --words counts "
            "probabilities, without texts.",
            panel=SCORE,
            min=0,
        ),
    ] = 0
    answer: Annotated[
        str, option("--answer", help='What should follow the prompt, like " Paris".', panel=SCORE)
    ] = ""
    against: AgainstOption = None
    metric: Annotated[
        str | None,
        option(
            "--metric",
            help="logprob, prob, logit, logit-diff, rank, kl or module:function; default: what the "
            "answers allow.",
            panel=SCORE,
        ),
    ] = None
    minimise: Annotated[bool, option("--minimise", help="Less of it is better.", panel=SCORE)] = (
        False
    )
    prompts_from: Annotated[
        str | None,
        option(
            "--prompts-from",
            help="Prompts of a file, instead of -p: one per line, or JSONL with prompt, answer, "
            "against.",
            panel=SCORE,
        ),
    ] = None


@dataclass
class SpaceOptions:
    operators: Annotated[
        str, option("--operators", help="Operators of mia steer, with commas.", panel=SPACE)
    ] = "add,project_out"
    layers: Annotated[
        str | None, option("--layers", help="Layers: 3,7 or 10..20.", panel=SPACE)
    ] = None
    widths: Annotated[
        str, option("--widths", help="How many consecutive layers at once.", panel=SPACE)
    ] = "1,4"
    coeff: Annotated[
        str | None,
        option(
            "--coeff",
            help="How much of it: 2, or several like 0.5,1,2; default twelve up to 16.",
            panel=SPACE,
        ),
    ] = None
    normalize: Annotated[
        bool, option("--normalize", help="Keep the norm of what is steered.", panel=SPACE)
    ] = False
    runs: Annotated[
        int | None,
        option("--runs", help="Settings to try; default a fifth of all.", panel=SPACE, min=1),
    ] = None


@dataclass
class CostOptions:
    kl_budget: Annotated[
        float,
        option(
            "--kl-budget",
            help="The most that the mean KL from the unsteered run may be (nats per token).",
            panel=COST,
        ),
    ] = 0.3
    neutral: Annotated[
        str, option("--neutral", help="The text that the KL is measured on.", panel=COST)
    ] = "neutral"
    neutral_tokens: Annotated[
        int, option("--neutral-tokens", help="How much of it is read.", panel=COST, min=2)
    ] = 256


def register(app: typer.Typer) -> None:
    prompt = "-p 'I went to the cinema and the film was' --bos"
    command(
        app,
        "tune",
        panel="Run and change",
        plot=True,
        examples=[
            f"mia tune love.gguf {prompt} --words positive_words --plot front.png",
            "mia tune rome.gguf --prompts-from asked.jsonl --operators add,clamp --best best.gguf",
            f"mia tune love.gguf {prompt} --answer ' great' --runs 400 --record trials.jsonl",
        ],
    )(tune)


def tune(
    model: ModelOptions,
    prompt: PromptOptions,
    generation: SampledOptions,
    aim: ScoreOptions,
    space: SpaceOptions,
    cost: CostOptions,
    vector: Annotated[
        str, typer.Argument(help='A vector file, or arithmetic: "a.gguf - 0.5*b.gguf".')
    ],
    best: Annotated[
        str | None,
        typer.Option("--best", help="Write the best setting's vector: .gguf or .safetensors."),
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(
            "--record",
            help="Write each trial to this file as it is made; go on from it if it is there.",
        ),
    ] = None,
) -> Report:
    """Search for the operator, the layers and the strength of a vector that make a score large
    within a KL budget on neutral text."""
    from mia.methods.steering import CANDIDATES
    from mia.methods.tune import Space, tune as method
    from mia.ranges import parse_counts, parse_numbers
    from mia.tuning.trials import Neutral

    score = _score(aim, generation)
    if best is not None:
        _check_best(vector, best)
    with open_model(model, small_effects=True) as m:
        tuned = method(
            m,
            _prompts(m, prompt, aim.prompts_from),
            vector,
            score,
            kl_budget=cost.kl_budget,
            space=Space(
                operators=[ALIASES.get(o, o) for o in space.operators.split(",")],
                layers=space.layers,
                widths=parse_counts(space.widths, "--widths", 999),
                coeffs=CANDIDATES if space.coeff is None else parse_numbers(space.coeff, "--coeff"),
            ),
            runs=space.runs,
            neutral=Neutral(cost.neutral, cost.neutral_tokens, bos=prompt.bos),
            keep_norm=space.normalize,
            seed=generation.seed,
            record=record,
        )
    if best is not None:
        _write_best(tuned, best)
    return tuned


def _score(aim: ScoreOptions, generation: SampledOptions) -> Answer | Words:
    from mia.tuning.scores import Answer, Words

    if aim.words is None:
        sampled = ("n_predict", "temperature", "sample_top_k", "top_p", "min_p")
        refuse((*sampled, "repeat_penalty", "frequency_penalty", "samples"), "needs --words")
        return Answer(unescaped(aim.answer), unescaped(aim.against or ""), aim.metric, aim.minimise)
    refuse(("answer", "against", "metric"), "is not for --words")
    return Words(aim.words, aim.samples, generation.n_predict, sampling(generation), aim.minimise)


def _prompts(m: Model, prompt: PromptOptions, file: str | None) -> list[Prompt]:
    from dataclasses import replace

    from mia.datasets.prompts import Prompt, load_prompts

    if file is None:
        return [Prompt(prompt_ids(m, prompt))]
    refuse(("prompt", "prompt_file", "keep_newline"), "is not for --prompts-from")
    return [
        replace(p, prompt=m.ids(p.prompt, bos=prompt.bos, chat=prompt.chat))
        for p in load_prompts(file)
    ]


def _check_best(vector: str, best: str) -> None:
    """Sees before any work that the file can hold such a vector, and be written."""
    from mia.vectors.expression import read
    from mia.vectors.files import check_file

    check_file(best, read(vector).site)


def _write_best(tuned: Tuned, path: str) -> None:
    """Writes the vector, and says how it is used."""
    from mia.notices import notice

    if tuned.best is None:
        notice(f"{path} is not written: there is no best setting")
        return
    tuned.write_best(path)
    setting = tuned.best.setting
    words = ["mia steer", path, "-p PROMPT"]
    if setting.operator != "add":
        words += ["--operator", setting.operator]
        words += ["--coeff", f"{setting.coeff:g}"] if setting.takes_coeff else []
    if tuned.about["normalize"]:
        words.append("--normalize")
    notice(f"wrote {path}; to use it: {' '.join(words)}{_to_bake(tuned, path)}")


def _to_bake(tuned: Tuned, path: str) -> str:
    """How `mia bake` makes a file of the best setting; nothing where no file holds such an edit."""
    from mia.bake.changes import REMOVE, WRITTEN

    assert tuned.best is not None
    setting, site = tuned.best.setting, tuned.vector.site
    words = ["mia bake", path, "-o OUT.gguf"]
    if setting.operator == "add" and site == "resid_post" and 0 not in setting.layers:
        words.append("--kind control-vector")
    elif setting.operator in ("project_out", REMOVE) and site in WRITTEN:
        words += [f"--coeff {setting.coeff:g}"] if setting.takes_coeff else []
    else:
        return ""
    return "" if tuned.about["normalize"] else f"; to bake it: {' '.join(words)}"
