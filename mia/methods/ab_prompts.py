"""A/B questions as prompts: the question as a user's message, and the answer begun.

"(" and the letter are tokenized each as what follows the text before it, so that the letter is
one token. A model without a chat template reads the question, a blank line and "Answer: (";
"(" has a space in front unless a template ends in a line end or a space. By text, the choices
are not listed, and the answers themselves take the place of their letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mia.datasets.choices import AbItem
from mia.errors import UsageError

if TYPE_CHECKING:
    from mia.model import Model


@dataclass(frozen=True, slots=True)
class AbPrompt:
    """tokens: up to and with "(", or by text up to the answer; steered: the first token after the
    user's message."""

    tokens: list[int]
    steered: int
    by_letter: bool = True


def prompt(
    model: Model, item: AbItem, *, bos: bool | None = None, by_text: bool = False
) -> AbPrompt:
    """The question as a user's message, with the answer begun; by text without the choices, and
    the answer not begun."""
    question = item.choices()[0] if by_text else item.question
    try:
        text = model.chat(question)
    except UsageError:
        text = f"{question}\n\nAnswer:"
    end = text.rfind(question.strip()) + len(question.strip())
    tokens = model.tokenize(text, bos=bos)
    n_user = len(tokens)
    lead = len(model.detokenize(tokens)) - len(text)  # a BOS in front
    while n_user > 1 and len(model.detokenize(tokens[: n_user - 1])) - lead >= end:
        n_user -= 1
    if by_text:
        return AbPrompt(tokens, n_user, by_letter=False)
    return AbPrompt([*tokens, *answer_tokens(model, tokens, "(")], n_user)


def answer_tokens(model: Model, begun: Sequence[int], answer: str) -> list[int]:
    """An answer, or its "(", after "A:" begins with a space, after a template's line end it does
    not."""
    before = model.piece(begun[-1])
    glue = "" if before.endswith(("\n", " ")) else " "
    return model.continuation(before, glue + answer.strip())


def prompt_and_answers(
    model: Model, item: AbItem, *, bos: bool | None, by_text: bool
) -> tuple[AbPrompt, list[int], list[int]]:
    """The prompt, and the tokens of the matching and of the other answer."""
    begun = prompt(model, item, bos=bos, by_text=by_text)
    if not by_text:
        return begun, _letter(model, item.matching), _letter(model, item.other)
    _, *texts = item.choices()
    matching, other = (answer_tokens(model, begun.tokens, t) for t in texts)
    return begun, matching, other


def _letter(model: Model, letter: str) -> list[int]:
    """A letter after "(": alone, a SentencePiece vocabulary would put a space in front."""
    tokens = model.continuation("(", letter)
    if len(tokens) != 1:
        raise UsageError(f"the letter {letter!r} after '(' is {len(tokens)} tokens, not one")
    return tokens
