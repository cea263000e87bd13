"""Counter-based random numbers: token t of a sequence is drawn with a number that depends on the
sequence's seed and t alone, so a rollout does not depend on what else is in the batch."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def _mix(z: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea, Flood 2014), on uint64 arrays with wrap-around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[B] float64 in [0, 1), one for each (seed, position); both [B] uint64."""
    mixed = _mix(_mix(seeds) + positions * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derive_seed(*parts: int) -> int:
    """One 64-bit seed from several whole numbers; order matters."""
    state = 0
    for part in parts:
        z = np.array([(state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK], np.uint64)
        state = int(_mix(z)[0])
    return state
