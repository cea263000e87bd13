"""Counter-based random numbers: token t of a sequence is drawn with a number that depends on the
sequence's seed and t alone, so a rollout does not depend on what else is in the batch."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

_Whole = TypeVar("_Whole", int, np.ndarray)


def _mix(z: _Whole) -> _Whole:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014), modulo 2⁶⁴, on a whole number or a uint64 array."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[B] float64 in [0, 1), one for each (seed, position); both [B] uint64."""
    mixed = _mix(_mix(seeds) + positions * _GOLDEN)
    return (mixed >> 11).astype(np.float64) * 2.0**-53


def derive_seed(*parts: int) -> int:
    """One 64-bit seed from several whole numbers; order matters."""
    state = 0
    for part in parts:
        state = _mix((state + part + _GOLDEN) & _MASK)
    return state
