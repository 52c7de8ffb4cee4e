"""llama.cpp's samplers."""

from __future__ import annotations

from typing import Any

from mia.llama.c_numbers import INT32, UINT32, c_int
from mia.llama.context import Context
from mia.llama.lifetime import Owned
from mia.llama.model import LlamaModel


class Sampler:
    """llama.cpp's own sampler chain: penalties, top-k, top-p, min-p, temperature, seed."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        frequency_penalty: float,
        presence_penalty: float,
        seed: int,
    ):
        L = self.L = model.lib.L
        top_k = c_int(top_k, "top-k", 0, INT32[1])
        seed = c_int(seed, "seed", *UINT32)
        chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
        self._n_vocab = model.n_vocab
        self._owned = Owned(model.lib, chain, L.llama_sampler_free, model.owned)

        def add(sampler: Any) -> None:
            L.llama_sampler_chain_add(chain, sampler)

        if (repeat_penalty, frequency_penalty, presence_penalty) != (1.0, 0.0, 0.0):
            add(
                L.llama_sampler_init_penalties(
                    model.n_vocab, 64, repeat_penalty, frequency_penalty, presence_penalty
                )
            )
        if temperature <= 0:
            add(L.llama_sampler_init_greedy())
        else:
            if top_k > 0:
                add(L.llama_sampler_init_top_k(top_k))
            if top_p < 1:
                add(L.llama_sampler_init_top_p(top_p, 1))
            if min_p > 0:
                add(L.llama_sampler_init_min_p(min_p, 1))
            add(L.llama_sampler_init_temp(temperature))
            add(L.llama_sampler_init_dist(seed))

    @property
    def chain(self) -> Any:
        """llama.cpp's chain. Raises `UsageError` after `close()`."""
        return self._owned.get("sampler")

    def accept(self, token: int) -> None:
        self.L.llama_sampler_accept(self.chain, c_int(token, "a token id", 0, self._n_vocab - 1))

    def sample(self, context: Context, row: int) -> int:
        """Samples from the logits of batch row `row`, and remembers the token."""
        return int(self.L.llama_sampler_sample(self.chain, context.handle, row))

    def close(self) -> None:
        self._owned.close()
