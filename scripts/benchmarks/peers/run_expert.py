"""The expert: transformers' Llama, by hand, as fast as the jobs allow on a processor.

The weights are those of `LlamaForCausalLM`; the blocks are written out below, so that

- rows of all interventions go through each matrix together (`_packed`), without padding;
- an intervention begins at its edit: the clean run's residual there, its keys and values before;
- behind the last block only the last token is kept, and its logits only for the tokens asked for;
- texts share what they begin with (`Trie`).

    python -m benchmarks.peers.run_expert FOLDER float32|bfloat16 [--once JOB INPUTS]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.peers.worker import Array, Inputs, Outcome, serve

#: (q, k, v) of all rows -> what the heads read, (rows, n_head, head_dim)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """A run over a whole prompt: residuals behind each block, keys and values in each."""

    resid: list[Tensor]  # (n, n_embd)
    keys: list[Tensor]  # (n_head_kv, n, head_dim), rotated
    values: list[Tensor]
    heads: list[Tensor]  # (n, n_head, head_dim): what the heads read


class Expert:
    def __init__(self, folder: str, dtype: str):
        torch.set_num_threads(1)
        kind = getattr(torch, dtype)
        # transformers 5 calls it dtype; both versions know the old name
        self.model = LlamaForCausalLM.from_pretrained(
            folder, torch_dtype=kind, attn_implementation="sdpa"
        ).eval()
        c = self.model.config
        self.dtype, self.eps, self.layers = kind, c.rms_norm_eps, list(self.model.model.layers)
        self.n_head, self.n_kv, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        angles = torch.arange(c.max_position_embeddings)[None]
        cos, sin = self.model.model.rotary_emb(torch.zeros(1, dtype=kind), angles)
        self.cos, self.sin = cos[0][:, None], sin[0][:, None]  # (n_ctx, 1, head_dim)
        self.unembedding = self.model.lm_head.weight  # (n_vocab, n_embd)

    # -- the model, row by row ------------------------------------------------------------

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.model.model.embed_tokens.weight)

    def norm(self, x: Tensor, module: Any) -> Tensor:
        return F.rms_norm(x, module.weight.shape, module.weight, self.eps)

    def project(self, layer: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (rows, n_head, dim), k and v (rows, n_kv, dim) of normed rows."""
        a = layer.self_attn
        q = F.linear(x, a.q_proj.weight).view(-1, self.n_head, self.dim)
        k, v = self.project_kv(layer, x, positions)
        return self.rotate(q, positions), k, v

    def project_kv(self, layer: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        a = layer.self_attn
        k = F.linear(x, a.k_proj.weight).view(-1, self.n_kv, self.dim)
        v = F.linear(x, a.v_proj.weight).view(-1, self.n_kv, self.dim)
        return self.rotate(k, positions), v

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = self.dim // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.cos[positions] + turned * self.sin[positions]

    def finish(self, layer: Any, x: Tensor, z: Tensor) -> Tensor:
        """The block from what its heads read, z (rows, n_head, dim), to its output."""
        x = x + F.linear(z.reshape(len(x), -1), layer.self_attn.o_proj.weight)
        h, mlp = self.norm(x, layer.post_attention_layernorm), layer.mlp
        gate = F.silu(F.linear(h, mlp.gate_proj.weight))
        return x + F.linear(gate.mul_(F.linear(h, mlp.up_proj.weight)), mlp.down_proj.weight)

    def logits(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Of some tokens, or all: (rows, n)."""
        w = self.unembedding if tokens is None else self.unembedding[tokens]
        return F.linear(self.norm(x, self.model.model.norm), w)

    def run(self, tokens: Tensor) -> Run:
        """One prompt (n,), everything kept."""
        x, positions = self.embed(tokens), torch.arange(len(tokens))
        run = Run([], [], [], [])
        for layer in self.layers:
            q, k, v = self.project(layer, self.norm(x, layer.input_layernorm), positions)
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
            z = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            x = self.finish(layer, x, z)
            run.resid.append(x)
            run.keys.append(k)
            run.values.append(v)
            run.heads.append(z)
        return run

    def behind(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of sequences that share what is before them.

        Args:
            q: (s, m, n_head, dim): s sequences of m tokens; k, v the same with n_kv heads.
            keys, values: (n_kv, p, dim) of the tokens before.

        Returns (s, m, n_head, dim).
        """
        s, m = q.shape[:2]
        p, per = keys.shape[1], self.n_head // self.n_kv
        q = (q * self.dim**-0.5).view(s, m, self.n_kv, per, self.dim)
        q = q.permute(2, 0, 3, 1, 4)  # (n_kv, s, per, m, dim)
        before = q.reshape(self.n_kv, s * per * m, self.dim) @ keys.transpose(1, 2)
        k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)  # (n_kv, s, m, dim)
        own = q.reshape(self.n_kv, s, per * m, self.dim) @ k.transpose(2, 3)
        own = own.view(self.n_kv, s, per, m, m)
        if m > 1:
            own = own + torch.full((m, m), -torch.inf, dtype=q.dtype).triu(1)
        scores = torch.cat((before.view(self.n_kv, s, per, m, p), own), -1).softmax(-1)
        z = (scores[..., :p].reshape(self.n_kv, s * per * m, p) @ values).view(q.shape)
        z = z + (scores[..., p:].reshape(self.n_kv, s, per * m, m) @ v).view(z.shape)
        return z.permute(1, 3, 0, 2, 4).reshape(s, m, self.n_head, self.dim)

    # -- the jobs ---------------------------------------------------------------------------

    def lens(self, inputs: Inputs) -> Outcome:
        run = self.run(torch.from_numpy(inputs["tokens"]))
        layers = inputs["layers"]
        rows = torch.cat([run.resid[i] for i in layers])
        best, ids, probs = [], [], list[Tensor]()
        for part in rows.split(256):
            scores = self.logits(part)
            top = scores.topk(5)
            best.append(top.values)
            ids.append(top.indices)
            # eight times as fast as logsumexp on a processor
            probs.append(scores.log_softmax(-1).gather(-1, top.indices).exp())
        values = torch.cat(best)
        return Outcome(lambda: {"values": numpy(values), "ids": torch.cat(ids).numpy()})

    def capture(self, inputs: Inputs) -> Outcome:
        """Nothing but the residuals is wanted: the last block's heads are not kept either."""
        run = self.run(torch.from_numpy(inputs["tokens"]))
        return Outcome(lambda: {"values": numpy(torch.stack(run.resid))})

    def patches(self, inputs: Inputs) -> Outcome:
        clean = self.run(torch.from_numpy(inputs["clean"]))
        base = self.run(torch.from_numpy(inputs["corrupted"]))
        answers = torch.from_numpy(inputs["answers"])
        n, last = len(inputs["corrupted"]), len(self.layers) - 1
        cells: dict[int, dict[int, int]] = {}  # layer -> token -> place in the result
        for place, (i, p) in enumerate(inputs["cells"].tolist()):
            cells.setdefault(i, {})[p] = place
        # by the first changed token: their rows (s, n - p, n_embd), and where they belong
        groups: dict[int, Tensor] = {}
        places: dict[int, list[int]] = {}
        out = torch.empty(len(inputs["cells"]), len(answers), dtype=self.dtype)
        out[:] = self.logits(base.resid[-1][-1:], answers)  # what changes no last token
        for i, layer in enumerate(self.layers):
            if groups:
                self._patched_block(i, layer, groups, base, n)
            for p, place in cells.get(i, {}).items():
                if i == last and p < n - 1:
                    continue
                row = torch.cat((clean.resid[i][p : p + 1], base.resid[i][p + 1 :]))
                if i == last:
                    row = row[-1:]
                new = row[None]
                groups[p] = torch.cat((groups[p], new)) if p in groups else new
                places.setdefault(p, []).append(place)
        rows = torch.cat([groups[p][:, -1] for p in groups])
        out[[place for p in groups for place in places[p]]] = self.logits(rows, answers)
        return Outcome(lambda: {"values": numpy(out[:, 0] - out[:, 1])})

    def _patched_block(
        self, i: int, layer: Any, groups: dict[int, Tensor], base: Run, n: int
    ) -> None:
        """Runs the rows of all groups through a block; behind the last one the last token is
        left."""
        at_end = i == len(self.layers) - 1
        shapes = {p: g.shape[:2] for p, g in groups.items()}
        x = torch.cat([g.flatten(0, 1) for g in groups.values()])
        positions = torch.cat([torch.arange(p, n).repeat(s) for p, (s, _) in shapes.items()])
        h = self.norm(x, layer.input_layernorm)
        if at_end:
            k, v = self.project_kv(layer, h, positions)
            ends = positions == n - 1
            x, h = x[ends], h[ends]
            q = F.linear(h, layer.self_attn.q_proj.weight).view(-1, self.n_head, self.dim)
            q = self.rotate(q, torch.full((len(q),), n - 1))
        else:
            q, k, v = self.project(layer, h, positions)
        z, start, first = [], 0, 0
        for p, (s, m) in shapes.items():
            own_k, own_v = (t[start : start + s * m].view(s, m, self.n_kv, -1) for t in (k, v))
            start += s * m
            keys, values = base.keys[i][:, :p], base.values[i][:, :p]
            if at_end:
                z.append(self._last_query(q[first : first + s], own_k, own_v, keys, values))
                first += s
            else:
                own_q = q[start - s * m : start].view(s, m, self.n_head, -1)
                z.append(self.behind(own_q, own_k, own_v, keys, values).flatten(0, 1))
        x = self.finish(layer, x, torch.cat(z))
        start = 0
        for p, (s, m) in shapes.items():
            m = 1 if at_end else m
            groups[p] = x[start : start + s * m].view(s, m, -1)
            start += s * m

    def _last_query(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The last token's attention alone: q (s, n_head, dim); see `behind` -> (s, n_head, dim)"""
        s, p, per = len(q), keys.shape[1], self.n_head // self.n_kv
        q = (q * self.dim**-0.5).view(s, self.n_kv, per, self.dim).transpose(0, 1)
        before = q.reshape(self.n_kv, s * per, self.dim) @ keys.transpose(1, 2)
        before = before.view(self.n_kv, s, per, p)
        k, v = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)  # (n_kv, s, m, dim)
        scores = torch.cat((before, q @ k.transpose(2, 3)), -1).softmax(-1)
        z = (scores[..., :p].reshape(self.n_kv, s * per, p) @ values).view(q.shape)
        return (z + scores[..., p:] @ v).transpose(0, 1).reshape(s, self.n_head, self.dim)

    def heads(self, inputs: Inputs) -> Outcome:
        cells, vectors = inputs["cells"], torch.from_numpy(inputs["vectors"]).to(self.dtype)
        runs = [self.run(t) for t in torch.from_numpy(inputs["prompts"])]
        n = inputs["prompts"].shape[1]
        rows: list[Tensor] = [torch.empty(0, self.model.config.hidden_size, dtype=self.dtype)]
        rows *= len(runs)  # of each prompt: the last token of every replacement so far
        order: list[list[int]] = [[] for _ in runs]
        for i, layer in enumerate(self.layers):
            new = [
                np.flatnonzero((cells[:, 0] == r) & (cells[:, 1] == i)) for r in range(len(runs))
            ]
            x, z = torch.cat(rows), []
            if len(x):
                end = torch.full((len(x),), n - 1)
                q, k, v = self.project(layer, self.norm(x, layer.input_layernorm), end)
                start = 0
                for r, run in enumerate(runs):
                    part = slice(start, start + len(rows[r]))
                    start = part.stop
                    keys, values = run.keys[i][:, :-1], run.values[i][:, :-1]
                    z.append(
                        self.behind(q[part, None], k[part, None], v[part, None], keys, values)[:, 0]
                    )
            for r, run in enumerate(runs):  # the replacements at this layer join
                which = new[r]
                before = (
                    run.resid[i - 1][-1]
                    if i
                    else self.embed(torch.from_numpy(inputs["prompts"][r][-1:]))[0]
                )
                changed = run.heads[i][-1].expand(len(which), -1, -1).clone()
                changed[range(len(which)), cells[which, 2]] = vectors[which]
                rows[r] = torch.cat((rows[r], before.expand(len(which), -1)))
                if len(x):
                    z[r] = torch.cat((z[r], changed))
                else:
                    z.append(changed)
                order[r] += which.tolist()
            out = self.finish(layer, torch.cat(rows), torch.cat(z))
            rows = list(out.split([len(r) for r in rows]))
        answer = torch.from_numpy(inputs["answer"]).view(1)
        values = torch.empty(len(cells), dtype=self.dtype)
        values[[c for r in order for c in r]] = self.logits(torch.cat(rows), answer)[:, 0]
        return Outcome(lambda: {"values": numpy(values)})

    def steer(self, inputs: Inputs) -> Outcome:
        tokens, n_predict = torch.from_numpy(inputs["tokens"]), int(inputs["n_predict"])
        vector, where = torch.from_numpy(inputs["vector"]).to(self.dtype), int(inputs["layer"])
        total = len(tokens) + n_predict
        shape = len(self.layers), self.n_kv, total, self.dim
        keys, values = torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)
        out: list[int] = []
        start, x = 0, self.embed(tokens)
        while True:
            stop = start + len(x)
            positions = torch.arange(start, stop)
            for i, layer in enumerate(self.layers):
                q, k, v = self.project(layer, self.norm(x, layer.input_layernorm), positions)
                keys[i, :, start:stop], values[i, :, start:stop] = (
                    k.transpose(0, 1),
                    v.transpose(0, 1),
                )
                z = F.scaled_dot_product_attention(
                    q.transpose(0, 1)[None],
                    keys[i, None, :, :stop],
                    values[i, None, :, :stop],
                    is_causal=len(x) > 1,
                    enable_gqa=True,
                )[0].transpose(0, 1)
                x = self.finish(layer, x, z)
                if i == where:
                    x = x + vector
            out.append(int(self.logits(x[-1:]).argmax()))
            if len(out) == n_predict:
                return Outcome(lambda: {"values": np.asarray(out)})
            start, x = stop, self.embed(torch.tensor(out[-1:]))

    def pairs(self, inputs: Inputs) -> Outcome:
        trie = Trie(inputs["tokens"])
        positions, hidden = torch.from_numpy(trie.depth), ~torch.from_numpy(trie.known)
        path, ends = torch.from_numpy(trie.path), torch.from_numpy(trie.ends)
        x, read = self.embed(torch.from_numpy(trie.tokens)), []
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill(hidden, -torch.inf)
        for i, layer in enumerate(self.layers):
            h = self.norm(x, layer.input_layernorm)
            if i == len(self.layers) - 1:
                k, v = self.project_kv(layer, h, positions)
                q = F.linear(h[ends], layer.self_attn.q_proj.weight)
                q = self.rotate(q.view(-1, self.n_head, self.dim), positions[ends])
                x, path, mask = x[ends], path[ends], mask[ends]
                ends = torch.arange(len(ends))
            else:
                q, k, v = self.project(layer, h, positions)
            q = (q * self.dim**-0.5).view(len(x), self.n_kv, -1, self.dim)
            k, v = k[path].transpose(1, 2), v[path].transpose(1, 2)  # (rows, n_kv, depth, dim)
            scores = (q @ k.transpose(2, 3) + mask[:, None, None]).softmax(-1)
            x = self.finish(layer, x, scores @ v)
            read.append(x[ends])
        rows = torch.stack(read, 1).float()  # (2 n_pairs, n_layer, n_embd)
        mean = rows[::2].mean(0) - rows[1::2].mean(0)
        return Outcome(lambda: {"values": numpy(mean), "rows": numpy(rows)})


class Trie:
    """Texts that share what they begin with: a row per token that is not shared."""

    def __init__(self, texts: Array):
        """texts: (n, longest) token ids, -1 behind the end."""
        rows: dict[tuple[int, int], int] = {}  # parent, token -> row
        paths: list[list[int]] = []
        ends = []
        for text in texts.tolist():
            row, path = -1, list[int]()
            for token in text:
                if token < 0:
                    break
                row = rows.setdefault((row, token), len(rows))
                path = [*path, row]
                if row == len(paths):
                    paths.append(path)
            ends.append(row)
        longest = max(map(len, paths))
        self.tokens = np.asarray([token for _, token in rows])
        self.depth = np.asarray([len(p) - 1 for p in paths])
        self.path = np.asarray([p + [0] * (longest - len(p)) for p in paths])  # ancestors, itself
        self.known = np.arange(longest) <= self.depth[:, None]  # which of them there are
        self.ends = np.asarray(ends)


def numpy(x: Tensor) -> Array:
    return x.float().numpy()


def main() -> None:
    folder, dtype, *rest = sys.argv[1:]
    with torch.inference_mode():
        e = Expert(folder, dtype)
        jobs = {
            "lens": e.lens,
            "capture": e.capture,
            "patches": e.patches,
            "heads": e.heads,
            "steer": e.steer,
            "pairs": e.pairs,
        }
        serve(jobs, {name: version(name) for name in ("torch", "transformers")}, rest)


if __name__ == "__main__":
    main()
