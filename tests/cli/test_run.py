"""run and patch, and the options that change a run, as a person types them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, greedy, refused, run
from one_prompt import HEADS, LAYERS, PROMPT as LONG, log_prob
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.io import activations
from mia.model import Model
from mia.show.text import safe

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


# -- run ------------------------------------------------------------------------------


def test_run_saves_and_patches_together() -> None:
    run("save", "l_out-0", "a.safetensors", "-p", "The cat")
    run(
        "run",
        "-p",
        PROMPT,
        "--patch",
        "l_out-0",
        "a.safetensors",
        "1",
        "3",
        "--save",
        "l_out-0",
        "b.safetensors",
    )
    a, b = (activations.load(f"{n}.safetensors").arrays["resid_post.0"] for n in "ab")
    np.testing.assert_array_equal(b[3], a[1])


def test_sampling_is_repeated_by_its_seed() -> None:
    words = ["run", "-p", PROMPT, "-n", "12", "--temperature", "1.5"]
    first = document(*words, "--seed", "3")["output"]
    assert first == document(*words, "--seed", "3")["output"]
    assert first != document(*words, "--seed", "4")["output"]


def test_out_writes_the_document() -> None:
    result = run("run", "-p", PROMPT, "-n", "2", "-o", "r.json")
    assert result.stdout == ""
    assert "wrote r.json" in result.stderr
    assert json.loads(Path("r.json").read_text()) == document("run", "-p", PROMPT, "-n", "2")


def test_steer_adds_a_vector_file(path: Path) -> None:
    vector = np.zeros((3, 48), np.float32)
    vector[1] = np.random.default_rng(0).normal(size=48) * 3
    np.save("v.npy", vector)
    doc = document("run", "-p", PROMPT, "-n", "4", "--steer", "v.npy", "--steer-coeff", "2")
    ids = [t["id"] for t in doc["tokens"]]
    expected = greedy(path, ids, {"resid_post.1": lambda h: h + 2 * vector[1]}, 4)
    assert [t["id"] for t in doc["output_tokens"]] == expected


# -- patch ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "add", "subtract", "average"])
def test_patch_modes_agree_with_the_oracle(path: Path, mode: str) -> None:
    run("save", "l_out-1", "c.safetensors", "-p", "The cat")
    vector = activations.load("c.safetensors").arrays["resid_post.1"][0].astype(np.float64)

    def edit(h: Any) -> Any:
        h = h.copy()
        h[2] = {
            "replace": vector,
            "add": h[2] + vector,
            "subtract": h[2] - vector,
            "average": (h[2] + vector) / 2,
        }[mode]
        return h

    words = [
        "patch",
        "l_out-1",
        "c.safetensors",
        "--from-token-idx",
        "0",
        "--to-token-idx",
        "2",
        "--patch-mode",
        mode,
    ]
    doc = document(*words, "-p", PROMPT, "-n", "4")
    ids = [t["id"] for t in doc["tokens"]]
    assert [t["id"] for t in doc["output_tokens"]] == greedy(path, ids, {"resid_post.1": edit}, 4)
    assert doc["baseline"] == document("run", "-p", PROMPT, "-n", "4")["output"]


def test_average_of_two_files_is_the_old_patch_avg(path: Path) -> None:
    for i, text in enumerate(("The cat", "The the")):
        run("save", "l_out-1", f"{i}.safetensors", "-p", text)
    both = [activations.load(f"{i}.safetensors").arrays["resid_post.1"][-1] for i in (0, 1)]
    np.save("mean.npy", (both[0] + both[1]) / 2)
    one = document(
        "patch",
        "l_out-1",
        "0.safetensors",
        "1.safetensors",
        "--patch-mode",
        "average",
        "-p",
        PROMPT,
    )
    other = document("patch", "l_out-1", "mean.npy", "-p", PROMPT)
    assert one["output_tokens"] == other["output_tokens"]
    assert one["output"] != one["baseline"]


def test_several_patches_over_ranges_in_one_run(path: Path) -> None:
    run("save", "l_out", "c.safetensors", "-p", "The cat the")
    c = activations.load("c.safetensors").arrays

    def put(layer: int) -> Any:
        def edit(h: Any) -> Any:
            h = h.copy()
            h[1:3] = c[f"resid_post.{layer}"][0:2]
            return h

        return edit

    doc = document(
        "run", "-p", PROMPT, "-n", "3",
        "--patch", "l_out-0", "c.safetensors", "0..1", "1..2",
        "--patch", "l_out-2", "c.safetensors", "0..1", "1,2",
    )  # fmt: skip
    ids = [t["id"] for t in doc["tokens"]]
    expected = greedy(path, ids, {"resid_post.0": put(0), "resid_post.2": put(2)}, 3)
    assert [t["id"] for t in doc["output_tokens"]] == expected


def test_subtract_token_takes_its_direction_out() -> None:
    word = document("tokens", "-p", PROMPT)["tokens"][-1]
    words = [
        "patch",
        "l_out-2",
        "--subtract-token",
        word["text"],
        "--to-token-idx",
        "*",
        "-p",
        PROMPT,
        "-n",
        "8",
    ]
    changed = document(*words)
    assert changed["output_tokens"][0]["id"] != word["id"]
    assert "is 2 tokens" in refused("patch", "l_out-2", "--subtract-token", "zq", "-p", PROMPT)


def test_a_warning_where_the_first_token_is_edited_without_a_bos() -> None:
    run("save", "l_out-1", "c.safetensors", "-p", PROMPT)
    words = ["patch", "l_out-1", "c.safetensors", "--to-token-idx", "1", "-p", PROMPT]
    assert "put <|endoftext|> in front" in run(*words).stderr
    assert "in front" not in run(*words, "--bos").stderr


def test_options_that_cannot_act_are_refused() -> None:
    for command in ("run", "logit-lens", "perplexity"):
        alone = refused(command, "-p", PROMPT, "--patch-mode", "add", "-m", "gone.gguf")
        assert alone == "--patch-mode needs --patch"
    removal = ("patch", "l_out-1", "--subtract-token", " France", "-p", PROMPT)
    assert refused(*removal, "--patch-mode", "add") == "--patch-mode needs --patch"
    inert = refused(*removal, "--from-token-idx", "1")
    assert inert == "--from-token-idx needs a file of activations"


def test_captures_that_do_not_fit_get_one_line(tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "wide.gguf", "llama", qtype="Q8_0")
    run("save", "l_out-1", "wide.safetensors", "-p", PROMPT, "-m", str(other))
    assert "of width 64" in refused("patch", "l_out-1", "wide.safetensors", "-p", PROMPT)
    run("save", "l_out-1", "c.safetensors", "-p", PROMPT)
    assert "has no resid_post.0" in refused("patch", "l_out-0", "c.safetensors", "-p", PROMPT)
    words = ["patch", "l_out-1", "c.safetensors", "-p", PROMPT]
    assert "0 to 4" in refused(*words, "--from-token-idx", "9")
    assert "3 tokens are taken" in refused(
        *words, "--from-token-idx", "0..2", "--to-token-idx", "0..1"
    )
    wrong = run(*words, "--patch-mode", "swap", code=2)
    assert "'swap' is not one of" in wrong.stderr and "--patch-mode" in wrong.stderr
    assert "only the mode average takes several" in refused(
        "patch", "l_out-1", "c.safetensors", "c.safetensors", "-p", PROMPT
    )


# -- heads and blocks -----------------------------------------------------------------


def _first(*words: str) -> dict[str, Any]:
    doc: dict[str, Any] = document("run", "-p", LONG, "-n", "1", *words)["output_tokens"][0]
    return doc


def _is(doc: dict[str, Any], logits: np.ndarray) -> None:
    assert doc["id"] == logits.argmax()
    assert abs(doc["logprob"] - log_prob(logits, doc["id"])) < 1e-4


def test_select_keeps_one_head(oracle: Oracle, tokens: list[int]) -> None:
    def keep(z: np.ndarray) -> np.ndarray:
        z.reshape(len(z), HEADS, -1)[:, [0, 1, 3, 4, 5]] = 0
        return z

    logits = oracle.run(tokens, {"head_out.1": keep})["logits"][-1]
    _is(_first("--select", "1.2"), logits)
    _is(_first("--select", "1.2", "--ablate-attention"), logits)


def test_ablate_with_the_mean_of_a_file(oracle: Oracle, tokens: list[int], path: Path) -> None:
    run("save", "head_out", "other.safetensors", "-p", "The dog sat on the mat")
    with Model(path, threads=1) as m:
        theirs = oracle.run(m.tokenize("The dog sat on the mat"))["head_out.2"]

    def mean(z: np.ndarray) -> np.ndarray:
        z[:, 8:16] = theirs[:, 8:16].mean(0)
        return z

    logits = oracle.run(tokens, {"head_out.2": mean})["logits"][-1]
    _is(_first("--ablate", "2.1", "--ablate-with", "mean", "other.safetensors"), logits)


def test_ablate_by_resampling_is_seeded() -> None:
    words = ("--ablate", "*.*", "--ablate-with", "resample")
    assert _first(*words) == _first(*words, "--ablate-seed", "0")
    assert _first(*words) != _first(*words, "--ablate-seed", "1")
    run("save", "head_out", "other.safetensors", "-p", "The dog")
    assert (
        _first("--ablate", "*.*", "--ablate-with", "resample-from", "other.safetensors") != _first()
    )


def test_blocks_add_up(oracle: Oracle, tokens: list[int]) -> None:
    def block(scores: np.ndarray) -> np.ndarray:
        scores[5, :, 0] = scores[7, :, 3] = -np.inf
        return scores

    truth = {f"attn_scores.{i}": block for i in range(LAYERS)}
    _is(_first("--block", "5->0", "--block", "-1->3"), oracle.run(tokens, truth)["logits"][-1])


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "-p", "x", "--ablate", "1.6"], "0 to 5"),
        (["run", "-p", "x", "--ablate", "nonsense"], "LAYER.HEAD"),
        (["run", "-p", PROMPT, "--ctx", "3"], "longer than the context of 3"),
        (["run", "-p", "x", "--top-p", "0"], "top-p 0.0"),
        (["run", "-p", "x", "--steer", "none.gguf"], "there is no file none.gguf"),
        (["run", "-p", "x", "--steer-coeff", "2"], "--steer-coeff and --steer-layers need --steer"),
        (["patch", "attn_pattern-1", "none.safetensors", "-p", "x"], "there is no file"),
        (["patch", "l_out-1", "none.safetensors", "-p", "x"], "there is no file"),
        (["patch", "l_out-1", "-p", "x"], "give a file of activations"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(words: list[str], says: str) -> None:
    assert says in refused(*words)
    assert list(Path().glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ablate", "3.0"], "layer 3 is out of range; there are 0 to 2"),
        (["--ablate", "nine"], "'nine' is not LAYER.HEAD"),
        (["--select", "0.9"], "head 9 is out of range; there are 0 to 5"),
        (["--ablate-with", "resample"], "no heads to ablate: set ablate or select"),
        (
            ["--ablate", "0.1", "--ablate-with", "noise"],
            "'noise' is not known; known: zero, mean FILE",
        ),
        (
            ["--ablate", "0.1", "--ablate-with", "mean", "no.safetensors"],
            "there is no file no.safetensors",
        ),
        (
            ["--ablate", "0.1", "--ablate-with", "resample", "--ablate-attention"],
            "attention weights are ablated by zeroing them, not by resample",
        ),
        (["--block", "5-0"], "'5-0' is not QUERIES->KEYS"),
        (["--block", "9->0"], "token index 9 is out of range; there are 0 to 7"),
        (["--block", "3->*"], "all keys of query 3 are blocked in layer 0, head 0"),
    ],
)
def test_wrong_changes_are_refused(words: list[str], message: str) -> None:
    assert message in refused("run", "-p", LONG, "-n", "1", *words)


def test_mean_without_a_file_is_a_usage_error() -> None:
    result = run("run", "-p", LONG, "--ablate", "0.1", "--ablate-with", "mean", code=2)
    assert "--ablate-with expects 2 values, got 1" in result.stderr


@pytest.mark.parametrize("word", ["--save=a", "--patch=a"])
def test_the_values_of_a_long_option_stand_after_it(word: str) -> None:
    result = run("run", "-p", PROMPT, word, code=2)
    assert f"{word[:-2]} expects " in result.stderr and "values after it" in result.stderr


def test_tokens_appear_as_they_come_on_a_terminal(tmp_path: Path) -> None:
    """Each is written by itself; into a pipe goes the whole text at once, the same."""
    words = [
        "run",
        "-m",
        str(write_tiny(tmp_path / "tiny.gguf", "llama")),
        "-p",
        "The cat",
        "-n",
        "12",
        "--seed",
        "3",
    ]
    program = (
        "import sys; from mia.cli import main; plain = sys.stdout.write; parts = []\n"
        "sys.stdout.isatty = lambda: LIVE\n"
        "sys.stdout.write = lambda text: (parts.append(text), plain(text))[1]\n"
        "try: main()\n"
        "finally: print(len([p for p in parts if p.strip()]), file=sys.stderr)\n"
    )
    told = {}
    for live in ("True", "False"):
        code = program.replace("LIVE", live)
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--temperature", "1.5"],
            capture_output=True,
            check=True,
        )
        told[live] = done.stdout.decode(), int(done.stderr.split()[-1])
    plain, live_text = (told[live][0].rstrip("\n") for live in ("False", "True"))
    assert live_text == safe(plain, "\n\t")
    assert told["True"][1] > 4 and told["False"][1] == 1
