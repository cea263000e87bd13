"""The error vocabulary: every failure a user can cause or meet has a name here.

Each message says what was wrong, where, and what to do. The command line prints the message of any
``VcpoError`` on one line, without a traceback, and exits with its ``exit_code``.
"""

from __future__ import annotations


class VcpoError(Exception):
    """Root of the vocabulary."""

    exit_code = 1


class ConfigError(VcpoError):
    """A recipe, an override or a path that cannot be used: found before any work is done."""

    exit_code = 2


class DataError(ConfigError):
    """A data file that cannot be read as the environment needs it; names the file and the line."""


class UnreachableDataError(DataError):
    """A data set that is elsewhere and cannot be had now: says how to get it. A plan can do without it."""


class ModelError(ConfigError):
    """A model that cannot be loaded, or that lacks something vcpo needs; names the model or module."""


class UnsupportedLayerError(ModelError):
    """A module whose per-trajectory gradient norm is not known. Never skipped in silence: named."""


class NonFiniteError(VcpoError):
    """NaN or infinity where a number is needed; names the quantity and the offending trajectory index."""

    def __init__(self, quantity: str, index: int | None, hint: str = "") -> None:
        where = "" if index is None else f" at trajectory index {index}"
        super().__init__(f"non-finite {quantity}{where}" + (f": {hint}" if hint else ""))
        self.quantity, self.index, self.hint = quantity, index, hint


class EnvironmentFailure(VcpoError):
    """An environment that raised or hung. Costs its own episode, never the run."""


class ContextOverflowError(EnvironmentFailure):
    """A prompt or an observation that does not fit in the model's context."""


class WorkerError(VcpoError):
    """A process that died, or did not answer in time; names the process and what was waited for."""


class SamplerLost(WorkerError):
    """A sampler that is gone and that the run can do without: others do what it had to do."""


class EngineLost(WorkerError):
    """The servers of a sampler are all gone: the sampler can do nothing until it is started anew."""


class LearnerLost(WorkerError):
    """A learner, or one of its ranks, that is gone: the run goes on from its last checkpoint, if it may."""


class PublicationError(WorkerError):
    """A sampler that did not take the weights it was given; names the sampler and both checksums."""


class CheckpointError(VcpoError):
    """A checkpoint or run folder that cannot be read back."""
