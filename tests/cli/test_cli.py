"""Every command as a person types it: what it prints, as JSON and plain, and how it refuses."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import document, refused, run
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.io import activations

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


# -- tokens ---------------------------------------------------------------------


def test_tokens_shows_each_and_whether_a_bos_stands_in_front() -> None:
    plain = run("tokens", "-p", "The cat\\n")
    assert plain.stdout.splitlines()[-1].endswith("\\n")
    assert "no BOS in front; --bos puts <|endoftext|> there" in plain.stderr
    found = document("tokens", "-p", PROMPT, "--bos")
    assert found["bos"] is True
    assert found["tokens"][0] == {"index": 0, "id": 0, "text": "<|endoftext|>"}
    assert "".join(t["text"] for t in found["tokens"][1:]) == PROMPT
    assert found["model"]["architecture"] == "llama"


def test_a_bos_in_the_text_is_not_doubled() -> None:
    once = document("tokens", "-p", "<|endoftext|>The cat", "--bos")
    assert [t["id"] for t in once["tokens"]].count(0) == 1


def test_prompts_come_from_files_and_stdin(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    expected = document("tokens", "-p", PROMPT)["tokens"]
    assert document("tokens", "-f", "p.txt")["tokens"] == expected
    assert document("tokens", "-f", "-", stdin=PROMPT)["tokens"] == expected


def test_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = write_tiny(tmp_path / "chat.gguf", "llama", chat_template=template, add_bos=False)
    found = document("tokens", "-m", str(chat), "--chat", "-p", "The cat")
    assert "".join(t["text"] for t in found["tokens"]) == "<|im_start|>user The cat<|im_end|>"
    assert "has no chat template" in refused("tokens", "--chat", "-p", "The cat")


# -- sites ----------------------------------------------------------------------


def test_sites_lists_every_name() -> None:
    found = {s["site"]: s for s in document("sites")["sites"]}
    assert found["k"]["shape"] == [2, 8] and found["q"]["shape"] == [6, 8]
    assert found["resid_post"]["llama.cpp"] == "l_out" and found["resid_post"]["layers"] == [0, 2]
    assert "blocks.N.hook_resid_post" in run("sites").stdout


def test_graph_lists_every_node_with_sources() -> None:
    nodes = document("sites", "--graph")["nodes"]
    last = nodes[-1]
    assert (last["name"], last["op"], last["type"]) == ("result_output", "MUL_MAT", "f32")
    assert last["sources"] == ["output.weight", "result_norm"]
    assert len(run("sites", "--graph").stdout.splitlines()) == len(nodes)


# -- logit-lens -----------------------------------------------------------------


def test_lens_agrees_with_the_oracle(path: Path) -> None:
    found = document("logit-lens", "l_out-1", "-p", PROMPT, "--bos", "-k", "3")
    oracle, ids = Oracle(path), [t["id"] for t in found["tokens"]]
    scores = oracle.lens(oracle.run(ids)["resid_post.1"])
    assert [r["token_index"] for r in found["lens"]] == list(range(len(ids)))
    for row, expected in zip(found["lens"], scores, strict=True):
        assert [t["id"] for t in row["top"]] == np.argsort(-expected)[:3].tolist()
        assert row["top"][0]["logit"] == pytest.approx(expected.max(), abs=2e-4)
        assert (row["site"], row["layer"]) == ("l_out-1", 1)


def test_lens_prints_a_line_per_token_off_a_terminal() -> None:
    lines = run(
        "logit-lens", "l_out-0,2", "-p", PROMPT, "--token-idx", "-2..-1", "-k", "2"
    ).stdout.splitlines()
    assert lines[0] == "Layer #0 l_out-0:" and lines[3] == "Layer #2 l_out-2:"
    assert lines[1].startswith("3: ") and lines[1].count("|") == 1
    assert len(lines) == 6


def test_old_kqv_out_means_what_attention_adds() -> None:
    old = run("logit-lens", "kqv_out-1", "-p", PROMPT)
    assert "kqv_out is read as attn_out" in old.stderr
    assert (
        old.stdout.splitlines()[1:]
        == run("logit-lens", "attn_out-1", "-p", PROMPT).stdout.splitlines()[1:]
    )
    assert old.stdout.startswith("Layer #1 kqv_out-1:")
    assert "read as" not in run("logit-lens", "kqv_out-1", "-p", PROMPT, "-q").stderr


def test_lens_of_everything_at_some_layers() -> None:
    found = document("logit-lens", "all", "--layers", "1", "-p", PROMPT, "--token-idx", "-1")
    assert {r["site"] for r in found["lens"]} == {
        "inp_embd",
        "attn_out-1",
        "ffn_inp-1",
        "ffn_out-1",
        "l_out-1",
    }


def test_lens_of_a_changed_run_sees_the_change() -> None:
    plain = document("logit-lens", "l_out", "-p", PROMPT)["lens"]
    changed = document("logit-lens", "l_out", "-p", PROMPT, "--ablate", "1.*")["lens"]
    n = len(plain) // 3
    assert plain[:n] == changed[:n]
    assert plain[n:] != changed[n:]


# -- save, patch, run --------------------------------------------------------------


def test_save_writes_rows_with_provenance(path: Path) -> None:
    found = document("save", "l_out+q-1", "c.safetensors", "-p", PROMPT)
    assert found["sites"][-1] == {"site": "q.1", "shape": [5, 48], "dtype": "float32"}
    c = activations.load("c.safetensors")
    ids = [t["id"] for t in found["tokens"]]
    assert c.tokens == ids
    expected = Oracle(path).run(ids)
    for name in ("resid_post.0", "resid_post.2", "q.1"):
        np.testing.assert_allclose(c.arrays[name], expected[name], atol=1e-4)


def _greedy(path: Path, ids: list[int], n: int, edits: dict[str, Any]) -> list[int]:
    oracle, out = Oracle(path), list(ids)
    for _ in range(n):
        out.append(int(oracle.run(out, edits)["logits"][-1].argmax()))
    return out[len(ids) :]


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
        "--mode",
        mode,
    ]
    found = document(*words, "-p", PROMPT, "-n", "4")
    ids = [t["id"] for t in found["tokens"]]
    assert [t["id"] for t in found["output_tokens"]] == _greedy(
        path, ids, 4, {"resid_post.1": edit}
    )
    assert found["baseline"] == document("run", "-p", PROMPT, "-n", "4")["output"]


def test_average_of_two_files_is_the_old_patch_avg(path: Path) -> None:
    for i, text in enumerate(("The cat", "The the")):
        run("save", "l_out-1", f"{i}.safetensors", "-p", text)
    both = [activations.load(f"{i}.safetensors").arrays["resid_post.1"][-1] for i in (0, 1)]
    np.save("mean.npy", (both[0] + both[1]) / 2)
    one = document(
        "patch", "l_out-1", "0.safetensors", "1.safetensors", "--mode", "average", "-p", PROMPT
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

    found = document(
        "run", "-p", PROMPT, "-n", "3",
        "--patch", "l_out-0", "c.safetensors", "0..1", "1..2",
        "--patch", "l_out-2", "c.safetensors", "0..1", "1,2",
    )  # fmt: skip
    ids = [t["id"] for t in found["tokens"]]
    expected = _greedy(path, ids, 3, {"resid_post.0": put(0), "resid_post.2": put(2)})
    assert [t["id"] for t in found["output_tokens"]] == expected


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


def test_ablated_heads_give_nothing(path: Path) -> None:
    run("save", "head_out", "c.safetensors", "-p", PROMPT, "--ablate", "0.1,2.*")
    c = activations.load("c.safetensors").arrays
    assert not c["head_out.2"].any()
    heads = c["head_out.0"].reshape(-1, 6, 8)
    assert not heads[:, 1].any() and heads[:, [0, 2, 3, 4, 5]].any(axis=(0, 2)).all()


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
    found = document("run", "-p", PROMPT, "-n", "4", "--steer", "v.npy", "--coeff", "2")
    ids = [t["id"] for t in found["tokens"]]
    expected = _greedy(path, ids, 4, {"resid_post.1": lambda h: h + 2 * vector[1]})
    assert [t["id"] for t in found["output_tokens"]] == expected


# -- refusals -----------------------------------------------------------------------


def test_a_warning_where_the_first_token_is_edited_without_a_bos() -> None:
    run("save", "l_out-1", "c.safetensors", "-p", PROMPT)
    words = ["patch", "l_out-1", "c.safetensors", "--to-token-idx", "1", "-p", PROMPT]
    assert "--bos puts <|endoftext|> in front" in run(*words).stderr
    assert "in front" not in run(*words, "--bos").stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tokens", "-p", ""], "the prompt is empty"),
        (["tokens"], "give the prompt once"),
        (["patch", "attn_pattern-1", "none.safetensors", "-p", "x"], "there is no file"),
        (["tokens", "-f", "none.txt"], "cannot read the prompt from none.txt"),
        (["logit-lens", "l_uot", "-p", "x"], "did you mean l_out"),
        (["logit-lens", "l_out-3", "-p", "x"], "0 to 2"),
        (["logit-lens", "head_out", "-p", "x"], "a lens does not read head_out"),
        (["logit-lens", "-p", "x", "--token-idx", "7"], "0 to 0"),
        (["run", "-p", "x", "--ablate", "1.6"], "0 to 5"),
        (["run", "-p", "x", "--ablate", "nonsense"], "LAYER.HEAD"),
        (["run", "-p", PROMPT, "--ctx", "3"], "longer than the context of 3"),
        (["run", "-p", "x", "--top-p", "0"], "top-p 0.0"),
        (["run", "-p", "x", "--steer", "none.gguf"], "there is no file none.gguf"),
        (["save", "l_out", "no/c.safetensors", "-p", "x"], "there is no folder no"),
        (["patch", "l_out-1", "none.safetensors", "-p", "x"], "there is no file"),
        (["patch", "l_out-1", "-p", "x"], "give a capture file"),
        (["tokens", "-m", "no-such-model", "-p", "x"], "no-such-model"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(words: list[str], says: str) -> None:
    assert says in refused(*words)
    assert list(Path().glob("*.safetensors")) == []


def test_damaged_models_get_one_line(path: Path) -> None:
    Path("text.gguf").write_text("not a model")
    assert "not a GGUF file" in refused("tokens", "-m", "text.gguf", "-p", "x")
    Path("short.gguf").write_bytes(path.read_bytes()[:-5000])
    assert "cut short" in refused("tokens", "-m", "short.gguf", "-p", "x")


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
    assert "known: replace, add, subtract, average" in refused(*words, "--mode", "swap")
    assert "only --mode average" in refused(
        "patch", "l_out-1", "c.safetensors", "c.safetensors", "-p", PROMPT
    )


# -- the rest -----------------------------------------------------------------------


def test_models_lists_names(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    Path("models.toml").write_text(f'[mine]\npath = "{path}"\n')
    listed = {m["name"]: m for m in json.loads(run("models", "--json").stdout)["models"]}
    assert listed["mine"]["present"] is True and "smollm2" in listed
    assert "mine" in run("models").stdout
    assert document("tokens", "-m", "mine", "-p", "x")["model"]["name"] == "mine"


@pytest.mark.parametrize("text", ["[x]\nwrong = 1\n", "not toml", '[x]\npath = "a"\nctx = "b"\n'])
def test_a_faulty_models_toml_is_one_line(text: str) -> None:
    Path("models.toml").write_text(text)
    assert "models.toml" in refused("models")


def test_tables_keep_sites_and_probabilities_whatever_the_width() -> None:
    from rich.console import Console

    from mia.cli._tables import lens_table

    lens = document("logit-lens", "l_out", "-p", PROMPT, "-k", "8")
    pieces = [t["text"] for t in lens["tokens"]]
    for width in (60, 80, 130):
        screen = Console(width=width, record=True, file=io.StringIO())
        screen.print(lens_table(lens["lens"], pieces, len(pieces), width))
        text = screen.export_text()
        assert "…" not in text and "l_out-2" in text
        assert f"{lens['lens'][0]['top'][0]['prob']:.2f}" in text
        assert max(map(len, text.splitlines())) <= width
    assert "fit here" in text or "8" in text


def test_doctor_says_what_there_is() -> None:
    found = document("doctor")
    assert found["weight_types"] == ["f32"] and found["kv_type"] == "f32"
    assert "threads" in run("doctor").stdout


def test_doctor_says_when_the_callback_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("MIA_NATIVE") == "0":
        pytest.skip("the compiled callback is off")
    assert document("doctor")["callback"] == "compiled"
    monkeypatch.setattr("mia.llama.ggml._native_watch", lambda: None)
    found = document("doctor")
    assert found["callback"] == "Python" and "C compiler" in " ".join(found["advice"])


def test_converted_models_say_the_same(path: Path, tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small.gguf", "llama", qtype="Q8_0", add_bos=False)
    made = json.loads(run("models", "convert", str(small), "f32", "big.gguf", "--json").stdout)
    assert made["bytes"] > small.stat().st_size
    assert document("doctor", "-m", "big.gguf")["weight_types"] == ["f32"]
    run("save", "embed", "a.safetensors", "-m", str(small), "-p", PROMPT)
    run("save", "embed", "b.safetensors", "-m", "big.gguf", "-p", PROMPT)
    a, b = (activations.load(f"{n}.safetensors").arrays["embed"] for n in "ab")
    np.testing.assert_array_equal(a, b)
    result = run("models", "convert", str(small), "q9", "x.gguf", code=1)
    assert "known: f32" in result.stderr and not Path("x.gguf").exists()
    result = run("models", "convert", str(small), "f16", str(small), code=1)
    assert "is the model itself" in result.stderr


def test_import_and_help_stay_light() -> None:
    """No numpy, no llama.cpp: what makes start-up slow is not even imported."""
    code = (
        "import sys, mia, mia.cli\n"
        "heavy = {'numpy', 'llama_cpp', 'safetensors', 'huggingface_hub', 'matplotlib', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import mia

    for name in mia.__all__:
        assert getattr(mia, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mia.nothing
