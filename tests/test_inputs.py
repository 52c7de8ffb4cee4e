"""What files say of themselves: metadata of vectors and activations, and damaged files at random."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import Tiny

from mia.datasets.pairs import load_pairs
from mia.errors import FileError, UsageError
from mia.io import activations
from mia.io.activations import Activations
from mia.io.files import file_sha256
from mia.io.provenance import warn_of_same_items
from mia.llama.gguf_write import write_gguf
from mia.methods import function_vectors, soft_vectors, task_vectors
from mia.show import plots
from mia.vectors import Vector, load
from mia.vectors.expression import combine
from reliability.readers import mutate_readers

ROWS = np.ones((2, 6), np.float32)


@pytest.mark.parametrize("sources", ["{", "[1]", "5", '{"a": 1}', '{"a": {"b": 1}}', "[" * 100_000])
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_sources_of_a_vector_that_are_none(sources: str, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sources are"):
        Vector({1: ROWS[0]}, metadata={"sources": sources})
    path = tmp_path / f"v{suffix}"
    if suffix == ".gguf":
        facts = {"general.architecture": "controlvector", "mia.sources": sources}
        write_gguf(path, facts, {"direction.1": ROWS[0]})
    else:
        save_file({"direction.1": ROWS[0]}, path, metadata={"sources": sources})
    with pytest.raises(FileError, match=rf"v\{suffix}: the vector's sources are"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_embd", "abc", "n_embd is 'abc', not a whole number"),
        ("n_layer", "-1", "n_layer is '-1', not a whole number"),
        ("n_layer", "9" * 5000, "n_layer is '999"),
        ("n_head", "²", "n_head is '²', not a whole number"),
        ("tokens", "{", "tokens are '{', not a list of token ids"),
        ("tokens", "5", "tokens are '5', not a list"),
        ("tokens", '["a"]', "not a list of token ids"),
        ("tokens", "[1.5]", "not a list of token ids"),
        ("tokens", "[" * 100_000, "not a list of token ids"),
    ],
)
def test_metadata_of_activations(key: str, value: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    Activations({"head_out.0": ROWS}, {key: value}).save(path)
    with pytest.raises(FileError, match=r"c\.safetensors: its ") as err:
        activations.load(path)
    assert message in str(err.value) and len(str(err.value)) < 300


def test_activations_of_places_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    for name in ("nowhere", "resid_post.-1", "direction.1", "\x1b[2J"):
        save_file({name: ROWS}, path)
        with pytest.raises(FileError, match="not a file of activations"):
            activations.load(path)
    save_file({"resid_post.1": ROWS, "l_out-1": ROWS}, path)
    with pytest.raises(FileError, match=r"has resid_post\.1 twice"):
        activations.load(path)


def test_heads_that_do_not_fill_a_row() -> None:
    for n, message in (("4", "4 heads do not fill a row of 6"), ("0", "no head 0")):
        with pytest.raises(UsageError, match=message):
            Activations({"head_out.0": ROWS}, {"n_head": n}).head(0, 0)


@pytest.mark.parametrize(
    "names",
    [
        ("direction.1", "direction.01"),
        ("direction.-1",),
        ("direction.9999999999999",),
        ("direction.²",),
    ],
)
def test_names_of_directions(names: tuple[str, ...], tmp_path: Path) -> None:
    save_file(dict.fromkeys(names, ROWS[0]), tmp_path / "v.safetensors")
    with pytest.raises(FileError, match="is not the direction of a layer"):
        load(tmp_path / "v.safetensors")


def test_a_direction_is_one_row_and_not_empty(tmp_path: Path) -> None:
    facts = {"general.architecture": "controlvector"}
    write_gguf(tmp_path / "v.gguf", facts, {"direction.1": ROWS})
    with pytest.raises(FileError, match=r"direction\.1 has shape \(2, 6\), not \(width,\)"):
        load(tmp_path / "v.gguf")
    save_file({"direction.1": np.ones(0, np.float32)}, tmp_path / "v.safetensors")
    with pytest.raises(FileError, match=r"layer 1 has shape \(0,\), not \(width,\)"):
        load(tmp_path / "v.safetensors")


def test_a_coefficient_or_layer_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for coeff in ("abc", "nan", "inf", ""):
        v = Vector({1: ROWS[0]}, metadata={"coeff": coeff})
        monkeypatch.setattr(function_vectors, "load_vector", lambda *a, v=v: (v, "f.safetensors"))
        with pytest.raises(FileError, match=r"f\.safetensors: its coeff is"):
            function_vectors.SavedFunctionVector("f").load(SimpleNamespace())  # type: ignore[arg-type]
    for layer in ("²", "9" * 5000, "-1", "x"):
        with pytest.raises(UsageError, match="does not say its layer"):
            task_vectors.load(Vector({1: ROWS[0]}, metadata={"layer": layer}))


def test_soft_vectors_of_other_numbers(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_file({"means": np.ones((1, 2, 3), np.complex64), "weights": np.ones((1, 2))}, path)
    with pytest.raises(FileError, match="not real"):
        soft_vectors.load(path)
    save_file({"means": np.full((1, 2, 3), 1e300), "weights": np.ones((1, 2))}, path)
    with pytest.raises(FileError, match="not finite"):
        soft_vectors.load(path)


def test_items_of_any_size_take_no_time(tmp_path: Path) -> None:
    data = tmp_path / "d"
    data.write_text("x")
    source = {"data_sha256": file_sha256(data), "items": "3,5..999999999999"}
    with pytest.warns(UserWarning, match=r"v was trained on items 3,6..7 of"):
        warn_of_same_items([source], "v", data, [2, 3, 4, 6, 7])


@pytest.mark.parametrize("value", ["Infinity", "1e400", "1.5", "true", '"x"', "[]", "9" * 30])
def test_a_token_index_of_pairs(value: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"positive": "a", "negative": "b", "read_positive": {value}}}\n')
    with pytest.raises(FileError, match=r"read_positive is .*, not a token index"):
        load_pairs(path)


def test_arithmetic_nested_too_deep() -> None:
    with pytest.raises(UsageError, match="nested too deep"):
        combine("(" * 5000 + "v" + ")" * 5000, lambda name: Vector({1: ROWS[0]}))


def test_a_text_that_is_not_unicode(llama: Tiny) -> None:
    for text, named in (("a\udcff", r"'\\udcff' at 1"), ("\ud800", r"'\\ud800' at 0")):
        for use in (llama.model.tokenize, llama.model.token_id, llama.model.generate):
            with pytest.raises(UsageError, match=named):
                use(text)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[9].x.y }}", "{{ none() }}", "{%"])
def test_a_template_that_fails(template: str, llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.model, "spec", SimpleNamespace(chat_template=template))
    with pytest.raises(UsageError, match=r"the chat template of .* fails"):
        llama.model.chat("hello")


def test_titles_and_names_of_a_picture_are_xml(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    nasty = "\x1b]52;c;QQ\x07 <b>&\ud800\u202e $x$"
    figure = plots.heatmap(ROWS, title=nasty, x_labels=[nasty[:6]] * 6, y_labels=["\u202e"] * 2)
    plots.save(figure, tmp_path / "a.svg")
    texts = " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert r"\x1b]52" in texts and r"\u202e" in texts and "\u202e" not in texts
    figure = plots.curves(range(6), {nasty: ROWS[0], "b": ROWS[1]}, x_label=nasty[:3])
    plots.save(figure, tmp_path / "b.svg")
    ElementTree.parse(tmp_path / "b.svg")


def test_damaged_files_are_read_or_refused() -> None:
    """The short form of `python -m reliability.readers`."""
    findings = mutate_readers(1500, seed=0)
    assert findings.foreign == []
    for name in findings.names:
        assert findings.read[name] + findings.refused[name] == 100


def test_the_soak_sees_a_foreign_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> object:
        raise KeyError("x")

    import reliability.readers

    def readers(folder: Path) -> list[reliability.readers.Reader]:
        return [reliability.readers.Reader("broken", [(".json", json.dumps([1]).encode())], fails)]

    monkeypatch.setattr(reliability.readers, "readers", readers)
    findings = mutate_readers(3, seed=0)
    assert [(name, what[:8]) for name, what, _ in findings.foreign] == [("broken", "KeyError")] * 3
