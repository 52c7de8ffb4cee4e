"""The real model: what the README shows, and what only happens outside tiny models."""

import numpy as np
import pytest
from commands import document

from mia.edits import Edit
from mia.methods import task_vectors
from mia.methods.demo import SOURCE
from mia.methods.icl import TaskSetup, experiment
from mia.methods.sweep import sweep
from mia.model import Model
from mia.request import Capture, Request
from mia.sites import Site
from mia.sweeps.experiments import Patching, tokens_of

pytestmark = pytest.mark.slow


def test_a_task_vector_turns_countries_into_capitals(smollm2: Model) -> None:
    source = smollm2.tokenize(SOURCE, bos=True)
    assert len(source) == 43 and smollm2.piece(source[0]) == "<|endoftext|>"
    task = smollm2.run([Request(source, captures=[Capture("l_out-21", -1)], logits=None)])[0][
        "l_out-21"
    ]
    for country, capital in (("France", " Paris"), ("Russia", " Moscow"), ("Germany", " Berlin")):
        ids = smollm2.tokenize(f"Q: {country}\nA:", bos=True)
        assert len(ids) == 7
        patch = Edit("l_out-21", "replace", task, tokens=6)
        plain, patched = smollm2.run([Request(ids), Request(ids, [patch])])
        assert plain.logits is not None and patched.logits is not None
        assert smollm2.piece(int(plain.logits[0].argmax())) == f" {country}"
        assert smollm2.piece(int(patched.logits[0].argmax())) == capital


def test_demo_shows_it() -> None:
    found = document("demo")
    assert [a["patched"] for a in found["answers"]] == [" Paris", " Moscow", " Berlin"]
    assert [a["plain"] for a in found["answers"]] == [" France", " Russia", " Germany"]
    assert found["lens"][-1]["top"][0]["text"] == " Paris"


def test_a_task_vector_does_what_examples_do(smollm2: Model) -> None:
    """The table of docs/results/tasks.md, cut short."""
    plain = experiment(smollm2, "uppercase", TaskSetup(seed=10))
    known = plain.known(1)
    assert 100 < len(known.pairs) < len(plain.task.pairs)
    ex = experiment(smollm2, known, TaskSetup(seed=10, n_test=20, n_dev=10))
    how = task_vectors.TaskVectorTraining(sets=2, dummies=4, layers=range(10, 26, 2))
    theta = task_vectors.train(ex, how)
    scores = task_vectors.evaluate(ex, theta)
    assert scores.zero_shot.value <= 0.05
    assert scores.vector.value >= 0.7


def test_lens_is_close_to_the_models_own_logits(smollm2: Model) -> None:
    ids = smollm2.tokenize("The capital of France is", bos=True)
    last = Site("resid_post", smollm2.n_layer - 1)
    result = smollm2.run([Request(ids, captures=[Capture(last)], logits="all")])[0]
    assert result.logits is not None
    read = smollm2.lens.read(result.captures[last], 1)
    np.testing.assert_array_equal(read.ids[:, 0], result.logits.argmax(1))
    assert smollm2.piece(int(read.ids[-1, 0])) == " Paris"


def test_planned_head_replacements_are_what_runs_one_by_one_give(smollm2: Model) -> None:
    """Quantized kernels differ between batch layouts, so distributions are compared, not bits."""
    ids = smollm2.tokenize("Q: Norway\nA: Oslo\n\nQ: Italy\nA: Rome\n\nQ: Spain\nA:", bos=True)
    means = smollm2.run([Request(ids, captures=[Capture("head_out")], logits=None)])[0]
    requests = []
    for layer in (3, 14, 22, 29):
        value = means[f"head_out.{layer}"].mean(0).reshape(9, 64)
        requests += [
            Request(ids, [Edit(f"head_out.{layer}", "replace", value[h], -1, heads=[h])])
            for h in (0, 5)
        ]
    together = smollm2.run(requests)
    for a, request in zip(together, requests, strict=True):
        b = smollm2.run([request])[0]
        assert a.logits is not None and b.logits is not None
        assert a.logits.argmax() == b.logits.argmax()
        assert np.corrcoef(a.logits[0], b.logits[0])[0, 1] > 0.995


def test_token_and_chat_words(smollm2: Model) -> None:
    assert smollm2.token_id(" Paris") == smollm2.tokenize(" Paris")[0]
    assert smollm2.chat("Hi").endswith("<|im_start|>assistant\n")
    assert smollm2.generate("The capital of France is", 1, bos=True).text == " Paris"


@pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")  # two copies are made
def test_a_map_of_patches_is_exact_in_an_f16_copy_alone(smollm2: Model) -> None:
    """The table of docs/guide/models.md, cut short: 4-bit weights round activations to 8 bits."""

    def effects(m: Model) -> np.ndarray:
        clean, other = (m.ids(f"{c} is the capital of", bos=True) for c in ("Paris", "Rome"))
        assert len(clean) == len(other)
        rows = m.look(clean, "l_out")
        good = m.token_id(" France")
        requests = [Request(other, metric=lambda logits: float(logits[-1, good]))]
        requests += [
            Request(
                other,
                [Edit(f"l_out-{i}", "replace", rows[f"l_out-{i}"][t], tokens=t)],
                metric=lambda logits: float(logits[-1, good]),
            )
            for i in range(0, m.n_layer, 2)
            for t in range(1, len(clean))
        ]
        values = np.array([r.value for r in m.run(requests)])
        return values[1:] - values[0]

    plain = effects(smollm2)
    with Model("smollm2", as_type="f16") as half, Model("smollm2", as_type="f32") as full:
        assert (half.name, half.file_hash) == ("smollm2", smollm2.file_hash)
        assert half.facts.as_type_note == "weights of q4_1 and q8_0 are rounded to f16"
        exact = effects(full)
        correlation = np.corrcoef(effects(half), exact)[0, 1]
        error, error_half = (np.abs(e - exact).mean() for e in (plain, effects(half)))
    assert correlation > 0.999
    assert error > 10 * error_half


def test_a_sweep_finds_the_two_sites_of_a_fact(smollm2: Model) -> None:
    """Meng et al. 2022, figure 1: early layers at the subject, late ones at the last token."""
    prompt = smollm2.ids("The Eiffel Tower is in the city of", bos=True)
    report = sweep(
        smollm2,
        prompt,
        Patching(noise_on="Eiffel Tower", draws=2),
        answer=" Paris",
        metric="prob",
        layers="2,5,26,28",
    )
    subject = tokens_of(smollm2, prompt, "Eiffel Tower")
    early, late = report.restored[:2], report.restored[2:]
    assert set(early.argmax(1)) <= set(subject) and (early.max(1) > 0.2).all()
    assert (late.argmax(1) == len(prompt) - 1).all() and (late.max(1) > 0.7).all()
    assert report.n_null == 24 and report.floor < 0.1
