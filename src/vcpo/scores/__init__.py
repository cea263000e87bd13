"""‖∇ log π(τ)‖² of every trajectory of a batch, and Σ c ∇ log π(τ), from one batched backward pass."""

from vcpo.scores.oracle import squared_score_norms_oracle
from vcpo.scores.record import Record
from vcpo.scores.tape import ScoreTape

__all__ = ["Record", "ScoreTape", "squared_score_norms_oracle"]
