"""The Hugging Face hub: where its downloads lie, and fetching one.

huggingface_hub is imported only to download; that a file is there is seen without it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mia.errors import ModelError
from mia.llama.gguf_file import absolute, is_file

#: a part of a path: no separator of any system, no drive, no control characters
_PART = re.compile(r"[^/\\:\x00-\x1f\x7f]+")


def hub_cache() -> Path:
    """The folder where huggingface_hub keeps downloads, from the environment as it is now."""
    env = os.environ.get
    named = env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE")
    if not named:
        home = env("HF_HOME") or str(Path(env("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
        named = str(Path(home) / "hub")
    return absolute(os.path.expandvars(named), Path.cwd())


def cached_file(repo: str, file: str, revision: str | None) -> Path | None:
    """The downloaded file: try_to_load_from_cache, without the 0.1 s that importing it takes."""
    folder = hub_cache() / f"models--{repo.replace('/', '--')}"
    revision = revision or "main"
    ref = folder / "refs" / revision
    if not inside(revision) or not inside(file):
        return None
    commit = _commit(ref) if is_file(ref) else revision
    if not inside(commit):
        return None
    path = folder / "snapshots" / commit / file
    return path if is_file(path) else None


def inside(path: str) -> bool:
    """Whether a path of a hub, its parts divided by /, stays in the folder that it begins in."""
    return all(_PART.fullmatch(part) and part.strip(".") for part in path.split("/"))


def _commit(ref: Path) -> str:
    """What a branch's file in the cache says, "" if it cannot be read."""
    try:
        return ref.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def fetch(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    where: dict[str, Any] = {"revision": revision, "endpoint": endpoint}
    cached, cache = cached_file(repo, file, revision), hub_cache()
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
