"""A context: the KV cache, its sequences, and `llama_decode`."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mia.arrays import Array
from mia.errors import EngineError, UsageError
from mia.llama.adapter import set_adapters
from mia.llama.c_numbers import MAX_THREADS, UINT32, c_int
from mia.llama.layer_inputs import can_keep_inputs, keep_function
from mia.llama.lifetime import Owned
from mia.llama.model import LlamaModel
from mia.llama.tensors import array_at, forget_arrays
from mia.llama.tracer import Tracer

#: types of the KV cache -> ggml's numbers. No quantized ones: llama.cpp rotates what they
#: hold, and with it what `kqv_out` shows
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30}


@dataclass(frozen=True, slots=True)
class ContextParams:
    """What a context is made with. `n_seq` sequences share one cache of `n_ctx` cells."""

    n_ctx: int
    n_ubatch: int
    n_seq: int
    flash: bool
    kv_type: str
    threads: int
    callback: bool


class Context:
    """A KV cache and the compute buffers. One `decode` is one micro-batch, so that the rows
    of every node are the rows of the batch, in order."""

    def __init__(self, model: LlamaModel, params: ContextParams):
        self.model, self.params, self.lib = model, params, model.lib
        L = self.lib.L
        p = L.llama_context_default_params()
        n_ctx = c_int(params.n_ctx, "the number of cells", 1, UINT32[1])
        p.n_ctx, p.n_batch, p.n_ubatch = n_ctx, params.n_ubatch, params.n_ubatch
        p.n_seq_max = params.n_seq
        p.n_threads = p.n_threads_batch = c_int(params.threads, "threads", 1, MAX_THREADS)
        p.flash_attn_type = 1 if params.flash else 0
        p.type_k = p.type_v = CACHE_TYPES[params.kv_type]
        p.kv_unified = True
        p.swa_full = True  # a sliding window that was cut cannot serve another suffix
        p.no_perf = True
        self.tracer = Tracer() if params.callback else None
        if self.tracer is not None:
            p.cb_eval = self.tracer.callback
            p.cb_eval_user_data = self.tracer.user_data
        self._decoding = False
        self._owned: Owned | None = self.lib.call(
            L.llama_init_from_model,
            model.handle,
            p,
            threads=params.threads,
            wrap=lambda handle: (
                Owned(
                    self.lib, handle, _free(model), model.owned, *(a.owned for a in model.adapters)
                )
                if handle
                else None
            ),
        )
        if self._owned is None:
            why = self.lib.last_error()
            raise EngineError(f"llama.cpp cannot open a context of {params.n_ctx} tokens: {why}")
        if model.adapters:
            set_adapters(self.lib, self.handle, model.adapters)
        self._memory = L.llama_get_memory(self.handle)
        self.n_ctx = int(L.llama_n_ctx(self.handle))
        self._n_outputs = 0
        self._directions: Array | None = None
        self._logits: tuple[int, Array] = (0, np.empty((0, 0), np.float32))
        self._make_batch(params.n_ubatch)

    def _make_batch(self, n: int) -> None:
        """One batch that every decode fills anew: making its pointers takes longer than that."""
        L = self.lib.L
        self._tokens, self._positions, self._seqs = (np.zeros(n, np.int32) for _ in range(3))
        self._outputs = np.zeros(n, np.int8)
        self._one = np.ones(n, np.int32)  # how many sequences each row belongs to
        self._seq_lists = self._seqs.ctypes.data + np.arange(n, dtype=np.uintp) * 4

        def ptr(a: npt.NDArray[Any], kind: Any) -> Any:
            return C.cast(a.ctypes.data, C.POINTER(kind))

        self._batch = L.llama_batch(
            n,
            ptr(self._tokens, C.c_int32),
            None,
            ptr(self._positions, C.c_int32),
            ptr(self._one, C.c_int32),
            ptr(self._seq_lists, C.POINTER(C.c_int32)),
            ptr(self._outputs, C.c_int8),
        )

    @property
    def handle(self) -> Any:
        """llama.cpp's context. Raises `UsageError` after `close()`."""
        if self._owned is None:
            raise UsageError("this model is closed; open it again to use it")
        return self._owned.get("model")

    @property
    def memory(self) -> Any:
        """llama.cpp's KV cache. Raises `UsageError` after `close()`."""
        return self.handle and self._memory

    def close(self) -> None:
        """Raises `UsageError` while it decodes: in a function of an edit, or in another thread."""
        if self._decoding:
            raise UsageError("the model is running; it can be closed when the run is over")
        if self._owned is not None:
            self._owned.close()
            self._owned = None
            self._logits = 0, np.empty((0, 0), np.float32)

    def clear(self, data: bool = False) -> None:
        """Forgets all cells; `data` also overwrites with zeros what they held."""
        self.lib.L.llama_memory_clear(self.memory, data)

    def seq_cp(self, src: int, dst: int, end: int) -> None:
        """Sequence `dst` gets the cells of `src` at positions 0 to end-1; nothing is copied."""
        self.lib.L.llama_memory_seq_cp(self.memory, src, dst, 0, end)

    def seq_rm(self, seq: int, start: int = 0) -> bool:
        return bool(self.lib.L.llama_memory_seq_rm(self.memory, seq, start, -1))

    @property
    def can_save_sequences(self) -> bool:
        """Whether `seq_save` gives what `seq_load` needs, and as fast as the host copies."""
        return not (self.model.recurrent or self.model.has_window or self.model.on_device)

    def seq_save(self, seq: int) -> npt.NDArray[np.uint8]:
        """A copy of the keys and values of a sequence."""
        L = self.lib.L
        data = np.empty(L.llama_state_seq_get_size(self.handle, seq), np.uint8)
        get = L.llama_state_seq_get_data
        n = self.lib.call(get, self.handle, _bytes_at(data), data.size, seq)
        if n != data.size:
            raise EngineError(f"llama.cpp cannot save a sequence: {self.lib.last_error()}")
        return data

    def seq_load(self, seq: int, data: npt.NDArray[np.uint8]) -> bool:
        """Puts what `seq_save` gave into free cells, as a sequence that has none. False if there is no
        room: then nothing is left of it."""
        put = self.lib.L.llama_state_seq_set_data
        return bool(self.lib.call(put, self.handle, _bytes_at(data), data.size, seq) == data.size)

    def keep_inputs(self, blocks: Iterable[int], *, trusted: bool = False) -> bool:
        """From now on the inputs of these blocks stay where they are until the next decode; the nodes
        are those for which `is_output` says so. llama.cpp plans its buffers anew.

        Args:
            trusted: not to ask whether it is safe (see layer_inputs.py).

        Returns:
            False if this model or library cannot do that: nothing was done.
        """
        if not trusted and not can_keep_inputs(self.model):
            return False
        keep = keep_function()
        for block in blocks:
            self.lib.call(
                keep, self.handle, c_int(block, "a block", 0, self.model.n_layer - 1), True
            )
        return True

    def set_control_vector(self, directions: Array | None) -> None:
        """`directions`: (n_layer - 1, n_embd), added at the end of blocks 1 …; None takes it off.

        It stays until the next call: llama.cpp plans its buffers anew at every change.
        """
        L, n_embd = self.lib.L, self.model.n_embd
        if directions is not None and not directions.any():
            directions = None
        last = self._directions
        if last is directions or (
            last is not None and directions is not None and np.array_equal(last, directions)
        ):
            return
        self._directions = np.full(
            (1, 1), np.nan, np.float32
        )  # equals nothing, should this be cut short
        if directions is None:
            self.lib.call(L.llama_set_adapter_cvec, self.handle, None, 0, n_embd, -1, -1)
            self._directions = None
            return
        data = np.array(directions, np.float32)
        pointer = data.ctypes.data_as(C.POINTER(C.c_float))
        # each block in the range gets an addition, whether there is something to add or not
        used = np.flatnonzero(data.any(1)) + 1
        size, ends = data.size, (int(used[0]), int(used[-1]))
        set_vector = L.llama_set_adapter_cvec
        if self.lib.call(set_vector, self.handle, pointer, size, n_embd, *ends) != 0:
            raise EngineError(f"llama.cpp refuses the control vector: {self.lib.last_error()}")
        self._directions = data

    def decode(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]],
        positions: Sequence[int] | npt.NDArray[np.integer[Any]],
        seqs: Sequence[int] | npt.NDArray[np.integer[Any]],
        outputs: Sequence[bool] | npt.NDArray[np.integer[Any]],
    ) -> bool:
        """Runs one micro-batch: for each row its token, position, sequence, and whether its logits
        are wanted. False if the graph was not the expected one (see `Tracer`): nothing was
        computed; the caller looks at `tracer.seen` and decodes again.

        Raises `EngineError` if llama.cpp fails, and whatever the callback's code raised.
        """
        n = len(tokens)
        if n > len(self._tokens):
            raise EngineError(f"{n} rows are more than the {len(self._tokens)} of a micro-batch")
        self._tokens[:n], self._positions[:n] = tokens, positions
        self._seqs[:n], self._outputs[:n] = seqs, outputs
        L, batch = self.lib.L, self._batch
        batch.n_tokens = n
        self._n_outputs = int(np.count_nonzero(self._outputs[:n]))
        tracer, expected = self.tracer, True
        handle, threads = self.handle, self.params.threads
        self.model.file.check()  # bytes that were cut away would be SIGBUS
        self._decoding = True
        try:
            if tracer is None:
                code = self.lib.call(L.llama_decode, handle, batch, threads=threads)
            else:
                ended = tracer.end  # whatever stops the decode: it gives nodes their flags back

                def end(code: int) -> tuple[int, bool]:
                    return code, ended()

                tracer.begin()
                code, expected = self.lib.call(
                    L.llama_decode, handle, batch, threads=threads, stop=tracer.stop, wrap=end
                )
                if tracer.error is not None:
                    raise tracer.error
        finally:
            self._decoding = False
        if code == 1:
            raise EngineError(f"the context of {self.n_ctx} tokens is full")
        if code != 0:
            raise EngineError(f"llama.cpp failed to decode ({code}): {self.lib.last_error()}")
        return expected

    def logits(self) -> Array:
        """(n_outputs, n_vocab) of the last decode, in batch order; valid until the next one."""
        p = self.lib.L.llama_get_logits(self.handle)
        addr = C.cast(p, C.c_void_p).value
        if not addr:
            raise EngineError("llama.cpp gave no logits")
        known, array = self._logits
        if known != addr or len(array) != self._n_outputs:
            shape = (self._n_outputs, self.model.n_vocab)
            array = array_at(addr, shape)
            self._logits = addr, array
        return array


def _bytes_at(data: npt.NDArray[np.uint8]) -> Any:
    return C.cast(data.ctypes.data, C.POINTER(C.c_uint8))


def _free(model: LlamaModel) -> Callable[[Any], None]:
    lib, remote = model.lib, bool(model.rpc)

    def free(handle: Any) -> None:
        if remote and lib.exiting:  # see LlamaModel
            return
        lib.L.llama_free(handle)
        forget_arrays()

    return free
