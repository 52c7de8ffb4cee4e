"""Pictures: what is on the axes, that labels do not overlap, and that files are what they say."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mia import plots
from mia.errors import FileError, UsageError


def _maps(n_layer: int, n_head: int, n: int) -> np.ndarray:
    x = np.random.default_rng(0).random((n_layer, n_head, n, n)) * np.tri(n)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def _no_overlap(fig) -> None:  # type: ignore[no-untyped-def]
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
    canvas = fig.axes[0].images[0].get_array()
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
    with pytest.raises(UsageError, match="1 labels are given for 2 cells"):
        plots.heatmap([[1, 2]], x_labels=["a"])
    with pytest.raises(UsageError, match="are not of 2 layers and 1 heads"):
        plots.attention_grid(_maps(1, 1, 3), layers=[0, 1], heads=[0], pieces=["x"] * 3)


def test_without_matplotlib_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from mia import plots\n"
        "try: plots.figure(1, 1)\n"
        "except Exception as err: print(type(err).__name__, err)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "UsageError pictures need matplotlib: pip install 'mia[plots]'\n"
