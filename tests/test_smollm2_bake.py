"""Baked files of the real model, in mia, in llama-cpp-python, and in llama.cpp's own programs.

The last need `MIA_LLAMA_TOOLS`, a folder with llama-completion and llama-server of the same source.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mia.errors import MiaError, ModelError
from mia.methods import contrast
from mia.methods.bake import bake
from mia.model import Model
from mia.vectors import Vector

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::mia.notices.MiaWarning")]
PROMPT = "I went to the cinema and the film was"
N = 32
TOOLS = Path(os.environ.get("MIA_LLAMA_TOOLS", ""))
needs_tools = pytest.mark.skipif(
    "MIA_LLAMA_TOOLS" not in os.environ, reason="MIA_LLAMA_TOOLS names no folder"
)


@pytest.fixture(scope="module", autouse=True)
def _three_texts() -> Iterator[None]:
    """Of the eight that a bake is checked with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mia.bake.checks._TEXTS", 3)
        yield


@pytest.fixture(scope="module")
def f32() -> Iterator[Model]:
    try:
        opened = Model("smollm2", as_type="f32")
    except MiaError as err:
        pytest.skip(str(err))
    with opened as m:
        yield m


@pytest.fixture(scope="module")
def love(f32: Model) -> Vector:
    return contrast.learn(f32, "sentiment", layers=[14], bos=True).vector


@pytest.fixture(scope="module")
def lora(f32: Model, love: Vector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "without.gguf"
    report = bake(f32, love, path, direction_layer=14, strength=0.4)
    [check] = report.checks
    assert check.edit_baked < 1e-9 and check.plain_edit > 0.1 and check.same_top > 0.99
    assert report.tensors == 60 and path.stat().st_size < 500_000
    return path


@pytest.fixture(scope="module")
def texts(f32: Model, lora: Path) -> dict[float, Any]:
    """What mia writes without the adapter, with it, and with half of it."""
    out = {0.0: f32.generate(PROMPT, N, bos=False)}
    for scale in (1.0, 0.5):
        with f32.reopened(lora={lora: scale}) as m:
            out[scale] = m.generate(PROMPT, N, bos=False)
    assert len({g.text for g in out.values()}) == 3
    return out


def test_llama_cpp_python_gives_the_same_tokens(
    f32: Model, lora: Path, texts: dict[float, Any]
) -> None:
    import llama_cpp

    assert f32.copy is not None
    llm = llama_cpp.Llama(
        str(f32.copy.path),
        lora_path=str(lora),
        n_ctx=128,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )
    tokens: list[int] = []
    for token in llm.generate(f32.ids(PROMPT, bos=False), temp=0.0):
        tokens.append(int(token))
        if len(tokens) == N:
            break
    llm.close()
    assert tokens == texts[1.0].tokens


def _program(name: str, f32: Model, lora: Path) -> list[str]:
    assert f32.copy is not None
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "2"]
    return [str(TOOLS / name), "-m", str(f32.copy.path), "--lora", str(lora), *exact]


@needs_tools
def test_llama_completion_gives_the_same_text(
    f32: Model, lora: Path, texts: dict[float, Any]
) -> None:
    words = ["-p", PROMPT, "-n", str(N), "--temp", "0", "-no-cnv", "--no-display-prompt"]
    done = subprocess.run(
        [*_program("llama-completion", f32, lora), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip("\n") == texts[1.0].text.rstrip("\n")


@needs_tools
def test_llama_server_takes_the_scale_with_each_request(
    f32: Model, lora: Path, texts: dict[float, Any]
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["--port", str(port), "--host", "127.0.0.1", "-c", "256", "-np", "1"]
    server = subprocess.Popen(
        [*_program("llama-server", f32, lora), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", server)
        for scale in (1.0, 0.0, 0.5, 1.0):
            body = {
                "prompt": PROMPT,
                "n_predict": N,
                "temperature": 0,
                "cache_prompt": False,
                "lora": [{"id": 0, "scale": scale}],
            }
            request = urllib.request.Request(
                f"{url}/completion",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                assert json.load(answer)["content"] == texts[scale].text, scale
    finally:
        server.terminate()
        server.wait()


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


def test_a_quantized_model_is_baked_to_its_noise(
    smollm2: Model, love: Vector, tmp_path: Path
) -> None:
    report = bake(smollm2, love, tmp_path / "a.gguf", direction_layer=14)
    [check] = report.checks
    assert check.edit_baked < 3 * check.noise < 0.05 * check.plain_edit
    with pytest.raises(ModelError, match=r"does not do what the edit does.*weight_type"):
        bake(smollm2, love, tmp_path / "b.gguf", kind="model", direction_layer=14)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
