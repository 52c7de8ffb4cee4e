"""tokens, sites, logit-lens, save: what they print, as JSON and plain, and how they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import document, refused, run
from oracle import Oracle
from tiny_gguf import write_tiny

from mia.io import activations
from mia.model import Model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def path(path_without_bos: Path) -> Path:
    return path_without_bos


# -- tokens ---------------------------------------------------------------------------


def test_tokens_shows_each_and_whether_a_bos_stands_in_front() -> None:
    plain = run("tokens", "-p", "The cat\\n")
    assert plain.stdout.splitlines()[-1].endswith("\\n")
    assert "no BOS in front; --bos puts <|endoftext|> there" in plain.stderr
    doc = document("tokens", "-p", PROMPT, "--bos")
    assert doc["bos"] is True
    assert doc["tokens"][0] == {"index": 0, "id": 0, "text": "<|endoftext|>"}
    assert "".join(t["text"] for t in doc["tokens"][1:]) == PROMPT
    assert doc["model"]["architecture"] == "llama"


def test_a_bos_in_the_text_is_not_doubled() -> None:
    once = document("tokens", "-p", "<|endoftext|>The cat", "--bos")
    assert [t["id"] for t in once["tokens"]].count(0) == 1


def test_prompts_come_from_files_and_stdin(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    expected = document("tokens", "-p", PROMPT)["tokens"]
    assert document("tokens", "-f", "p.txt")["tokens"] == expected
    assert document("tokens", "-f", "-", stdin=PROMPT)["tokens"] == expected


def test_a_newline_at_the_end_of_a_file_is_not_of_the_prompt(tmp_path: Path, path: Path) -> None:
    """Editors and `echo` put it there; kept, the next token is that of a new line."""

    def ids(*words: str, text: str) -> list[int]:
        (tmp_path / "p.txt").write_text(text)
        file = document("tokens", "-f", "p.txt", *words)["tokens"]
        assert document("tokens", "-f", "-", *words, stdin=text)["tokens"] == file
        return [t["id"] for t in file]

    with Model(path, threads=1) as m:
        assert ids(text=f"{PROMPT}\n") == m.tokenize(PROMPT)
        assert ids(text=f"{PROMPT}\r\n") == m.tokenize(PROMPT)
        assert ids(text=f"{PROMPT}\n\n") == m.tokenize(f"{PROMPT}\n")
        assert ids("--keep-newline", text=f"{PROMPT}\n") == m.tokenize(f"{PROMPT}\n")


def test_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = write_tiny(tmp_path / "chat.gguf", "llama", chat_template=template, add_bos=False)
    doc = document("tokens", "-m", str(chat), "--chat", "-p", "The cat")
    assert "".join(t["text"] for t in doc["tokens"]) == "<|im_start|>user The cat<|im_end|>"
    assert "has no chat template" in refused("tokens", "--chat", "-p", "The cat")


# -- sites ----------------------------------------------------------------------------


def test_sites_lists_every_name() -> None:
    doc = {s["site"]: s for s in document("sites")["sites"]}
    assert doc["k"]["shape"] == [2, 8] and doc["q"]["shape"] == [6, 8]
    assert doc["resid_post"]["llama.cpp"] == "l_out" and doc["resid_post"]["layers"] == [0, 2]
    assert "blocks.N.hook_resid_post" in run("sites").stdout


def test_sites_say_what_heads_are() -> None:
    about = {s["site"]: s["about"] for s in json.loads(run("sites", "--json").stdout)["sites"]}
    assert (
        about["q"].startswith("6 query heads of 8")
        and about["head_out"] == "6 heads of 8 side by side, before W_O"
    )
    assert about["v"] == "2 value heads of 8, each read by 3 query heads"
    assert about["resid_post"] == "" and "not with flash attention" in about["attn_pattern"]
    graph = run("sites", "--graph").stdout
    assert any(line.endswith("= head_out.1") and "kqv_out-1" in line for line in graph.splitlines())
    assert any(
        line.endswith("= attn_scores.1") and "MUL_MAT" in line for line in graph.splitlines()
    )


def test_graph_lists_every_node_with_sources() -> None:
    nodes = document("sites", "--graph")["nodes"]
    last = nodes[-1]
    assert (last["name"], last["op"], last["type"]) == ("result_output", "MUL_MAT", "f32")
    assert last["sources"] == ["output.weight", "result_norm"]
    assert len(run("sites", "--graph").stdout.splitlines()) == len(nodes)


# -- logit-lens -----------------------------------------------------------------------


def test_lens_agrees_with_the_oracle(path: Path) -> None:
    doc = document("logit-lens", "l_out-1", "-p", PROMPT, "--bos", "-k", "3")
    oracle, ids = Oracle(path), [t["id"] for t in doc["tokens"]]
    scores = oracle.lens(oracle.run(ids)["resid_post.1"])
    assert [r["token_index"] for r in doc["lens"]] == list(range(len(ids)))
    for row, expected in zip(doc["lens"], scores, strict=True):
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
    doc = document("logit-lens", "all", "--layers", "1", "-p", PROMPT, "--token-idx", "-1")
    assert {r["site"] for r in doc["lens"]} == {
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


# -- save -----------------------------------------------------------------------------


def test_save_writes_rows_with_provenance(path: Path) -> None:
    doc = document("save", "l_out+q-1", "c.safetensors", "-p", PROMPT)
    assert doc["sites"][-1] == {"site": "q.1", "shape": [5, 48], "dtype": "float32"}
    c = activations.load("c.safetensors")
    ids = [t["id"] for t in doc["tokens"]]
    assert c.tokens == ids
    expected = Oracle(path).run(ids)
    for name in ("resid_post.0", "resid_post.2", "q.1"):
        np.testing.assert_allclose(c.arrays[name], expected[name], atol=1e-4)


def test_ablated_heads_give_nothing(path: Path) -> None:
    run("save", "head_out", "c.safetensors", "-p", PROMPT, "--ablate", "0.1,2.*")
    c = activations.load("c.safetensors").arrays
    assert not c["head_out.2"].any()
    heads = c["head_out.0"].reshape(-1, 6, 8)
    assert not heads[:, 1].any() and heads[:, [0, 2, 3, 4, 5]].any(axis=(0, 2)).all()


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tokens", "-p", ""], "the prompt is empty"),
        (["tokens"], "give the prompt once"),
        (["tokens", "-f", "none.txt"], "cannot read the prompt from none.txt"),
        (["tokens", "-m", "no-such-model", "-p", "x"], "no-such-model"),
        (["logit-lens", "l_uot", "-p", "x"], "did you mean l_out"),
        (["logit-lens", "l_out-3", "-p", "x"], "0 to 2"),
        (["logit-lens", "head_out", "-p", "x"], "a lens does not read head_out"),
        (["logit-lens", "l_out-1", "--layers", "2", "-p", "x"], "no site of l_out-1 is in layers 2"),
        (["logit-lens", "-p", "x", "--token-idx", "7"], "0 to 0"),
        (["save", "l_out", "no/c.safetensors", "-p", "x"], "there is no folder no"),
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
