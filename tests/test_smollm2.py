"""The real model: what the README shows, and what only happens outside tiny models."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from typer.testing import CliRunner

from mia.cli import app
from mia.cli.tools import DEMO_SOURCE
from mia.edits import Edit
from mia.errors import MiaError
from mia.model import Model
from mia.request import Capture, Request
from mia.sites import Site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    try:
        opened = Model("smollm2")
    except MiaError as err:
        pytest.skip(str(err))
    with opened as m:
        yield m


def test_a_task_vector_turns_countries_into_capitals(model: Model) -> None:
    source = model.tokenize(DEMO_SOURCE, bos=True)
    assert len(source) == 43 and model.piece(source[0]) == "<|endoftext|>"
    task = model.run([Request(source, captures=[Capture("l_out-21", -1)], logits=None)])[0][
        "l_out-21"
    ]
    for country, capital in (("France", " Paris"), ("Russia", " Moscow"), ("Germany", " Berlin")):
        ids = model.tokenize(f"Q: {country}\nA:", bos=True)
        assert len(ids) == 7
        patch = Edit("l_out-21", "replace", task, tokens=6)
        plain, patched = model.run([Request(ids), Request(ids, [patch])])
        assert plain.logits is not None and patched.logits is not None
        assert model.piece(int(plain.logits[0].argmax())) == f" {country}"
        assert model.piece(int(patched.logits[0].argmax())) == capital


def test_demo_shows_it() -> None:
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [a["patched"] for a in found["answers"]] == [" Paris", " Moscow", " Berlin"]
    assert [a["plain"] for a in found["answers"]] == [" France", " Russia", " Germany"]
    assert found["lens"][-1]["top"][0]["text"] == " Paris"


def test_lens_is_close_to_the_models_own_logits(model: Model) -> None:
    ids = model.tokenize("The capital of France is", bos=True)
    last = Site("resid_post", model.n_layer - 1)
    result = model.run([Request(ids, captures=[Capture(last)], logits="all")])[0]
    assert result.logits is not None
    read = model.lens.read(result.captures[last], 1)
    np.testing.assert_array_equal(read.ids[:, 0], result.logits.argmax(1))
    assert model.piece(int(read.ids[-1, 0])) == " Paris"


def test_planned_head_replacements_are_what_runs_one_by_one_give(model: Model) -> None:
    """Quantized kernels differ between batch layouts, so distributions are compared, not bits."""
    ids = model.tokenize("Q: Norway\nA: Oslo\n\nQ: Italy\nA: Rome\n\nQ: Spain\nA:", bos=True)
    means = model.run([Request(ids, captures=[Capture("head_out")], logits=None)])[0]
    requests = []
    for layer in (3, 14, 22, 29):
        value = means[f"head_out.{layer}"].mean(0).reshape(9, 64)
        requests += [
            Request(ids, [Edit(f"head_out.{layer}", "replace", value[h], -1, heads=[h])])
            for h in (0, 5)
        ]
    together = model.run(requests)
    for a, request in zip(together, requests, strict=True):
        b = model.run([request])[0]
        assert a.logits is not None and b.logits is not None
        assert a.logits.argmax() == b.logits.argmax()
        assert np.corrcoef(a.logits[0], b.logits[0])[0, 1] > 0.995


def test_token_and_chat_words(model: Model) -> None:
    assert model.token_id(" Paris") == model.tokenize(" Paris")[0]
    assert model.chat("Hi").endswith("<|im_start|>assistant\n")
    assert model.generate("The capital of France is", 1, bos=True) == " Paris"
