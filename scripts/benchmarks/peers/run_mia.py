"""mia, through its public names; with "plain" llama.cpp's own decode and nothing else.

python -m benchmarks.peers.run_mia MODEL mia|plain [--once JOB INPUTS]
"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.harness import Plain
from benchmarks.peers.worker import Inputs, Outcome, Work, serve
from mia import Capture, Edit, LogitDifference, Model, Request, TokenLogits
from mia.llama import library_info
from mia.methods import contrast


class Mia:
    def __init__(self, model: Model):
        self.model = model

    def lens(self, inputs: Inputs) -> Outcome:
        m = self.model
        sites = [f"resid_post.{i}" for i in inputs["layers"]]
        request = Request(inputs["tokens"].tolist(), captures=[Capture(sites)], logits=None)
        captures = m.run([request])[0].captures
        best = m.lens.read(np.concatenate(list(captures.values())), 5)
        return Outcome(lambda: {"values": best.logits, "ids": best.ids})

    def capture(self, inputs: Inputs) -> Outcome:
        request = Request(inputs["tokens"].tolist(), captures=[Capture("resid_post")], logits=None)
        captures = self.model.run([request])[0].captures
        return Outcome(lambda: {"values": np.stack(list(captures.values()))})

    def patches(self, inputs: Inputs) -> Outcome:
        clean = Request(inputs["clean"].tolist(), captures=[Capture("resid_post")], logits=None)
        read = self.model.run([clean])[0]
        difference = LogitDifference(*inputs["answers"].tolist())
        corrupted = inputs["corrupted"].tolist()
        requests = []
        for i, p in inputs["cells"].tolist():
            site = f"resid_post.{i}"
            edit = Edit(site, "replace", read[site][p], tokens=p)
            requests.append(Request(corrupted, [edit], metric=difference))
        results = self.model.run(requests)
        return Outcome(lambda: {"values": np.asarray([r.value for r in results])})

    def heads(self, inputs: Inputs) -> Outcome:
        logit = TokenLogits([int(inputs["answer"])])
        prompts = inputs["prompts"].tolist()
        requests = [
            Request(
                prompts[r],
                [Edit(f"head_out.{i}", "replace", vector, tokens=-1, heads=[head])],
                metric=logit,
            )
            for (r, i, head), vector in zip(
                inputs["cells"].tolist(), inputs["vectors"], strict=True
            )
        ]
        results = self.model.run(requests)
        return Outcome(lambda: {"values": np.asarray([r.value[0, 0] for r in results])})

    def steer(self, inputs: Inputs) -> Outcome:
        edit = Edit(f"resid_post.{int(inputs['layer'])}", "add", inputs["vector"], generated=True)
        request = Request(
            inputs["tokens"].tolist(),
            [edit],
            logits=None,
            n_predict=int(inputs["n_predict"]),
            stop_at_eog=False,
        )
        tokens = self.model.run([request])[0].tokens
        return Outcome(lambda: {"values": np.asarray(tokens)})

    def pairs(self, inputs: Inputs) -> Outcome:
        texts = [(a, b) for a, b in inputs["texts"]]
        vector = contrast.train(self.model, texts, method="mean")
        return Outcome(lambda: {"values": np.stack([vector[i] for i in vector.layers])})


class LlamaCpp:
    """The prompt's decode alone, with nothing read; and steering by its own control vector."""

    def __init__(self, model: Model):
        self.plain, self.shape = Plain(model), (model.n_layer - 1, model.n_embd)

    def capture(self, inputs: Inputs) -> Outcome:
        self.plain.decode(inputs["tokens"])
        return Outcome()

    def steer(self, inputs: Inputs) -> Outcome:
        directions = np.zeros(self.shape, np.float32)  # of the blocks from 1 on
        directions[int(inputs["layer"]) - 1] = inputs["vector"]
        tokens = self.plain.decode(inputs["tokens"], int(inputs["n_predict"]), directions)
        return Outcome(lambda: {"values": np.asarray(tokens)})


def main() -> None:
    name, which, *rest = sys.argv[1:]
    model = Model(name, threads=1)
    jobs: dict[str, Work]
    if which == "plain":
        plain = LlamaCpp(model)
        jobs = {"capture": plain.capture, "steer": plain.steer}
    else:
        mia = Mia(model)
        jobs = {
            "lens": mia.lens,
            "capture": mia.capture,
            "patches": mia.patches,
            "heads": mia.heads,
            "steer": mia.steer,
            "pairs": mia.pairs,
        }
    serve(jobs, {"llama-cpp-python": str(library_info()["llama_cpp_python"])}, rest)


if __name__ == "__main__":
    main()
