"""Routing as a report: against the oracle and numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import Tiny
from tiny_gguf import ARCHS

from mia.errors import RangeError, SiteError, UsageError
from mia.methods.changes import Changes
from mia.methods.experts import experts


def test_routing_is_the_oracles(mixture: Tiny) -> None:
    tokens = mixture.prompt()
    report, sites = experts(mixture.model, tokens), mixture.oracle.run(tokens)
    of = ARCHS[mixture.name].experts
    assert of is not None
    assert [r.layer for r in report.layers] == list(range(of.n_dense, 3))
    for r in report.layers:
        logits = sites[f"router.{r.layer}"]
        np.testing.assert_array_equal(r.experts, sites[f"experts.{r.layer}"])
        np.testing.assert_allclose(r.weights, sites[f"expert_weights.{r.layer}"], atol=1e-5)
        np.testing.assert_allclose(r.logits, logits, atol=1e-4)
        p = 1 / (1 + np.exp(-logits)) if of.sigmoid else np.exp(logits)
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(r.scores, p, atol=1e-5)
        assert r.entropy == pytest.approx(-(p * np.log(p)).sum(1).mean(), abs=1e-4)
        load = [(r.experts == e).any(1).mean() for e in range(of.n_expert)]
        np.testing.assert_allclose(r.load, load)
        assert r.load.sum() == pytest.approx(of.n_used)
        q = np.array(load)[np.array(load) > 0] / of.n_used
        assert r.load_entropy == pytest.approx(-(q * np.log(q)).sum())


def test_the_report(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("mixtral")
    report = experts(t.model, t.prompt(), layers="1..2", tokens="-1,3", k=2)
    assert report.positions == [13, 3] and [r.layer for r in report.layers] == [1, 2]
    r = report[2]
    assert report.layers[1] is r
    first, second = r.experts[0].tolist()
    lines = report.plain().splitlines()
    assert len(lines) == 2 * 3
    load = f"{np.argsort(-r.load, kind='stable')[0]} {r.load.max():.2f}|"
    assert lines[3].startswith(f"Layer 2: 6 experts, entropy {r.entropy:.2f}, load {load}")
    assert lines[3].endswith(f"its entropy {r.load_entropy:.2f} of 1.79")
    assert lines[4].startswith("13: ")
    assert lines[4].endswith(
        f": {first} {r.weights[0, first]:.2f}|{second} {r.weights[0, second]:.2f}"
    )
    doc = report.document()
    assert doc["positions"] == [13, 3] and [x["layer"] for x in doc["layers"]] == [1, 2]
    assert doc["layers"][1]["experts"] == r.experts.tolist()
    rows = report.rows()
    assert len(rows) == 2 * 2 * 2
    assert {k: rows[4][k] for k in ("layer", "token_index", "rank", "expert")} == {
        "layer": 2,
        "token_index": 13,
        "rank": 1,
        "expert": first,
    }
    with pytest.raises(UsageError, match="no routing of layer 0; there is of 1, 2"):
        _ = report[0]


def test_routing_of_a_changed_run(tiny: Callable[[str], Tiny]) -> None:
    """Logits of excluded experts are -inf: None in the document."""
    t = tiny("mixtral")
    tokens = t.prompt()
    edits = Changes(ablate_experts="1.0-1", zero_experts="2.*").edits(t.model, tokens)
    report = experts(t.model, tokens, edits=edits)
    assert not report[1].load[:2].any() and not report[1].scores[:, :2].any()
    assert np.isfinite(report[1].entropy) and not report[2].weights.any()
    assert report.document()["layers"][1]["logits"][0][:2] == [None, None]
    assert report.plain().count(" 0.00|") >= len(tokens)


@pytest.mark.parametrize("view", ["tokens", "load"])
@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.html"])
def test_pictures(tiny: Callable[[str], Tiny], tmp_path: Path, view: str, name: str) -> None:
    t = tiny("mixtral")
    report = experts(t.model, t.prompt(5), view=view)
    report.plot(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert len(data) > 3000
    cell = ",".join(map(str, report[2].experts[0]))
    if name == "a.svg":
        assert (f">{cell}<".encode() in data) == (view == "tokens")
        assert (b">expert<" in data) == (view == "load")
    if name == "a.html":
        assert data.startswith(b"<!doctype html>")
        assert cell.encode() in data and b"experts across" in data and b"Layer 2: 6" in data


def test_a_narrow_terminal_gets_lines(tiny: Callable[[str], Tiny]) -> None:
    t = tiny("mixtral")
    report = experts(t.model, t.prompt(5))
    assert str(report.table(20)) == report.plain()
    assert str(report.table(80)) != report.plain()


def test_refused(llama: Tiny, tiny: Callable[[str], Tiny]) -> None:
    with pytest.raises(SiteError, match="this model has no experts"):
        experts(llama.model, llama.prompt())
    t = tiny("dots1")
    with pytest.raises(UsageError, match=r"no layer of 0 has experts; layers 1\.\.2 have"):
        experts(t.model, t.prompt(), layers=0)
    with pytest.raises(RangeError, match="layer 3 is out of range"):
        experts(t.model, t.prompt(), layers="3")
    with pytest.raises(UsageError, match="unknown view 'x'; known: tokens, load"):
        experts(t.model, t.prompt(), view="x")
