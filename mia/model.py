"""Model: a GGUF file that answers requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.edits import Edit, Tokens, resolve_tokens
from mia.engine.delegate import delegate
from mia.engine.dry import counting, prompts_only
from mia.engine.run import Engine
from mia.errors import ModelError, NotFiniteError, UsageError
from mia.generation import Generation
from mia.io import runs
from mia.io.files import file_sha256
from mia.io.kinds import refuse_other_kind
from mia.llama import CACHE_TYPES, LlamaModel
from mia.llama.c_numbers import c_int, usable_threads
from mia.llama.open_file import OpenFile
from mia.models import registry
from mia.models.adapters import Lora, facts_of, named_adapters, read_adapters
from mia.notices import notice
from mia.progress import Progress, step
from mia.request import (
    Capture,
    OnResult,
    OnToken,
    Request,
    Result,
    Sampling,
    TokenMetric,
    one_or_more,
)
from mia.sites import KINDS, Site, parse
from mia.vocabulary import Vocabulary, Writer

if TYPE_CHECKING:
    from mia.engine.graph import Topology
    from mia.engine.stream import Stream
    from mia.io.activations import Activations
    from mia.io.provenance import ModelFacts
    from mia.lenses import LogitLens
    from mia.lenses.unembedding import Unembedding
    from mia.llama.weights import Weights
    from mia.models.claims import Algebra
    from mia.models.copies import Weights as CopiedWeights
    from mia.steering import Handle, Steering
    from mia.vectors import Vector


class Model(Vocabulary):
    """A loaded model.

    Attributes:
        name, path: what it was opened as, and its file.
        n_layer, n_embd, n_head, n_head_kv, n_vocab: its sizes. Heads at `head_out` number
            n_head, at `k` and `v` n_head_kv.
        n_ctx: the longest prompt with its continuation, in tokens.
        rpc: the RPC servers that have its blocks.
    """

    def __init__(
        self,
        model: str | Path = "smollm2",
        *,
        ctx: int | None = None,
        threads: int | None = None,
        gpu_layers: int | None = None,
        rpc: str | Sequence[str] | None = None,
        kv_type: str | None = None,
        bos: bool | None = None,
        flash: bool | None = None,
        as_type: str | None = None,
        lora: Lora | None = None,
    ):
        """Opens a model.

        Args:
            model: a .gguf file, or a name that `mia models` lists.
            ctx: the most tokens of one request; by default what the model was trained with.
            threads: by default, and at most, all processors this process may use.
            gpu_layers: how many blocks to put on a GPU, -1 for all; with `rpc` all by default.
            rpc: servers for the blocks (`mia rpc-server`), as "host:port" each; several share them
                by their free memory. Without encryption: loopback and private networks only. If a
                server dies while it is in use, llama.cpp ends the process: one line on stderr
                (by `sys.excepthook`), exit status 1.
            kv_type: type of the KV cache; by default f32 for F32 models (exact), else f16.
            bos: put a BOS token before each prompt; by default what the file asks for.
            flash: fused attention; by default wherever no attention pattern is read and
                the cache is not f32 (it rounds keys and values to f16).
            as_type: f16, bf16 or f32: open a copy of the weights in this type, which is made once
                and kept (`mia.models.copies`). Its products do not round activations to 8 bits.
            lora: LoRA adapters (GGUF) that are added to its weights: a file or several, each as
                "style.gguf" or "style.gguf=0.5" for half of it; or {file: scale}.

        Raises:
            ModelError: no such model, or the file is damaged or not a decoder model; an adapter is
                damaged or made for another model.
            RangeError: ctx, threads or gpu_layers are out of range.
            UsageError: an unknown type.
            FileError: there is no room for a copy.
            EngineError: this process was forked from one in which llama.cpp ran threads, or an RPC
                server is not there, hangs, or is of another version.
        """
        spec = registry.resolve(str(model))
        assert spec.path is not None
        refuse_other_kind(spec.path, "model", ModelError)
        if (run := runs.current()) is not None:
            run.opens(spec.name, partial(file_sha256, spec.path))
        registry.check_gguf(spec.path)
        servers = (spec.rpc if rpc is None else rpc) or ()
        if gpu_layers is None:
            gpu_layers = spec.gpu_layers
        if gpu_layers is None:
            gpu_layers = -1 if servers else 0
        layers = c_int(gpu_layers, "gpu_layers", -1)
        n_ctx = ctx or spec.ctx
        if n_ctx is not None:
            c_int(n_ctx, "ctx", 1)
        self.threads = usable_threads(threads)
        self._opened_with = {
            "ctx": ctx, "threads": threads, "gpu_layers": gpu_layers, "rpc": rpc,
            "kv_type": kv_type, "bos": bos, "flash": flash, "as_type": as_type, "lora": lora,
        }  # fmt: skip
        named = named_adapters(lora)
        from mia.llama.probe import extra_buffers_safe

        #: the copy of its weights that is open, None for the file itself
        self.copy: CopiedWeights | None = None
        if as_type is not None:
            from mia.models import copies

            self.copy = copies.weights_as(spec.path, as_type, name=spec.name, threads=self.threads)
        loaded = spec.path if self.copy is None else self.copy.path
        llama = LlamaModel(loaded, gpu_layers=layers, extra_bufts=extra_buffers_safe(), rpc=servers)
        # results are of the model; which copy of its weights was run, they say beside it
        self._file = llama.file if loaded == spec.path else OpenFile(spec.path)
        #: the LoRA adapters that are added to its weights
        self.adapters = read_adapters(named, llama.file, as_name=spec.name)
        llama.add(self.adapters)
        super().__init__(llama, spec, bos)
        self.path, self.rpc = spec.path, llama.rpc
        self.n_layer, self.n_embd = self._llama.n_layer, self._llama.n_embd
        self.n_head, self.n_head_kv = self._llama.n_head, self._llama.n_head_kv
        self.n_ctx = n_ctx or self._llama.n_ctx_train
        if self.n_ctx < 1:
            raise ModelError(f"{self.name} says that its context is {self.n_ctx} tokens; give ctx")
        self.kv_type = kv_type or spec.kv_type or ("f32" if self._is_f32 else "f16")
        if self.kv_type not in CACHE_TYPES:
            raise UsageError(f"unknown kv type {self.kv_type!r}; known: {', '.join(CACHE_TYPES)}")
        self._engine = Engine(
            self._llama,
            n_ctx=self.n_ctx,
            kv_type=self.kv_type,
            threads=self.threads,
            flash=flash,
        )
        #: edits of every run, before the requests' own (see `steered`)
        self.standing_edits: list[Edit] = []
        if run is not None:
            from mia.io.provenance import opened, setup

            run.opened(opened(self), setup(self))

    def reopened(self, model: str | Path | None = None, **changes: Any) -> Model:
        """The same model, or another file, opened once more with the same arguments but `changes`."""
        return Model(model or self.path, **{**self._opened_with, **changes})

    def close(self) -> None:
        """Frees the model, as dropping it does, after the run that another thread may have under
        way. Using it afterwards raises `UsageError`."""
        self._engine.close()
        self._file.close()
        if self.copy is not None and self.copy.hold is not None:
            self.copy.hold.close()

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
    def fuses(self) -> bool:
        """Whether runs that read no attention patterns use fused attention."""
        return self._engine.fuses

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
        """SHA-256 of the model file as it was opened, also if a copy of its weights is run."""
        return self._file.sha256()

    # -- the one way to the model ----------------------------------------------------

    def run(
        self,
        requests: Iterable[Request],
        *,
        progress: Progress | None = None,
        on_result: OnResult | None = None,
        on_token: OnToken | None = None,
    ) -> list[Result]:
        """Runs requests, computing shared work once.

        Calls from several threads take turns. A metric, an edit's function, a hook, `progress` or
        `on_result` and `on_token` may raise, which ends the run, but cannot run this model itself.

        Args:
            progress: called as requests finish, with how many are done and how many there are.
            on_result: called as a request finishes, with its index and its result. Requests
                that share work finish in the order in which they are decoded, not in the list's.
            on_token: called as each token is chosen, with the request's index and the token's id,
                in the thread that called `run`.

        Raises:
            UsageError: what a request asks for does not fit this model, or this is called by
                the run that is under way.
            EngineError: llama.cpp failed.
        """
        if isinstance(requests, Request):
            raise UsageError("run takes a list of requests; for one: run([request])[0]")
        requests = one_or_more(requests, Request)
        count = counting()
        if count is None and (other := delegate()) is not None:
            return other.run(requests, progress=progress, on_result=on_result, on_token=on_token)
        requests = self._prepared(requests)
        if any(isinstance(r.metric, TokenMetric) for r in requests):
            self._engine.token_logits = self._unembedding
        if count is not None:
            requests = prompts_only(requests)
        try:
            return self._engine.run(
                requests, progress=progress, on_result=on_result, on_token=on_token, count=count
            )
        except NotFiniteError as err:
            if self.copy is None or self.copy.type != "f16":
                raise
            hint = "f16 ends at 65504, which as_type bf16 does not"
            raise NotFiniteError(f"{err}; {hint}") from err

    def _prepared(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Requests with what the model adds to every run."""
        if standing := tuple(self.standing_edits):
            requests = [replace(r, edits=(*standing, *r.edits)) for r in requests]
        if any(r.edits or r.captures for r in requests):
            _ = self.site_checks
        return requests

    def stream(self, *, cells: int | None = None, n_requests: int | None = None) -> Stream:
        """A run that stays open: requests join between tokens, each with its own edits, and the
        beginnings of those that are over stay in its cache for those that go on from there.

        Args:
            cells: tokens that its cache has room for, by default up to 8192.
            n_requests: how many run side by side at most.

        Returns:
            A stream (`mia.engine.stream`), to be closed, or used in a `with` block.
        """
        return self._engine.stream(
            lambda request: self._prepared([request])[0], cells=cells, n_requests=n_requests
        )

    @cached_property
    def site_checks(self) -> Algebra:
        """Whether this model's sites are what they say (`mia.models.claims`): tested when the
        file's sites are used for the first time, and remembered. Sites that are not are no sites
        of this model from then on."""
        from mia.models.adapters import leave_out_unused
        from mia.models.algebra import algebra

        leave_out_unused(self.adapters, self._engine)
        found = algebra(self, self._engine)
        self._engine.blocks_with_vector = found.vectors
        taken = {**found.unproved, **found.refused}
        self._engine.sessions.refuse({parse(s, self.n_layer): why for s, why in taken.items()})
        if found.refused:
            notice(f"{self.name}: {found.summary()}")
        return found

    @property
    def topology(self) -> Topology:
        """The graph with its sites (`mia.engine.graph.Topology`)."""
        _ = self.site_checks
        return self._engine.topology()

    @property
    def unfused_topology(self) -> Topology:
        """The graph with flash attention off, which has the attention patterns too."""
        _ = self.site_checks
        return self._engine.topology(fused=False)

    @cached_property
    def weights(self) -> Weights:
        """The file's tensors as float32, with what adapters add to them."""
        from mia.llama.weights import Weights

        return Weights(self._llama.file, self.adapters)

    @cached_property
    def _unembedding(self) -> Unembedding | None:
        """Logits of a few tokens; None if they are not the model's own."""
        from mia.lenses.unembedding import Unembedding

        site = Site("final_norm")
        tokens = [t % self.n_vocab for t in (7, 11, 13, 17)][: self.n_ctx]
        try:
            unembedding = Unembedding(self.topology, self.weights, architecture=self.architecture)
            request = Request(tokens, captures=[Capture(site)], logits="all")
            result = self._engine.run([request])[0]
            assert result.logits is not None
            own = unembedding.agrees(result.captures[site], result.logits)
        except ModelError:
            return None  # mia does not know what this file or its graph has there
        return unembedding if own else None

    @cached_property
    def lens(self) -> LogitLens:
        """The logit lens: this model's own final norm and unembedding.

        Raises `ModelError` if the lens at the last layer does not give the model's own logits.
        """
        from mia.lenses import LogitLens

        lens = LogitLens(
            self.topology, self.weights, architecture=self.architecture, described=self.described
        )
        tokens = [t % self.n_vocab for t in (7, 11, 13, 17)]
        last = Site("resid_post", self.n_layer - 1)
        request = Request(tokens, captures=[Capture(last)], logits="all")
        # at once, also in a thread whose runs are delegated
        result = self._engine.run([request])[0]
        assert result.logits is not None
        lens.check(result.captures[last], result.logits, model=self.name)
        return lens

    # -- conveniences -------------------------------------------------------------------

    def steered(self, *vectors: Vector | Steering, **how: Any) -> Handle:
        """Puts vectors on the model, for a `with` block or until `remove()` is called on what
        is returned; every run is steered meanwhile.

        Args:
            how: fields of `mia.Steering` for plain vectors: coeff, op, layers, tokens,
                generated, keep_norm.
        """
        from mia.steering import Handle, Steering

        steerings = [s if isinstance(s, Steering) else Steering(s, **how) for s in vectors]
        for s in steerings:
            self.check_vector(s.vector)
        return Handle(self.standing_edits, [e for s in steerings for e in s.edits()])

    def check_vector(self, vector: Vector, source: str | None = None) -> None:
        """Raises `UsageError` if this model has no such vectors: another site, width or layers.

        Args:
            source: what an error calls the vector; its name by default.
        """
        width = self.n_embd
        if vector.site != "resid_post":
            node = self.topology.sites.get(Site(vector.site, 0))
            if node is None or KINDS[vector.site].by_key:
                raise UsageError(
                    f"{source or vector.name}: {self.name} has no vectors at {vector.site}"
                )
            width = prod(node.shape)
        vector.check(self.n_layer, width, source)

    @cached_property
    def facts(self) -> ModelFacts:
        """What results say of this model."""
        from mia.io.provenance import ModelFacts

        return ModelFacts(
            self.name,
            self.path,
            self.architecture,
            self.n_layer,
            self.n_embd,
            self.n_head,
            self.n_head_kv,
            self._file,
            **(
                {}
                if self.copy is None
                else {"as_type": self.copy.type, "as_type_note": self.copy.note}
            ),
            lora=facts_of(self.adapters),
        )

    def file_metadata(self, **arguments: Any) -> dict[str, str]:
        """What a file says of how it was made: the model and its hash, the tokenizer's, versions,
        and arguments (texts as they are, all else as JSON)."""
        from mia.io.provenance import as_strings

        return {
            **self.facts.metadata(),
            "tokenizer_sha256": self.tokenizer_hash,
            **as_strings(arguments),
        }

    def check_activations(self, activations: Activations) -> None:
        """Raises `UsageError` if the activations are from an incompatible model."""
        metadata, source = activations.metadata, activations.source
        other = metadata.get("model", "another model")
        if metadata.get("tokenizer_sha256", self.tokenizer_hash) != self.tokenizer_hash:
            raise UsageError(
                f"{source} was captured from {other}, which has another tokenizer than {self.name}"
            )
        width = metadata.get("n_embd", str(self.n_embd))
        if width != str(self.n_embd):
            raise UsageError(
                f"{source} was captured from a model of width {width}; {self.name} has {self.n_embd}"
            )

    def look(
        self,
        prompt: str | Sequence[int],
        sites: str | Site | Sequence[str | Site] = "resid_post",
        *,
        tokens: Tokens = None,
        edits: Edit | Sequence[Edit] = (),
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
        result = self.run([Request(ids, one_or_more(edits, Edit), [capture], logits=None)])[0]
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

        arrays = result.captures if capture is None else result.of(capture)
        ids = [int(t) for t in tokens]
        return Activations(
            {str(s): a for s, a in arrays.items()},
            lambda: self.file_metadata(tokens=ids, bos=self.has_bos(ids)),
            f"the capture of {self.name}",
            facts=self.facts,
            prompt=self.token_rows(ids),
            positions=None if capture is None else resolve_tokens(capture.tokens, len(ids)),
        )

    def generate(
        self,
        prompt: str | Sequence[int],
        n_predict: int = 32,
        *,
        edits: Edit | Sequence[Edit] = (),
        captures: Capture | Sequence[Capture] = (),
        sampling: Sampling | None = None,
        bos: bool | None = None,
        baseline: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continues a prompt; prints as the text.

        Args:
            prompt: a text or token ids.
            edits, captures: changes and reads while it runs.
            sampling: greedy by default.
            baseline: continue the unchanged prompt as well, where there are edits.
            on_text: called with the text of the changed run as it is written, in whole characters.
        """
        ids = self.ids(prompt, bos=bos)
        request = Request(
            ids,
            one_or_more(edits, Edit),
            one_or_more(captures, Capture),
            logits=None,
            n_predict=n_predict,
            sampling=sampling or Sampling(),
            logprobs=True,
        )
        requests = [request]
        if edits and baseline:
            requests.append(replace(request, edits=(), captures=()))
        if on_text is not None:
            writer = Writer(self, on_text)
            results = self.run(requests, on_token=writer.token)
            writer.end()
        else:
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
        rows = self.token_rows([*tokens, *result.tokens])
        prompt, written = rows[: len(tokens)], rows[len(tokens) :]
        return Generation(
            text=self.text(result.tokens),
            tokens=result.tokens,
            pieces=[t.text for t in written],
            logprobs=result.logprobs,
            prompt=prompt,
            written=written,
            facts=self.facts,
            result=result,
            baseline=baseline,
        )
