"""Generation: a continuation with its tokens and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mia.show.report import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mia.io.provenance import ModelFacts
    from mia.request import Result


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a text: its place, its id and its text.

    Attributes:
        text: a byte that is no UTF-8 by itself is spelled `<0xE2>`.
        bytes: of a token that is no text, in hex.
        character: what such bytes complete, with those of the tokens before.
    """

    index: int
    id: int
    text: str
    bytes: str = ""
    character: str = ""

    @property
    def label(self) -> str:
        """The text for a person, with the character that its bytes complete: `<0xAC>=€`."""
        return f"{self.text}={self.character}" if self.character else self.text

    def document(self) -> dict[str, Any]:
        return {"index": self.index, **self.named()}

    def named(self) -> dict[str, Any]:
        """The token without its place."""
        more = {"bytes": self.bytes, "character": self.character}
        return {"id": self.id, "text": self.text, **{k: v for k, v in more.items() if v}}


@dataclass(frozen=True, eq=False)
class Generation(Report):
    """What a model wrote after a prompt; prints as the text.

    Attributes:
        text: the continuation, without the token that ended the turn.
        tokens: its token ids; pieces: their texts; written: both, and bytes that are no text.
        logprobs: natural log-probability of each token under the model's full distribution.
        baseline: the unedited run, if requested.
        prompt: the tokens of the prompt.
        result: what `Model.run` gave, with the captures.
    """

    text: str
    tokens: list[int]
    pieces: list[str]
    logprobs: list[float]
    prompt: Sequence[Token]
    facts: ModelFacts
    result: Result
    baseline: Generation | None = None
    written: Sequence[Token] = ()
    #: whether the text is on the terminal already, as its tokens came
    is_written: bool = False
    #: more entries for the document: what was changed
    about: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        return {
            "model": self.facts.document(),
            "tokens": [t.document() for t in self.prompt],
            **self.output(),
            **({} if self.baseline is None else {"baseline": self.baseline.text}),
            **self.about,
        }

    def output(self) -> dict[str, Any]:
        """The continuation's part of a document."""
        return {"output": self.text, "output_tokens": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {**token.named(), "logprob": round(p, 6)}
            for token, p in zip(self.written, self.logprobs, strict=True)
        ]

    def table(self, width: int) -> RenderableType:
        from rich.text import Text

        return Text("") if self.is_written else super().table(width)

    def plain(self) -> str:
        if self.baseline is None:
            return self.text
        return f"baseline: {self.baseline.text}\nchanged:  {self.text}"
