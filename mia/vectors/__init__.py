"""Directions, one per layer: values, files, expressions."""

from mia.vectors.expression import combine as combine
from mia.vectors.files import check_file as check_file, check_suffix as check_suffix
from mia.vectors.vector import Vector as Vector, load as load
