"""The carriers: the few records that travel through the system.

A *trajectory* is the record of one played episode, tokens in and tokens out: prompt, sampled tokens
and observations in one sequence, never re-tokenized. A *group* is the trajectories of one prompt.
Arrays are NumPy, so that samplers and environments can be used without torch.

Example, a prompt of two tokens, one sampled token, one observed token::

    Trajectory(
        tokens=np.array([5, 9, 2, 7], np.int32),
        action_mask=np.array([False, False, True, False]),
        log_probs=np.array([0.0, 0.0, -0.7, 0.0], np.float32),
        versions=np.array([-1, -1, 4, -1], np.int32),
        reward=1.0,
    )
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from vcpo.errors import NonFiniteError, VcpoError

Outcome = Literal["finished", "truncated", "failed"]

NOT_SAMPLED = -1
"""Version of a token that no policy sampled (prompt and observations)."""


@dataclass(frozen=True)
class Trajectory:
    """One played episode of T tokens."""

    tokens: np.ndarray
    """[T] int32: prompt, sampled tokens and observations in the order the model saw them."""
    action_mask: np.ndarray
    """[T] bool: true where the behaviour policy sampled the token; only these enter the loss."""
    log_probs: np.ndarray
    """[T] float32: behaviour log-probability of each sampled token, in nats; 0 elsewhere."""
    versions: np.ndarray
    """[T] int32: policy version that sampled the token, stamped at generation; -1 elsewhere."""
    reward: float
    """Scalar reward of the whole episode."""
    outcome: Outcome = "finished"
    """``truncated``: cut by the context or the token limit; ``failed``: the environment failed twice."""
    note: str = ""
    """Why the episode failed; empty otherwise."""

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.action_mask), len(self.log_probs), len(self.versions)}
        if len(lengths) != 1:
            raise VcpoError(f"a trajectory's arrays must have one length, got lengths {sorted(lengths)}")
        if not np.isfinite(self.reward):
            raise NonFiniteError("reward", None, "an environment must return a finite number")

    @property
    def action_count(self) -> int:
        """Number of sampled tokens."""
        return int(self.action_mask.sum())

    @property
    def oldest_version(self) -> int | None:
        """Version of the oldest sampled token; None if nothing was sampled."""
        return int(self.versions[self.action_mask].min()) if self.action_mask.any() else None


class Outline(NamedTuple):
    """What the controller knows of a group."""

    problem: int
    rewards: list[float]
    tokens: int
    failed: int
    """Episodes that failed."""


@dataclass(frozen=True)
class Group:
    """The trajectories of one prompt."""

    index: int
    """Place in the order of admission, from 0: the window and the journal know a group by it."""
    problem: int
    """Index of the problem in the environment's training stream."""
    trajectories: tuple[Trajectory, ...]
    seconds: float = 0.0
    """Wall time from admission to the last trajectory's end."""
    admitted_version: int = 0
    """The learner's version when the group was admitted; no token of it is older."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Free JSON-able remarks of the rollout worker (failures, retries)."""

    @property
    def oldest_version(self) -> int:
        """Oldest version of any sampled token, else the version at admission (nothing was sampled)."""
        versions = [v for t in self.trajectories if (v := t.oldest_version) is not None]
        return min(versions, default=self.admitted_version)

    @property
    def rewards(self) -> list[float]:
        return [t.reward for t in self.trajectories]

    def to_bytes(self) -> bytes:
        """One JSON header line, then the four arrays of each trajectory, little endian, in order."""
        header = {
            "index": self.index,
            "problem": self.problem,
            "seconds": self.seconds,
            "admitted_version": self.admitted_version,
            "extra": self.extra,
            "trajectories": [
                {"length": len(t.tokens), "reward": t.reward, "outcome": t.outcome, "note": t.note}
                for t in self.trajectories
            ],
        }
        parts = [json.dumps(header, separators=(",", ":")).encode(), b"\n"]
        for t in self.trajectories:
            parts += [
                t.tokens.astype("<i4", copy=False).tobytes(),
                t.action_mask.astype("?", copy=False).tobytes(),
                t.log_probs.astype("<f4", copy=False).tobytes(),
                t.versions.astype("<i4", copy=False).tobytes(),
            ]
        return b"".join(parts)

    @staticmethod
    def outline_of(data: bytes) -> Outline:
        """From the header of a record alone."""
        header = json.loads(data.partition(b"\n")[0])
        members = header["trajectories"]
        return Outline(
            problem=header["problem"],
            rewards=[t["reward"] for t in members],
            tokens=sum(t["length"] for t in members),
            failed=sum(t["outcome"] == "failed" for t in members),
        )

    @staticmethod
    def from_bytes(data: bytes) -> Group:
        """Inverse of :meth:`to_bytes`."""
        line, _, body = data.partition(b"\n")
        header = json.loads(line)
        offset = 0

        def take(dtype: str, count: int) -> np.ndarray:
            nonlocal offset
            array = np.frombuffer(body, dtype, count, offset)
            offset += array.nbytes
            return array

        trajectories = tuple(
            Trajectory(
                tokens=take("<i4", t["length"]),
                action_mask=take("?", t["length"]),
                log_probs=take("<f4", t["length"]),
                versions=take("<i4", t["length"]),
                reward=t["reward"],
                outcome=t["outcome"],
                note=t["note"],
            )
            for t in header["trajectories"]
        )
        return Group(
            index=header["index"],
            problem=header["problem"],
            trajectories=trajectories,
            seconds=header["seconds"],
            admitted_version=header["admitted_version"],
            extra=header["extra"],
        )
