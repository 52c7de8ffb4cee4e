"""stdin, stdout and stderr: nothing from outside speaks to a terminal, pipes get the data exactly,
and a stream that takes or gives nothing is one clear error."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
import tty
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
import tiny_vocabulary
import typer
from letters import NEXT, WORDS

from mia.cli import app
from mia.io.activations import Activations
from mia.model import Model
from mia.show.text import safe
from mia.vectors import Vector

#: writes the clipboard, clears the screen (also by a C1 control), turns text around, has no width;
#: and what rich would take for a link, a style and an emoji
EVIL = "\x1b]52;c;QQ==\x07\x1b[2J\x9b2J\u202e\u200b\ufeff[link=x][bold]:cat:\r\x7f"
#: as the name of a file: also a byte that is not UTF-8, where names can have it
NAME = EVIL + ("" if sys.platform == "darwin" else "\udcff")
MODEL, VECTOR, CAPTURE = (NAME + s for s in (".gguf", "v.gguf", ".safetensors"))
TASK, OTHER = NAME + "t.json", NAME + "u.json"
TEXT = "The cat " + EVIL
PROMPT = ("-p", TEXT)
SETS = ("--sets", "1", "--dummies", "2", *WORDS)
SMALL = ("--prompts", "3", "--effect-prompts", "2", *WORDS)
SAMPLED = ("--samples", "2", "--temperature", "1", "-n", "8")
FEW = ("--evaluations", "12", "--population", "6", "--batch", "3", "--prompts", "3", *WORDS)

COMMANDS: list[tuple[str, ...]] = [
    ("tokens", *PROMPT),
    ("sites",),
    ("sites", "--graph"),
    ("logit-lens", "l_out", *PROMPT, "-k", "4"),
    ("save", "l_out", NAME + "s.safetensors", *PROMPT),
    ("run", *PROMPT, "-n", "12", "--steer", VECTOR, "--steer-coeff", "3"),
    ("run", *PROMPT, "-n", "12", "--json"),
    ("run", *PROMPT, "-n", "12", "-o", NAME + "r.json"),
    ("replay", NAME + "r.json"),
    ("report", NAME + "r.json"),
    ("report", NAME + "r.json", "-o", NAME + "r.html"),
    ("patch", "l_out-1", CAPTURE, *PROMPT, "-n", "6"),
    ("attention", *PROMPT, "-k", "2"),
    ("attention", "-p", "The \x1b cat", "--heads", "0.1"),
    ("explore", *PROMPT, "-n", "4"),
    ("explore", *PROMPT, "-n", "4", "-o", NAME + "x.html"),
    ("heads", *PROMPT),
    ("sweep", *PROMPT, "--zero", "--answer", "\x1b", "-k", "2"),
    ("sweep", *PROMPT, "--zero", "--explain"),
    ("sweep", *PROMPT, "--zero", "--shard", "1/1", "-o", NAME + "1.jsonl"),
    ("merge", NAME + "1.jsonl", "-o", NAME + "all.jsonl"),
    ("diff", MODEL, MODEL, *PROMPT, "--blame-tokens", "3", "-k", "1"),
    ("why", *PROMPT, "-k", "2"),
    ("ablate", *PROMPT, "--answer", " cat\x1b[2J", "-k", "2"),
    ("attribute", *PROMPT, "--answer", "\x1b", "--against", "\x07"),
    ("steer", VECTOR, "--coeff", "1,2", *PROMPT, "-n", "12"),
    ("steer-explain", VECTOR, *PROMPT),
    ("bake", VECTOR, "-o", NAME + "b.gguf", "--coeff", "0.5", *PROMPT),
    ("steer-words", VECTOR, "--words", NAME + "w.txt", *PROMPT, "-n", "4", "--samples", "2"),
    ("tune", VECTOR, *PROMPT, "--answer", "\x1b", "--kl-budget", "99", "--neutral-tokens", "8"),
    ("actadd", "--plus", EVIL, "--layers", "1", *PROMPT, *SAMPLED),
    ("perplexity", "-f", NAME + "w.txt", "--steer", VECTOR),
    ("perplexity-sweep", "--on", NAME + "w.txt", "--steer", VECTOR),
    ("vector", "train", NAME + "p.jsonl", "-o", NAME + "o.gguf"),
    ("vector", "show", VECTOR, "-k", "8"),
    ("vector", "show", VECTOR, "-k", "8", "--json"),
    ("vector", "combine", f"'{VECTOR}' - 0.5*'{VECTOR}'", "-o", NAME + "c.gguf"),
    ("vector", "convert", VECTOR, "-o", NAME + "c.safetensors"),
    ("caa", "train", NAME + "ab.json", "-o", NAME + "a.gguf"),
    ("caa", "eval", VECTOR, NAME + "ab.json", "--layers", "1"),
    ("iti", "train", NAME + "ab.json", "-o", NAME + "i.safetensors", "--n-heads", "2"),
    ("iti", "eval", NAME + "i.safetensors", NAME + "ab.json", "--generate", "1", "-n", "8"),
    ("tasks", TASK),
    ("tasks", TASK, "--show-prompt", "--shots", "2"),
    ("task-vector", "train", TASK, "-o", NAME + "tv.safetensors", *SETS),
    ("task-vector", "eval", TASK, "next.json", "--by-layer", *SETS),
    ("task-vector", "conflict", TASK, OTHER, *SETS),
    ("function-vector", "train", TASK, "-o", NAME + "f.safetensors", *SMALL),
    ("function-vector", "eval", TASK, "--vector", NAME + "f.safetensors", *WORDS),
    ("function-vector", "compose", f"{TASK},{TASK},next.json,next.json", *SMALL, "--n-heads", "2"),
    ("soft-vector", "train", TASK, "-o", NAME + "s.safetensors", *FEW),
    ("soft-vector", "eval", TASK, NAME + "s.safetensors", *WORDS),
    ("doctor", "-m", MODEL),
    ("models",),
    ("models", "convert", MODEL, "f16", NAME + "16.gguf"),
    ("tokens", *PROMPT, "--as", "f16"),
    ("models", "cache"),
    ("models", "cache", "--clear"),
]
#: errors that name what was typed
REFUSED: list[tuple[str, ...]] = [
    ("experts", *PROMPT),  # not with this model
    ("tokens", "-m", EVIL, *PROMPT),
    ("tokens", "-m", EVIL + "/x.gguf", *PROMPT),
    ("logit-lens", EVIL, *PROMPT),
    ("run", *PROMPT, "--steer", NAME + "none.gguf"),
    ("run", *PROMPT, "--ablate", EVIL),
    ("run", *PROMPT, "--block", EVIL),
    ("run", "-f", NAME + "none"),
    ("run", "-p", "caf\udce9"),
    ("save", "l_out", EVIL + "/none/x.safetensors", *PROMPT),
    ("tasks", EVIL),
    ("vector", "combine", EVIL + " + ", "-o", "x.gguf"),
    ("task-vector", "train", TASK, "-o", NAME + "tv", *SETS),
    ("models", "pull", EVIL),
    ("rpc-server", "--host", EVIL),
    ("serve", "--host", EVIL),
    ("tokens", "--rpc", EVIL, *PROMPT),
    ("models", "cache", "--remove", EVIL),
    ("merge", EVIL, "-o", "x.jsonl"),
    ("sweep", *PROMPT, "--zero", "--shard", EVIL),
]
#: of leaves of the tree: needs the real model; needs a hub
LEFT_OUT = {("demo",), ("models", "pull")}

_DRIVER = """
import json, sys
from mia.cli import main
codes = []
for words in json.loads(open("words.json", encoding="utf-8").read()):
    sys.argv = ["mia", *words]
    try:
        main()
        codes.append(0)
    except SystemExit as err:
        codes.append(err.code or 0)
    except BaseException as err:
        codes.append(repr(err))
    for stream in (sys.stdout, sys.stderr):
        stream.write("\\n== " + ascii(words[:2]) + "\\n")
        stream.flush()
open("codes.json", "w").write(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where everything is hostile: names, vocabulary, metadata, data."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokens, merges = tiny_vocabulary.gpt2_vocabulary()
        letters = tiny_vocabulary.byte_letters()
        evil = ["".join(letters[b] for b in f" {EVIL}{i}\n<script>".encode()) for i in range(1500)]
        patch.setattr(tiny_gguf, "gpt2_vocabulary", lambda: ([*tokens, *evil], merges))
        tiny_gguf.write_tiny(MODEL, "llama", chat_template=EVIL)
        rng = np.random.default_rng(0)
        facts = dict.fromkeys(("name", "model", "method", "data", "items", "n_pairs", "read"), EVIL)
        facts["model_sha256"] = EVIL
        directions = {i: rng.standard_normal(48).astype(np.float32) for i in (1, 2)}
        Vector(directions, metadata=facts).save(VECTOR)
        with Model(MODEL, threads=1) as model:
            known = model.tokenizer_hash
        rows = rng.standard_normal((3, 48)).astype(np.float32)
        meta = {"model": EVIL, "model_sha256": EVIL, "prompt": EVIL, "tokenizer_sha256": known}
        Activations({"resid_post.1": rows}, meta).save(CAPTURE)
        Path(NAME + "w.txt").write_text(f"the cat {EVIL}\nred sky\n", encoding="utf-8", newline="")
        odd = "\x1b[2J\u202e"
        Path(TASK).write_text(json.dumps({a + odd: b + odd for a, b in NEXT.items()}))
        Path(OTHER).write_text(json.dumps({b + odd: a + odd for a, b in NEXT.items()}))
        Path("next.json").write_text(json.dumps(NEXT))
        pair = {"positive": "The cat sat " + EVIL, "negative": "The dog sat " + EVIL}
        Path(NAME + "p.jsonl").write_text(json.dumps(pair) + "\n")
        ab = [
            {
                "question": f"{q} {odd}\n\nChoices:\n (A) yes{odd}\n (B) no and no",
                "answer_matching_behavior": "(A)" if i % 2 else "(B)",
                "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
            }
            for i, q in enumerate(["cat is red?", "sky is blue?", "Paris in Rome?", "the dog?"])
        ]
        Path(NAME + "ab.json").write_text(json.dumps(ab))
        name = json.dumps("x" + EVIL)
        Path("models.toml").write_text(f"[{name}]\npath = {json.dumps('y' + EVIL)}\n")
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "MIA_MODEL": MODEL,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }


def on_terminals(code: str, folder: Path) -> tuple[bytes, bytes]:
    """What Python code writes to stdout and stderr, each a terminal of its own."""
    out: list[bytearray] = [bytearray(), bytearray()]

    def listen(master: int, into: bytearray) -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while block := os.read(master, 1 << 16):
                into.extend(block)

    pairs = [pty.openpty() for _ in out]
    for _, slave in pairs:
        tty.setraw(slave)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=pairs[0][1],
        stderr=pairs[1][1],
    )
    for _, slave in pairs:
        os.close(slave)
    ears = [
        threading.Thread(target=listen, args=(m, into))
        for (m, _), into in zip(pairs, out, strict=True)
    ]
    for ear in ears:
        ear.start()
    assert process.wait(timeout=500) == 0, bytes(out[1]).decode(errors="replace")
    for ear in ears:
        ear.join()
    for master, _ in pairs:
        os.close(master)
    return bytes(out[0]), bytes(out[1])


def leaves(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    parts = getattr(command, "commands", None)
    if parts is None or getattr(command, "invoke_without_command", False):
        yield name
    for part, child in (parts or {}).items():
        yield from leaves(child, (*name, part))


def test_every_command_is_tried() -> None:
    tried = {words[:n] for words in (*COMMANDS, *REFUSED) for n in (1, 2)}
    missing = {n for n in leaves(typer.main.get_command(app)) if n} - tried - LEFT_OUT
    assert not missing


#: what rich writes to a terminal: colours; on stderr also the lines of a bar
STYLES = re.compile(rb"\x1b\[[0-9;]*m")
BARS = re.compile(rb"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r")


def test_nothing_speaks_to_a_terminal(hostile: Path) -> None:
    words = [[*w, "-t", "1"] if _takes_threads(w) else [*w] for w in (*COMMANDS, *REFUSED)]
    (hostile / "words.json").write_text(json.dumps(words))
    stdout, stderr = on_terminals(_DRIVER, hostile)
    codes = json.loads((hostile / "codes.json").read_text())
    has_probes = find_spec("sklearn") is not None  # iti is refused without
    expected = [int(w[0] == "iti" and not has_probes) for w in COMMANDS] + [1] * len(REFUSED)
    assert codes == expected, stderr.decode(errors="replace")[-4000:]
    for raw, allowed in ((stdout, STYLES), (stderr, BARS)):
        text = allowed.sub(b"", raw).decode()  # UTF-8 throughout
        for line in text.split("\n"):
            assert line == safe(line), line
        assert r"\x1b]52;c;QQ==\x07" in text and r"\u202e" in text
        # rich's markup and names of emoji are text
        assert "[link=x]" in text and "[bold]" in text and ":cat:" in text
        assert not re.search(r"(?i)traceback", text)
    assert stderr.count(b"mia: ") >= len(REFUSED)


def _takes_threads(words: tuple[str, ...]) -> bool:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return any("--threads" in p.opts for p in command.params)


def test_a_pipe_gets_the_data_exactly(hostile: Path) -> None:
    def piped(*words: str) -> bytes:
        done = subprocess.run(
            [sys.executable, "-m", "mia", *words, "-t", "1", "-q"],
            cwd=hostile,
            env=environment(hostile),
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    document = json.loads(piped("run", *PROMPT, "-n", "12", "--json"))
    text = document["output"]
    assert safe(text, "\n") != text
    assert piped("run", *PROMPT, "-n", "12") == (text + "\n").encode()


# -- streams that take or give nothing ---------------------------------------------------

MIA = f"{sys.executable} -m mia"


def shell(
    line: str, folder: Path, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    where = environment(folder)
    where["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env=where,
        input=stdin,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture
def plain(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(globals(), "MODEL", str(path))
    return folder


LOOK = f"{MIA} tokens -p 'The cat' -t 1 -q"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{LOOK} > /dev/full", "cannot write to stdout: No space left on device"),
        (f"{LOOK} --json > /dev/full", "cannot write to stdout: No space left on device"),
        (f"{LOOK} >&-", "cannot write the result: stdout is closed"),
        (f"{MIA} tokens -f - -t 1 <&-", "cannot read the prompt: stdin is closed"),
        (f"printf 'caf\\xe9' | {MIA} tokens -f - -t 1", "it is not UTF-8 text (byte 0xe9 at 3)"),
        (f"{MIA} tokens -p $'caf\\xe9' -t 1", "'\\udce9' at 3: half a character, or a byte"),
        (f"{MIA} tokens -f $'caf\\xe9' -t 1", r"cannot read the prompt from caf\udce9"),
        (f"{MIA} tokens -f . -t 1", "cannot read the prompt from .: Is a directory"),
        (f"{MIA} tokens -m . -p x -t 1", "is a directory: give a .gguf file"),
    ],
)
def test_a_stream_that_fails_is_one_clear_error(line: str, message: str, plain: Path) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = shell(line, plain)
    assert (done.returncode, done.stdout) == (1, b""), done
    assert done.stderr.startswith(b"mia: ") and done.stderr.count(b"\n") == 1, done.stderr
    assert message in done.stderr.decode()


@pytest.mark.parametrize(
    "line",
    [
        f"{LOOK} | true",
        f"{LOOK} --json | true",
        f"{MIA} logit-lens all -p '{'The cat sat on the ' * 9}' -k 20 -t 1 -q | head -1",
        f"{LOOK} 2>&-",
        f"{MIA} tokens -p 'The cat' -t 1 --no-bos 2> /dev/full > /dev/null",
        f"{LOOK} -o out.json >&- <&- 2>&-",
        f"{MIA} tokens -f <(printf 'The cat') -t 1 -q",
    ],
)
def test_what_nobody_reads_is_no_error(line: str, plain: Path) -> None:
    if "/dev/full" in line and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = shell(line, plain)
    assert (done.returncode, done.stderr) == (0, b""), done
    if "out.json" in line:
        assert json.loads((plain / "out.json").read_text())["tokens"]


def test_closed_streams_are_not_taken_by_other_files(plain: Path) -> None:
    """A file opened as number 1 would get what C code prints."""
    before = (plain / "c.safetensors", f"{MIA} save l_out-1 c.safetensors -p 'The cat' -t 1")
    done = shell(f"{before[1]} <&- >&- 2>&-", plain)
    assert done.returncode == 1 and before[0].exists()  # the report had nowhere to go
    assert shell(f"{MIA} patch l_out-1 c.safetensors -p 'The cat' -t 1 -q", plain).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_a_character_spells_it_out(encoding: str, plain: Path) -> None:
    line = f"PYTHONIOENCODING={encoding} {MIA} tokens -p '☃ é' -t 1"
    done = shell(line, plain)
    assert done.returncode == 0, done
    document = shell(f"{line} --json", plain)
    pieces = [t["text"] for t in json.loads(document.stdout.decode(encoding))["tokens"]]
    assert len(pieces) > 3


def test_stdin_is_read_as_a_file_is(plain: Path) -> None:
    text = "\ufeffThe cat\r\nsat".encode()
    (plain / "p.txt").write_bytes(text)
    piped = shell(f"{MIA} tokens -f - -t 1 --json", plain, text)
    read = shell(f"{MIA} tokens -f p.txt -t 1 --json", plain)
    one, other = (json.loads(done.stdout) for done in (piped, read))
    assert one.pop("run")["stdin"] and other.pop("run")["files"]
    assert one == other and one["tokens"]
