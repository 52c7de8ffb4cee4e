"""scripts/soak: short runs of every part find nothing, and what is wrong is found."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Tiny

from mia.edits import Edit
from mia.engine import limits
from mia.engine.run import Engine
from mia.errors import UsageError
from mia.model import Model
from mia.request import Capture, Request, Result
from mia.sites import Site
from reliability import requests as joint_and_alone
from reliability.compare import TOLERANCE, differences, error, first_other_token, until
from reliability.files import files
from reliability.groups import random_group
from reliability.inputs import inputs
from reliability.memory import memory
from reliability.part import Options, Part
from reliability.requests import Pair, odd_limits, repeat, requests, run_group
from reliability.serving import serving
from reliability.signals import signals
from reliability.threads import threads
from reliability.workers import work

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc, and sends signals")


def asked(tmp_path: Path, n: int, **options: Any) -> Options:
    return Options(n, faults=tmp_path / "faults", workers=1, **options)


@pytest.fixture
def pair(llama: Tiny) -> Any:
    opened = Pair.open(llama.path)
    yield opened
    opened.alone.close()
    opened.joint.close()


# -- short runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "n"),
    [(requests, 200), (inputs, 500), (memory, 60), (threads, 7), (signals, 2), (serving, 60)],
)
def test_a_short_run_finds_nothing(tmp_path: Path, part: Callable[[Options], Part], n: int) -> None:
    got = part(asked(tmp_path, n, seed=int.from_bytes(part.__name__.encode(), "big") % 1000))
    assert got.faults == []
    assert got.figures and not (tmp_path / "faults").exists()
    assert all(row.startswith(f"| {part.__name__} | ") for row in got.table().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "n"),
    [(requests, 2000), (inputs, 8000), (files, 150), (memory, 1500), (threads, 42), (signals, 6)],
)
def test_a_longer_run_finds_nothing(
    tmp_path: Path, part: Callable[[Options], Part], n: int
) -> None:
    assert part(asked(tmp_path, n, seed=1)).faults == []


def test_the_command(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT)])
    args = ["requests", "-n", "8", "--workers", "1", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "reliability", *args],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| part | what | figure |")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["parts"][0]["faults"] == []


# -- what is wrong is found --------------------------------------------------------------


def test_wrong_numbers_of_joint_runs_are_found_and_kept(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.run

    def off(self: Engine, given: list[Request], **options: Any) -> list[Result]:
        results = plain(self, given, **options)
        if len(given) > 1 and results[-1].logits is not None:
            results[-1].logits = results[-1].logits + np.float32(1e-2)
        return results

    group = random_group(pair.facts, (0, 0, 0))
    group["requests"][-1] |= {"logits": "all", "metric": None, "edits": [], "n_predict": 0}
    assert run_group(pair, group).wrong == []
    monkeypatch.setattr(Engine, "run", off)
    (text,) = run_group(pair, group).wrong
    assert "logits 0.01" in text or "logits 0.00" in text


def test_errors_that_differ_are_found(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Engine.run

    def refuse(self: Engine, given: list[Request], **options: Any) -> list[Result]:
        if len(given) > 1:
            raise how("not so many")
        return plain(self, given, **options)

    group = random_group(pair.facts, (0, 0, 1))
    monkeypatch.setattr(Engine, "run", refuse)
    how: type[Exception] = UsageError
    assert "refused jointly, not alone: 'not so many'" in str(run_group(pair, group).wrong)
    how = IndexError
    assert "IndexError at test_soak.py" in str(run_group(pair, group).wrong)


def test_a_tie_is_none_of_the_faults(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding at the start changes as much is not wrong."""
    plain = Engine.run

    def rounded(self: Engine, given: list[Request], **options: Any) -> list[Result]:
        if len(given) > 1:
            tiny = Edit("embed", "scale", coeff=1 + 2e-5, generated=True)
            given = [replace(r, edits=[*r.edits, tiny]) for r in given]
        return plain(self, given, **options)

    group = random_group(pair.facts, (0, 0, 2))
    for request in group["requests"]:
        request["edits"] = [0]
    blown = {"site": "resid_post.0", "op": "scale", "coeff": 1.0}
    group["edits"][0] = blown
    monkeypatch.setattr(Engine, "run", rounded)
    assert run_group(pair, group).wrong == []


def test_the_same_seed_gives_the_same_group(pair: Pair) -> None:
    one, two, other = (random_group(pair.facts, (3, 0, i)) for i in (5, 5, 6))
    assert one == two != other
    assert json.loads(json.dumps(one)) == one


def test_odd_limits_are_put_back() -> None:
    before = limits.UBATCH
    with pytest.raises(ZeroDivisionError), odd_limits({"UBATCH": 3}):
        assert limits.UBATCH == 3
        raise ZeroDivisionError
    assert before == limits.UBATCH


def test_a_kept_group_is_run_again_and_made_smaller(
    tmp_path: Path, llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(llama.path, threads=1) as m:
        m.run([Request([5])])
    pair = Pair.open(llama.path)
    group = {"model": str(llama.path), **random_group(pair.facts, (0, 0, 3))}
    marked = {**group["requests"][0], "tokens": [9, 9, 9], "edits": [], "captures": []}
    group["requests"][1:3] = [marked]
    file = tmp_path / "group.json"
    file.write_text(json.dumps(group))
    assert repeat(file).faults == []

    plain = joint_and_alone._compare_results

    def compare(pair: Pair, group: Any, given: list[Request], *rest: Any) -> None:
        plain(pair, group, given, *rest)
        if [9, 9, 9] in [list(r.tokens) for r in given]:
            rest[-1].wrong.append("three nines")

    monkeypatch.setattr(joint_and_alone, "_compare_results", compare)
    assert repeat(file).faults == ["three nines"]
    small = json.loads((tmp_path / "group-small.json").read_text())
    assert small["requests"] == [marked] and small["limits"] == {}


def test_other_tokens_are_a_tie_only_if_a_small_change_turns_the_choice(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.run

    def other_end(self: Engine, given: list[Request], **options: Any) -> list[Result]:
        results = plain(self, given, **options)
        if len(given) > 1:
            results[0].tokens[-1] ^= 1
        return results

    group = random_group(pair.facts, (0, 0, 4))
    first = {"n_predict": 4, "stop_at_eog": False, "edits": [], "sampling": {}, "logprobs": True}
    group["requests"][0] |= first
    assert run_group(pair, group).wrong == []
    monkeypatch.setattr(Engine, "run", other_end)
    assert "tokens inf" in str(run_group(pair, group).wrong)


def test_a_result_is_cut_where_the_tokens_part() -> None:
    site, pattern = Site("resid_post", 0), Site("attn_pattern", 0)
    capture = Capture([site, pattern], -1, generated=True)
    rows = {site: np.ones((4, 5), np.float32), pattern: np.ones((4, 2, 9), np.float32)}
    whole = Result(tokens=[7, 8, 9, 10], logprobs=[0.1] * 4, by_capture=[(capture, rows)])
    part = until(whole, n_prompt=6, n=2)
    assert part.tokens == [7, 8] and len(part.logprobs) == 2
    ((_, cut),) = part.by_capture
    assert cut[site].shape == (3, 5) and cut[pattern].shape == (3, 2, 8)
    assert first_other_token(whole, part) == 2
    assert first_other_token(whole, Result(tokens=[7, 9])) == 1
    assert first_other_token(whole, whole) is None


@pytest.mark.parametrize("how", ["dies", "raises", "hangs"])
def test_a_child_that_ends_badly_is_named_and_the_rest_is_done(how: str) -> None:
    block = {"task": "soak_tasks:badly", "n": 4, "bad": 1, "how": how}
    events = [e for _, e in work(iter([block]), workers=1, seconds=1.5)]
    assert [e["good"] for e in events if "good" in e] == [0, 2, 3]
    (bad,) = [e for e in events if "died" in e or "hung" in e]
    assert bad["at"] == 1
    said = {"dies": "SIGABRT", "raises": "a foreign one", "hangs": ""}[how]
    assert said in bad.get("died", "")


def test_errors_of_arrays() -> None:
    inf = float("inf")
    assert error([1.0, 2.0], [1.0, 2.0]) == 0
    assert error([100.0, 2.0], [100.0, 3.0]) == pytest.approx(0.01)
    assert error([0.1], [0.2]) == pytest.approx(0.1)
    assert error([-inf, 1.0], [-inf, 1.0]) == 0
    assert error([-inf, 1.0], [0.0, 1.0]) == error([1.0], [1.0, 1.0]) == inf
    assert error([float("nan")], [float("nan")]) == 0
    assert differences(Result(tokens=[1]), Result(tokens=[2])) == {"tokens": inf}
    assert TOLERANCE < 1e-3
