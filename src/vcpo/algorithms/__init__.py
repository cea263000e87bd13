"""Algorithms as frozen compositions of estimators."""

from vcpo.algorithms.catalog import ALGORITHMS, get_algorithm
from vcpo.algorithms.composition import Algorithm, Evidence, Update

__all__ = ["ALGORITHMS", "Algorithm", "Evidence", "Update", "get_algorithm"]
