"""steering-vectors: a vector of the pairs' mean difference, and steering by one.

    python -m benchmarks.peers.run_steering_vectors FOLDER documented|batched [--once JOB INPUTS]

`batched`: 32 texts at a time instead of one, the library's own default.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import numpy as np
import torch
from steering_vectors import SteeringVector, train_steering_vector
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.peers.worker import Inputs, Outcome, serve, shortened, texts_of, words


def main() -> None:
    folder, which, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"

    def pairs(inputs: Inputs) -> Outcome:
        index, some, scale = texts_of(inputs)
        texts = [words(tokens) for tokens in some]
        vector = train_steering_vector(
            model,
            tokenizer,
            list(zip(texts[::2], texts[1::2], strict=True)),
            read_token_index=-1,
            batch_size=1 if which == "documented" else 32,
        )
        by_layer = vector.layer_activations
        rows = torch.stack([by_layer[i] for i in sorted(by_layer)])
        return Outcome(lambda: {"values": rows.numpy(), "index": index}, scale)

    def steer(inputs: Inputs) -> Outcome:
        vector = SteeringVector({int(inputs["layer"]): torch.from_numpy(inputs["vector"])})
        encoded = tokenizer(words(inputs["tokens"]), return_tensors="pt")
        n, scale = shortened(inputs)
        with vector.apply(model):
            out = model.generate(**encoded, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        return Outcome(lambda: {"values": np.asarray(out[0, -n:])}, scale)

    names = ("steering-vectors", "torch", "transformers")
    jobs = {"pairs": pairs} if which == "batched" else {"pairs": pairs, "steer": steer}
    serve(jobs, {name: version(name) for name in names}, rest)


if __name__ == "__main__":
    main()
