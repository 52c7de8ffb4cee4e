"""A loaded model file and its vocabulary."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from mia.errors import ModelError, UsageError
from mia.llama.adapter import Adapter, AdapterFile
from mia.llama.c_numbers import c_int, c_path, processors
from mia.llama.library import library
from mia.llama.lifetime import Owned
from mia.llama.open_file import OpenFile

#: buffers of the CPU whose weights are copies in another layout
_REPACKED = ("CPU_REPACK", "AMX", "CPU_KLEIDIAI", "CPU_RISCV64_SPACEMIT")
#: `enum llama_vocab_type` of llama.h
_NO_VOCAB, _SPM = 0, 1


class LlamaModel:
    """A loaded model file and its vocabulary.

    Attributes:
        has_vocab: whether the file has tokens' texts.
        file: what was opened: weights and hash are read from it, and no run goes on once it is
            changed.

        rpc: the RPC servers that have blocks of it.

    Everything after `close()` raises `UsageError`.
    """

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int = 0,
        extra_bufts: bool = True,
        rpc: str | Sequence[str] = (),
    ):
        self.lib = library()
        L = self.lib.L
        params = L.llama_model_default_params()
        params.n_gpu_layers = c_int(gpu_layers, "gpu_layers", -1)
        params.use_extra_bufts = extra_bufts
        self.rpc: list[str] = []
        if rpc:
            from mia.llama.rpc import devices, parse  # here: most runs of mia need none of it

            self.rpc = parse(rpc)
            on_servers = devices(self.rpc)
            params.devices = C.cast(on_servers, C.c_void_p)
        if gpu_layers:
            # several devices would work on several batches at once, with a copy of each input in
            # turn; mia waits for every batch. An override that fits no tensor turns that off
            no_pipeline = (C.c_char_p * 4)(b"no tensor is called this", None, None, None)
            params.tensor_buft_overrides = C.cast(no_pipeline, C.c_void_p)
        self.file = OpenFile(path)
        stopped: list[BaseException] = []
        self.lib.weight_buffers.clear()
        # with a callback of ours llama.cpp logs no dots, and a Ctrl-C ends the load
        progress = L.llama_progress_callback(lambda fraction, _: not stopped)
        params.progress_callback = progress
        features = L.llama_print_system_info().decode() if extra_bufts else ""
        self.owned: Owned | None = self.lib.call(
            L.llama_model_load_from_file,
            c_path(path),
            params,
            threads=processors() if "AMX_INT8 = 1" in features else 1,  # it repacks weights
            device=gpu_layers != 0 and bool(self.rpc or self.lib.has_gpu),
            stop=stopped.append,
            wrap=lambda handle: Owned(self.lib, handle, self._free()) if handle else None,
        )
        if self.owned is None:
            why = self.lib.last_error()
            raise ModelError(f"llama.cpp cannot load {path}" + (f": {why}" if why else ""))
        self.file.check_name()
        #: whether a GPU or a server has a part of it
        self.on_device = gpu_layers != 0 and bool(self.rpc or self.lib.has_gpu)
        #: LoRA adapters that every context of it adds
        self.adapters: list[Adapter] = []
        buffers = self.lib.weight_buffers
        #: bytes of copies of weights in layouts of extra buffers (AMX, repacking), beside the mapped file
        self.repacked = sum(n for name, n in buffers.items() if name in _REPACKED)
        self._vocab = L.llama_model_get_vocab(self.handle)
        self.n_layer = int(L.llama_model_n_layer(self.handle))
        self.n_embd = int(L.llama_model_n_embd(self.handle))
        self.n_head = int(L.llama_model_n_head(self.handle))
        self.n_head_kv = int(L.llama_model_n_head_kv(self.handle))
        self.n_vocab = int(L.llama_vocab_n_tokens(self.vocab))
        self.has_vocab = int(L.llama_vocab_type(self.vocab)) != _NO_VOCAB
        self.n_ctx_train = int(L.llama_model_n_ctx_train(self.handle))
        # a recurrent state cannot be cut at a position, so prefixes cannot be shared
        self.recurrent = bool(
            L.llama_model_is_recurrent(self.handle) or L.llama_model_is_hybrid(self.handle)
        )
        #: whether some layers attend to a sliding window, whose cells llama.cpp takes back
        self.has_window = int(L.llama_model_n_swa(self.handle)) > 0
        if L.llama_model_has_encoder(self.handle) or not L.llama_model_has_decoder(self.handle):
            self.close()
            raise ModelError(f"{path} is an encoder model; mia runs decoder-only models")

    def _free(self) -> Callable[[Any], None]:
        """What frees the model; with servers, what counts its connections too."""
        L, lib, servers = self.lib.L, self.lib, self.rpc
        if not servers:
            return cast("Callable[[Any], None]", L.llama_model_free)
        from mia.llama.rpc import connect, disconnect

        connect(servers)

        def free(handle: Any) -> None:
            if not lib.exiting:  # a server frees what was a process's; one that died needs nothing
                L.llama_model_free(handle)
                disconnect(servers)

        return free

    @property
    def handle(self) -> Any:
        """llama.cpp's model. Raises `UsageError` after `close()`."""
        if self.owned is None:
            raise UsageError("this model is closed; open it again to use it")
        return self.owned.get("model")

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary of it. Raises `UsageError` after `close()`."""
        return self.handle and self._vocab

    def add(self, adapters: Sequence[AdapterFile]) -> None:
        """Loads LoRA adapters, for the contexts that are opened from now on. Raises `ModelError`."""
        for file in adapters:
            self.adapters.append(Adapter(self, file))

    def close(self) -> None:
        """Frees the model, once the last context on it is closed."""
        for adapter in self.adapters:
            adapter.owned = None
        self.owned = None
        self.file.close()

    @cached_property
    def architecture(self) -> str:
        """What llama.cpp takes the file for: "llama", "qwen3" …"""
        buf = C.create_string_buffer(256)
        self.lib.L.llama_model_meta_val_str(self.handle, b"general.architecture", buf, len(buf))
        return buf.value.decode(errors="replace")

    def metadata(self) -> dict[str, str]:
        L, out = self.lib.L, {}
        buf = C.create_string_buffer(1 << 16)
        for i in range(L.llama_model_meta_count(self.handle)):
            L.llama_model_meta_key_by_index(self.handle, i, buf, len(buf))
            key = buf.value.decode(errors="replace")
            n = L.llama_model_meta_val_str_by_index(self.handle, i, buf, len(buf))
            if n >= len(buf):
                big = C.create_string_buffer(n + 1)
                L.llama_model_meta_val_str_by_index(self.handle, i, big, len(big))
                out[key] = big.value.decode(errors="replace")
            else:
                out[key] = buf.value.decode(errors="replace")
        return out

    def chat_template(self) -> str | None:
        text = self.lib.L.llama_model_chat_template(self.handle, None)
        return text.decode(errors="replace") if text else None

    def special(self, which: str) -> int:
        """Token id of "bos", "eos", "eot" …, -1 if the vocabulary has none."""
        return int(getattr(self.lib.L, f"llama_vocab_{which}")(self.vocab))

    def add_bos(self) -> bool:
        return bool(self.lib.L.llama_vocab_get_add_bos(self.vocab))

    def is_eog(self, token: int) -> bool:
        return bool(self.lib.L.llama_vocab_is_eog(self.vocab, self._id(token)))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids, no BOS or EOS added; `special` reads `<|…|>` as control tokens."""
        vocab = self.vocab
        if not self.has_vocab:
            raise ModelError("this model's file has no vocabulary; give token ids")
        raw = _utf8(text)
        self._check_text(text)
        n = c_int(len(raw) + 8, "the length of a text in bytes")
        out = (C.c_int32 * n)()
        tokenize = self.lib.L.llama_tokenize
        count = self.lib.call(tokenize, vocab, raw, len(raw), out, n, False, special)
        if count < 0:
            n = -count
            out = (C.c_int32 * n)()
            count = self.lib.call(tokenize, vocab, raw, len(raw), out, n, False, special)
        return list(out[:count])

    def _check_text(self, text: str) -> None:
        """A SentencePiece vocabulary without tokens for bytes has none for some characters, and
        llama.cpp ends the process at them."""
        if self._tokens_without_bytes is None:
            return
        for char in set(text.replace(" ", "▁")):
            raw = char.encode()
            if raw not in self._tokens_without_bytes and not all(
                b"<0x%02X>" % b in self._tokens_without_bytes
                or bytes([b]) in self._tokens_without_bytes
                for b in raw
            ):
                raise ModelError(f"the vocabulary of this model has no token for {char!r}")

    @cached_property
    def _tokens_without_bytes(self) -> set[bytes] | None:
        """The tokens' texts; None if there is one for each byte, or the kind needs none."""
        if int(self.lib.L.llama_vocab_type(self.vocab)) != _SPM:
            return None
        texts = self.vocab_text()
        if b"<0x00>" in texts and all(next(texts, b"") == b"<0x%02X>" % b for b in range(1, 256)):
            return None  # in one row, as they always are
        return set(self.vocab_text())

    def _id(self, token: int) -> int:
        return c_int(token, "a token id", 0, self.n_vocab - 1)

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, control tokens spelled out; `[7]` if the file has no
        vocabulary."""
        vocab, token = self.vocab, self._id(token)
        if not self.has_vocab:  # llama.cpp ends the process
            return b"[%d]" % token
        buf = C.create_string_buffer(64)
        n = self.lib.L.llama_token_to_piece(vocab, token, buf, len(buf), 0, True)
        if n < 0:
            buf = C.create_string_buffer(-n)
            n = self.lib.L.llama_token_to_piece(vocab, token, buf, len(buf), 0, True)
        return buf.raw[:n]

    def vocab_text(self) -> Iterator[bytes]:
        """Every token's text as the file spells it."""
        vocab = self.vocab
        for i in range(self.n_vocab):
            text = self.lib.L.llama_vocab_get_text(vocab, i) if self.has_vocab else None
            yield text or b""


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as err:
        raise UsageError(
            f"a text has {text[err.start]!a} at {err.start}: half a character, or a byte that is "
            "not UTF-8"
        ) from err
