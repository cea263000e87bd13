"""Windowed FIFO: which groups may be generated, and which may be trained on next.

Groups are numbered 0, 1, 2, … in the order of admission. A group is *active* from its admission until the
step that trains on it is complete, or until it is skipped (:mod:`vcpo.pipeline.dynamic_sampling`). P groups
make a step.

- **Admission**: a group is admitted while fewer than (S+1)·P + M are active, where M groups are begun beyond
  those needed (over-provision, usually 0). This is the back-pressure: with the window full, samplers rest
  until the learner has finished a step.
- **Taking**: groups of a step are taken one at a time, each time the oldest finished one among the W
  numbers that begin at the *anchor*, the oldest active group not yet taken. So at most W−1 younger groups
  can pass a slow one; nothing is dropped; short answers gain nothing by being fast beyond that.
- **Skipping**: a group that is not to be trained on gives up its place, and the anchor passes over it.

**Bound.** The lag of a group g, the learner's version when g is taken minus the oldest version in g, is at
most S + 1 + ⌊(M+W−2)/P⌋, and 0 if S = 0 and M = 0. Without over-provision that is S + ⌈(W−1)/P⌉.

Proof. Let v be the learner's version when g is admitted. Weights of version v were sent to the samplers
before g was (one ordered channel), so no token of g is older than v. Let n steps complete between g's
admission and the step that takes g; the lag is at most n. Each of those n steps trains P groups other than
g, and each such group was either active at g's admission, or is younger than g.

- Active at g's admission (those in training included, since a group stays active until its step is
  complete): at most (S+1)·P + M − 1 besides g.
- Younger: while g is not taken the anchor is at most g, so a younger group that is taken is numbered below
  g + W: at most W − 1 of them.

A group that is skipped is in no step, so skipping can only take groups out of the two lists.

Hence n·P ≤ (S+1)·P + M − 1 + (W−1), so n ≤ S + 1 + ⌊(M+W−2)/P⌋: S for W = 1 and M = 0, and for M = 0 ever
S + ⌈(W−1)/P⌉, since ⌊(W−2)/P⌋ + 1 = ⌈(W−1)/P⌉. ∎

With S = 0 and M = 0 at most P groups are active, so each step takes all of them, and none is admitted before
it is complete, but in the place of one that is skipped: the synchronous loop, whatever W.
"""

from __future__ import annotations

from collections.abc import Iterable


def lag_bound(lag: int, window: int, prompts: int, over_provision: int = 0) -> int:
    """The largest policy lag any group can have: S + 1 + ⌊(M+W−2)/P⌋, or 0 for the synchronous loop."""
    return lag + 1 + (over_provision + window - 2) // prompts if lag or over_provision else 0


class Window:
    """The bookkeeping of admission and taking; knows numbers of groups, not groups."""

    def __init__(
        self,
        prompts: int,
        lag: int,
        window: int,
        *,
        over_provision: int = 0,
        anchor: int = 0,
        trained: Iterable[int] = (),
    ) -> None:
        """``anchor`` and ``trained`` resume a run: groups below the one and those of the other are done,
        trained or skipped."""
        self._prompts, self._width = prompts, window
        self._room = (lag + 1) * prompts + over_provision
        self._anchor = self._next = anchor
        self._passed = {index for index in trained if index >= anchor}
        """Taken, trained or skipped groups above the anchor."""
        self._finished: set[int] = set()
        self._active: set[int] = set()
        self._in_training: set[int] = set()

    @property
    def active(self) -> int:
        """Groups admitted and not yet trained."""
        return len(self._active)

    @property
    def ready(self) -> int:
        """Groups that are finished and wait to be taken."""
        return len(self._finished)

    def admit(self, needed: int | None = None) -> list[int]:
        """Numbers of the groups to generate now; they count as active from here on. ``needed``: how many
        groups the rest of the run will train on; more than that are never active."""
        limit = self._room if needed is None else min(self._room, needed)
        admitted: list[int] = []
        while len(self._active) < limit:
            if self._next not in self._passed:
                admitted.append(self._next)
                self._active.add(self._next)
            self._next += 1
        return admitted

    def finish(self, index: int) -> None:
        """Group ``index`` is complete. A number that is not being generated is a programming error."""
        if index not in self._active or index in self._finished or index in self._in_training:
            raise ValueError(f"group {index} is not being generated")
        self._finished.add(index)

    def skip(self, index: int) -> None:
        """Group ``index``, active and not taken, will not be trained on: its place is free."""
        if index not in self._active or index in self._in_training:
            raise ValueError(f"group {index} is not waiting for a step")
        self._finished.discard(index)
        self._active.remove(index)
        self._passed.add(index)
        self._anchor = _past(self._anchor, self._passed)

    def take(self) -> list[int] | None:
        """The P groups of the next step in ascending order, or None while they are not all there."""
        if self._in_training:
            raise ValueError("the step before is not complete")
        anchor, passed, taken = self._anchor, set(self._passed), []
        left = sorted(self._finished)
        while len(taken) < self._prompts:
            if not left or left[0] >= anchor + self._width:
                return None
            taken.append(left.pop(0))
            passed.add(taken[-1])
            anchor = _past(anchor, passed)
        self._anchor, self._passed = anchor, passed
        self._finished.difference_update(taken)
        self._in_training = set(taken)
        return taken

    def complete(self) -> None:
        """The step on the groups last taken is complete: their places are free."""
        self._active -= self._in_training
        self._in_training = set()

    def position(self) -> dict[str, object]:
        """Where to resume once the step is complete: the arguments ``anchor`` and ``trained``."""
        return {"anchor": self._anchor, "trained": sorted(self._passed)}


def _past(anchor: int, passed: set[int]) -> int:
    """The first number from ``anchor`` on that is not among ``passed``, which loses those before it."""
    while anchor in passed:
        passed.remove(anchor)
        anchor += 1
    return anchor
