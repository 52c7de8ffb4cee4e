"""How CPU time grows with the number of interventions and of tokens, as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.peers.jobs import write_inputs
from benchmarks.peers.rounds import Answers
from mia.model import Model

#: what grows -> job, sizes, the axis
AXES = {
    "interventions": ("heads", (64, 256, 1024, 4096), "head replacements at one prompt"),
    "capture": ("capture", (32, 128, 512, 2048), "tokens captured at 30 layers"),
    "lens": ("lens", (32, 128, 512, 2048), "tokens read by the lens at 6 layers"),
}
Seconds = dict[str, dict[int, float]]  # contestant -> size -> CPU seconds


def grow(
    model: Model,
    running: Sequence[Answers],
    folder: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Seconds]:
    """Each axis: every contestant once per size, after a turn at the smallest that is not
    timed."""
    out: dict[str, Seconds] = {}
    for name, (job, sizes, _) in AXES.items():
        out[name] = {}
        for n, size in enumerate(sizes):
            inputs = write_inputs(model, job, folder, size=size)
            for who in running:
                if job not in who.jobs:
                    continue
                answer = who.ask(job, inputs)
                if n == 0 and "error" not in answer:
                    answer = who.ask(job, inputs)
                if "error" in answer:
                    progress(f"{name}: {size}: {who.contestant.name}: {answer['error']}")
                    continue
                taken = answer["cpu"] * answer["scale"]
                out[name].setdefault(who.contestant.name, {})[size] = taken
                progress(f"{name}: {size}: {who.contestant.name}: {taken:.3g} s")
    return out


def draw(growth: Mapping[str, Seconds], path: Path) -> None:
    """One panel per axis, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(growth), figsize=(4.2 * len(growth), 3.8), squeeze=False)
    for panel, (name, seconds) in zip(panels[0], growth.items(), strict=True):
        for who, by_size in seconds.items():
            dashed = not who.startswith("mia")
            panel.plot(
                list(by_size), list(by_size.values()), "o--" if dashed else "o-", ms=4, label=who
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        sizes = AXES[name][1]
        panel.set_xticks(sizes, [f"{s:,}" for s in sizes])
        panel.set_xlabel(AXES[name][2])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("CPU seconds, one thread")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
