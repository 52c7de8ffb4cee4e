"""Capture files: what is written is read back, and what does not fit is refused."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import write_tiny

from mia.errors import FileError, RangeError, UsageError
from mia.io import activations, files
from mia.io.activations import Activations
from mia.model import Model
from mia.sites import Site

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny(tmp_path_factory.mktemp("c") / "tiny.gguf", "llama"), threads=1) as m:
        yield m


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")


def test_round_trip_with_file_metadata(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Activations({"resid_post.1": ROWS}, model.file_metadata(tokens=[5, 6, 7], bos=True)).save(path)
    back = activations.load(path)
    np.testing.assert_array_equal(back.at(Site("resid_post", 1)), ROWS)
    np.testing.assert_array_equal(back.at(Site("resid_post", 1), [-1, 0]), ROWS[[2, 0]])
    assert back.tokens == [5, 6, 7]
    assert back.metadata["model_sha256"] == model.file_hash
    assert json.loads(back.metadata["bos"]) is True
    assert {"mia", "llama_cpp_python", "tokenizer_sha256", "n_layer"} <= back.metadata.keys()
    model.check_activations(back)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.safetensors"]


def test_npy_stands_for_any_site(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", ROWS[0])
    loaded = activations.load(tmp_path / "v.npy")
    np.testing.assert_array_equal(loaded.at(Site("mlp_out", 2)), ROWS[:1])


def test_a_read_prompt_is_saved_with_what_made_it(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    read = model.look([5, 6, 7], "l_out")
    read.save(path)
    assert read.file == str(path)
    back = activations.load(path)
    assert list(back.arrays) == ["resid_post.0", "resid_post.1", "resid_post.2"]
    for name, array in back.arrays.items():
        np.testing.assert_array_equal(array, read.arrays[name])
    assert back.tokens == [5, 6, 7] and back.metadata["bos"] == "false"
    assert back.metadata["model_sha256"] == model.file_hash
    read.save(tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert document == read.document() and document["file"] == str(path)
    assert document["sites"][1] == {"site": "resid_post.1", "shape": [3, 48], "dtype": "float32"}


def test_layers_heads_and_stacks(model: Model) -> None:
    z = model.look([5, 6, 7], "head_out")
    rows = z["head_out.1"]
    np.testing.assert_array_equal(z.layer(1), rows)
    np.testing.assert_array_equal(z.head(1, 2), rows[:, 16:24])
    np.testing.assert_array_equal(z.stack()[1], rows)
    k = model.look([5, 6, 7], "k-2")
    np.testing.assert_array_equal(k.head(2, 1), k["k.2"].reshape(3, 2, 8)[:, 1])
    with pytest.raises(UsageError, match=r"there is no head 2 at k; there are 0 to 1"):
        k.head(2, 2)
    with pytest.raises(UsageError, match="has resid_post, which is not made of heads"):
        model.look([5, 6], "l_out").head(1, 2)
    with pytest.raises(UsageError, match="has q and k, not one kind of site"):
        model.look([5, 6], ["q", "k"]).layer(1)


def test_a_site_without_its_layer_is_said(model: Model, tmp_path: Path) -> None:
    a = model.look([5, 6, 7], "l_out")
    for text in ("resid_post", "l_out", "hook_resid_post"):
        with pytest.raises(
            UsageError,
            match=rf"^'{text}' needs a layer: the capture of tiny has resid_post\.0\.\.2; stack\(\) gives",
        ):
            a[text]
    np.testing.assert_array_equal(a["resid_post.-1"], a["l_out-2"])
    with pytest.raises(UsageError, match="means 3 sites where one is needed"):
        a["resid_post.*"]
    with pytest.raises(UsageError, match=r"has no q; it has resid_post\.0"):
        a["q"]
    a.save(tmp_path / "a.safetensors")
    back = activations.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(back["l_out--1"], a["l_out-2"])
    with pytest.raises(UsageError, match=r"needs a layer: .* has k\.1$"):
        model.look([5, 6], ["k-1", "logits"])["k"]
    np.save(tmp_path / "v.npy", ROWS)
    np.testing.assert_array_equal(activations.load(tmp_path / "v.npy")["l_out"], ROWS)


def test_activations_in_one_line(model: Model) -> None:
    assert repr(model.look([5, 6, 7], "l_out")) == "Activations(tiny: resid_post.0..2, 3 tokens)"
    one = model.look([5, 6, 7], ["q.1", "embed"], tokens=-1)
    assert repr(one) == "Activations(tiny: q.1, embed, 1 token)"
    assert (
        repr(Activations({"": ROWS}, source="v.npy"))
        == "Activations(v.npy: no named site, 3 tokens)"
    )
    assert repr(Activations({"attention": ROWS})) == "Activations(the capture: attention, 3 tokens)"


def test_one_site_is_indexed_by_token(model: Model) -> None:
    a = model.look([5, 6, 7], "l_out-1")
    np.testing.assert_array_equal(a[-1], a["blocks.1.hook_resid_post"][2])
    np.testing.assert_array_equal(a[1:], a["l_out-1"][1:])
    with pytest.raises(UsageError, match=r"has resid_post\.0, .*; say which"):
        model.look([5, 6], "l_out")[-1]


def test_activations_as_lines_and_records() -> None:
    a = Activations({"resid_post.0": ROWS, "attn_pattern.1": np.ones((3, 2, 3), np.float32)})
    assert a.plain().splitlines() == [
        "resid_post.0  3 × 4  float32",
        "attn_pattern.1  3 × 2 × 3  float32",
    ]
    rows = a.rows()
    assert rows[1]["norm"] == pytest.approx(np.linalg.norm(ROWS[1]))
    assert rows[5] == {
        "site": "attn_pattern.1",
        "token_index": 2,
        "text": "",
        "norm": pytest.approx(np.sqrt(6)),
    }


def test_other_models_are_refused(model: Model) -> None:
    facts = model.file_metadata()
    with pytest.raises(UsageError, match="another tokenizer"):
        model.check_activations(
            Activations({"resid_post.0": ROWS}, facts | {"tokenizer_sha256": "0"})
        )
    with pytest.raises(UsageError, match="width 64"):
        model.check_activations(Activations({"resid_post.0": ROWS}, facts | {"n_embd": "64"}))


def test_missing_sites_and_tokens_are_named() -> None:
    c = Activations({"resid_post.0": ROWS, "q.1": ROWS})
    with pytest.raises(UsageError, match=r"has no k.1; it has resid_post.0, q.1"):
        c.at(Site("k", 1))
    with pytest.raises(RangeError, match="0 to 2"):
        c.at(Site("q", 1), 3)


@pytest.mark.parametrize(
    ("name", "kind"), [("x.safetensors", "safetensors file"), ("x.npy", r"\.npy array")]
)
def test_files_that_are_none(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    with pytest.raises(FileError, match="there is no file"):
        activations.load(path)
    path.write_bytes(b"GGUF nothing of the kind")
    with pytest.raises(FileError, match=f"is not a {kind}"):
        activations.load(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = ROWS.copy()
    bad[1, 1] = np.nan
    Activations({"resid_post.0": bad}).save(tmp_path / "nan.safetensors")
    with pytest.raises(FileError, match="not finite"):
        activations.load(tmp_path / "nan.safetensors")


def test_nothing_is_half_written(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("before")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"cannot write .*out.json: No space left"):
        files.write_whole(path, fail)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_pipes_and_devices_are_refused_and_links_are_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        files.write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_json(tmp_path / "link.json", {"new": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"new": 1}


def test_a_folder_that_takes_no_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(FileError, match=r"cannot write .*x.json: No such file"):
        files.write_json(tmp_path / "x.json", {})


def test_npy_is_written_for_one_site_and_read_as_rows(tmp_path: Path) -> None:
    Activations({"resid_post.0": ROWS}).save(tmp_path / "one.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "one.npy"), ROWS)
    with pytest.raises(FileError, match="one site, not 2"):
        Activations({"a": ROWS, "b": ROWS}).save(tmp_path / "two.npy")
    np.save(tmp_path / "deep.npy", ROWS[None, None])
    with pytest.raises(FileError, match=r"its shape is \(1, 1, 3, 4\)"):
        activations.load(tmp_path / "deep.npy")


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        files.check_writable(tmp_path / "no" / "x.json")
    with pytest.raises(FileError, match="is a folder"):
        files.check_writable(tmp_path)


def test_file_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(b"one")
    first = files.file_sha256(path)
    assert first == files.file_sha256(path)
    assert len(json.loads((tmp_path / "cache" / "hashes.json").read_text())) == 1
    path.write_bytes(b"three")
    assert files.file_sha256(path) != first
