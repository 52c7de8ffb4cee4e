"""Measures mia beside the libraries that do the same work: `scripts/bench peers --help`.

Six jobs and two whole processes, on the same weights, one thread each. Every contestant is a
process of its own, in an environment of its own, that does a job once when it is told to
(`worker`), so that all take turns and share the noise of the machine. Each result is compared
with the expert's in float32 first; what is wrong is not timed.

| file                      | who                                                              |
|---------------------------|------------------------------------------------------------------|
| `run_mia`                 | mia, one process per type of the weights; plain llama.cpp        |
| `run_expert`              | transformers' Llama, by hand: batched, resumed at the edit       |
| `run_transformer_lens`    | TransformerLens as its documentation shows it, and batched       |
| `run_nnsight`             | nnsight as its documentation shows it, and batched               |
| `run_steering_vectors`    | steering-vectors: training and steering                          |
| `run_repeng`              | repeng: training and steering                                    |

The `run_*` files and `worker` import nothing of mia, as their environments need not have it
(`run_mia` excepted).
"""
