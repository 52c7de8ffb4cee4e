"""The `process` group: whole processes, from start to exit, beside one that only loads the model."""

import sys
from pathlib import Path

from benchmarks.harness import Bench, measure_process

BARE = """
import sys, llama_cpp as L
quiet = L.llama_log_callback(lambda *_: None)
L.llama_log_set(quiet, None)
L.llama_backend_init()
model = L.llama_model_load_from_file(sys.argv[1].encode(), L.llama_model_default_params())
L.llama_init_from_model(model, L.llama_context_default_params())
"""


def process(bench: Bench) -> None:
    mia, python = str(Path(sys.executable).with_name("mia")), sys.executable
    bench.model.tokenize("x")  # the file is in the page cache
    prompt = "Q: What is the capital of France?\nA: The capital of France is"
    commands = {
        "lens": [mia, "logit-lens", "l_out", "-m", bench.model.name, "-p", prompt],
        "bare": [python, "-c", BARE, str(bench.model.path)],
        "import": [python, "-c", "import mia"],
        "help": [mia, "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    megabytes: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(bench.rounds + 1):
        for name, argv in commands.items():
            wall, peak = measure_process(argv)
            if i:  # the first turn warms the caches
                seconds[name].append(wall)
                megabytes[name].append(peak)
    bench.add(
        "mia logit-lens l_out, whole process", seconds["lens"], unit="s", target=1, at_least=False
    )
    beside = "  a bare process that loads the model, beside"
    bench.add(beside, seconds["bare"], unit="s")
    bench.add(
        "mia logit-lens l_out, peak memory",
        megabytes["lens"],
        unit="MB",
        target=350,
        at_least=False,
    )
    bench.add(beside, megabytes["bare"], unit="MB")
    bench.add("import mia", seconds["import"], unit="s", target=0.3, at_least=False)
    bench.add("mia --help", seconds["help"], unit="s", target=0.3, at_least=False)
