"""Tiny random models for all tests, opened once: `tiny("llama")` is a model and its oracle."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import chromium
import one_core  # noqa: F401  (before numpy)
import pytest
from tiny import CASES, MIXTURES, Tiny
from tiny_gguf import write_tiny

from mia.engine import limits
from mia.errors import MiaError
from mia.llama import Context
from mia.llama.gguf_file import read_header
from mia.model import Model
from mia.models import registry
from mia.models.server import RpcServer


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, files with slow tests come first: a long one at the end would run alone."""
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    """A tab of a browser without a window."""
    if chromium.PROGRAM is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    with chromium.browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts what runs in its background deaf to Ctrl-C; the tests of it need ears."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of files, so that a test finds nothing of an earlier run."""
    old = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = old


@pytest.fixture(scope="session", autouse=True)
def _on_servers() -> Iterator[None]:
    """With MIA_TEST_RPC every model lies on RPC servers on loopback, which is memory that is not
    the host's, as on a GPU: "1" or "2" of them, or "half", one server and half of the blocks."""
    wish = os.environ.get("MIA_TEST_RPC")
    if not wish:
        yield
        return
    with ExitStack() as stack:
        started = [
            stack.enter_context(RpcServer(port=0, threads=1))
            for _ in range(2 if wish == "2" else 1)
        ]
        plain = registry.resolve

        def resolve(name: Any) -> registry.ModelSpec:
            spec = plain(name)
            assert spec.path is not None
            layers = _half_of_the_blocks(spec.path) if wish == "half" else -1
            servers = ",".join(s.endpoint for s in started)
            return replace(spec, rpc=servers, gpu_layers=layers)

        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(registry, "resolve", resolve)
        yield


def _half_of_the_blocks(path: Path) -> int:
    with path.open("rb") as file:
        values = read_header(file.fileno(), path).values
    return (int(values[f"{values['general.architecture'].decode()}.block_count"]) + 1) // 2


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tiny]]:
    """The tiny model of a name in CASES or MIXTURES, or "mamba". One thread: on a busy machine a barrier
    between two costs more than these models take."""
    folder = tmp_path_factory.mktemp("tiny")
    with ExitStack() as stack:

        @cache
        def get(name: str) -> Tiny:
            arch, options = CASES.get(name, (name, {}))
            path = write_tiny(folder / f"{name}.gguf", arch, **options)
            return Tiny(name, path, stack.enter_context(Model(path, threads=1)))

        yield get


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]) -> Tiny:
    """Each tiny model in turn."""
    return tiny(request.param)


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]) -> Tiny:
    """Each tiny mixture of experts in turn."""
    return tiny(request.param)


@pytest.fixture
def llama(tiny: Callable[[str], Tiny]) -> Tiny:
    """The tiny model for what does not depend on the architecture."""
    return tiny("llama")


@pytest.fixture
def reopen() -> Iterator[Callable[..., Tiny]]:
    """The same file in a model of its own, for tests that change limits: `reopen(llama, ctx=64)`."""
    with ExitStack() as stack:

        def get(of: Tiny, **options: Any) -> Tiny:
            model = stack.enter_context(Model(of.path, threads=1, **options))
            return replace(of, model=model)

        yield get


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more cells than the longest request of a run needs."""
    monkeypatch.setattr(limits, "KV_BYTES", 0)


@pytest.fixture
def five_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than five rows in a decode, for models that are opened afterwards. llama.cpp wants
    no more sequences than that either."""
    monkeypatch.setattr(limits, "UBATCH", 5)
    monkeypatch.setattr(limits, "MAX_SEQUENCES", 5)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each decode had that ran to its end, in order."""
    sizes: list[int] = []
    plain = Context.decode

    def decode(self: Context, tokens: Any, *rest: Any) -> bool:
        done = plain(self, tokens, *rest)
        if done:
            sizes.append(len(tokens))
        return done

    monkeypatch.setattr(Context, "decode", decode)
    return sizes


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Model]:
    """The real model, for the slow tests; they are skipped where it is not installed."""
    try:
        opened = Model("smollm2")
    except MiaError as err:
        pytest.skip(str(err))
    with opened as m:
        yield m
