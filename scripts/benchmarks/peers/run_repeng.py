"""repeng: a control vector of the pairs (the first principal component of the differences, its
default), and steering by one.

    python -m benchmarks.peers.run_repeng FOLDER [--once JOB INPUTS]
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.peers.worker import Inputs, Outcome, serve, shortened, words

if not hasattr(np, "float_"):  # repeng 0.4.0 names a type that numpy 2 has no more
    setattr(np, "float_", np.float64)  # noqa: B010
from repeng import ControlModel, ControlVector, DatasetEntry


def main() -> None:
    folder, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    # behind the last block its hidden states are normed: that layer is left out
    layers = list(range(model.config.num_hidden_layers - 1))

    def pairs(inputs: Inputs) -> Outcome:
        texts = [words(tokens) for tokens in inputs["tokens"]]
        entries = [DatasetEntry(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
        trained = ControlVector.train(model, tokenizer, entries, hidden_layers=layers)
        directions = np.stack([trained.directions[i] for i in layers])
        return Outcome(lambda: {"principal": directions, "layers": np.asarray(layers)})

    def steer(inputs: Inputs) -> Outcome:
        where, (n, scale) = int(inputs["layer"]), shortened(inputs)
        encoded = tokenizer(words(inputs["tokens"]), return_tensors="pt")
        controlled = ControlModel(model, [where])
        try:
            controlled.set_control(ControlVector("llama", {where: inputs["vector"]}), 1.0)
            out = controlled.generate(
                **encoded, max_new_tokens=n, min_new_tokens=n, do_sample=False
            )
        finally:
            controlled.unwrap()
        return Outcome(lambda: {"values": np.asarray(out[0, -n:])}, scale)

    names = ("repeng", "torch", "transformers")
    serve({"pairs": pairs, "steer": steer}, {name: version(name) for name in names}, rest)


if __name__ == "__main__":
    main()
