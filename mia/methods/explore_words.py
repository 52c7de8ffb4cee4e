"""What a text's tokens are on a command line: as a prompt that is read as the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mia.errors import UsageError
from mia.request import Sampling
from mia.show.text import safe

if TYPE_CHECKING:
    from mia.arrays import IntArray
    from mia.methods.explore_reports import Alternatives
    from mia.model import Model


@dataclass(frozen=True)
class Words:
    """How the text is written for a command.

    Attributes:
        model: a name or file that opens it; as_type: the type of its weights, if another.
        bos: whether the text begins with a BOS token, which a prompt leaves out.
        cut: characters that the tokenizer puts in front of a prompt by itself.
        prompts: for each number of tokens, whether their text is read as the same tokens.
        alternatives: the same for each token with each of its alternatives in the next one's place.
        answers: ids of the tokens whose text alone is that token.
        k, branches: as `explore` was given them.
        sampling: the options that are not at their default.
    """

    model: str
    as_type: str
    bos: bool
    cut: int
    prompts: list[bool]
    alternatives: list[list[bool]]
    answers: set[int]
    n_predict: int
    k: int
    branches: int
    sampling: dict[str, Any]


def words_of(
    model: Model,
    tokens: Sequence[int],
    alternatives: Alternatives,
    *,
    n_predict: int,
    k: int,
    branches: int,
    sampling: Sampling,
) -> Words:
    """Tries which texts are read as the tokens that they are of."""
    spelling = Spelling(model, tokens)
    cut = spelling.cut
    listed: IntArray = alternatives.ids
    own = set(tokens) | {int(t) for t in listed.ravel()}
    defaults = Sampling()
    return Words(
        model=model_words(model),
        as_type="" if model.copy is None else model.copy.type,
        bos=spelling.bos,
        cut=cut,
        prompts=[spelling.says(tokens[: i + 1]) for i in range(len(tokens))],
        alternatives=[
            [spelling.says([*tokens[: i + 1], int(t)]) for t in row] for i, row in enumerate(listed)
        ],
        answers={t for t in own if is_one(model, t)},
        n_predict=n_predict,
        k=k,
        branches=branches,
        sampling={
            name: value
            for name in Sampling.__dataclass_fields__
            if (value := getattr(sampling, name)) != getattr(defaults, name)
        },
    )


def model_words(model: Model) -> str:
    """A name that opens the model: that of a registered one, or its file's, without the folder."""
    return model.path.name if model.name in (model.path.name, model.path.stem) else model.name


def is_one(model: Model, token: int) -> bool:
    """Whether a token's text alone is that token."""
    piece = model.piece(token)
    try:
        return piece == safe(piece, "\n\t") and model.token_id(piece) == token
    except UsageError:
        return False


class Spelling:
    """How tokens of a text are written as prompts: which of them are read as the same tokens.

    Attributes:
        bos: whether the text begins with a BOS token, which a prompt leaves out.
        cut: characters that the tokenizer puts in front of a prompt by itself.
    """

    def __init__(self, model: Model, tokens: Sequence[int]):
        self._model = model
        self.bos, self.cut = model.has_bos(tokens), 0
        # a SentencePiece tokenizer puts a space in front of what it reads
        self.cut = int(self._text(tokens).startswith(" ") and not self.says(tokens))

    def says(self, ids: Sequence[int]) -> bool:
        """Whether these first tokens of the text are what their text is read as."""
        spelled = self._text(ids)
        if spelled != safe(spelled, "\n\t"):
            return False  # nobody types these characters
        try:
            return self._model.tokenize(spelled[self.cut :], bos=self.bos) == list(ids)
        except UsageError:
            return False

    def _text(self, ids: Sequence[int]) -> str:
        return self._model.detokenize(ids[1:] if self.bos else ids)
