"""nnsight, as its documentation shows these jobs, and with many interventions in one trace.

    python -m benchmarks.peers.run_nnsight FOLDER documented|batched [--once JOB INPUTS]

`documented` traces once per intervention; `batched` gives each its own `invoke` of one trace. Both
do a part of a sweep, as each intervention costs a whole run of the model, whichever it is.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import nnsight
import numpy as np
import torch
from nnsight import TransformersModel
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.peers.worker import (
    BATCH,
    Array,
    Inputs,
    Outcome,
    part_of,
    partly,
    serve,
    shortened,
    texts_of,
)


class Nnsight:
    def __init__(self, folder: str):
        torch.set_num_threads(1)
        hf = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = TransformersModel(hf, tokenizer=tokenizer, task="text-generation")
        self.n_layer = hf.config.num_hidden_layers
        self.dim = hf.config.head_dim

    def resid(self, tokens: Array) -> list[Any]:
        """Residuals behind every block, (1, n, n_embd) each."""
        model = self.model
        with torch.no_grad(), model.trace(torch.from_numpy(tokens)[None]):
            kept = nnsight.save([])
            for layer in model.model.layers:
                kept.append(layer.output)
        return list(kept)

    def lens(self, inputs: Inputs) -> Outcome:
        model, layers = self.model, set(inputs["layers"].tolist())
        with torch.no_grad(), model.trace(torch.from_numpy(inputs["tokens"])[None]):
            best = nnsight.save([])
            for i, layer in enumerate(model.model.layers):
                if i in layers:
                    scores = model.lm_head(model.model.norm(layer.output))[0]
                    probs = scores.softmax(-1).topk(5)
                    best.append((scores.gather(-1, probs.indices), probs.indices, probs.values))
        values = torch.cat([b[0] for b in best])
        ids = torch.cat([b[1] for b in best])
        return Outcome(lambda: {"values": values.numpy(), "ids": ids.numpy()})

    def capture(self, inputs: Inputs) -> Outcome:
        kept = self.resid(inputs["tokens"])
        return Outcome(lambda: {"values": torch.cat(kept).numpy()})

    def patch(self, inputs: Inputs, clean: list[Any], cells: Array) -> list[float]:
        """One trace per patch."""
        model, tokens = self.model, torch.from_numpy(inputs["corrupted"])[None]
        first, second = inputs["answers"].tolist()
        out = []
        for i, p in cells.tolist():
            with torch.no_grad(), model.trace(tokens):
                model.model.layers[i].output[:, p] = clean[i][:, p]
                logits = model.lm_head.output[0, -1]
                value = (logits[first] - logits[second]).save()
            out.append(float(value))
        return out

    def patch_batch(self, inputs: Inputs, clean: list[Any], cells: Array) -> list[float]:
        """One trace, one invoke per patch."""
        model, tokens = self.model, torch.from_numpy(inputs["corrupted"])[None]
        first, second = inputs["answers"].tolist()
        with torch.no_grad(), model.trace() as tracer:
            values = nnsight.save([])
            for i, p in cells.tolist():
                with tracer.invoke(tokens):
                    model.model.layers[i].output[:, p] = clean[i][:, p]
                    logits = model.lm_head.output[0, -1]
                    values.append(logits[first] - logits[second])
        return [float(v) for v in values]

    def replace(self, tokens: Any, cells: Array, vectors: Any, answer: int) -> list[float]:
        """One trace per head."""
        model, dim, out = self.model, self.dim, []
        for (_, i, head), vector in zip(cells.tolist(), vectors, strict=True):
            with torch.no_grad(), model.trace(tokens):
                z = model.model.layers[i].self_attn.o_proj.input
                z[0, -1, head * dim : (head + 1) * dim] = vector
                value = model.lm_head.output[0, -1, answer].save()
            out.append(float(value))
        return out

    def replace_batch(self, tokens: Any, cells: Array, vectors: Any, answer: int) -> list[float]:
        """One trace, one invoke per head."""
        model, dim = self.model, self.dim
        with torch.no_grad(), model.trace() as tracer:
            values = nnsight.save([])
            for (_, i, head), vector in zip(cells.tolist(), vectors, strict=True):
                with tracer.invoke(tokens):
                    z = model.model.layers[i].self_attn.o_proj.input
                    z[0, -1, head * dim : (head + 1) * dim] = vector
                    values.append(model.lm_head.output[0, -1, answer])
        return [float(v) for v in values]

    def patches(self, inputs: Inputs, batched: bool) -> Outcome:
        clean = self.resid(inputs["clean"])
        index = part_of(len(inputs["cells"]), BATCH)
        cells = inputs["cells"][index]
        values = (self.patch_batch if batched else self.patch)(inputs, clean, cells)
        return partly(np.asarray(values), index, len(inputs["cells"]))

    def heads(self, inputs: Inputs, batched: bool) -> Outcome:
        index = part_of(len(inputs["cells"]), BATCH)
        index = index[inputs["cells"][index, 0] == 0]  # of one prompt
        cells, vectors = inputs["cells"][index], torch.from_numpy(inputs["vectors"][index])
        tokens = torch.from_numpy(inputs["prompts"][:1])
        run = self.replace_batch if batched else self.replace
        values = run(tokens, cells, vectors, int(inputs["answer"]))
        return partly(np.asarray(values), index, len(inputs["cells"]))

    def steer(self, inputs: Inputs) -> Outcome:
        model, (n, scale) = self.model, shortened(inputs)
        vector, where = torch.from_numpy(inputs["vector"]), int(inputs["layer"])
        tokens = torch.from_numpy(inputs["tokens"])[None]
        with (
            torch.no_grad(),
            model.generate(tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False) as tracer,
        ):
            for _step in tracer.iter[:n]:
                model.model.layers[where].output[:] += vector
            out = tracer.result.save()
        return Outcome(lambda: {"values": out[0, -n:].numpy()}, scale)

    def pairs(self, inputs: Inputs, batched: bool) -> Outcome:
        model = self.model
        index, some, scale = texts_of(inputs)
        texts = [torch.from_numpy(t)[None] for t in some]
        rows: list[tuple[int, int, Any]] = []  # text, layer, (n_embd,)
        for start in range(0, len(texts), BATCH if batched else 1):
            with torch.no_grad(), model.trace() as tracer:
                kept = nnsight.save([])  # invokes take turns: in no order
                for k, tokens in enumerate(texts[start : start + (BATCH if batched else 1)]):
                    with tracer.invoke(tokens):
                        for i, layer in enumerate(model.model.layers):
                            kept.append((k, i, layer.output[0, -1]))
            rows += [(start + k, i, row) for k, i, row in kept]
        rows.sort(key=lambda place: place[:2])
        read = torch.stack([row for *_, row in rows]).view(len(texts), self.n_layer, -1)
        mean = read[::2].mean(0) - read[1::2].mean(0)
        return Outcome(lambda: {"values": mean.numpy(), "index": index}, scale)


def main() -> None:
    folder, which, *rest = sys.argv[1:]
    nn, batched = Nnsight(folder), which == "batched"
    jobs = {
        "patches": lambda i: nn.patches(i, batched),
        "heads": lambda i: nn.heads(i, batched),
        "pairs": lambda i: nn.pairs(i, batched),
    }
    if not batched:
        jobs |= {"lens": nn.lens, "capture": nn.capture, "steer": nn.steer}
    serve(jobs, {name: version(name) for name in ("nnsight", "torch", "transformers")}, rest)


if __name__ == "__main__":
    main()
