"""TransformerLens, as its documentation shows these jobs, and with many interventions in a batch.

    python -m benchmarks.peers.run_transformer_lens FOLDER documented|batched [--once JOB INPUTS]

`documented` runs the model once per intervention (`patching.generic_activation_patch`,
`run_with_hooks`); `batched` puts 24 of them into one batch. Both do a part of a sweep, as each
intervention costs a whole run of the model, whichever it is.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_lens
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


class Lens:
    def __init__(self, folder: str):
        torch.set_num_threads(1)
        hf = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.model = TransformerBridge.boot_transformers(
            folder, hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu"
        )
        self.model.eval()
        self.n_layer = hf.config.num_hidden_layers

    def lens(self, inputs: Inputs) -> Outcome:
        read = logit_lens(
            self.model,
            torch.from_numpy(inputs["tokens"])[None],
            layers=[int(i) + 1 for i in inputs["layers"]],  # entry 0 is the embedding
            positions=None,
            top_k=5,
        )
        values = read.readout.values.reshape(-1, 5)
        return Outcome(lambda: {"values": values.numpy()})

    def capture(self, inputs: Inputs) -> Outcome:
        def wanted(name: str) -> bool:
            return name.endswith("hook_resid_post")

        tokens = torch.from_numpy(inputs["tokens"])[None]
        _, cache = self.model.run_with_cache(tokens, names_filter=wanted)
        kept = [cache["resid_post", i] for i in range(self.n_layer)]
        return Outcome(lambda: {"values": torch.cat(kept).numpy()})

    def clean(self, inputs: Inputs) -> Any:
        return self.model.run_with_cache(torch.from_numpy(inputs["clean"])[None])[1]

    def patches(self, inputs: Inputs) -> Outcome:
        first, second = inputs["answers"].tolist()
        index = part_of(len(inputs["cells"]), BATCH)
        values = patching.generic_activation_patch(
            self.model,
            torch.from_numpy(inputs["corrupted"])[None],
            self.clean(inputs),
            lambda logits: logits[0, -1, first] - logits[0, -1, second],
            patching.layer_pos_patch_setter,
            "resid_post",
            index_df=pd.DataFrame(inputs["cells"][index], columns=["layer", "pos"]),
        )
        return partly(values.numpy(), index, len(inputs["cells"]))

    def patches_in_batches(self, inputs: Inputs) -> Outcome:
        """One batch: a row per patch."""
        first, second = inputs["answers"].tolist()
        clean = self.clean(inputs)
        index = part_of(len(inputs["cells"]), BATCH)
        cells = inputs["cells"][index]

        def put(resid: Any, hook: Any, layer: int) -> Any:
            rows = np.flatnonzero(cells[:, 0] == layer)
            resid[rows, cells[rows, 1]] = clean["resid_post", layer][0, cells[rows, 1]]
            return resid

        hooks = [
            (f"blocks.{i}.hook_resid_post", partial(put, layer=i)) for i in np.unique(cells[:, 0])
        ]
        tokens = torch.from_numpy(inputs["corrupted"]).expand(len(cells), -1)
        logits = self.model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1]
        return partly((logits[:, first] - logits[:, second]).numpy(), index, len(inputs["cells"]))

    def heads(self, inputs: Inputs) -> Outcome:
        answer, index, cells, vectors = self._heads(inputs)
        tokens, values = torch.from_numpy(inputs["prompts"][:1]), []

        def put(z: Any, hook: Any, head: int, vector: Any) -> Any:
            z[0, -1, head] = vector
            return z

        for (_, i, head), vector in zip(cells.tolist(), vectors, strict=True):
            hook = f"blocks.{i}.attn.hook_z", partial(put, head=head, vector=vector)
            logits = self.model.run_with_hooks(tokens, fwd_hooks=[hook])
            values.append(float(logits[0, -1, answer]))
        return partly(np.asarray(values), index, len(inputs["cells"]))

    def heads_in_batches(self, inputs: Inputs) -> Outcome:
        """One batch: a row per replacement."""
        answer, index, cells, vectors = self._heads(inputs)

        def put(z: Any, hook: Any, layer: int) -> Any:
            rows = np.flatnonzero(cells[:, 1] == layer)
            z[rows, -1, cells[rows, 2]] = vectors[rows]
            return z

        hooks = [(f"blocks.{i}.attn.hook_z", partial(put, layer=i)) for i in np.unique(cells[:, 1])]
        tokens = torch.from_numpy(inputs["prompts"][0]).expand(len(cells), -1)
        logits = self.model.run_with_hooks(tokens, fwd_hooks=hooks)
        return partly(logits[:, -1, answer].numpy(), index, len(inputs["cells"]))

    def _heads(self, inputs: Inputs) -> tuple[int, Array, Array, Any]:
        """The answer, and a part of the first prompt's replacements."""
        index = part_of(len(inputs["cells"]), BATCH)
        index = index[inputs["cells"][index, 0] == 0]
        vectors = torch.from_numpy(inputs["vectors"][index])
        return int(inputs["answer"]), index, inputs["cells"][index], vectors

    def steer(self, inputs: Inputs) -> Outcome:
        n, scale = shortened(inputs)
        vector = torch.from_numpy(inputs["vector"])

        def add(resid: Any, hook: Any) -> Any:
            return resid + vector

        hook = f"blocks.{int(inputs['layer'])}.hook_resid_post", add
        with self.model.hooks(fwd_hooks=[hook]):
            out = self.model.generate(
                torch.from_numpy(inputs["tokens"])[None],
                max_new_tokens=n,
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )
        return Outcome(lambda: {"values": out[0, -n:].numpy()}, scale)

    def pairs(self, inputs: Inputs) -> Outcome:
        index, texts, scale = texts_of(inputs)

        def wanted(name: str) -> bool:
            return name.endswith("hook_resid_post")

        rows = []
        for tokens in texts:
            _, cache = self.model.run_with_cache(
                torch.from_numpy(tokens)[None], names_filter=wanted
            )
            rows.append(torch.stack([cache["resid_post", i][0, -1] for i in range(self.n_layer)]))
        read = torch.stack(rows)
        mean = read[::2].mean(0) - read[1::2].mean(0)
        return Outcome(lambda: {"values": mean.numpy(), "index": index}, scale)


def main() -> None:
    folder, which, *rest = sys.argv[1:]
    lens = Lens(folder)
    if which == "batched":
        jobs = {"patches": lens.patches_in_batches, "heads": lens.heads_in_batches}
    else:
        jobs = {
            "lens": lens.lens,
            "capture": lens.capture,
            "patches": lens.patches,
            "heads": lens.heads,
            "steer": lens.steer,
            "pairs": lens.pairs,
        }
    with torch.no_grad():
        names = ("transformer-lens", "torch", "transformers")
        serve(jobs, {name: version(name) for name in names}, rest)


if __name__ == "__main__":
    main()
