"""Small random vectors."""

import numpy as np

from mia.vectors import Vector

WIDTH = 8


def make(*layers: int, seed: int = 0, name: str = "v", **more: str) -> Vector:
    rng = np.random.default_rng(seed)
    directions = {i: rng.standard_normal(WIDTH).astype(np.float32) for i in layers}
    return Vector(directions, metadata={"name": name, **more})
