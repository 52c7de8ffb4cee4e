"""Model: a GGUF file that answers requests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.edits import Edit, Tokens
from mia.engine.plan import Job, build, edit_table
from mia.engine.runner import MAX_SEQ, Restart, Runner
from mia.engine.session import Session
from mia.errors import EngineError, RangeError, UsageError
from mia.generation import Generation, Token
from mia.llama import ggml
from mia.models import registry
from mia.progress import Progress, step
from mia.request import Capture, Request, Result, Sampling
from mia.sites import BY_KEY, Site, parse_many

if TYPE_CHECKING:
    from mia.engine.graph import Topology
    from mia.io.activations import Activations
    from mia.io.provenance import ModelFacts
    from mia.lenses import LogitLens
    from mia.llama.weights import Weights
    from mia.methods.steering import Handle, Steering
    from mia.vectors import Vector

Array = npt.NDArray[np.float32]

_UBATCH = 512
#: bytes that a KV cache may take for running requests side by side; one long request may take more
_KV_BYTES = 512 << 20


class Model:
    """A loaded model.

    Attributes:
        name, path: what it was opened as, and its file.
        n_layer, n_embd, n_head, n_head_kv, n_vocab: its sizes. Heads at `head_out` number
            n_head, at `k` and `v` n_head_kv.
        n_ctx: the longest prompt with its continuation, in tokens.
    """

    def __init__(
        self,
        model: str | Path = "smollm2",
        *,
        ctx: int | None = None,
        threads: int | None = None,
        gpu_layers: int | None = None,
        kv_type: str | None = None,
        bos: bool | None = None,
        flash: bool | None = None,
    ):
        """Opens a model.

        Args:
            model: a .gguf file, or a name that `mia models` lists.
            ctx: the most tokens of one request; by default what the model was trained with.
            threads: by default all processors this process may use.
            gpu_layers: how many blocks to put on a GPU, -1 for all.
            kv_type: type of the KV cache; by default f32 for F32 models (exact), else f16.
            bos: put a BOS token before each prompt; by default what the file asks for.
            flash: fused attention; by default wherever no attention pattern is read and
                the cache is not f32 (it rounds keys and values to f16).

        Raises:
            ModelError: no such model, or the file is damaged or not a decoder model.
        """
        spec = registry.resolve(str(model))
        assert spec.path is not None
        registry.check_gguf(spec.path)
        self.spec, self.name, self.path = spec, spec.name, spec.path
        layers = spec.gpu_layers if gpu_layers is None else gpu_layers
        from mia.llama.probe import extra_buffers_safe

        self._llama = ggml.LlamaModel(
            spec.path, gpu_layers=layers, extra_bufts=extra_buffers_safe()
        )
        self.n_layer, self.n_embd = self._llama.n_layer, self._llama.n_embd
        self.n_head, self.n_head_kv = self._llama.n_head, self._llama.n_head_kv
        self.n_vocab = self._llama.n_vocab
        self.n_ctx = ctx or spec.ctx or self._llama.n_ctx_train
        if self.n_ctx < 1:
            raise RangeError(f"a context of {self.n_ctx} tokens is not possible")
        self.threads = threads or processors()
        if self.threads < 1:
            raise RangeError(f"{self.threads} threads are not possible; 1 to {processors()}")
        self.kv_type = kv_type or spec.kv_type or ("f32" if self._is_f32 else "f16")
        if self.kv_type not in ggml.GGML_TYPES:
            raise UsageError(
                f"unknown kv type {self.kv_type!r}; known: {', '.join(ggml.GGML_TYPES)}"
            )
        self._flash = flash
        self._bos = spec.bos if bos is None else bos
        self._sessions: dict[tuple[bool, bool], Session] = {}
        #: edits of every run, before the requests' own (see `steered`)
        self.standing_edits: list[Edit] = []

    def close(self) -> None:
        """Frees the model. Using it afterwards is an error."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._llama.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Model({self.name!r}, n_layer={self.n_layer}, n_embd={self.n_embd}, n_head={self.n_head})"

    # -- what the file says ------------------------------------------------------

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The file's key-value pairs, arrays left out."""
        return self._llama.metadata()

    @property
    def architecture(self) -> str:
        return self.metadata.get("general.architecture", "unknown")

    @cached_property
    def _is_f32(self) -> bool:
        return self.metadata.get("general.file_type") == "0"

    @cached_property
    def head_dim(self) -> int:
        """Width of one head's output, which need not be n_embd / n_head."""
        return self.topology.sites[Site("head_out", 0)].shape[1]

    @cached_property
    def file_hash(self) -> str:
        """SHA-256 of the model file."""
        from mia.io.files import file_sha256

        return file_sha256(self.path)

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 over all token texts: two models with the same one read text alike."""
        digest = hashlib.sha256()
        for text in self._llama.vocab_text():
            digest.update(len(text).to_bytes(4, "little") + text)
        return digest.hexdigest()

    # -- text and tokens -----------------------------------------------------------

    @cached_property
    def bos_token(self) -> int:
        """The token that stands before a text when a BOS is asked for, -1 for none.

        What models.toml says, else the file's BOS; but where that opens a chat turn
        (`<|im_start|>`) the end-of-text token, which is what such models saw between texts.
        """
        if self.spec.bos_token:
            return self.token_id(self.spec.bos_token)
        bos = self._llama.special("bos")
        if bos >= 0 and "im_start" in self.piece(bos):
            for name in ("<|endoftext|>", "<|end_of_text|>"):
                ids = self._llama.tokenize(name, special=True)
                if len(ids) == 1:
                    return ids[0]
        return bos

    @property
    def adds_bos(self) -> bool:
        """Whether `tokenize` puts a BOS in front by default."""
        return self._llama.add_bos() if self._bos is None else self._bos

    def wants_bos(self, bos: bool | None) -> bool:
        """What `bos` means here: None is the model's default."""
        return self.adds_bos if bos is None else bos

    def tokenize(self, text: str, *, bos: bool | None = None, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            bos: put the BOS token in front (never a second one); None for the model's default.
            special: read `<|…|>` as control tokens.

        Raises:
            UsageError: a BOS is asked for and the vocabulary has none.
        """
        ids = self._llama.tokenize(text, special=special)
        if self.wants_bos(bos):
            if self.bos_token < 0:
                raise UsageError(f"{self.name} has no BOS token; run without --bos")
            if not ids or ids[0] != self.bos_token:
                ids.insert(0, self.bos_token)
        return ids

    def continuation(self, before: str, text: str) -> list[int]:
        """Token ids of a text that follows `before`. Alone it can have others: a SentencePiece
        vocabulary puts a space in front of whatever it is given."""
        head, both = (self._llama.tokenize(t, special=True) for t in (before, before + text))
        n = len(head)
        return both[n:] if both[:n] == head else self._llama.tokenize(text, special=True)

    def piece(self, token: int) -> str:
        """The text of one token; bytes that are no UTF-8 by themselves show as `�`."""
        return self._bytes(token).decode(errors="replace")

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of several tokens, control tokens spelled out."""
        return b"".join(self._bytes(int(t)) for t in tokens).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        if not 0 <= token < self.n_vocab:
            raise RangeError(
                f"token id {token} is out of range; the vocabulary has 0 to {self.n_vocab - 1}"
            )
        return self._llama.piece(token)

    def token_id(self, text: str) -> int:
        """The one token that a text is. Raises `UsageError` where it is none or several."""
        ids = self._llama.tokenize(text, special=True)
        if len(ids) > 1 and len(found := self.continuation(":", text)) == 1:
            return found[0]
        if len(ids) != 1:
            parts = " ".join(repr(self.piece(i)) for i in ids)
            hint = (
                ""
                if text.startswith(" ")
                else f"; most words need a space in front: {' ' + text!r}"
            )
            raise UsageError(f"{text!r} is {len(ids)} tokens ({parts}), not one{hint}")
        return ids[0]

    def chat(self, messages: str | Sequence[dict[str, str]], *, system: str | None = None) -> str:
        """The prompt of a conversation under the model's chat template, up to where the
        assistant speaks. A text is one user message.

        Raises `UsageError` where the model has no template.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self.spec.chat_template or self._llama.chat_template()
        if not template:
            raise UsageError(f"{self.name} has no chat template; run without --chat")
        turns = (
            [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        )
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def refuse(message: str) -> None:
            raise UsageError(f"the chat template of {self.name} says: {message}")

        env.globals["raise_exception"] = refuse
        bos, eos = self._llama.special("bos"), self._llama.special("eos")
        try:
            return env.from_string(template).render(
                messages=turns,
                add_generation_prompt=True,
                bos_token=self.piece(bos) if bos >= 0 else "",
                eos_token=self.piece(eos) if eos >= 0 else "",
            )
        except jinja2.TemplateError as err:
            raise UsageError(f"the chat template of {self.name} fails: {err}") from err

    # -- the one way to the model ----------------------------------------------------

    def run(self, requests: Iterable[Request], *, progress: Progress | None = None) -> list[Result]:
        """Runs requests, sharing among them whatever is the same.

        Args:
            progress: called as requests finish, with how many are done and how many there are.

        Raises:
            UsageError: what a request asks for does not fit this model.
            EngineError: llama.cpp failed.
        """
        if standing := tuple(self.standing_edits):
            requests = [replace(r, edits=(*standing, *r.edits)) for r in requests]
        if isinstance(requests, Request):
            raise UsageError("run takes a list of requests; for one: run([request])[0]")
        jobs = [Job(i, r, self.n_layer) for i, r in enumerate(requests)]
        if not jobs:
            return []
        self._check(jobs)
        vector = _shared_control_vector(jobs, self.n_layer, self.n_embd)
        if vector is not None:
            requests = [_without_edits(j.request) for j in jobs]
            jobs = [Job(i, r, self.n_layer) for i, r in enumerate(requests)]
        sites = {s for j in jobs for s in j.sites}
        done = 0

        def on_done(job: Job) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(jobs))

        if self._llama.recurrent:
            for job in jobs:
                self._run_alone(job, sites, vector, on_done)
        else:
            self._run_jobs(jobs, sites, vector, on_done)
        return [j.result for j in jobs]

    def _run_alone(
        self, job: Job, sites: set[Site], vector: Array | None, on_done: Callable[[Job], None]
    ) -> None:
        """For memories that cannot share or cut prefixes: one whole sequence at a time."""
        for _ in range(4):
            try:
                return self._run_jobs([job], sites, vector, on_done)
            except Restart:
                job.__init__(job.index, job.request, self.n_layer)  # type: ignore[misc]
        raise EngineError("llama.cpp builds another graph each time; mia cannot follow it")

    def _run_jobs(
        self,
        jobs: list[Job],
        sites: set[Site],
        vector: Array | None,
        on_done: Callable[[Job], None],
    ) -> None:
        share = not self._llama.recurrent
        session_edits = edit_table(jobs)
        budget = self._budget(jobs)
        # what is there for many sequences costs a single one a hundredth of each token
        n_seq = MAX_SEQ if share and len(jobs) > 1 else 1
        session = self._session(bool(sites), self._wants_flash(sites), budget, n_seq)
        if sites:
            self._check_shapes(session, jobs)
        roots = build(
            jobs,
            share=share,
            resume=share and bool(session_edits),
            n_layer=self.n_layer,
            n_batch=session.context.params.n_ubatch,
        )
        runner = Runner(
            session,
            session_edits,
            sites=sites,
            budget=budget,
            max_seq=n_seq,
            is_eog=self._llama.is_eog,
            on_done=on_done,
            make_sampler=lambda job: _sampler(self._llama, job.request.sampling),
        )
        session.context.set_control_vector(vector)
        try:
            runner.run(roots)
        except BaseException:
            # what an edit has made may be in the cache, NaN even, which spoils later runs: masked
            # cells are read, and zero times NaN is NaN
            session.context.clear(data=True)
            raise
        finally:
            runner.close()

    def _check(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.n_total > self.n_ctx:
                n, extra = len(job.tokens), job.request.n_predict
                more = f" and {extra} to generate" if extra else ""
                raise RangeError(
                    f"a prompt of {n} tokens{more} is longer than the context of {self.n_ctx}"
                )
            low, high = min(job.tokens), max(job.tokens)
            if low < 0 or high >= self.n_vocab:
                bad = low if low < 0 else high
                raise RangeError(
                    f"token id {bad} is out of range; the vocabulary has 0 to {self.n_vocab - 1}"
                )

    def _check_shapes(self, session: Session, jobs: list[Job]) -> None:
        seen: set[tuple[int, int]] = set()
        for job in jobs:
            for edit, site in job.edits:
                at, key = session.site(site), (id(edit), len(job.tokens))
                if key in seen:
                    continue
                seen.add(key)
                shape = at.shape
                if site.name in BY_KEY:
                    if edit.value is not None:
                        raise UsageError(
                            f"{site.name} takes zero, scale or a function, not a value"
                        )
                    if edit.dims is not None:
                        raise UsageError(
                            f"{site.name} takes no dims; its keys grow with the sequence"
                        )
                elif site.name not in ("q", "k", "v", "head_out") and edit.heads is not None:
                    shape = (int(np.prod(shape)),)
                edit.check(site, shape, len(job.tokens))
            for buffer, prompt_tokens, _ in job.buffers:
                for site in buffer.sites:
                    at = session.site(site)
                    if not prompt_tokens:
                        # perhaps no row will come; the width is known all the same
                        pattern = site.name in BY_KEY
                        shape = (
                            (at.shape[0], buffer.n_keys) if pattern else (int(np.prod(at.shape)),)
                        )
                        buffer.array(site, shape)

    def _budget(self, jobs: list[Job]) -> int:
        """Cells to run in: enough for the longest request, more where running side by side pays.

        All rows of a batch attend over all cells in use, masked or not, so that beyond a
        few times n_embd the attention to other requests' cells costs more than it saves.
        """
        longest = max(j.n_total for j in jobs)
        if self._llama.recurrent:
            return longest + 1
        total = sum(j.n_total for j in jobs)
        bytes_per_cell = 4 * self.n_layer * self.n_embd * self.n_head_kv // max(self.n_head, 1)
        most = min(max(3 * self.n_embd, 1024), max(_KV_BYTES // bytes_per_cell, 1))
        return max(longest, min(total, most)) + 1

    def _wants_flash(self, sites: set[Site]) -> bool:
        if any(s.name in BY_KEY for s in sites):
            return False
        return self.kv_type != "f32" if self._flash is None else self._flash

    def _session(self, callback: bool, flash: bool, budget: int, n_seq: int = 1) -> Session:
        """A context that is large enough; kept between runs, grown when it must be."""
        key = (callback, flash)
        cells = -(-budget // 256) * 256
        found = self._sessions.pop(key, None)
        if found is not None:
            old = found.context.params
            if old.n_ctx < cells or old.n_seq < n_seq:
                cells, n_seq = max(cells, old.n_ctx), max(n_seq, old.n_seq)
                found.close()
                found = None
        if found is None:
            while len(self._sessions) >= 2:
                self._sessions.pop(next(iter(self._sessions))).close()
            params = ggml.ContextParams(
                n_ctx=cells,
                n_ubatch=min(_UBATCH, cells),
                n_seq=n_seq,
                flash=flash,
                kv_type=self.kv_type,
                threads=self.threads,
                callback=callback,
            )
            found = Session(ggml.Context(self._llama, params))
        self._sessions[key] = found
        return found

    @property
    def topology(self) -> Topology:
        """The graph with its sites (`mia.engine.graph.Topology`)."""
        return self._session(True, self._wants_flash(set()), 1).topology

    @property
    def unfused_topology(self) -> Topology:
        """The graph with flash attention off, which has the attention patterns too."""
        return self._session(True, False, 1).topology

    @cached_property
    def weights(self) -> Weights:
        """The file's tensors as float32."""
        from mia.llama.weights import Weights

        return Weights(self.path)

    @cached_property
    def lens(self) -> LogitLens:
        """The logit lens: this model's own final norm and unembedding."""
        from mia.lenses import LogitLens

        return LogitLens(self)

    # -- conveniences -------------------------------------------------------------------

    def steered(self, *vectors: Vector | Steering, **how: Any) -> Handle:
        """Puts vectors on the model, for a `with` block or until `remove()` is called on what
        is returned; every run is steered meanwhile.

        Args:
            how: fields of `mia.methods.steering.Steering` for plain vectors: coeff, op,
                layers, tokens, generated, keep_norm.
        """
        from mia.methods.steering import steer

        return steer(self, *vectors, **how)

    def ids(
        self, prompt: str | Sequence[int], *, bos: bool | None = None, chat: bool = False
    ) -> list[int]:
        """Token ids of a prompt: a text is tokenized, with `chat` as a user's turn under the
        chat template; ids stay as they are.

        Raises `UsageError` where the prompt is empty."""
        if isinstance(prompt, str):
            tokens = self.tokenize(self.chat(prompt) if chat else prompt, bos=bos)
        else:
            tokens = [int(t) for t in prompt]
        if not tokens:
            raise UsageError("the prompt is empty")
        return tokens

    def token_rows(self, tokens: Iterable[int]) -> list[Token]:
        """Index, id and text of tokens."""
        return [Token(i, t, self.piece(t)) for i, t in enumerate(tokens)]

    def has_bos(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt begins with a BOS token."""
        return self.bos_token >= 0 and tokens[0] == self.bos_token

    @cached_property
    def facts(self) -> ModelFacts:
        """What results say of this model."""
        from mia.io.provenance import ModelFacts

        return ModelFacts(self.name, self.path, self.architecture, self.n_layer, self.n_embd)

    def look(
        self,
        prompt: str | Sequence[int],
        sites: str | Site | Sequence[str | Site] = "resid_post",
        *,
        tokens: Tokens = None,
        edits: Sequence[Edit] = (),
        bos: bool | None = None,
    ) -> Activations:
        """Runs a prompt and reads activations.

        Args:
            prompt: a text or token ids.
            sites: any spelling, or several: `"l_out"`, `["q.3", "k.3"]`, `"resid_post.14"`.
            tokens: which tokens of the prompt; None for all.
            edits: changes while it runs.
        """
        ids = self.ids(prompt, bos=bos)
        capture = Capture(sites, tokens)
        result = self.run([Request(ids, edits, [capture], logits=None)])[0]
        return self.activations(ids, result, capture)

    def activations(
        self, tokens: Sequence[int], result: Result, capture: Capture | None = None
    ) -> Activations:
        """What one run read, as `Activations`, which can be saved.

        Args:
            tokens: the prompt's token ids.
            capture: only what this one read.
        """
        from mia.io.activations import Activations
        from mia.io.provenance import file_metadata

        sites = result.captures if capture is None else parse_many(capture.sites, self.n_layer)
        ids = [int(t) for t in tokens]
        return Activations(
            {str(s): result.captures[s] for s in sites},
            lambda: file_metadata(self, tokens=ids, bos=self.has_bos(ids)),
            f"the activations of {self.name}",
            facts=self.facts,
            pieces=[self.piece(t) for t in ids],
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        n_predict: int = 32,
        *,
        edits: Sequence[Edit] = (),
        captures: Sequence[Capture] = (),
        sampling: Sampling | None = None,
        bos: bool | None = None,
        baseline: bool = False,
    ) -> Generation:
        """Continues a prompt; prints as the text.

        Args:
            prompt: a text or token ids.
            edits, captures: changes and reads while it runs.
            sampling: greedy by default.
            baseline: continue the unchanged prompt as well, where there are edits.
        """
        ids = self.ids(prompt, bos=bos)
        request = Request(
            ids,
            edits,
            captures,
            logits=None,
            n_predict=n_predict,
            sampling=sampling or Sampling(),
            logprobs=True,
        )
        requests = [request]
        if edits and baseline:
            requests.append(replace(request, edits=(), captures=()))
        with step("running") as bar:
            results = self.run(requests, progress=bar)
        plain = self.generation(ids, results[1]) if len(results) > 1 else None
        return self.generation(ids, results[0], plain)

    def generation(
        self, tokens: Sequence[int], result: Result, baseline: Generation | None = None
    ) -> Generation:
        """A result with generated tokens as a `Generation`.

        Args:
            tokens: the prompt's token ids.
        """
        return Generation(
            text=self.text(result.tokens),
            tokens=result.tokens,
            pieces=[self.piece(t) for t in result.tokens],
            logprobs=result.logprobs,
            prompt=self.token_rows(tokens),
            facts=self.facts,
            result=result,
            baseline=baseline,
        )

    def text(self, tokens: Sequence[int]) -> str:
        """Generated tokens as text, without the token that ended the turn."""
        out = list(tokens)
        if out and self._llama.is_eog(out[-1]):
            out.pop()
        return self.detokenize(out)


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def _sampler(llama: ggml.LlamaModel, s: Sampling) -> ggml.Sampler:
    return ggml.Sampler(
        llama,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repeat_penalty=s.repeat_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        seed=s.seed,
    )


def is_control_vector(edit: Edit, site: Site) -> bool:
    """Whether llama.cpp's control vector does the same: an add, at all tokens, at a block's end."""
    return (
        edit.op == "add"
        and site.name == "resid_post"
        and (site.layer or 0) >= 1
        and edit.tokens is None
        and edit.on_generated
        and edit.heads is None
        and edit.dims is None
        and not edit.keep_norm
        and np.ndim(edit.coeff) == 0
        and edit.value is not None
        and np.ndim(edit.value) == 1
    )


def _shared_control_vector(jobs: list[Job], n_layer: int, n_embd: int) -> Array | None:
    """The edits of all requests as one control vector (n_layer - 1, n_embd), or None: a control
    vector acts on every sequence of a context, so all requests must have the same edits."""
    first = jobs[0].edits
    if not first or not all(is_control_vector(e, s) for e, s in first):
        return None
    for job in jobs:
        if job.buffers or len(job.edits) != len(first):
            return None
        if any(a is not b for (a, _), (b, _) in zip(job.edits, first, strict=True)):
            return None
    out = np.zeros((n_layer - 1, n_embd), np.float32)
    for edit, site in first:
        value = np.asarray(edit.value, np.float32)
        if value.shape != (n_embd,):
            raise UsageError(
                f"{site} has rows of {n_embd} here, the edit's value has {value.shape[-1]}"
            )
        assert site.layer is not None
        out[site.layer - 1] += np.asarray(edit.coeff, np.float32) * value
    return out


def _without_edits(r: Request) -> Request:
    return replace(r, edits=())
