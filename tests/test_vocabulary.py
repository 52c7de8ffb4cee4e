"""Tokens that are bytes and no text: how they are spelled, and the characters that they make."""

import pytest
from tiny import Tiny

from mia.vocabulary import as_text, completed_characters


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"cat", "cat"),
        ("€".encode(), "€"),
        (b"\xe2", "<0xE2>"),
        (b" \xe2\x82", " <0xE2><0x82>"),
        (b"\xac!", "<0xAC>!"),
        (b"\xff\xc3\xbc", "<0xFF>ü"),
    ],
)
def test_bytes_that_are_no_text_are_spelled(data: bytes, text: str) -> None:
    assert as_text(data) == text


@pytest.mark.parametrize(
    ("pieces", "characters"),
    [
        ([b"a", b"b"], ["", ""]),
        ([b"\xe2", b"\x82", b"\xac"], ["", "", "€"]),
        ([b" \xf0\x9f\x98", b"\x80", b"x"], ["", "😀", ""]),
        ([b"\xc3", b"\xbc\xc3", b"\xa4"], ["", "ü", "ä"]),
        ([b"\xe2\x82", b"a", b"\xac"], ["", "", ""]),  # broken off
        ([b"\xe2\x82", b"\xc3", b"\xbc"], ["", "", "ü"]),
        ([b"\xac", b"\xff", b"\xe2"], ["", "", ""]),
        ([b"\xc3", b"\xbc!"], ["", "ü"]),
        ([], []),
    ],
)
def test_the_character_that_a_run_of_bytes_makes(
    pieces: list[bytes], characters: list[str]
) -> None:
    assert completed_characters(pieces) == characters


def test_every_text_is_whole_however_it_is_cut() -> None:
    """Each character of several bytes is completed by the token with its last byte."""
    text = "aü€😀ß中"
    data = text.encode()
    for n in range(1, 5):
        pieces = [data[i : i + n] for i in range(0, len(data), n)]
        completed = [c for c in completed_characters(pieces) if c]
        whole = [c for c in text if len(c.encode()) > 1]
        assert [c for c in whole if c in completed] == completed
        if n == 1:
            assert completed == whole


def test_documents_have_the_bytes(llama: Tiny) -> None:
    """The tiny vocabulary has every byte; a face is four tokens."""
    rows = llama.model.token_rows(llama.model.tokenize("a😀", bos=False))
    assert "".join(t.bytes for t in rows[1:]) == "😀".encode().hex()
    assert [t.character for t in rows] == ["", "", "", "", "😀"]
    first, last = rows[1].document(), rows[-1].document()
    assert first == {"index": 1, "id": rows[1].id, "text": "<0xF0>", "bytes": "f0"}
    assert last["character"] == "😀" and rows[-1].label == "<0x80>=😀"
    assert rows[0].document().keys() == {"index", "id", "text"}
    assert llama.model.described(rows[1].id) == {k: first[k] for k in ("id", "text", "bytes")}
    assert llama.model.detokenize([t.id for t in rows]) == "a😀"
    assert llama.model.detokenize([t.id for t in rows[:2]]) == "a<0xF0>"


def test_generated_bytes_complete_those_of_the_prompt(llama: Tiny) -> None:
    ids = llama.model.tokenize("😀", bos=False)
    generation = llama.model.generate(ids[:3], 1)
    (row,) = generation.rows()
    assert row["id"] == generation.tokens[0] and row["text"] == generation.pieces[0]
    assert generation.written[0].index == 3
