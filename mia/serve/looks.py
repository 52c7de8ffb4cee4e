"""What /mia/… answers: one look at a prompt each, in a thread beside that which has the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mia.edits import Edit
from mia.errors import MiaError
from mia.ranges import parse_heads, parse_layers, parse_tokens
from mia.request import Capture, Request
from mia.serve.changes import Asked, Changer
from mia.serve.fields import Fields, Refused
from mia.serve.limits import Limits
from mia.serve.store import Vectors
from mia.show.text import safe, visible
from mia.sites import parse_many

if TYPE_CHECKING:
    from mia.model import Model


@dataclass(frozen=True)
class Desk:
    """What a look needs."""

    model: Model
    vectors: Vectors
    changer: Changer
    limits: Limits
    longest: int

    def prompt(self, fields: Fields) -> list[int]:
        """The token ids of `prompt`, a text or ids, or of `messages`."""
        prompt, messages = fields.take("prompt"), fields.take("messages")
        bos = fields.take("bos")
        if bos is not None and not isinstance(bos, bool):
            raise fields.refuse("bos", "is true or false")
        if messages is not None:
            from mia.serve.completions import _messages

            prompt = self.model.chat(_messages(Fields({"messages": messages})))
        if not isinstance(prompt, (str, list)) or not prompt:
            raise fields.refuse("prompt", "is missing: a text or token ids")
        if len(prompt) > 64 * self.longest:
            raise fields.refuse("prompt", "is too long")
        ids = self.model.ids(prompt, bos=bos)
        if len(ids) > self.longest:
            raise fields.refuse("prompt", f"has {len(ids)} tokens; {self.longest} are the most")
        return ids

    def edits(self, fields: Fields, ids: Sequence[int]) -> list[Edit]:
        """The changes that the body asks for."""
        return self.edits_of(Asked.of(fields, self.limits), fields, ids)

    def edits_of(self, asked: Asked, fields: Fields, ids: Sequence[int]) -> list[Edit]:
        if asked.lens is not None or asked.capture:
            raise Refused("lens and capture belong to completions", param="lens")
        fields.end()
        return self.changer.edits(asked, ids)

    def check_size(self, size: int, param: str = "prompt") -> None:
        """Raises `Refused` for more numbers than a look may read."""
        most = 8 * self.limits.captured
        if size > most:
            raise Refused(f"{size} numbers are to be read; {most} are the most", param=param)


def tokens(desk: Desk, fields: Fields) -> dict[str, Any]:
    """The tokens of a text, or the text of token ids."""
    ids = desk.prompt(fields)
    fields.end()
    rows = [
        {**token.document(), "label": visible(token.label)} for token in desk.model.token_rows(ids)
    ]
    return {"tokens": rows, "text": desk.model.detokenize(ids)}


def model(desk: Desk) -> dict[str, Any]:
    """What a page needs to know of the model."""
    from mia.methods.explore_parts import missing_parts
    from mia.methods.explore_words import model_words

    m = desk.model
    return {
        "name": visible(m.name),
        "architecture": visible(m.architecture),
        "n_layer": m.n_layer,
        "n_head": m.n_head,
        "n_head_kv": m.n_head_kv,
        "n_embd": m.n_embd,
        "longest": desk.longest,
        "has_chat": _has_chat(m),
        "has_bos": m.adds_bos,
        "as_type": "" if m.copy is None else m.copy.type,
        "words": model_words(m),
        "missing": {part: safe(why) for part, why in missing_parts(m).items()},
        "limits": {"logprobs": desk.limits.logprobs, "changes": desk.limits.changes},
    }


def _has_chat(model: Model) -> bool:
    """Whether the model's template makes a prompt of a conversation."""
    try:
        return bool(model.chat("Hello"))
    except MiaError:
        return False


def tokenize(desk: Desk, fields: Fields) -> dict[str, Any]:
    """Token ids of a text, as vLLM's servers answer."""
    text = fields.text("prompt", "", most=64 * desk.longest) or ""
    special = fields.flag("add_special_tokens", True)
    fields.text("model")
    fields.end()
    ids = desk.model.tokenize(text, bos=None if special else False)
    return {"tokens": ids, "count": len(ids), "max_model_len": desk.longest}


def detokenize(desk: Desk, fields: Fields) -> dict[str, Any]:
    """The text of token ids, as vLLM's servers answer."""
    ids = fields.take("tokens", [])
    fields.text("model")
    fields.end()
    if not isinstance(ids, list) or len(ids) > 64 * desk.longest:
        raise fields.refuse("tokens", "are token ids")
    return {"prompt": desk.model.detokenize(ids)}


def tokenizer_info(model: Model) -> dict[str, Any]:
    """The special tokens and the chat template, as vLLM's servers answer."""
    return {
        "tokenizer_class": "gguf",
        "bos_token": None if model.bos_token < 0 else model.piece(model.bos_token),
        "eos_token": None if model.eos_token < 0 else model.piece(model.eos_token),
        "chat_template": model.chat_template,
    }


def lens(desk: Desk, fields: Fields) -> dict[str, Any]:
    """What each layer would say next (the logit lens)."""
    from mia.methods.logit_lens import logit_lens

    ids = desk.prompt(fields)
    layers, at = fields.ranges("layers"), fields.ranges("tokens")
    k = fields.whole("k", 5, 1, desk.limits.logprobs)
    model = desk.model
    n_rows = len(ids if at is None else parse_tokens(at, len(ids)))
    n_layers = len(range(model.n_layer) if layers is None else parse_layers(layers, model.n_layer))
    desk.check_size(n_rows * n_layers * model.n_embd)
    edits = desk.edits(fields, ids)
    every: Any = "0.." if at is None else at
    table = logit_lens(model, ids, "l_out", k=k, layers=layers, tokens=every, edits=edits)
    return table.document()


def attention(desk: Desk, fields: Fields) -> dict[str, Any]:
    """Where heads look."""
    from mia.methods.attention import attention as look

    ids = desk.prompt(fields)
    layers, heads = fields.ranges("layers"), fields.text("heads", most=100_000)
    token = fields.whole("token", -1, -len(ids), len(ids) - 1)
    k, by_value = fields.whole("k", 5, 1, 1000), fields.flag("value_weighted")
    model = desk.model
    n_heads = model.n_head * len(
        range(model.n_layer) if layers is None else parse_layers(layers, model.n_layer)
    )
    if heads is not None:
        n_heads = model.n_head * len(
            {h.layer for h in parse_heads(heads, model.n_layer, model.n_head)}
        )
    desk.check_size(len(ids) ** 2 * n_heads)
    edits = desk.edits(fields, ids)
    report = look(
        model,
        ids,
        layers=layers,
        heads=heads,
        token=token,
        k=k,
        value_weighted=by_value,
        edits=edits,
    )
    return report.document()


def attribute(desk: Desk, fields: Fields) -> dict[str, Any]:
    """What each part writes into the logit of an answer."""
    from mia.methods.attribution import attribute as look

    ids = desk.prompt(fields)
    answer, against = fields.text("answer", most=1000), fields.text("against", most=1000)
    if answer is None:
        raise fields.refuse("answer", 'is missing, like " Paris"')
    token = fields.whole("token", -1, -len(ids), len(ids) - 1)
    k = fields.whole("k", 10, 1, 1000)
    edits = desk.edits(fields, ids)
    report = look(desk.model, ids, answer, against=against, token=token, k=k, edits=edits)
    return report.document()


def activations(desk: Desk, fields: Fields) -> bytes:
    """Activations of a prompt, as safetensors."""
    from safetensors.numpy import save

    ids = desk.prompt(fields)
    names, at = fields.several("sites", desk.limits.changes), fields.ranges("tokens")
    if not names or not all(isinstance(s, str) and len(s) <= 200 for s in names):
        raise fields.refuse("sites", 'is like "l_out-14" or ["q.3", "k.3"]')
    sites = parse_many(names, desk.model.n_layer)
    positions = parse_tokens("0.." if at is None else at, len(ids))
    desk.changer.check_size([(s, len(positions), len(ids)) for s in sites])
    edits = desk.edits(fields, ids)
    capture = Capture(sites, positions)
    result = desk.model.run([Request(ids, edits, [capture], logits=None)])[0]
    read = desk.model.activations(ids, result, capture)
    arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in read.arrays.items()}
    return save(arrays, metadata=read.metadata)


def combine(desk: Desk, fields: Fields) -> dict[str, Any]:
    """A new vector from arithmetic with others: {"name": "v", "expression": "a - 0.5*b"}."""
    name, expression = fields.text("name", most=100), fields.text("expression")
    if expression is None:
        raise fields.refuse("expression", 'is missing, like "french - 0.5*formal"')
    fields.end()
    vector = desk.vectors.read(expression)
    desk.model.check_vector(vector, expression)
    desk.vectors.add(name, vector)
    norms = {str(i): round(x, 6) for i, x in vector.norms.items()}
    return {"name": name, "site": vector.site, "layers": vector.layers, "norms": norms}
