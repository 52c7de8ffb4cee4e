"""What POST /mia/explore answers: one part of a page about a text, read as the page asks for it.

Token `i` of the answer is token `i` of the text; a column `i` is what follows it. Arrays are packed
(`mia.show.explorer.packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mia.edits import Edit
from mia.errors import ModelError
from mia.methods import explore_parts as parts
from mia.methods.explore import check_length, explored
from mia.methods.explore_changes import NOTHING, said_of
from mia.methods.explore_text import Settings
from mia.methods.explore_words import Spelling, is_one, model_words
from mia.ranges import parse_tokens
from mia.request import Sampling
from mia.serve.changes import Asked
from mia.serve.completions import labels
from mia.serve.fields import Fields, Refused
from mia.serve.looks import Desk
from mia.serve.saying import changes_of
from mia.show.explorer import attribution_arrays, explorer_page, packed, pieces
from mia.show.text import safe

#: tokens of which the first n are tried as prompts in the part "text"
_WORDS = 512
_FOLLOWED = 64


@dataclass
class Text:
    """A text that a client asks about.

    Attributes:
        ids: its tokens; n_prompt: how many of them are the prompt.
        edits: the changes, for the prompt.
        named: ids of tokens that the answer names.
    """

    desk: Desk
    fields: Fields
    ids: list[int]
    n_prompt: int
    k: int
    edits: list[Edit] = field(default_factory=list)
    named: set[int] = field(default_factory=set)

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of each function of `explore_parts`."""
        return {"edits": self.edits, "n_prompt": self.n_prompt}

    def at(self, low: int) -> int:
        """The token that is asked about, counted from the start."""
        n = len(self.ids)
        if low >= n:
            raise self.fields.refuse("at", f"is {low} at least, and the text has {n} tokens")
        return self.fields.whole("at", n - 1, low, n - 1)

    def tokens(self, name: str, most: int) -> list[int]:
        """Token ids that the client lists."""
        ids = self.fields.take(name, [])
        n = self.desk.model.n_vocab
        if not isinstance(ids, list) or not all(type(t) is int and 0 <= t < n for t in ids):
            raise self.fields.refuse(name, f"are token ids, 0 to {n - 1}")
        if len(ids) > most:
            raise self.fields.refuse(name, f"are {len(ids)}; {most} are the most")
        return ids


def explore(desk: Desk, fields: Fields) -> dict[str, Any]:
    """One part of a page."""
    part = fields.text("part", most=100)
    if part not in _PARTS:
        known = ", ".join(_PARTS)
        raise fields.refuse("part", f"is one of {known}")
    missing = parts.missing_parts(desk.model) if part in _MAY_LACK else {}
    if (why := missing.get(_MAY_LACK.get(part, ""))) is not None:
        raise Refused(safe(why), param="part", code="missing")
    ids = desk.prompt(fields)
    n_prompt = fields.whole("n_prompt", len(ids), 1, len(ids))
    text = Text(desk, fields, ids, n_prompt, fields.whole("k", 5, 1, desk.limits.logprobs))
    read = _PARTS[part](text)
    text.edits = desk.edits(fields, ids[:n_prompt])
    answer = read()
    named = {t: desk.model.described(t) for t in sorted(text.named)}
    return {"version": 2, "part": part, "pieces": pieces(named), **answer}


def page(desk: Desk, fields: Fields) -> str:
    """The page of `mia explore` for a text that was generated, and the changed one beside it."""
    ids, title = desk.prompt(fields), fields.text("title", most=500)
    k, branches = fields.whole("k", 5, 1, desk.limits.logprobs), fields.whole("branches", 3, 0, 10)
    text = Text(desk, fields, ids, len(ids), k)
    sampling = _sampled(fields)
    written = [text.tokens("written", desk.longest)]
    changed = text.tokens("changed", desk.longest)
    asked = Asked.of(fields, desk.limits)
    if changed:
        written.append(changed)
    if not all(written):
        raise fields.refuse("written", "is missing: the tokens that were generated")
    n_predict = max(map(len, written))
    if len(ids) + n_predict > desk.longest:
        raise fields.refuse("written", f"makes a text of more than {desk.longest} tokens")
    check_length(desk.model, len(ids) + n_predict, len(written))
    edits = desk.edits_of(asked, fields, ids)
    if bool(edits) != bool(changed):
        raise fields.refuse("changed", "is what was generated with the changes: give both or none")
    said = said_of(changes_of(asked, desk.vectors), desk.model, ids) if edits else NOTHING
    how = Settings(n_predict, k, branches, sampling)
    return explorer_page(explored(desk.model, ids, written, how, edits=edits, said=said), title)


def _sampled(fields: Fields) -> Sampling:
    """How the tokens of a text were chosen: the best ones, if the client says nothing."""
    temperature = fields.number("temperature", 0.0, 0, 100)
    return Sampling(
        temperature=0.0 if temperature < 1e-6 else temperature,
        top_p=max(fields.number("top_p", 1.0, 0, 1), 1e-6),
        seed=fields.whole("seed", 0, 0, 2**32 - 2),
    )


# Each of these takes its fields, and returns what is done when all fields are known to be right.


def _text(t: Text) -> Callable[[], dict[str, Any]]:
    model, n = t.desk.model, len(t.ids)

    def read() -> dict[str, Any]:
        spelling, short = Spelling(model, t.ids), n <= _WORDS
        return {
            "tokens": labels(model, t.ids),
            "n_prompt": t.n_prompt,
            "words": {
                "model": model_words(model),
                "as_type": "" if model.copy is None else model.copy.type,
                "bos": spelling.bos,
                "cut": spelling.cut,
                "prompts": [spelling.says(t.ids[: i + 1]) for i in range(n)] if short else None,
                "answers": sorted(x for x in set(t.ids) if is_one(model, x)) if short else None,
                "n_predict": n - t.n_prompt,
                "k": t.k,
                "branches": 3,
                "sampling": {},
            },
        }

    return read


def _lens(t: Text) -> Callable[[], dict[str, Any]]:
    model, asked = t.desk.model, t.fields.ranges("columns")
    chosen: Any = "0.." if asked is None else asked
    columns = parse_tokens(chosen, len(t.ids), "columns")
    if not columns:
        raise t.fields.refuse("columns", "are none")
    t.desk.check_size(model.n_layer * model.n_embd * len(columns), "columns")

    def read() -> dict[str, Any]:
        ids, probs, after = parts.columns(model, t.ids, columns, t.k, **t.how)
        t.named.update(_all(ids), _all(after.ids))
        return {
            "columns": columns,
            "lens": {"ids": packed(ids, "<u4"), "probs": packed(probs, "<f4")},
            "alternatives": {
                "ids": packed(after.ids, "<u4"),
                "logprobs": packed(after.logprobs, "<f4"),
                "own": packed(after.own, "<f4"),
                "ranks": packed(after.ranks, "<u4"),
            },
        }

    return read


def _follow(t: Text) -> Callable[[], dict[str, Any]]:
    at, ids = t.at(0), list(dict.fromkeys(t.tokens("ids", _FOLLOWED)))
    t.named.update(ids)
    if not ids:
        raise t.fields.refuse("ids", "are missing: the tokens to follow")

    def read() -> dict[str, Any]:
        found = parts.followed(t.desk.model, t.ids, at, ids, **t.how)
        return {
            "at": at,
            "ids": ids,
            "logprobs": packed(found.logprobs, "<f4"),
            "ranks": packed(found.ranks, "<u4"),
        }

    return read


def _attention(t: Text) -> Callable[[], dict[str, Any]]:
    at, model = t.at(0), t.desk.model
    t.desk.check_size(model.n_layer * model.n_head * (at + 1), "at")

    def read() -> dict[str, Any]:
        weights = parts.attention_of(model, t.ids, at, **t.how)
        top = float(weights.max()) or 1.0
        shares = packed(np.rint(weights / top * 65535), "<u2")
        return {"at": at, "largest": top, "weights": shares}

    return read


def _attribution(t: Text) -> Callable[[], dict[str, Any]]:
    at = t.at(1)

    def read() -> dict[str, Any]:
        shares = parts.attribution_of(t.desk.model, t.ids, at, **t.how)
        if isinstance(shares, ModelError):
            return {"at": at, "why": safe(str(shares))}
        return {"at": at, **attribution_arrays(shares)}

    return read


def _blocking(t: Text) -> Callable[[], dict[str, Any]]:
    at = t.at(2)
    n_rows = (at + 1 + parts.N_NUDGES) * at
    if n_rows > t.desk.limits.look_rows:
        raise t.fields.refuse(
            "at",
            f"is {at}: {n_rows} tokens would be run, {t.desk.limits.look_rows} are the most",
        )

    def read() -> dict[str, Any]:
        drop, floor = parts.blocking_of(t.desk.model, t.ids, at, **t.how)
        return {"at": at, "drop": packed(drop, "<f4"), "floor": floor}

    return read


def _words(t: Text) -> Callable[[], dict[str, Any]]:
    at, ids, model = t.at(0), t.tokens("ids", 4 * _FOLLOWED), t.desk.model
    t.named.update(ids)

    def read() -> dict[str, Any]:
        spelling, before = Spelling(model, t.ids), t.ids[:at]
        return {
            "at": at,
            "prompts": bool(before) and spelling.says(before),
            "answers": is_one(model, t.ids[at]),
            "alternatives": {i: spelling.says([*before, i]) for i in ids},
        }

    return read


def _all(ids: Iterable[Any]) -> Sequence[int]:
    return [int(t) for t in np.unique(np.asarray(ids))]


_PARTS: dict[str, Callable[[Text], Callable[[], dict[str, Any]]]] = {
    "text": _text,
    "lens": _lens,
    "follow": _follow,
    "attention": _attention,
    "attribution": _attribution,
    "blocking": _blocking,
    "words": _words,
}
#: part -> what an architecture may lack for it
_MAY_LACK = {
    "lens": "lens",
    "follow": "lens",
    "attention": "attention",
    "attribution": "attribution",
    "blocking": "blocking",
}
