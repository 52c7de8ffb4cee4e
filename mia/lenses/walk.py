"""What a graph does between two sites, as a list of steps: numpy functions of rows.

The logit lens walks from the last block's output to the logits, logit attribution from the
heads to what attention adds. Reading the steps off the graph is what makes LayerNorm, biases,
post-norms, logit scales and soft-capping come out right on every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mia.errors import ModelError
from mia.lenses.linear import Norm
from mia.sites import Site

if TYPE_CHECKING:
    from mia.engine.graph import Topology
    from mia.llama.weights import Weights

Array = npt.NDArray[np.floating[Any]]

#: floats of a matrix that are in memory at a time
_BLOCK = 4 << 20
#: operations that keep the numbers: another shape, or some of the rows
_SAME_NUMBERS = ("RESHAPE", "VIEW", "CONT", "GET_ROWS")


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """Times a matrix of the file: (n, n_in) -> (n, n_out). The matrix is read at each call, in blocks
    of rows."""

    weights: Weights
    name: str

    def __call__(self, x: Array) -> Array:
        n_out, n_in = self.weights.shape(self.name)
        out = np.empty((*x.shape[:-1], n_out), x.dtype)
        size = max(_BLOCK // n_in, 1)
        for start in range(0, n_out, size):
            stop = min(start + size, n_out)
            rows = self.weights.rows(self.name, start, stop)
            out[..., start:stop] = x @ rows.T.astype(x.dtype, copy=False)
        return out


@dataclass(frozen=True, eq=False, slots=True)
class Times:
    """Times a vector, element by element: the weight of a norm."""

    vector: npt.NDArray[np.float32]  # (width,)

    def __call__(self, x: Array) -> Array:
        return x * self.vector

    def columns(self, start: int, stop: int) -> Times:
        return Times(self.vector[start:stop])


@dataclass(frozen=True, eq=False, slots=True)
class Plus:
    """Plus a vector: a bias."""

    vector: npt.NDArray[np.float32]  # (width,)

    def __call__(self, x: Array) -> Array:
        return x + self.vector

    def columns(self, start: int, stop: int) -> Plus:
        return Plus(self.vector[start:stop])


@dataclass(frozen=True, slots=True)
class Scale:
    """Times a number, plus a number."""

    factor: float
    offset: float

    def __call__(self, x: Array) -> Array:
        return x * np.float32(self.factor) + np.float32(self.offset)

    def columns(self, start: int, stop: int) -> Scale:
        return self


@dataclass(frozen=True, slots=True)
class Tanh:
    """The bend of a soft-cap, the one step that is not linear."""

    def __call__(self, x: Array) -> Array:
        return np.tanh(x)

    def columns(self, start: int, stop: int) -> Tanh:
        return self


#: steps that act on each column of the rows by itself; `columns` gives the step of some of them
ByColumn = Times | Plus | Scale | Tanh
Step = Product | Norm | ByColumn


def walk(
    topology: Topology, weights: Weights, begin: Site, end: Site, *, architecture: str
) -> list[Step]:
    """The steps from the node of one site to that of another, in the order of the forward pass.

    Raises:
        ModelError: the graph lacks one of the sites, `end` is not computed from `begin` and
            the file's weights alone, or an operation between them is not known.
    """
    for site in (begin, end):
        if site not in topology.sites:
            raise ModelError(f"{architecture} has no {site} to read")
    node = topology.nodes[topology.sites[end].index]
    stop = topology.nodes[topology.sites[begin].index].addr
    steps: list[Step] = []
    while node.addr != stop:
        source = node.src[0]
        if topology.graph.is_added(node):
            pass  # what an adapter adds is in the weights that are read
        elif node.op == "MUL_MAT" and topology.is_leaf(source):
            steps.append(Product(weights, topology.node(source).name))
            source = node.src[1]
        elif node.op in ("ADD", "MUL") and topology.is_leaf(node.src[1]):
            vector = weights.vector(topology.node(node.src[1]).name)
            steps.append(Plus(vector) if node.op == "ADD" else Times(vector))
        elif node.op in ("RMS_NORM", "NORM"):
            steps.append(Norm(node.param_f32(0), centred=node.op == "NORM"))
        elif node.op == "SCALE":
            steps.append(Scale(node.param_f32(0), node.param_f32(1)))
        elif node.op == "TANH":
            steps.append(Tanh())
        elif node.op not in _SAME_NUMBERS:
            raise ModelError(
                f"{node.op} between {begin} and {end} of {architecture} is not known to mia"
            )
        if topology.is_leaf(source):
            raise ModelError(f"{end} of {architecture} is not computed from {begin} alone")
        node = topology.node(source)
    return steps[::-1]
