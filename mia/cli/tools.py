"""Commands about the installation: models, doctor, demo."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from mia.cli import _work
from mia.cli._options import ModelOptions, OutputOptions, command, one_line_errors
from mia.cli._output import console, finish, model_facts, notice, on_terminal, token_list, visible


def register(app: typer.Typer) -> None:
    models = typer.Typer(
        invoke_without_command=True, help="Models that have a name, and whether they are there."
    )

    @models.callback()
    def _list(
        ctx: typer.Context,
        json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    ) -> None:
        if ctx.invoked_subcommand is None:
            with one_line_errors():
                list_models(OutputOptions(json=json))

    command(models, name="pull")(pull)
    command(models, name="convert")(convert)
    app.add_typer(models, name="models")
    command(app, name="doctor")(doctor)
    command(app, name="demo")(demo)


def list_models(output: OutputOptions) -> None:
    from mia.models import registry

    found = registry.list_models()
    rows: list[dict[str, Any]] = [
        {
            "name": s.spec.name,
            "present": s.present,
            "path": None if s.path is None else str(s.path),
            "bytes": s.size,
            "source": s.spec.source,
            "problem": s.problem,
        }
        for s in found
    ]

    def human() -> None:
        for r in rows:
            size = f"{r['bytes'] / 1e6:8.0f} MB" if r["bytes"] else " " * 11
            print(f"{r['name']:<20s} {size}  {r['path'] if r['present'] else r['problem']}")

    finish({"models": rows}, output, human)


def pull(
    output: OutputOptions,
    name: Annotated[str, typer.Argument(help="A name of models.toml with repo and file.")],
) -> None:
    """Download a model of models.toml from its Hugging Face repository."""
    from mia.models import registry

    path = registry.pull(name, progress=not output.quiet)
    finish({"name": name, "path": str(path)}, output, lambda: print(path))


def convert(
    output: OutputOptions,
    model: Annotated[str, typer.Argument(help="A .gguf file, or a name.")],
    kind: Annotated[str, typer.Argument(help="f32, f16, bf16, q8_0, q6_k, q4_k_m, q4_1, q4_0.")],
    file: Annotated[str, typer.Argument(help="The .gguf file to write.")],
) -> None:
    """Write a model with its weights in another type. f32 loses nothing, is exact, and runs many rows fast."""
    from mia.errors import UsageError
    from mia.io.files import check_writable, write_whole
    from mia.llama import ggml
    from mia.model import processors
    from mia.models import registry

    if kind not in ggml.FILE_TYPES:
        raise UsageError(f"unknown type {kind!r}; known: {', '.join(ggml.FILE_TYPES)}")
    source = registry.resolve(model).path
    assert source is not None
    registry.check_gguf(source)
    target = check_writable(file)
    if target.exists() and target.samefile(source):
        raise UsageError(f"{file} is the model itself; give another name")
    write_whole(target, lambda p: ggml.convert_file(source, p, kind, processors()))
    size = target.stat().st_size
    finish(
        {"file": file, "type": kind, "bytes": size},
        output,
        lambda: print(f"{file}  {size / 1e6:.0f} MB"),
    )


def doctor(model: ModelOptions, output: OutputOptions) -> None:
    """What llama.cpp can do on this machine, and what would make it faster or safer."""
    from mia.llama.ggml import library_info
    from mia.llama.probe import extra_buffers_safe

    info = library_info()
    amx = "AMX_INT8 = 1" in info["features"]
    safe = extra_buffers_safe()
    with _work.open_model(model) as m:
        kinds = sorted({n.type for n in _weight_nodes(m)})
        advice = []
        if amx and not safe:
            advice.append(
                "AMX crashes in this build of llama.cpp: rebuild it with -fno-tree-dse -fno-dse (scripts/demo does)"
            )
        if info["callback"] == "Python" and os.environ.get("MIA_NATIVE") != "0":
            advice.append(
                "the callback is answered by Python, several hundredths slower per token: install mia again "
                "where there is a C compiler"
            )
        slow = [k for k in kinds if k in ("q4_1", "q5_0", "q5_1")]
        if slow:
            advice.append(
                f"{', '.join(slow)} weights have no matrix-matrix kernel on a CPU: many rows at once run faster "
                f"as q4_0, q8_0 or f32: mia models convert {m.name} f32 FILE"
            )
        document = {
            "model": model_facts(m),
            "features": info["features"],
            "gpu": info["gpu"],
            "callback": info["callback"],
            "extra_buffers": safe,
            "threads": m.threads,
            "weight_types": kinds,
            "kv_type": m.kv_type,
            "advice": advice,
        }

        def human() -> None:
            print(f"llama-cpp-python {info['llama_cpp_python']}; {info['features']}")
            print(
                f"GPU offload: {info['gpu']}; extra buffers (AMX, repacking): {'on' if safe else 'off'}; "
                f"callback: {info['callback']}"
            )
            print(
                f"{m.name}: {m.architecture}, weights {', '.join(kinds)}, KV cache {m.kv_type}, {m.threads} threads"
            )
            for line in advice or ["nothing to improve was found"]:
                print(f"- {line}")

        finish(document, output, human)


def _weight_nodes(m: Any) -> list[Any]:
    topology = m.topology
    return [
        topology.node(n.src[0])
        for n in topology.nodes
        if n.op == "MUL_MAT" and topology.is_leaf(n.src[0])
    ]


DEMO_SOURCE = "Q: Egypt\nA: Cairo\n\nQ: Norway\nA: Oslo\n\nQ: Japan\nA: Tokyo\n\nQ: Italy\nA: Rome\n\nQ: Spain\nA:"
DEMO_SITE = "l_out-21"


def demo(output: OutputOptions) -> None:
    """Carry "answer with the capital" from one prompt into another, on smollm2."""
    from mia.edits import Edit
    from mia.model import Model
    from mia.request import Capture, Request

    with Model("smollm2", bos=True) as m:
        source = m.tokenize(DEMO_SOURCE)
        task = m.run([Request(source, captures=[Capture(DEMO_SITE, -1)], logits=None)])[0][
            DEMO_SITE
        ]
        queries = {c: m.tokenize(f"Q: {c}\nA:") for c in ("France", "Russia", "Germany")}
        requests = []
        for ids in queries.values():
            patch = Edit(DEMO_SITE, "replace", task, tokens=-1)
            requests.append(Request(ids, n_predict=1, logits=None))
            requests.append(Request(ids, [patch], [Capture("l_out", -1)], logits=None, n_predict=1))
        results = m.run(requests)
        answers = [
            {
                "query": c,
                "plain": m.text(results[2 * i].tokens),
                "patched": m.text(results[2 * i + 1].tokens),
            }
            for i, c in enumerate(queries)
        ]
        lens = _demo_lens(m, results[1])
        document = {
            "model": model_facts(m),
            "tokens": token_list(m, queries["France"]),
            "source": DEMO_SOURCE,
            "site": DEMO_SITE,
            "answers": answers,
            "lens": lens,
        }
        finish(document, output, lambda: _show_demo(document, len(source)))


def _demo_lens(m: Any, result: Any) -> list[dict[str, Any]]:
    import numpy as np

    from mia.sites import Site

    layers = list(range(17, m.n_layer))
    rows = np.concatenate([result.captures[Site("resid_post", i)] for i in layers])
    read = m.lens.read(rows, 4)
    return [
        {
            "site": f"l_out-{layer}",
            "layer": layer,
            "token_index": 6,
            "top": [
                {"id": int(t), "text": m.piece(int(t)), "prob": round(float(p), 4)}
                for t, p in zip(read.ids[n], read.probs[n], strict=True)
            ],
        }
        for n, layer in enumerate(layers)
    ]


def _show_demo(document: dict[str, Any], n_source: int) -> None:
    print(
        f"Five questions and four answers, {n_source} tokens; what the last token holds at {DEMO_SITE} is the task:\n"
    )
    print("  " + DEMO_SOURCE.replace("\n\n", "  ").replace("\n", " ") + "\n")
    print("That vector, put at the last token of a prompt without examples:\n")
    for a in document["answers"]:
        print(
            f"  Q: {a['query']:<8s} A:   plain ->{visible(a['plain']):<10s} patched ->{visible(a['patched'])}"
        )
    print(
        "\nThe logit lens of the patched run, last token of 'Q: France A:' (l_out-21 is where the vector came in):\n"
    )
    if on_terminal():
        from mia.cli._tables import lens_table

        screen = console()
        pieces = [visible(t["text"]) for t in document["tokens"]]
        screen.print(lens_table(document["lens"], pieces, 1, screen.width))
    else:
        for row in document["lens"]:
            print(
                f"  {row['site']:<9s}"
                + "|".join(f"{visible(t['text'])} {t['prob']:.2f}" for t in row["top"])
            )
    notice("next: mia logit-lens l_out -p 'The capital of France is' --bos", OutputOptions())
