"""A loaded model file and its vocabulary."""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator
from pathlib import Path

from mia.errors import ModelError
from mia.llama.library import library


class LlamaModel:
    """A loaded model file and its vocabulary."""

    def __init__(self, path: Path, *, gpu_layers: int = 0, extra_bufts: bool = True):
        self.lib = library()
        L = self.lib.L
        params = L.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = extra_bufts
        self.handle = L.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            why = self.lib.last_error()
            raise ModelError(f"llama.cpp cannot load {path}" + (f": {why}" if why else ""))
        self.vocab = L.llama_model_get_vocab(self.handle)
        self.n_layer = int(L.llama_model_n_layer(self.handle))
        self.n_embd = int(L.llama_model_n_embd(self.handle))
        self.n_head = int(L.llama_model_n_head(self.handle))
        self.n_head_kv = int(L.llama_model_n_head_kv(self.handle))
        self.n_vocab = int(L.llama_vocab_n_tokens(self.vocab))
        self.n_ctx_train = int(L.llama_model_n_ctx_train(self.handle))
        # a recurrent state cannot be cut at a position, so prefixes cannot be shared
        self.recurrent = bool(
            L.llama_model_is_recurrent(self.handle) or L.llama_model_is_hybrid(self.handle)
        )
        if L.llama_model_has_encoder(self.handle) or not L.llama_model_has_decoder(self.handle):
            self.close()
            raise ModelError(f"{path} is an encoder model; mia runs decoder-only models")

    def close(self) -> None:
        if self.handle:
            self.lib.L.llama_model_free(self.handle)
            self.handle = None

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
        return text.decode() if text else None

    def special(self, which: str) -> int:
        """Token id of "bos", "eos", "eot" …, -1 if the vocabulary has none."""
        return int(getattr(self.lib.L, f"llama_vocab_{which}")(self.vocab))

    def add_bos(self) -> bool:
        return bool(self.lib.L.llama_vocab_get_add_bos(self.vocab))

    def is_eog(self, token: int) -> bool:
        return bool(self.lib.L.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids, no BOS or EOS added; `special` reads `<|…|>` as control tokens."""
        raw = text.encode()
        n = len(raw) + 8
        out = (C.c_int32 * n)()
        count = self.lib.L.llama_tokenize(self.vocab, raw, len(raw), out, n, False, special)
        if count < 0:
            n = -count
            out = (C.c_int32 * n)()
            count = self.lib.L.llama_tokenize(self.vocab, raw, len(raw), out, n, False, special)
        return list(out[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for, control tokens spelled out."""
        buf = C.create_string_buffer(64)
        n = self.lib.L.llama_token_to_piece(self.vocab, token, buf, len(buf), 0, True)
        if n < 0:
            buf = C.create_string_buffer(-n)
            n = self.lib.L.llama_token_to_piece(self.vocab, token, buf, len(buf), 0, True)
        return buf.raw[:n]

    def vocab_text(self) -> Iterator[bytes]:
        """Every token's text as the file spells it."""
        for i in range(self.n_vocab):
            yield self.lib.L.llama_vocab_get_text(self.vocab, i) or b""
