"""OpenAI's wire format: bodies of /v1/completions and /v1/chat/completions, and what answers them."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mia.request import Request, Sampling
from mia.serve.changes import Asked, Changer
from mia.serve.fields import Fields, Refused
from mia.serve.limits import Limits
from mia.serve.scheduler import Part
from mia.serve.writing import Choice, PromptLogProbs, Written
from mia.values import shown

if TYPE_CHECKING:
    from mia.model import Model

#: tokens that a completion and a chat may have where the client does not say
_COMPLETION, _CHAT = 16, 512
#: tokens that a letter's bytes may be spread over, and more
_LETTER = 8


@dataclass
class Body:
    """A request as it came, checked as far as it can be without the model.

    Attributes:
        prompts: texts or token ids; of a chat one text, once the template has made it.
        says_length: whether the client gave `max_tokens`.
        logprobs: None for none, else how many of the most probable tokens are listed.
        token_ids, labels: whether the answer has the tokens' ids, and how they are shown.
    """

    chat: bool
    prompts: list[str | list[int]] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    n: int = 1
    max_tokens: int = 0
    says_length: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    stops: list[str] = field(default_factory=list)
    logprobs: int | None = None
    echo: bool = False
    bos: bool | None = None
    ignore_eos: bool = False
    stream: bool = False
    usage: bool = False
    token_ids: bool = False
    labels: bool = False
    asked: Asked = field(default_factory=Asked)

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())


def parse(body: Any, *, chat: bool, model: str, longest: int, limits: Limits) -> Body:
    """Raises `Refused` for what cannot be served."""
    fields = Fields(body)
    name = fields.text("model", model)
    if name != model:
        raise Refused(
            f"there is no model {shown(name)}; this server has {model}",
            status=404,
            param="model",
            code="model_not_found",
        )
    out = Body(chat)
    if chat:
        out.messages = _messages(fields)
    else:
        out.prompts = _prompts(fields, longest, limits)
        out.echo = fields.flag("echo")
        fields.only("suffix", "")
    out.n = fields.whole("n", 1, 1, limits.n)
    if not chat:
        fields.only("best_of", out.n)
    if out.n * max(len(out.prompts), 1) > limits.choices:
        raise Refused(f"prompts × n are {limits.choices} at most", param="n")
    lengths = ("max_tokens", "max_new_tokens", *(["max_completion_tokens"] if chat else []))
    out.says_length = any(fields.has(name) for name in lengths)
    out.max_tokens = min(_CHAT if chat else _COMPLETION, longest)
    if out.says_length:  # lm-evaluation-harness may send two
        given = [n for n in lengths if fields.has(n)]
        out.max_tokens = min(fields.whole(n, 0, 1 if chat else 0, longest) for n in given)
    out.sampling = _sampling(fields)
    out.stops = _stops(fields, limits)
    out.logprobs = _logprobs(fields, chat, limits)
    bos = fields.take("bos")
    if bos is not None and not isinstance(bos, bool):
        raise fields.refuse("bos", f"is true or false, not {shown(bos)}")
    out.bos = bos
    out.ignore_eos = fields.flag("ignore_eos")
    out.stream = fields.flag("stream")
    out.token_ids = fields.flag("return_token_ids")
    out.labels = fields.flag("return_labels")
    options = Fields(fields.take("stream_options", {}), "stream_options")
    out.usage = options.flag("include_usage")
    options.flag("include_obfuscation")
    options.end()
    out.asked = Asked.of(fields, limits)
    _refuse_others(fields)
    return out


def _refuse_others(fields: Fields) -> None:
    """Fields that change nothing here may come; others are refused by their name."""
    for harmless in ("user", "safety_identifier", "metadata", "store", "service_tier"):
        fields.take(harmless)
    fields.only("num_beams", 1)
    fields.only("logit_bias", {})
    fields.only("tools", [])
    fields.only("functions", [])
    fields.only("tool_choice", "none", "auto")
    fields.only("parallel_tool_calls", True, False)
    fields.only("response_format", {"type": "text"})
    fields.only("modalities", ["text"])
    fields.end()


def _prompts(fields: Fields, longest: int, limits: Limits) -> list[str | list[int]]:
    given = fields.take("prompt")
    one = isinstance(given, str) or (
        isinstance(given, list) and given and all(type(t) is int for t in given)
    )
    prompts = [given] if one else given
    if not isinstance(prompts, list) or not prompts:
        raise fields.refuse("prompt", "is missing: a text, token ids, or several of these")
    if len(prompts) > limits.choices:
        raise fields.refuse("prompt", f"has {len(prompts)} prompts; {limits.choices} are the most")
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and all(type(t) is int for t in prompt)
        if not (isinstance(prompt, str) or is_ids) or not prompt:
            raise fields.refuse("prompt", f"is a text or token ids, not {shown(prompt)}")
        if is_ids and len(prompt) > longest:
            raise _too_long(len(prompt), 0, longest)
    return prompts


def _messages(fields: Fields) -> list[dict[str, str]]:
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise fields.refuse("messages", "is missing: a list of {role, content}")
    if len(given) > 4096:
        raise fields.refuse("messages", "are 4096 at most")
    out = []
    for i, message in enumerate(given):
        one = Fields(message, f"messages[{i}]")
        role, content = one.text("role", most=32), one.take("content", "")
        one.text("name", most=200)
        if role == "developer":
            role = "system"
        if role not in ("system", "user", "assistant"):
            raise one.refuse("role", f"is system, user or assistant, not {shown(role)}")
        if isinstance(content, list):
            parts = [Fields(part, f"messages[{i}].content") for part in content]
            for part in parts:
                part.only("type", "text")
            texts = [part.text("text", "") or "" for part in parts]
            for part in parts:
                part.end()
            content = "".join(texts)
        if not isinstance(content, str):
            raise one.refuse("content", f"is a text, not {shown(content)}")
        for empty in ("refusal", "tool_calls", "function_call", "audio", "annotations"):
            one.only(empty, None, [])
        one.end()
        out.append({"role": role, "content": content})
    return out


def _sampling(fields: Fields) -> Sampling:
    temperature = fields.number("temperature", 1.0, 0, 100)
    seed = fields.whole("seed", secrets.randbelow(2**31), -(2**63), 2**64)
    return Sampling(
        temperature=0.0 if temperature < 1e-6 else temperature,
        top_k=fields.whole("top_k", 0, 0, 2**31 - 1),
        top_p=max(fields.number("top_p", 1.0, 0, 1), 1e-6),
        min_p=fields.number("min_p", 0.0, 0, 0.999999),
        repeat_penalty=fields.number("repeat_penalty", 1.0, 0.01, 100),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -100, 100),
        presence_penalty=fields.number("presence_penalty", 0.0, -100, 100),
        seed=seed % (2**32 - 1),
    )


def _stops(fields: Fields, limits: Limits) -> list[str]:
    stops = fields.several("stop", limits.stops)
    for stop in stops:
        if not isinstance(stop, str) or not stop or len(stop) > limits.stop_letters:
            raise fields.refuse(
                "stop", f"is a text of 1 to {limits.stop_letters} letters, not {shown(stop)}"
            )
    return stops


def _logprobs(fields: Fields, chat: bool, limits: Limits) -> int | None:
    if not chat:
        value = fields.whole("logprobs", -1, -1, limits.logprobs)
        return None if value < 0 else value
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, 0, limits.logprobs)
    if top and not wanted:
        raise fields.refuse("top_logprobs", "needs logprobs to be true")
    return top if wanted else None


def _too_long(n: int, more: int, longest: int) -> Refused:
    return Refused(
        f"{n} tokens of prompt and {more} to generate are more than the {longest} of the context",
        code="context_length_exceeded",
        param="prompt",
    )


# -- from a body to choices: in the thread that has the model --------------------------------


def plan(body: Body, model: Model, changer: Changer, longest: int) -> list[Choice]:
    """The choices of a body, in OpenAI's order."""
    choices: list[Choice] = []
    size = 0
    prompts: Sequence[str | list[int]] = [model.chat(body.messages)] if body.chat else body.prompts
    for prompt in prompts:
        if isinstance(prompt, str) and len(prompt) > 64 * longest:
            raise Refused(f"the prompt has {len(prompt)} letters", param="prompt")
        ids = model.ids(prompt, bos=body.bos)
        n_predict = body.max_tokens
        if not body.says_length:  # what there is room for
            n_predict = max(1, min(n_predict, longest - len(ids) + 1))
        if len(ids) + max(n_predict, 1) - 1 > longest:
            raise _too_long(len(ids), n_predict, longest)
        edits = changer.edits(body.asked, ids)
        reads = changer.reads(body.asked, ids, n_predict)
        size += body.n * reads.size
        changer.check_total(size)
        scored = body.echo and body.logprobs is not None
        request = Request(
            ids,
            edits,
            reads.captures,
            logits="all" if scored else None,
            metric=PromptLogProbs(ids, body.logprobs or 0) if scored else None,
            n_predict=n_predict,
            sampling=body.sampling,
            stop_at_eog=not body.ignore_eos,
            logprobs=body.logprobs is not None,
            top_logprobs=body.logprobs or 0,
        )
        for i in range(body.n):
            seed = (body.sampling.seed + i) % (2**32 - 1)
            own = replace(request, sampling=replace(body.sampling, seed=seed))
            choices.append(Choice(len(choices), own, ids, body.stops, reads))
    return choices


# -- answers -----------------------------------------------------------------------------------


class Answers:
    """The documents that answer one body."""

    def __init__(self, body: Body, model: Model):
        self._body, self._model = body, model
        #: for each choice how many letters of its text the tokens told so far are, and the decoder
        #: that has the bytes of a letter that is not whole yet
        self._places: dict[int, tuple[int, codecs.IncrementalDecoder]] = {}
        self._begun: set[int] = set()
        #: for each choice the tokens told last: they may have the first bytes of the next one's letter
        self._before: dict[int, list[int]] = {}

    def chunks(self, part: Part) -> list[dict[str, Any]]:
        """The documents of a stream for a part."""
        out = []
        is_first = part.choice.index not in self._begun
        if is_first:
            self._begun.add(part.choice.index)
            if self._body.chat:
                out.append(self._chunk(part, {"role": "assistant", "content": ""}, None))
            elif self._body.echo:
                text = self._model.detokenize(part.choice.prompt)
                out.append(self._chunk(part, text, self._of_prompt(part.choice)))
            if out:
                out[0]["choices"][0].update(self._ids(part.choice, (), of_prompt=True))
        if part.text or part.tokens or part.finish_reason:
            logprobs = self._of(part.choice, part.tokens)
            content: Any = {"content": part.text} if self._body.chat else part.text
            if self._body.chat and not part.text:
                content = {}
            chunk = self._chunk(part, content, logprobs, part.finish_reason, part.extra)
            ids = self._ids(part.choice, part.tokens, of_prompt=is_first and not out)
            chunk["choices"][0].update(ids)
            out.append(chunk)
        return out

    def last_chunk(self, choices: Iterable[Choice]) -> dict[str, Any] | None:
        """With the numbers of tokens, if they are asked for."""
        if not self._body.usage:
            return None
        return {**self._head(chunk=True), "choices": [], "usage": self._usage(choices)}

    def whole(self, parts: Iterable[Part], choices: Sequence[Choice]) -> dict[str, Any]:
        """The one document of a request that is not streamed."""
        extras = {part.choice.index: part.extra for part in parts if part.finish_reason}
        out = []
        for c in choices:
            logprobs = self._of_prompt(c) if self._body.echo and not self._body.chat else None
            logprobs = _joined(logprobs, self._of(c, c.tokens))
            entry: dict[str, Any] = {"index": c.index}
            if self._body.chat:
                entry["message"] = {"role": "assistant", "content": c.text, "refusal": None}
            else:
                before = self._model.detokenize(c.prompt) if self._body.echo else ""
                entry["text"] = before + c.text
            entry["logprobs"], entry["finish_reason"] = logprobs, c.finish_reason
            entry.update(self._ids(c, c.tokens, of_prompt=True))
            if extras.get(c.index):
                entry["mia"] = extras[c.index]
            out.append(entry)
        return {**self._head(chunk=False), "choices": out, "usage": self._usage(choices)}

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._body.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        b = self._body
        return {"id": b.id, "object": kind, "created": b.created, "model": self._model.name}

    def _chunk(
        self,
        part: Part,
        content: Any,
        logprobs: Any,
        finish_reason: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": part.choice.index}
        entry["delta" if self._body.chat else "text"] = content
        entry["logprobs"], entry["finish_reason"] = logprobs, finish_reason
        if extra:
            entry["mia"] = extra
        return {**self._head(chunk=True), "choices": [entry]}

    def _ids(self, choice: Choice, tokens: Sequence[Written], *, of_prompt: bool) -> dict[str, Any]:
        """The ids of new tokens, and how they are shown: [id, label, text]."""
        out: dict[str, Any] = {}
        ids = [t.id for t in tokens]
        if self._body.token_ids:
            out = {"prompt_token_ids": choice.prompt} if of_prompt else {}
            out["token_ids"] = ids
        if self._body.labels:
            if of_prompt:
                out["prompt_labels"] = labels(self._model, choice.prompt)
            before = self._before.get(choice.index, choice.prompt[-_LETTER:])
            out["labels"] = labels(self._model, ids, before)
            self._before[choice.index] = [*before, *ids][-_LETTER:]
        return out

    def _usage(self, choices: Iterable[Choice]) -> dict[str, int]:
        choices = list(choices)
        n_prompt = sum(len(c.prompt) for c in choices[:: self._body.n])
        n_written = sum(len(c.tokens) for c in choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_written,
            "total_tokens": n_prompt + n_written,
        }

    def _of_prompt(self, choice: Choice) -> Any:
        if self._body.logprobs is None or choice.prompt_logprobs is None:
            return None
        told = self._of(choice, choice.prompt_logprobs, errors="mia.bytes")
        at, decoder = self._places[choice.index]
        self._places[choice.index] = at + len(decoder.decode(b"", True)), _decoder("replace")
        return told

    def _of(self, choice: Choice, tokens: Sequence[Written], errors: str = "replace") -> Any:
        """`errors`: how the text spells bytes that are none, as of `bytes.decode`."""
        if self._body.logprobs is None or not tokens:
            return None
        if self._body.chat:
            shown_tokens = [t for t in tokens if not self._model.ends_turn(t.id)]
            return {"content": [self._chat_token(t) for t in shown_tokens], "refusal": None}
        offsets = []
        at, decoder = self._places.get(choice.index) or (0, _decoder(errors))
        for token in tokens:
            offsets.append(at)
            at += len(decoder.decode(self._model.token_bytes(token.id)))
        self._places[choice.index] = at, decoder
        return {
            "tokens": [self._piece(t.id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if self._body.logprobs else None,
            "text_offset": offsets,
        }

    def _piece(self, token: int) -> str:
        return self._model.piece(token)

    def _top(self, token: Written) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        out: dict[str, float] = {}
        for other, logprob in token.top:
            out.setdefault(self._piece(other), logprob)
        out.setdefault(self._piece(token.id), token.logprob)
        return out

    def _chat_token(self, token: Written) -> dict[str, Any]:
        def entry(id: int, logprob: float | None) -> dict[str, Any]:
            data = self._model.token_bytes(id)
            return {"token": self._piece(id), "logprob": logprob, "bytes": list(data)}

        top = [entry(other, logprob) for other, logprob in token.top]
        return {**entry(token.id, token.logprob), "top_logprobs": top}


def labels(model: Model, ids: Sequence[int], before: Sequence[int] = ()) -> list[list[Any]]:
    """[id, label, text] of tokens, as pages have them. `before`: the last tokens before these."""
    from mia.show.text import visible

    rows = model.token_rows([*before, *ids])[len(before) :]
    return [[row.id, visible(row.label), row.text] for row in rows]


def _decoder(errors: str) -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors)


def _joined(a: Any, b: Any) -> Any:
    """Log-probabilities of a prompt and of what follows it."""
    if a is None or b is None:
        return b if a is None else a
    return {k: None if a[k] is None else a[k] + b[k] for k in a}
