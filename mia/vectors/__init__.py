"""Directions, one per layer: values, files, expressions."""

from mia.vectors.vector import Vector as Vector
from mia.vectors.vector import check_suffix as check_suffix
from mia.vectors.vector import load as load
