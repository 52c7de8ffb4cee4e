"""Model: a GGUF file that answers requests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mia.edits import Edit, Tokens, resolve_tokens
from mia.engine.run import Engine
from mia.errors import RangeError, UsageError
from mia.generation import Generation
from mia.llama import CACHE_TYPES, LlamaModel
from mia.models import registry
from mia.progress import Progress, step
from mia.request import Capture, Request, Result, Sampling, one_or_more
from mia.sites import KINDS, Site, parse_many
from mia.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mia.engine.graph import Topology
    from mia.io.activations import Activations
    from mia.io.provenance import ModelFacts
    from mia.lenses import LogitLens
    from mia.llama.weights import Weights
    from mia.steering import Handle, Steering
    from mia.vectors import Vector


class Model(Vocabulary):
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
        layers = spec.gpu_layers if gpu_layers is None else gpu_layers
        from mia.llama.probe import extra_buffers_safe

        llama = LlamaModel(spec.path, gpu_layers=layers, extra_bufts=extra_buffers_safe())
        super().__init__(llama, spec, bos)
        self.path = spec.path
        self.n_layer, self.n_embd = self._llama.n_layer, self._llama.n_embd
        self.n_head, self.n_head_kv = self._llama.n_head, self._llama.n_head_kv
        self.n_ctx = ctx or spec.ctx or self._llama.n_ctx_train
        if self.n_ctx < 1:
            raise RangeError(f"ctx must be at least 1, got {self.n_ctx}")
        self.threads = threads or processors()
        if self.threads < 1:
            raise RangeError(f"threads must be at least 1, got {self.threads}")
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

    def close(self) -> None:
        """Frees the model. Using it afterwards is an error."""
        self._engine.close()
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

    # -- the one way to the model ----------------------------------------------------

    def run(self, requests: Iterable[Request], *, progress: Progress | None = None) -> list[Result]:
        """Runs requests, computing shared work once.

        Args:
            progress: called as requests finish, with how many are done and how many there are.

        Raises:
            UsageError: what a request asks for does not fit this model.
            EngineError: llama.cpp failed.
        """
        if isinstance(requests, Request):
            raise UsageError("run takes a list of requests; for one: run([request])[0]")
        requests = list(requests)
        if standing := tuple(self.standing_edits):
            requests = [replace(r, edits=(*standing, *r.edits)) for r in requests]
        return self._engine.run(requests, progress=progress)

    @property
    def topology(self) -> Topology:
        """The graph with its sites (`mia.engine.graph.Topology`)."""
        return self._engine.topology()

    @property
    def unfused_topology(self) -> Topology:
        """The graph with flash attention off, which has the attention patterns too."""
        return self._engine.topology(fused=False)

    @cached_property
    def weights(self) -> Weights:
        """The file's tensors as float32."""
        from mia.llama.weights import Weights

        return Weights(self.path)

    @cached_property
    def lens(self) -> LogitLens:
        """The logit lens: this model's own final norm and unembedding.

        Raises `ModelError` if the lens at the last layer does not give the model's own logits.
        """
        from mia.lenses import LogitLens

        lens = LogitLens(
            self.topology, self.weights, architecture=self.architecture, piece=self.piece
        )
        tokens = [t % self.n_vocab for t in (7, 11, 13, 17)]
        last = Site("resid_post", self.n_layer - 1)
        result = self.run([Request(tokens, captures=[Capture(last)], logits="all")])[0]
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

        sites = result.captures if capture is None else parse_many(capture.sites, self.n_layer)
        ids = [int(t) for t in tokens]
        return Activations(
            {str(s): result.captures[s] for s in sites},
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


def processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1
