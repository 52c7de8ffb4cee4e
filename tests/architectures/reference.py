"""What transformers computes at mia's sites: read and edited through hooks.

`Reference.run` gives every site by its name, in mia's sense of it:

    embed          rows of the token table, as stored
    resid_pre.i    what block i is given; resid_post.i what it gives
    attn_norm.i    the norm before attention; mlp_norm.i the norm before the MLP
    q.i, k.i, v.i  what the scores and the values are made of: after rotation and norms
    attn_scores.i  q·k, scaled and capped; attn_pattern.i after mask and softmax
    head_out.i     what the patterns pick of the values, heads side by side
    attn_out.i     what attention adds to the residual: after W_O, its bias, post-norm and scale
    mlp_out.i      what the MLP (all its experts) adds
    resid_mid.i    resid_pre + attn_out, in blocks where attention comes before the MLP
    router.i       the router's logits; experts.i the chosen ones' numbers, expert_weights.i what
                   each one is multiplied by (read only)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from .recipes import Recipe

Array = np.ndarray
Edits = Mapping[tuple[str, int | None], Callable[[torch.Tensor], torch.Tensor]]

#: the parts of a block as most call them; several names: the first that a block has
LAYOUT: dict[str, Any] = {
    "attn_norm": ("input_layernorm",),
    "attn": ("self_attn", "linear_attn", "attn", "attention", "self_attention", "mamba", "conv"),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp": ("mlp", "feed_forward", "ffn"),
}


class Reference:
    """A transformers model with hooks at mia's sites."""

    def __init__(self, recipe: Recipe, model: Any):
        self.model = model
        base = model.model if hasattr(model, "model") else model.base_model
        base = getattr(base, "language_model", base)
        names = ("layers", "h", "blocks")
        self.blocks = next(getattr(base, n) for n in names if hasattr(base, n))
        self.n_layer = len(self.blocks)
        self._layout = {**LAYOUT, **recipe.layout}
        self._parallel = bool(self._layout.get("parallel"))
        self._scale = float(self._layout.get("scale", 1.0))
        self._edits: Edits = {}
        self._seen: dict[tuple[str, int | None], torch.Tensor] = {}
        self._current = 0
        self._replaced: list[tuple[Any, str, Any]] = []
        self._hook_ends(base)
        for i, block in enumerate(self.blocks):
            self._hook_block(i, block)
        self._hook_attention()

    # -- use -------------------------------------------------------------------------

    def run(self, ids: Sequence[int], edits: Edits | None = None) -> dict[str, Array]:
        """Every site's rows (n_tokens, width) float32; by-key sites (n_tokens, n_head, n_keys)."""
        self._edits, self._seen = edits or {}, {}
        with torch.no_grad(), self._watched():
            logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        self._edits = {}
        seen = {f"{n}.{i}" if i is not None else n: x for (n, i), x in self._seen.items()}
        return {"logits": logits.numpy()} | {k: x.float().numpy() for k, x in seen.items()}

    def generate(self, ids: Sequence[int], n: int, edits: Edits | None = None) -> list[int]:
        """n tokens, each the likeliest, by whole passes over everything before it."""
        tokens = list(ids)
        for _ in range(n):
            tokens.append(int(self.run(tokens, edits)["logits"][-1].argmax()))
        return tokens[len(ids) :]

    # -- one visit ---------------------------------------------------------------------

    def _visit(self, site: str, layer: int | None, x: torch.Tensor) -> torch.Tensor:
        """x (n_tokens, width) as an edit leaves it; kept for `run`."""
        edit = self._edits.get((site, layer))
        if edit is not None:
            x = edit(x.clone())
        self._seen[site, layer] = x.detach().clone()
        return x

    def _visit_heads(self, site: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        """x (1, heads, n_tokens, head_dim)."""
        _, heads, n, dim = x.shape
        rows = self._visit(site, layer, x[0].transpose(0, 1).reshape(n, heads * dim))
        return rows.reshape(n, heads, dim).transpose(0, 1)[None]

    # -- hooks -------------------------------------------------------------------------

    def _hook_ends(self, base: Any) -> None:
        table = self.model.get_input_embeddings()
        scale = float(getattr(table, "scalar_embed_scale", 1.0) or 1.0)

        def embed(_m: Any, _i: Any, out: torch.Tensor) -> torch.Tensor:
            return self._visit("embed", None, out[0] / scale)[None] * scale

        table.register_forward_hook(embed)
        names = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "embedding_norm")
        norm = next(getattr(base, n) for n in names if hasattr(base, n))

        def last(_m: Any, _i: Any, out: torch.Tensor) -> torch.Tensor:
            return self._visit("final_norm", None, out[0])[None]

        norm.register_forward_hook(last)

    def _hook_block(self, layer: int, block: Any) -> None:
        def enter(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._current = layer
            if args:
                x = self._visit("resid_pre", layer, args[0][0])[None]
                return (x, *args[1:]), kwargs
            x = self._visit("resid_pre", layer, kwargs["hidden_states"][0])[None]
            return args, {**kwargs, "hidden_states": x}

        def leave(_m: Any, _i: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (self._visit("resid_post", layer, out[0][0])[None], *out[1:])
            return self._visit("resid_post", layer, out[0])[None]

        if not self._layout.get("streams"):
            block.register_forward_pre_hook(enter, with_kwargs=True)
            block.register_forward_hook(leave)
        else:
            block.register_forward_pre_hook(lambda *_: setattr(self, "_current", layer))
        for site in ("attn_norm", "mlp_norm"):
            if self._layout.get("norm_of_attention_only") and site == "attn_norm":
                attn = self._part(block, "attn")
                attn.register_forward_pre_hook(partial(self._given, layer), with_kwargs=True)
            elif (part := self._part(block, site)) is not None:
                before_mlp = site == "attn_norm" and self._is_mlp_alone(block)
                part.register_forward_hook(self._reader("mlp_norm" if before_mlp else site, layer))
        attn = self._part(block, "attn")
        if attn is not None:
            self._hook_product(layer, attn)
        for part in block.modules():
            if type(part).__name__.endswith(("Router", "Gate")):
                part.register_forward_hook(partial(self._routes, layer))
        if self._layout.get("streams"):
            return
        if not self._parallel and (
            reader := self._part(block, "mlp_norm") or self._part(block, "mlp")
        ):
            reader.register_forward_pre_hook(self._middle(layer))
        out = self._parts(block, "attn_out") or [x for x in [attn] if x is not None]
        self._add_part("mlp_out" if self._is_mlp_alone(block) else "attn_out", layer, out)
        out = self._parts(block, "mlp_out") or [
            x for x in [self._part(block, "mlp")] if x is not None
        ]
        self._add_part("mlp_out", layer, out)

    def _middle(self, layer: int) -> Any:
        """Blocks keep what the MLP or its norm is given, and add to it: changed in place, it is
        changed in both."""

        def hook(_m: Any, args: tuple[Any, ...]) -> None:
            changed = self._visit("resid_mid", layer, args[0][0])
            if ("resid_mid", layer) in self._edits:
                args[0].copy_(changed[None])

        return hook

    def _given(
        self, layer: int, _m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """What attention reads, where another mixer reads the same norm."""
        x = self._visit("attn_norm", layer, kwargs["hidden_states"][0])[None]
        return args, {**kwargs, "hidden_states": x}

    def _routes(self, layer: int, router: Any, args: tuple[Any, ...], out: Any) -> None:
        """A router's logits, and where it gives them the experts that it chose, with weights."""
        weight = next(p for p in router.parameters() if p.ndim == 2)
        bias = dict(router.named_parameters()).get("bias", torch.zeros(len(weight)))
        rows = args[0].reshape(-1, weight.shape[1])
        self._keep("router", layer, rows @ weight.T + bias)
        given = [x for x in out if isinstance(x, torch.Tensor)] if isinstance(out, tuple) else []
        chosen = next((x for x in given if not x.is_floating_point()), None)
        if chosen is None:
            return
        self._keep("experts", layer, chosen.float())
        weights = [x for x in given if x.is_floating_point() and x.shape == chosen.shape]
        if weights:
            all_of_them = torch.zeros(len(rows), len(weight))
            self._keep("expert_weights", layer, all_of_them.scatter(1, chosen, weights[-1].float()))

    def _hook_product(self, layer: int, attn: Any) -> None:
        """What W_O reads: the heads, unless a gate or a norm stands between."""
        names = ("o_proj", "out_proj", "dense", "c_proj")
        product = next((getattr(attn, n) for n in names if hasattr(attn, n)), None)
        if product is None:
            return

        def hook(_m: Any, args: tuple[Any, ...]) -> tuple[Any]:
            x = args[0]
            return (self._visit("what W_O reads", layer, x.reshape(-1, x.shape[-1])).view_as(x),)

        product.register_forward_pre_hook(hook)

    def _keep(self, name: str, layer: int, x: torch.Tensor) -> None:
        self._seen[name, layer] = x.detach().reshape(x.shape[-2] if x.ndim > 2 else len(x), -1)

    def _part(self, block: Any, what: str) -> Any:
        return next(iter(self._found(block, self._layout.get(what))), None)

    def _parts(self, block: Any, what: str) -> list[Any]:
        return self._found(block, self._layout.get(what))

    def _found(self, block: Any, names: Any) -> list[Any]:
        out = []
        for name in (names,) if isinstance(names, str) else names or ():
            part = block
            for step in name.split("."):
                part = getattr(part, step, None)
            if part is not None:
                out.append(part)
        return out

    def _reader(self, site: str, layer: int) -> Any:
        return lambda _m, _i, out: self._visit(site, layer, out[0])[None]

    def _add_part(self, site: str, layer: int, parts: list[Any]) -> None:
        """What several modules add together; an edit changes what the last one gives."""
        sums: dict[str, Any] = {}

        def hook_of(index: int) -> Any:
            def hook(_m: Any, _i: Any, out: Any) -> Any:
                x = out[0] if isinstance(out, tuple) else out
                shape = x.shape
                rows = x.reshape(-1, shape[-1])
                if index == 0:
                    sums["before"] = torch.zeros_like(rows)
                if index < len(parts) - 1:
                    sums["before"] = sums["before"] + rows
                    return None
                whole = self._visit(site, layer, (sums["before"] + rows) * self._scale)
                new = (whole / self._scale - sums["before"]).reshape(shape)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            return hook

        for index, part in enumerate(parts):
            part.register_forward_hook(hook_of(index))

    # -- inside attention ------------------------------------------------------------------

    def _hook_attention(self) -> None:
        kind = self._layout.get("attention")
        if kind is not None:
            for i, block in enumerate(self.blocks):
                getattr(self, f"_hook_{kind}")(i, self._part(block, "attn"))
            return
        for name in {type(m).__module__ for m in self.model.modules()}:
            if hasattr(sys.modules[name], "eager_attention_forward"):
                self._replace(sys.modules[name], "eager_attention_forward", self._around)

    def _replace(self, file: Any, name: str, around: Callable[[Any], Any]) -> None:
        """While the model runs, `around(function)` stands for a function of transformers'."""
        self._replaced.append((file, name, around(getattr(file, name))))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        plain = [(file, name, getattr(file, name)) for file, name, _ in self._replaced]
        for file, name, function in self._replaced:
            setattr(file, name, function)
        try:
            yield
        finally:
            for file, name, function in plain:
                setattr(file, name, function)

    def _around(self, function: Any) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, *a: Any, **k: Any) -> Any:
            i = self._current
            query = self._visit_heads("q", i, query)
            key = self._visit_heads("k", i, key)
            value = self._visit_heads("v", i, value)
            scale = k.get("scaling")
            cap = k.get("softcap") or getattr(module, "attn_logit_softcapping", None)
            self._scores(i, query, key, query.shape[-1] ** -0.5 if scale is None else scale, cap)
            out, weights = function(module, query, key, value, *a, **k)
            if weights is not None:
                plain = weights[0].transpose(0, 1)  # (n, heads, n)
                pattern = self._visit("attn_pattern", i, plain)
                if ("attn_pattern", i) in self._edits:
                    each = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
                    out = (pattern.transpose(0, 1)[None] @ each).transpose(1, 2)
            n = out.shape[1]
            rows = self._visit("head_out", i, out.reshape(n, -1))
            return rows.reshape(out.shape), weights

        return attend

    def _is_mlp_alone(self, block: Any) -> bool:
        """Whether a block is an MLP and nothing else, as some of nemotron-h's are."""
        parts = self._parts(block, "attn_out") or [self._part(block, "attn")]
        return any(type(x).__name__.endswith("MLP") for x in parts)

    def _scores(self, layer: int, q: Any, k: Any, scale: float, cap: float | None = None) -> None:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        s = q @ k.transpose(2, 3) * scale  # (1, heads, n, n)
        if cap:
            s = cap * torch.tanh(s / cap)
        self._visit("attn_scores", layer, s[0].transpose(0, 1))

    def _hook_ends_of_heads(self, layer: int, attn: Any, product: str) -> None:
        """The pattern that a module returns, and what its W_O reads."""

        def weights(_m: Any, _i: Any, out: Any) -> None:
            self._visit("attn_pattern", layer, out[1][0].transpose(0, 1))

        def heads(_m: Any, args: tuple[Any, ...]) -> Any:
            return (self._visit("head_out", layer, args[0][0])[None],)

        attn.register_forward_hook(weights)
        getattr(attn, product).register_forward_pre_hook(heads)

    def _hook_bloom(self, layer: int, attn: Any) -> None:
        plain = attn._reshape

        def split(fused: torch.Tensor) -> Any:
            q, k, v = (
                self._visit_heads(n, layer, x) for n, x in zip("qkv", plain(fused), strict=True)
            )
            self._scores(layer, q, k, attn.inv_norm_factor)
            return q, k, v

        attn._reshape = split
        self._hook_ends_of_heads(layer, attn, "dense")

    def _hook_mpt(self, layer: int, attn: Any) -> None:
        def fused(_m: Any, _i: Any, out: torch.Tensor) -> torch.Tensor:
            n = out.shape[1]
            parts = [x.reshape(1, n, attn.n_heads, -1).transpose(1, 2) for x in out.chunk(3, dim=2)]
            q, k, v = (self._visit_heads(s, layer, x) for s, x in zip("qkv", parts, strict=True))
            self._scores(layer, q, k, attn.softmax_scale)
            return torch.cat([x.transpose(1, 2).reshape(1, n, -1) for x in (q, k, v)], 2)

        attn.Wqkv.register_forward_hook(fused)
        self._hook_ends_of_heads(layer, attn, "out_proj")

    def _hook_falcon(self, layer: int, attn: Any) -> None:
        plain, file = attn._split_heads, sys.modules[type(attn).__module__]
        groups = attn.num_heads // attn.num_kv_heads if attn.new_decoder_architecture else 1

        def split(fused: torch.Tensor) -> Any:
            q, k, v = plain(fused)  # (1, n, heads, head_dim)
            v = self._visit_heads("v", layer, v.transpose(1, 2)[:, ::groups])
            return q, k, v.repeat_interleave(groups, 1).transpose(1, 2)

        def around(rotate: Any) -> Any:
            def rotated(q: Any, k: Any, *a: Any) -> Any:
                q, k = rotate(q, k, *a)
                q = self._visit_heads("q", self._current, q)
                k = self._visit_heads("k", self._current, k[:, ::groups])
                self._scores(self._current, q, k, q.shape[-1] ** -0.5)
                return q, k.repeat_interleave(groups, 1)

            return rotated

        if layer == 0:
            self._replace(file, "apply_rotary_pos_emb", around)
        attn._split_heads = split
        self._hook_ends_of_heads(layer, attn, "dense")
