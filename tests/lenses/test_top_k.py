"""The k largest of rows, block by block."""

import numpy as np

from mia.lenses.top_k import TopK


def test_top_k_with_many_candidates_and_ties() -> None:
    rng = np.random.default_rng(2)
    values = rng.integers(0, 40, size=(6, 3000)).astype(np.float32)
    top = TopK(6, 9)
    for start in range(0, 3000, 700):
        block = values[:, start : start + 700]
        top.add(start, block, block.max(1))
    ids, found = top.sorted()
    np.testing.assert_array_equal(found, -np.sort(-values, axis=1)[:, :9])
    np.testing.assert_array_equal(np.take_along_axis(values, ids, 1), found)
    assert all(len(set(row)) == 9 for row in ids.tolist())
