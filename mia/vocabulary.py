"""A model's vocabulary: text to token ids and back, BOS, chat template."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mia.errors import RangeError, UsageError
from mia.generation import Token
from mia.values import shown, whole, wholes

if TYPE_CHECKING:
    from mia.llama import LlamaModel
    from mia.models.registry import ModelSpec


def _spelled(err: UnicodeError) -> tuple[str, int]:
    assert isinstance(err, UnicodeDecodeError)
    return "".join(f"<0x{b:02X}>" for b in err.object[err.start : err.end]), err.end


codecs.register_error("mia.bytes", _spelled)


def as_text(data: bytes) -> str:
    """UTF-8 as text; bytes that are none are spelled `<0xE2>`."""
    return data.decode(errors="mia.bytes")


def completed_characters(pieces: Sequence[bytes]) -> list[str]:
    """For the bytes of each token of a text the character that they complete, whose first bytes
    are those of tokens before; "" for none."""
    out, begun = [], b""  # begun: the bytes of a character that is not whole yet
    for data in pieces:
        whole, n = begun + data, _length(begun[:1])
        try:
            out.append(whole[:n].decode() if begun and len(whole) >= n else "")
        except UnicodeDecodeError:
            out.append("")
        if not begun or len(whole) >= n:
            whole = data
        starts = [k for k in range(1, min(4, len(whole) + 1)) if _length(whole[-k:][:1]) > k]
        begun = whole[-starts[0] :] if starts else b""
    return out


def _length(lead: bytes) -> int:
    """How many bytes the character has whose first byte this is; 1 for any other byte."""
    first = lead[0] if lead else 0
    return (
        4
        if 0xF0 <= first < 0xF5
        else 3
        if 0xE0 <= first < 0xF0
        else 2
        if 0xC2 <= first < 0xE0
        else 1
    )


class Writer:
    """Writes the text of a run's first request as its tokens come, in whole characters."""

    def __init__(self, vocabulary: Vocabulary, write: Callable[[str], None]):
        self._vocabulary, self._write = vocabulary, write
        self._decoder = codecs.getincrementaldecoder("utf-8")("mia.bytes")

    def token(self, request: int, token: int) -> None:
        """One more token of a request (`Model.run(on_token=)`)."""
        if request == 0 and not self._vocabulary.ends_turn(token):
            self._tell(self._decoder.decode(self._vocabulary.token_bytes(token)))

    def end(self) -> None:
        """Writes what is left: bytes that are no whole character."""
        self._tell(self._decoder.decode(b"", True))

    def _tell(self, text: str) -> None:
        if text:
            self._write(text)


class Vocabulary:
    """The part of `Model` that reads and writes text.

    Attributes:
        name: of the model, for messages.
        n_vocab: how many tokens there are.
    """

    def __init__(self, llama: LlamaModel, spec: ModelSpec, bos: bool | None):
        """`bos`: put a BOS in front of each prompt; by default what the file asks for."""
        self._llama, self.spec, self.name = llama, spec, spec.name
        self.n_vocab = llama.n_vocab
        self._bos = spec.bos if bos is None else bos

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 over all token texts: two models with the same one read text alike."""
        digest = hashlib.sha256()
        for text in self._llama.vocab_text():
            digest.update(len(text).to_bytes(4, "little") + text)
        return digest.hexdigest()

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
    def eos_token(self) -> int:
        """The token that ends a text, -1 for none."""
        return self._llama.special("eos")

    @property
    def chat_template(self) -> str | None:
        """The model's chat template: what models.toml says, else the file's."""
        return self.spec.chat_template or self._llama.chat_template() or None

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
        if not isinstance(text, str):
            raise UsageError(f"tokenize takes a text, not {shown(text)}")
        ids = self._llama.tokenize(text, special=special)
        if self.wants_bos(bos):
            if self.bos_token < 0:
                raise UsageError(f"{self.name} has no BOS token to put in front")
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
        """The text of one token; a byte that is no UTF-8 by itself is spelled `<0xE2>`."""
        return as_text(self.token_bytes(token))

    def detokenize(self, tokens: Iterable[int]) -> str:
        """The text of several tokens, control tokens spelled out, bytes as in `piece`."""
        return as_text(b"".join(self.token_bytes(t) for t in tokens))

    def described(self, token: int) -> dict[str, Any]:
        """A token as documents have it: id, text, and in hex the bytes of one that is no text."""
        return Token(0, token, *self._text_and_bytes(token)).named()

    def _text_and_bytes(self, token: int) -> tuple[str, str]:
        """A token's text, and its bytes in hex if they are no UTF-8."""
        data = self.token_bytes(token)
        try:
            return data.decode(), ""
        except UnicodeDecodeError:
            return as_text(data), data.hex()

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for. Raises `RangeError`."""
        token = whole(token, "a token id")
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
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = self.chat_template
        if not template:
            raise UsageError(f"{self.name} has no chat template")
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
        except UsageError:
            raise
        except Exception as err:  # a template is a program: it may divide by zero
            raise UsageError(f"the chat template of {self.name} fails: {err}") from err

    def ids(
        self, prompt: str | Sequence[int], *, bos: bool | None = None, chat: bool = False
    ) -> list[int]:
        """Token ids of a prompt: a text is tokenized, with `chat` as a user's turn under the
        chat template; ids stay as they are.

        Raises `UsageError` where the prompt is empty."""
        if isinstance(prompt, str):
            tokens = self.tokenize(self.chat(prompt) if chat else prompt, bos=bos)
        else:
            tokens = wholes(prompt, "a prompt that is no text")
        if not tokens:
            raise UsageError("the prompt is empty")
        return tokens

    def token_rows(self, tokens: Iterable[int]) -> list[Token]:
        """Tokens of a text in their order: index, id and text; of bytes that are no text the
        character that they complete with those before."""
        ids = [int(t) for t in tokens]
        completed = completed_characters([self.token_bytes(t) for t in ids])
        return [
            Token(i, t, *self._text_and_bytes(t), character)
            for i, (t, character) in enumerate(zip(ids, completed, strict=True))
        ]

    def has_bos(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt begins with a BOS token."""
        return self.bos_token >= 0 and tokens[0] == self.bos_token

    def ends_turn(self, token: int) -> bool:
        """Whether the model ends its turn, or the text, with this token."""
        return self._llama.is_eog(token)

    def text(self, tokens: Sequence[int]) -> str:
        """Generated tokens as text, without the token that ended the turn."""
        out = list(tokens)
        if out and self._llama.is_eog(out[-1]):
            out.pop()
        return self.detokenize(out)
