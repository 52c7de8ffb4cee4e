"""What a GGUF file must not say: values at which llama.cpp ends the process or hangs.

llama.cpp throws most errors of a file, and asserts the rest: a failed GGML_ASSERT cannot be caught.
Each check here stands for one of its assertions (0.3.36's), and `tests/llama/test_mutants.py` looks for
those that are missing. What still gets through dies in a child process: `mia.llama.trial`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mia.errors import ModelError
from mia.llama.gguf_file import TOKENS, Header, existing, is_file, read_header, split_parts

#: LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS
_MAX_LAYERS, _MAX_EXPERTS = 512, 1024
#: llama.cpp adds to it in 32 bits
_MAX_WINDOW = 1 << 30
_SCALINGS = (b"none", b"linear", b"yarn", b"longrope")
#: architectures whose graph asserts that RoPE turns whole heads
_WHOLE_HEADS = frozenset(
    [
        "apertus",
        "arcee",
        "arctic",
        "baichuan",
        "codeshell",
        "dbrx",
        "deepseek",
        "dots1",
        "dream",
        "ernie4_5",
        "ernie4_5-moe",
        "exaone",
        "exaone4",
        "falcon",
        "granite",
        "granitemoe",
        "internlm2",
        "jais2",
        "llada",
        "llada-moe",
        "llama",
        "llama4",
        "mistral3",
        "olmo",
        "olmo2",
        "olmoe",
        "orion",
        "qwen2",
        "qwen2moe",
        "qwen2vl",
        "qwen3",
        "qwen3moe",
        "qwen3vl",
        "qwen3vlmoe",
        "seed_oss",
        "smollm3",
        "starcoder2",
        "xverse",
    ]
)
#: and those that need keys and values of one width, besides these
_EQUAL_HEADS = _WHOLE_HEADS | frozenset(
    [
        "bitnet",
        "bloom",
        "chatglm",
        "command-r",
        "glm4",
        "gpt2",
        "gptneox",
        "jais",
        "mpt",
        "phi2",
        "phi3",
        "qwen",
        "refact",
        "stablelm",
        "starcoder",
    ]
)
#: architectures whose keys are read with the shape of the queries
_ONE_KEY_PER_HEAD = ("dots1",)
#: how a router's logits become weights; some architectures have no default
_GATES = (1, 2, 3, 4)
_GATE_NEEDED = ("dots1",)
#: i8 to i64 among ggml's types: no operation takes weights of these
_INTEGERS = {24: "i8", 25: "i16", 26: "i32", 27: "i64"}
#: tensors that are tables of integers: experts by token, a draft's vocabulary
_TABLES = ("tid2eid", "d2t")

#: what is added to float32 numbers or multiplied with them, which llama.cpp does in f32 alone
_ALWAYS_F32 = ("norm.weight", ".bias")

Whole = Callable[[str], int | None]


def check_gguf(path: str | os.PathLike[str]) -> None:
    """Checks that a GGUF file, or each part of a split one, is as long as its tensor table says, and
    that its metadata has no value at which llama.cpp ends the process.

    Only the header is read, which takes milliseconds. llama.cpp itself crashes on a file that
    is cut short, or gives an error that does not say so.

    Raises:
        ModelError: missing, unreadable, empty, not GGUF, of another version, cut
            short, damaged, or a split model without all its parts.
    """
    first = Path(path)
    parts = split_parts(first)
    if first.name != parts[0].name:
        raise ModelError(f"{first} is a later part of a split model: give {parts[0].name}")
    existing(first)
    for part in filter(is_file, parts):
        check_part(part)
    if missing := [part.name for part in parts if not is_file(part)]:
        raise ModelError(f"{first} is one of {len(parts)} parts; missing: {', '.join(missing)}")


def check_part(path: Path) -> None:
    """`check_gguf` of one file by itself."""
    try:
        with path.open("rb") as file:
            read_header(file.fileno(), path, check=check_header)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


def check_header(header: Header) -> None:
    """Raises ValueError naming the value or tensor."""
    arch = header.values.get("general.architecture")
    if isinstance(arch, bytes):  # llama.cpp says itself what it misses
        check_hyperparameters(header.values, arch.decode(errors="replace"))
        check_vocabulary(header.values)
    check_tensors(header)


def check_hyperparameters(values: dict[str, Any], arch: str) -> None:
    """Raises ValueError naming the value."""

    def whole(key: str) -> int | None:
        value = values.get(f"{arch}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def refuse(key: str, valid: str) -> None:
        raise ValueError(f"it is damaged, {arch}.{key} is {values[f'{arch}.{key}']}, not {valid}")

    n_layer = whole("block_count")
    if n_layer is not None and not 1 <= n_layer <= _MAX_LAYERS:
        refuse("block_count", f"1 to {_MAX_LAYERS}")
    if n_layer is not None and (whole("nextn_predict_layers") or 0) > n_layer:
        refuse("nextn_predict_layers", f"at most {n_layer}")
    for key, value in values.items():
        if isinstance(value, float) and key.endswith("_epsilon") and not 0 <= value < math.inf:
            refuse(key.removeprefix(f"{arch}."), "a number from 0")
    scaling = values.get(f"{arch}.rope.scaling.type")
    if isinstance(scaling, bytes) and scaling not in _SCALINGS:
        known = ", ".join(s.decode() for s in _SCALINGS)
        raise ValueError(f"it is damaged, {arch}.rope.scaling.type is {scaling!r}, none of {known}")
    if (whole("attention.sliding_window") or 0) > _MAX_WINDOW:
        refuse("attention.sliding_window", f"at most {_MAX_WINDOW}")
    _check_heads(arch, whole, refuse)
    _check_experts(arch, values, whole, refuse)


def _check_heads(arch: str, whole: Whole, refuse: Callable[[str, str], None]) -> None:
    n_embd, n_head = whole("embedding_length"), whole("attention.head_count")
    if n_head == 0:
        return
    n_kv = whole("attention.head_count_kv")
    if n_head is not None and n_kv and n_head % n_kv:
        refuse("attention.head_count_kv", f"a divisor of the {n_head} heads")
    if arch in _ONE_KEY_PER_HEAD and n_kv is not None and n_kv != n_head:
        refuse("attention.head_count_kv", f"{n_head}")
    head_dim = whole("attention.key_length")
    if head_dim is None and n_embd is not None and n_head:
        head_dim = n_embd // n_head
    n_value = whole("attention.value_length")
    if n_value is None and n_embd is not None and n_head:
        n_value = n_embd // n_head
    if arch in _EQUAL_HEADS and None not in (head_dim, n_value) and head_dim != n_value:
        key = "key" if whole("attention.key_length") is not None else "value"
        refuse(f"attention.{key}_length", f"{n_value if key == 'key' else head_dim}")
    for key, most in (
        ("rope.dimension_count", head_dim),
        ("rope.dimension_count_swa", whole("attention.key_length_swa") or head_dim),
    ):
        n_rot = whole(key)
        if n_rot is None:
            continue
        if n_rot < 1 or n_rot % 2 or (most is not None and n_rot > most):
            refuse(key, "even and positive" + ("" if most is None else f", at most {most}"))
        if arch in _WHOLE_HEADS and most is not None and n_rot != most:
            refuse(key, f"the width of a head, {most}")


def _check_experts(
    arch: str, values: dict[str, Any], whole: Whole, refuse: Callable[[str, str], None]
) -> None:
    if arch.startswith("hunyuan"):  # one expert is none there
        return
    n, n_used = whole("expert_count") or 0, whole("expert_used_count")
    n_groups, n_groups_used = whole("expert_group_count") or 0, whole("expert_group_used_count")
    if n > _MAX_EXPERTS:
        refuse("expert_count", f"at most {_MAX_EXPERTS}")
    if n_used is not None and not (1 <= n_used <= n if n else n_used == 0):
        refuse("expert_used_count", f"1 to {n}" if n else "0, as there are no experts")
    if n and f"{arch}.expert_used_count" not in values:
        raise ValueError(f"it is damaged, it has {n} experts, and no {arch}.expert_used_count")
    if n_groups and (n_groups >= n or n % n_groups):
        refuse("expert_group_count", f"a divisor of the {n} experts")
    if n_groups > 1 and n_groups_used is None:
        raise ValueError(
            f"it is damaged, it has {n_groups} groups of experts, and no {arch}.expert_group_used_count"
        )
    if n_groups > 1 and not 0 < (n_groups_used or 0) < n_groups:
        refuse("expert_group_used_count", f"1 to {n_groups - 1}")
    gate = whole("expert_gating_func")
    if gate is not None and gate not in _GATES:
        refuse("expert_gating_func", f"{_GATES[0]} to {_GATES[-1]}")
    if n and arch in _GATE_NEEDED and gate is None:
        raise ValueError(f"it is damaged, it has {n} experts, and no {arch}.expert_gating_func")


def check_vocabulary(values: dict[str, Any]) -> None:
    """Raises ValueError naming the token."""
    texts = values.get(TOKENS)
    if values.get("tokenizer.ggml.model") in (b"no_vocab", b"none") or not isinstance(texts, list):
        return
    if values.get("tokenizer.ggml.model") == b"bert" and b"<0x41>" in texts:
        raise ValueError("it is damaged, its vocabulary of the kind bert has tokens for bytes")
    if b"\0" in b"".join(texts):  # llama.cpp reads up to it
        texts = [text.partition(b"\0")[0] for text in texts]
    if len(set(texts)) < len(texts) - max(texts.count(b"") - 1, 0):  # empty ones get other names
        twice = next(t for t, n in Counter(texts).items() if t and n > 1)
        text = twice.decode(errors="replace")
        raise ValueError(f"it is damaged, its vocabulary has the token {text!r} more than once")


def check_tensors(header: Header) -> None:
    """Raises ValueError naming the tensor."""
    for tensor in header.tensors:
        kind, name = _INTEGERS.get(tensor.type), tensor.name
        if kind is not None and not any(table in name for table in _TABLES):
            raise ValueError(f"it is damaged, the weights of {name} are of type {kind}")
        if tensor.type and name.endswith(_ALWAYS_F32):
            raise ValueError(f"it is damaged, {name} is of ggml's type {tensor.type}, not f32")
