"""The picture of a sweep over one axis: the numbers are where they should be."""

import numpy as np
import pytest

from mia.errors import UsageError
from mia.show.effect_curve import effect_curve

Y = np.array([0.5, -2.0, 1.0])


def test_the_line_its_interval_and_the_floor() -> None:
    fig = effect_curve(
        Y, x=[3, 4, 8], interval=(Y - 1, Y + 2), floor=0.25, x_label="layer", y_label="nats"
    )
    (axes,) = fig.axes
    zero, line = axes.lines
    assert np.asarray(line.get_xydata()).tolist() == [[3, 0.5], [4, -2], [8, 1]]
    assert set(np.asarray(zero.get_ydata()).tolist()) == {0}
    (band,) = axes.collections
    corners = np.asarray(band.get_paths()[0].vertices).tolist()
    for corner in ([3, -0.5], [3, 2.5], [4, -3], [4, 0], [8, 0], [8, 3]):
        assert corner in corners
    (floor,) = axes.patches
    assert (floor.get_y(), floor.get_height()) == (-0.25, 0.5)  # type: ignore[attr-defined]
    texts = [t.get_text() for t in fig.legends[0].get_texts()]
    assert texts == ["noise floor, ±0.25", "95 % interval"]


def test_tokens_stand_under_their_points() -> None:
    fig = effect_curve(Y, labels=[" the", "$a$", "\n"], floor=float("nan"))
    (axes,) = fig.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["·the", r"\$a\$", "\\n"]
    assert list(axes.get_xticks()) == [0, 1, 2]
    assert not axes.patches and not fig.legends


@pytest.mark.parametrize(
    "more", [{"x": [1.0, 2.0]}, {"interval": (Y, Y[:2])}, {"labels": ["a"]}], ids=str
)
def test_shapes_that_do_not_fit_are_refused(more: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"a curve of shape|got 1 labels for 3"):
        effect_curve(Y, **more)  # type: ignore[arg-type]
