"""Spans: a prompt cut into sentences, lines, clauses, words, runs of tokens."""

import pytest
from tiny import Tiny

from mia.errors import RangeError, UsageError
from mia.model import Model
from mia.spans import spans_of


class Letters:
    """A vocabulary of a token for each byte, so that texts alone decide."""

    def has_bos(self, tokens: list[int]) -> bool:
        return tokens[0] == 0

    def token_bytes(self, token: int) -> bytes:
        return b"<s>" if token == 0 else bytes([token])

    def detokenize(self, tokens: list[int]) -> str:
        return b"".join(self.token_bytes(t) for t in tokens).decode(errors="replace")


def cut(text: str, how: str = "auto") -> tuple[str, list[str]]:
    model: Model = Letters()  # type: ignore[assignment]
    name, spans = spans_of(model, [0, *text.encode()], how)
    ends = [1, *(s.end for s in spans)]
    assert [s.first for s in spans] == ends[:-1] and ends[-1] == len(text.encode()) + 1
    return name, [s.text.strip() for s in spans]


@pytest.mark.parametrize(
    ("text", "how", "spans"),
    [
        ("It rains. Why? Who knows it!", "sentences", ["It rains.", "Why?", "Who knows it!"]),
        ('He said "no." She left us', "sentences", ['He said "no."', "She left us"]),
        ("Dr. Bell met J. Doe. It was 3.14 pm", "sentences", ["Dr. Bell met J. Doe.", "It was 3.14 pm"]),
        ("Who is it? Answer:", "clauses", ["Who is it?", "Answer:"]),
        ("It rains. Who is it? Answer:", "sentences", ["It rains.", "Who is it? Answer:"]),
        ("Q: Oslo\nA: yes\n\nQ: Rome\nA:", "sentences", ["Q: Oslo", "A: yes", "Q: Rome\nA:"]),
        ("In May, as it rained, he", "clauses", ["In May,", "as it rained,", "he"]),
        ("The sea is", "words", ["The", "sea", "is"]),
        ("彼は東京に住む。彼はどこ", "sentences", ["彼は東京に住む。", "彼はどこ"]),
    ],
)  # fmt: skip
def test_a_text_is_cut(text: str, how: str, spans: list[str]) -> None:
    assert cut(text) == (how, spans)


def test_ways_to_cut() -> None:
    assert cut("a b\nc d", "lines") == ("lines", ["a b\nc d"])  # a last line of two words joins
    assert cut("a b\nc d e", "lines") == ("lines", ["a b", "c d e"])
    assert cut("abcde", "2") == ("2", ["ab", "cd", "e"])
    assert cut("abc", "tokens") == ("tokens", ["a", "b", "c"])


def test_ranges(llama: Tiny) -> None:
    tokens = llama.prompt(10)
    how, spans = spans_of(llama.model, tokens, "1..3,5..5, 7..")
    assert how == "ranges" and [(s.first, s.end) for s in spans] == [(1, 4), (5, 6), (7, 10)]
    for text, kind, message in (
        ("1..3,2..5", UsageError, "2..5 begins before the span before it ends"),
        ("1..30", RangeError, "out of range"),
        ("pages", UsageError, "known: auto, sentences, lines, clauses, words, tokens"),
        ("0", UsageError, "spans of 0 tokens"),
    ):
        with pytest.raises(kind, match=message):
            spans_of(llama.model, tokens, text)
