"""Options that mean the same everywhere, declared once (see `mia.cli._command`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from mia.cli._command import option

#: other names of operators
ALIASES = {"ablate": "project_out", "ablate-add": "project_out_add"}

MODEL, PROMPT, GENERATION, CHANGES = "Model", "Prompt", "Generation", "Changes while it runs"


ThreadsOption = Annotated[
    int | None, option("-t", "--threads", help="Processors to use.", panel=MODEL, min=1)
]
GpuLayersOption = Annotated[
    int | None, option("--gpu-layers", help="Blocks on the GPU, -1 for all.", panel=MODEL)
]
RpcOption = Annotated[
    str | None,
    option(
        "--rpc",
        help="Put its blocks on RPC servers: host:port[,host:port]. No encryption.",
        panel=MODEL,
        envvar="MIA_RPC",
    ),
]
CtxOption = Annotated[
    int | None, option("--ctx", help="Longest prompt with its continuation.", panel=MODEL, min=1)
]
AsOption = Annotated[
    Literal["f16", "bf16", "f32"] | None,
    option(
        "--as",
        help="Run a copy of the weights in this type, made once and kept (mia models cache): "
        "activations are not rounded to 8 bits. Pays for many rows, as in sweeps; costs where "
        "tokens are generated one by one, about twice the time of a 4-bit file.",
        panel=MODEL,
    ),
]
LoraOption = Annotated[
    list[str] | None,
    option(
        "--lora",
        help="A LoRA adapter (.gguf) to add to the weights, =0.5 behind its name for half of "
        "it. May be repeated.",
        panel=MODEL,
        metavar="FILE[=SCALE]",
    ),
]


@dataclass
class ModelOptions:
    model: Annotated[
        str,
        option(
            "-m",
            "--model",
            help="A .gguf file, or a name (mia models).",
            panel=MODEL,
            envvar="MIA_MODEL",
        ),
    ] = "smollm2"
    threads: ThreadsOption = None
    gpu_layers: GpuLayersOption = None
    rpc: RpcOption = None
    ctx: CtxOption = None
    as_type: AsOption = None
    lora: LoraOption = None


@dataclass
class PromptOptions:
    prompt: Annotated[
        str | None,
        option("-p", "--prompt", help="The prompt. \\n, \\t and \\\\ are read.", panel=PROMPT),
    ] = None
    prompt_file: Annotated[
        str | None,
        option("-f", "--file", help="Read the prompt from a file, - for stdin.", panel=PROMPT),
    ] = None
    keep_newline: Annotated[
        bool,
        option(
            "--keep-newline",
            help="Keep the newline at the end of the file; one is removed otherwise, as shells do.",
            panel=PROMPT,
        ),
    ] = False
    bos: Annotated[
        bool | None,
        option(
            "--bos/--no-bos",
            help="Put the BOS token in front; default: what the model asks for.",
            panel=PROMPT,
        ),
    ] = None
    chat: Annotated[
        bool,
        option("--chat", help="The prompt is a user's turn: use the chat template.", panel=PROMPT),
    ] = False


TemperatureOption = Annotated[float, option("--temperature", help="0 is greedy.", panel=GENERATION)]


@dataclass
class GenerationOptions:
    n_predict: Annotated[
        int, option("-n", "--n-predict", help="Tokens to generate.", panel=GENERATION, min=0)
    ] = 32
    temperature: TemperatureOption = 0.0
    sample_top_k: Annotated[
        int, option("--sample-top-k", help="Sample from the k best, 0 for all.", panel=GENERATION)
    ] = 0
    top_p: Annotated[float, option("--top-p", help="Nucleus sampling.", panel=GENERATION)] = 1.0
    min_p: Annotated[
        float,
        option("--min-p", help="Least share of the best token's probability.", panel=GENERATION),
    ] = 0.0
    repeat_penalty: Annotated[
        float, option("--repeat-penalty", help="1 is off.", panel=GENERATION)
    ] = 1.0
    frequency_penalty: Annotated[
        float, option("--frequency-penalty", help="0 is off.", panel=GENERATION)
    ] = 0.0
    seed: Annotated[
        int, option("--seed", help="Seed of everything that is drawn.", panel=GENERATION, min=0)
    ] = 0


@dataclass
class SampledOptions(GenerationOptions):
    """For commands that only make sense with samples that differ."""

    temperature: TemperatureOption = 1.0


SteerOption = Annotated[
    list[str] | None,
    option(
        "--steer",
        help='A vector to add while running: a file, or arithmetic: "a.gguf - 0.5*b.gguf". '
        "May be repeated.",
        panel=CHANGES,
    ),
]
SteerCoeffOption = Annotated[
    float | None, option("--steer-coeff", help="How much of it; default 1.", panel=CHANGES)
]
SteerLayersOption = Annotated[
    str | None,
    option("--steer-layers", help="Layers to steer at; default: all it has.", panel=CHANGES),
]


@dataclass
class ChangeOptions:
    patch: Annotated[
        list[str] | None,
        option(
            "--patch",
            help="SITE FILE FROM TO: put the activations of token FROM of a file (mia save) at "
            "token TO. Tokens may be ranges (3..7), lists (1,4) and negative. May be repeated.",
            panel=CHANGES,
            metavar="SITE FILE FROM TO",
        ),
    ] = None
    patch_mode: Annotated[
        Literal["replace", "add", "subtract", "average"] | None,
        option("--patch-mode", help="How patches act; default replace.", panel=CHANGES),
    ] = None
    ablate: Annotated[
        str | None,
        option("--ablate", help="Heads to ablate, as LAYER.HEAD: 3.5,4.0,7.*", panel=CHANGES),
    ] = None
    select: Annotated[
        str | None,
        option(
            "--select",
            help="Heads to keep; the others of their layers are ablated.",
            panel=CHANGES,
        ),
    ] = None
    ablate_with: Annotated[
        str | None,
        option(
            "--ablate-with",
            help="What ablated heads give instead: zero; mean FILE (of activations at head_out); "
            "resample (what they give at other tokens of the prompt); resample-from FILE.",
            panel=CHANGES,
            metavar="zero|mean FILE|resample",
        ),
    ] = None
    ablate_attention: Annotated[
        bool,
        option(
            "--ablate-attention",
            help="Ablate heads at their attention weights, not at head_out (turns flash attention "
            "off).",
            panel=CHANGES,
        ),
    ] = False
    ablate_seed: Annotated[
        int, option("--ablate-seed", help="Seed of resampling.", panel=CHANGES, min=0)
    ] = 0
    ablate_experts: Annotated[
        str | None,
        option(
            "--ablate-experts",
            help="Experts that the router may not choose, as LAYER.EXPERT: 3.5,4.0-7.",
            panel=CHANGES,
        ),
    ] = None
    zero_experts: Annotated[
        str | None,
        option(
            "--zero-experts",
            help="Experts that are chosen as before, but add nothing.",
            panel=CHANGES,
        ),
    ] = None
    force_experts: Annotated[
        str | None,
        option("--force-experts", help="Experts that every token chooses.", panel=CHANGES),
    ] = None
    block: Annotated[
        list[str] | None,
        option(
            "--block",
            help='QUERIES->KEYS: these tokens may not attend to those, like "5->0", "3..7->0,1", '
            '"5..->0" (5 and all after it); "5->0@2..4" in some layers, "5->0@3.2,4.*" in some '
            "heads. May be repeated; turns flash attention off.",
            panel=CHANGES,
            metavar="QUERIES->KEYS",
        ),
    ] = None
    steer: SteerOption = None
    steer_coeff: SteerCoeffOption = None
    steer_layers: SteerLayersOption = None


# -- single options ------------------------------------------------------------------------

CoeffOption = Annotated[
    str | None,
    option("--coeff", help="How much of it: 2, or several like 0.5,1,2; default 1.", panel=CHANGES),
]
KlBudgetOption = Annotated[
    float | None,
    option(
        "--kl-budget",
        help="Choose the coefficient of largest size whose mean KL from the unchanged run is at most "
        "this (nats per token); default: among those of --coeff, or a list of usual ones.",
        panel=CHANGES,
    ),
]
PromptsOption = Annotated[int, typer.Option("--prompts", help="Prompts to average over.", min=1)]
LayersOption = Annotated[str | None, typer.Option("--layers", help="Layers: 3,7 or 10..20.")]
HeadsOption = Annotated[
    str | None, typer.Option("--heads", help="Heads, as LAYER.HEAD: 3.5,7.*; default all.")
]
TopOption = Annotated[
    int, typer.Option("-k", "--top-k", help="How many of the best to list.", min=1)
]
NullOption = Annotated[
    int, typer.Option("--null", help="Changes by 1e-5 that measure the noise floor.", min=0)
]
TokensOption = Annotated[
    str | None, typer.Option("--token-idx", help="Tokens of the prompt: -1, 3..7, 1,4.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.", min=0)]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="Put the BOS token in front; default: what the model asks for."
    ),
]
ItemsOption = Annotated[
    str | None, typer.Option("--items", help="Items of the data, counted from 0: 0..39, 40..")
]
AnswerOption = Annotated[
    str, typer.Option("--answer", help='What should follow the prompt, like " Paris".')
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against", help='Another answer, like " Rome": the difference to it is measured.'
    ),
]
BaselineOption = Annotated[
    bool,
    typer.Option(
        "--baseline/--no-baseline",
        help="Run the prompt unchanged as well.",
        rich_help_panel=CHANGES,
    ),
]
VectorFileOption = Annotated[
    str, typer.Option("-o", "--out", help="The file to write: .gguf or .safetensors.")
]
LayerZeroOption = Annotated[
    bool, typer.Option("--layer-zero", help="Keep layer 0 in a GGUF, which llama.cpp refuses.")
]
