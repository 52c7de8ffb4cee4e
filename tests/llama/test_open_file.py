"""One file from the opening of a model to its end, whatever happens to the name or the bytes."""

import copy
import gc
import os
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from tiny import Tiny, logits
from tiny_gguf import write_tiny

from mia.errors import ModelError
from mia.llama import LlamaModel, library_info
from mia.llama.open_file import OpenFile
from mia.model import Model
from mia.request import Capture, Request


@pytest.fixture
def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tiny(tmp_path / "m.gguf", "llama")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "other.gguf", "llama", seed=1)


def first_row(m: Model) -> np.ndarray:
    return m.weights.rows("token_embd.weight", 0, 1)


def test_a_file_that_takes_the_name_changes_nothing(one: Path, other: Path) -> None:
    expected = sha256(one.read_bytes()).hexdigest()
    with Model(one, threads=1) as m, Model(other, threads=1) as n:
        before, row, foreign = m.run([Request([5, 6])])[0], first_row(Model(one)), first_row(n)
        other.replace(one)
        assert not np.array_equal(row, foreign)
        assert np.array_equal(first_row(m), row)
        assert m.file_hash == m.facts.sha256 == expected
        assert m.file_metadata()["model_sha256"] == expected
        assert m.lens  # made of the weights, checked against the run
        assert np.array_equal(logits(m.run([Request([5, 6])])[0]), logits(before))


def test_a_closed_model_knows_its_file_if_it_is_still_there(one: Path, other: Path) -> None:
    expected = sha256(one.read_bytes()).hexdigest()
    m, n, late = (Model(one, threads=1) for _ in range(3))
    row = first_row(m)
    for model in (m, n, late):
        model.close()
    assert m.facts.sha256 == expected
    assert np.array_equal(first_row(n), row)
    other.replace(one)
    assert m.facts.sha256 == n.facts.sha256 == expected
    for ask in (lambda: late.facts.sha256, lambda: late.file_hash, lambda: late.weights):
        with pytest.raises(ModelError, match=f"{one} was replaced since it was opened; open the"):
            ask()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _write(path: Path) -> None:
    with path.open("r+b") as f:
        f.seek(-8, os.SEEK_END)
        f.write(b"\0" * 8)
    os.utime(path, ns=(0, 1))  # as if a clock tick had passed


@pytest.mark.parametrize(("damage", "how"), [(_cut, "cut short"), (_write, "changed")])
@pytest.mark.parametrize("n", [1, 200])
def test_a_file_that_is_changed_while_open(
    one: Path, damage: Callable[[Path], None], how: str, n: int
) -> None:
    """The process died of SIGBUS, or went on with the new bytes."""
    with Model(one, threads=1) as m:
        m.run([Request([5] * n, captures=[Capture("embed")])])
        weights = m.weights
        damage(one)
        for use in (
            lambda: m.run([Request([5] * n)]),
            lambda: m.run([Request([5] * n, captures=[Capture("embed")])]),
            lambda: m.generate([5], 3),
            lambda: weights.matrix("output.weight"),
            lambda: m.file_hash,
        ):
            with pytest.raises(ModelError, match=f"{one} was {how} while it was open; open the"):
                use()


def test_a_file_that_is_replaced_while_it_is_loaded(
    one: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mia.llama.library import library

    L = library().L
    load = L.llama_model_load_from_file

    def replaced(*args: object) -> object:
        other.replace(one)
        return load(*args)

    assert library_info()
    monkeypatch.setattr(L, "llama_model_load_from_file", replaced)
    with pytest.raises(
        ModelError, match=f"{one} was replaced while it was being opened; try again"
    ):
        LlamaModel(one)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_no_file_stays_open(one: Path, tmp_path: Path) -> None:
    def n_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before = n_open()
    models = [Model(one, threads=1) for _ in range(3)]
    facts = [m.facts for m in models]
    assert n_open() >= before + 3
    models[0].close()
    assert facts[0].sha256 == facts[1].sha256
    copies = [copy.deepcopy(facts[1]), pickle.loads(pickle.dumps(facts[1]))]
    assert [c.sha256 for c in copies] == [facts[0].sha256] * 2
    models.clear()
    facts.clear()
    copies.clear()
    gc.collect()
    assert n_open() == before
    with pytest.raises(ModelError, match=r"gone\.gguf cannot be read: No such file"):
        OpenFile(tmp_path / "gone.gguf")
    assert n_open() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_weights_are_read_without_another_mapping(llama: Tiny) -> None:
    """Pages that two mappings share count twice in a process's memory."""

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(llama.path))

    with Model(llama.path, threads=1) as model:
        before = mappings()
        weights = model.weights
        rows = [weights.rows("token_embd.weight", 3, 5), weights.matrix("token_embd.weight")[3:5]]
        assert mappings() == before
        np.testing.assert_array_equal(rows[0], rows[1])
