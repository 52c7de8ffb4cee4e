"""Pictures: what is on the axes, that labels do not overlap, and that files are what they say."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mia.errors import FileError, UsageError
from mia.measure.estimates import Accuracy
from mia.methods.icl_reports import plot_curves
from mia.show import plots


def _maps(n_layer: int, n_head: int, n: int) -> np.ndarray:
    x = np.random.default_rng(0).random((n_layer, n_head, n, n)) * np.tri(n)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def _no_overlap(fig: Any) -> None:
    """No two labels of an axis touch, and none leaves the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    width, height = canvas.get_width_height()
    for axes in fig.axes:
        if not axes.axison:
            continue
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [
                t.get_window_extent()
                for t in axis.get_ticklabels()
                if t.get_text() and t.get_visible()
            ]
            for a, b in pairwise(boxes):
                assert not a.overlaps(b), f"{axis}: labels overlap"
            for box in (b for b in boxes if axes.get_label() != "<colorbar>"):
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


@pytest.mark.parametrize(("n_layer", "n_head", "n"), [(8, 8, 12), (30, 9, 64), (80, 64, 8)])
def test_grids_label_layers_and_heads(n_layer: int, n_head: int, n: int) -> None:
    fig = plots.attention_grid(
        _maps(n_layer, n_head, n),
        layers=range(n_layer),
        heads=range(n_head),
        pieces=["x"] * n,
        title="t",
    )
    axes = fig.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert [t.get_text() for t in axes.get_yticklabels()][:2] == ["0", "1"]
    assert fig.axes[1].get_ylabel() == "attention weight"
    _no_overlap(fig)


@pytest.mark.parametrize("shape", [(8, 8), (30, 9), (80, 64), (2, 3), (1, 128)])
def test_heatmaps_label_what_fits(shape: tuple[int, int]) -> None:
    fig = plots.heatmap(np.zeros(shape), x="head", y="layer", bar="drop", diverging=True)
    _no_overlap(fig)


def test_a_few_maps_have_tokens_on_the_ticks() -> None:
    pieces = ["<|endoftext|>", "The", " capital", "\n", "$x$", " internationalisation"]
    fig = plots.attention_grid(_maps(2, 2, 6), layers=[3, 5], heads=[0, 7], pieces=pieces)
    assert [a.get_title() for a in fig.axes[:4]] == [
        "layer 3 · head 0", "layer 3 · head 7", "layer 5 · head 0", "layer 5 · head 7",
    ]  # fmt: skip
    shown = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert shown == ["<|endoftext…", "The", "·capital", "\\n", "\\$x\\$", "·internatio…"]
    _no_overlap(fig)


def test_long_prompts_label_some_tokens() -> None:
    fig = plots.large_maps(
        _maps(1, 1, 300)[0], names=["a"], pieces=[f" word{i}" for i in range(300)]
    )
    assert 20 < len(fig.axes[0].get_yticklabels()) < 100
    _no_overlap(fig)


def test_values_land_where_they_belong() -> None:
    """The first pixel row of a tile is its query 0; smaller tiles keep the largest weight."""
    maps = np.zeros((5, 5, 4, 4), np.float32)
    maps[1, 2, 3, 0] = 1
    fig = plots.attention_grid(maps, layers=range(5), heads=range(5), pieces=["x"] * 4)
    canvas = np.asarray(fig.axes[0].images[0].get_array())
    pitch = 5  # 4 cells and a gap
    assert canvas[1 * pitch + 3, 2 * pitch + 0] == 1 and np.nansum(canvas) == 1
    pooled = plots._pooled(np.eye(100, dtype=np.float32), 10)
    assert pooled.shape == (10, 10) and np.array_equal(pooled, np.eye(10))


def test_curves_with_bands() -> None:
    fig = plots.curves(
        [0, 1], {"a": [1, 2], "b": [2, 1]}, intervals={"a": ([0, 1], [2, 3])}, x_label="layer"
    )
    assert len(fig.axes[0].lines) == 2 and len(fig.axes[0].collections) == 1
    with pytest.raises(UsageError, match=r"line 'a' has shape \(3,\), x has \(2,\)"):
        plots.curves([0, 1], {"a": [1, 2, 3]})


@pytest.mark.parametrize(("n", "bands"), [(1, 1), (6, 6), (7, 0), (40, 0)])
def test_many_curves_are_told_apart_and_the_legend_covers_nothing(n: int, bands: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    x, y = np.arange(30), np.linspace(0, 1, 30)
    lines = [plots.Line(name=f"a_rather_long_task_{i}", x=x, y=y, band=(y, y)) for i in range(n)]
    fig = plots.panels([plots.Panel(lines=lines, share=True)], title="t", x_label="layer")
    axes = fig.axes[0]
    assert axes.get_ylim() == (0, 1) and len(axes.collections) == bands
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == n
    ticks = [t for t in axes.get_xticks() if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    assert len(ticks) > 3 and all(t == int(t) <= 29 for t in ticks)
    assert len(fig.legends) == (n > 1)
    if n > 1:
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
        box, around = fig.legends[0].get_window_extent(), axes.get_tightbbox()
        assert around is not None and not box.overlaps(around)
        assert around.height > 3.5 * fig.dpi
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= canvas.get_width_height()[0]
        texts = [t.get_text() for t in fig.legends[0].get_texts() if t.get_text().strip()]
        assert texts == [line.name for line in lines]


def test_a_line_has_points_of_its_own_and_names_keep_their_colour() -> None:
    a = plots.Line(name="_a$", x=[1, 2, 3], y=[1, 2, 3])
    b = plots.Line(name="b", x=[2.5], y=[0.5])
    fig = plots.panels([plots.Panel(lines=[a, b]), plots.Panel(lines=[b], share=True)])
    top, bottom = fig.axes
    assert list(np.asarray(top.lines[1].get_xdata())) == [2.5]
    assert top.lines[1].get_color() == bottom.lines[0].get_color() != top.lines[0].get_color()
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [" _a\\$", "b"]
    plots.panels([plots.Panel(lines=[plots.Line(name="a", x=[], y=[])])])


@pytest.mark.parametrize("layers", [[7], [0, 1], [0, 1, 2]])
def test_few_layers_have_whole_ticks(layers: list[int]) -> None:
    axes = plots.curves(layers, {"a": layers}).axes[0]
    low, high = axes.get_xlim()
    ticks = [t for t in axes.get_xticks() if low < t < high]
    assert ticks == layers


def _drawn(monkeypatch: pytest.MonkeyPatch, *args: Any) -> Any:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda fig, path: figures.append(fig))
    plot_curves("x.svg", *args)
    return figures[0]


def _texts(fig: Any) -> list[str]:
    return [t.get_text() for t in fig.legends[0].get_texts() if t.get_text().strip()]


def test_accuracy_by_layer_of_a_task_names_it_and_has_its_levels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    curve = {0: Accuracy(0, 10), 1: Accuracy(5, 10), 2: Accuracy(10, 10)}
    levels = {"with examples": {"a": 0.9}, "without examples": {"a": 0.1}}
    fig = _drawn(monkeypatch, {"with the vector": {"a": curve}}, "by layer", levels)
    axes = fig.axes[0]
    assert axes.get_title(loc="left") == "a: by layer"
    assert [list(line.get_ydata()) for line in axes.lines] == [[0, 0.5, 1], [0.9] * 2, [0.1] * 2]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", ":"]
    assert _texts(fig) == ["with the vector", "with examples", "without examples"]
    four = dict.fromkeys("abcd", curve)
    levels = {kind: dict.fromkeys(four, 0.5) for kind in levels}
    fig = _drawn(monkeypatch, {"with the vector": four}, "by layer", levels)
    assert len(fig.axes[0].lines) == 4 and _texts(fig) == list("abcd")
    assert fig.axes[0].get_title(loc="left") == "by layer"


@pytest.mark.parametrize("n", [1, 5, 6, 12])
def test_two_curves_of_a_task_are_solid_and_dashed_or_in_two_panels(
    monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    tasks = [f"t{i}" for i in range(n)]
    kinds = {
        kind: {t: {0: Accuracy(k, 9), 1: Accuracy(k, 9)} for t in tasks}
        for kind, k in (("plain", 3), ("shuffled", 6))
    }
    fig = _drawn(monkeypatch, kinds, "by layer")
    lines = [line for axes in fig.axes for line in axes.lines]
    assert [line.get_ydata()[0] for line in lines] == [3 / 9] * n + [6 / 9] * n
    colours = [line.get_color() for line in lines]
    assert colours[:n] == colours[n:]
    dashes = [line.get_linestyle() for line in lines]
    if n <= 5:
        assert len(fig.axes) == 1 and dashes == ["-"] * n + ["--"] * n
        assert {"plain", "shuffled"} <= set(_texts(fig))
    else:
        assert [a.get_ylabel() for a in fig.axes] == ["accuracy plain", "accuracy shuffled"]
        assert dashes[:n] == dashes[n:] and _texts(fig) == tasks


def test_a_clipped_heatmap_shows_what_one_strong_cell_would_hide() -> None:
    from matplotlib.patches import Rectangle

    a = np.tile([0.01, -0.01], (30, 4))
    a[20, 5], a[3, 1], a[4, 2], a[5, 3] = 0.25, -0.125, 0.03, 0.02
    fig = plots.heatmap(a, diverging=True, clipped=True, bar="effect")
    _no_overlap(fig)
    axes, bar = fig.axes
    assert axes.images[0].get_clim() == (-0.02, 0.02)
    assert bar.get_ylabel() == (
        "effect\nframed: the 10 strongest; max 0.25 at 20.5; min -0.12 at 3.1"
    )
    framed = [tuple(p.get_xy()) for p in axes.patches if isinstance(p, Rectangle)]
    assert framed[:3] == [(4.5, 19.5), (0.5, 2.5), (1.5, 3.5)] and len(framed) == 10
    # nearly all are 0: the one that is not still has a colour
    a = np.zeros((30, 9))
    a[1, 2] = 0.5
    fig = plots.heatmap(a, diverging=True, clipped=True)
    assert fig.axes[0].images[0].get_clim() == (-0.5, 0.5) and len(fig.axes[0].patches) == 1
    plots.heatmap(np.zeros((2, 2)), diverging=True, clipped=True)


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_the_same_curves_and_effects_give_the_same_file(tmp_path: Path, suffix: str) -> None:
    def drawn() -> list[bytes]:
        out = []
        effects = np.arange(-50.0, 50).reshape(10, 10) ** 3
        for fig in (
            plots.curves([0, 1], {f"t{i}": [i, 2] for i in range(12)}, title="t"),
            plots.heatmap(effects, diverging=True, clipped=True, bar="b"),
        ):
            plots.save(fig, tmp_path / f"a{suffix}")
            out.append((tmp_path / f"a{suffix}").read_bytes())
        return out

    assert drawn() == drawn()


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_files_are_what_their_names_say(tmp_path: Path, suffix: str, begin: bytes) -> None:
    fig = plots.heatmap([[1.0, np.nan], [0.5, -1]])
    plots.save(fig, tmp_path / f"a{suffix}")
    plots.save(plots.heatmap([[1.0, np.nan], [0.5, -1]]), tmp_path / f"b{suffix}")
    written = (tmp_path / f"a{suffix}").read_bytes()
    assert written.startswith(begin) and written == (tmp_path / f"b{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_names_and_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match=r"cannot draw .*a\.bmp: its name must end in \.png, \.svg, \.pdf$"
    ):
        plots.check_picture(tmp_path / "a.bmp")
    with pytest.raises(FileError, match="there is no folder"):
        plots.check_picture(tmp_path / "no" / "a.png")
    with pytest.raises(UsageError, match=r"not of shape \(3,\)"):
        plots.heatmap([1, 2, 3])
    with pytest.raises(UsageError, match="got 1 labels for 2 cells"):
        plots.heatmap([[1, 2]], x_labels=["a"])
    with pytest.raises(UsageError, match="are not of 2 layers and 1 heads"):
        plots.attention_grid(_maps(1, 1, 3), layers=[0, 1], heads=[0], pieces=["x"] * 3)


def test_without_matplotlib_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from mia.show import plots\n"
        "try: plots.figure(1, 1)\n"
        "except Exception as err: print(type(err).__name__, err)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "UsageError pictures need matplotlib: pip install 'mia[plots]'\n"
