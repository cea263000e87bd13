"""Which prompts are held out, and how generated problems are drawn.

A prompt belongs to one split for ever: a stable hash of its text decides, not its place in a stream. So
no training problem or demonstration of any run, seed or setting is ever a held-out problem.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from vcpo.environments.protocol import Problem, Split
from vcpo.errors import ConfigError

HELD_OUT_ONE_IN = 8
"""One prompt in this many is held out."""

MAX_DRAWS = 50_000
"""Candidates tried for one problem before the settings are declared too narrow."""


def split_of(prompt: str) -> Split:
    """The split that ``prompt`` belongs to: held out for one in eight, by BLAKE2b of its UTF-8 text."""
    digest = blake2b(prompt.encode(), digest_size=1).digest()[0]
    return "held_out" if digest % HELD_OUT_ONE_IN == 0 else "train"


def draw(index: int, split: Split, propose: Callable[[random.Random], tuple[str, Any] | None]) -> Problem:
    """Problem ``index`` of the split: the first candidate of a generator seeded by (index, split) that
    belongs to the split. ``propose`` gives (prompt, answer), or None for a candidate it rejects itself.

    Raises ConfigError if no candidate in ``MAX_DRAWS`` fits, which happens only where the settings allow
    so few prompts that a split has none.
    """
    rng = random.Random(2 * index + (split == "held_out"))
    for _ in range(MAX_DRAWS):
        candidate = propose(rng)
        if candidate is not None and split_of(candidate[0]) == split:
            return Problem(index, *candidate)
    raise ConfigError(
        f"no {split} problem in {MAX_DRAWS} draws: these [environment] settings allow too few prompts; "
        "raise environment.size (on a grid, or take fewer environment.walls or more environment.max_turns)"
    )
