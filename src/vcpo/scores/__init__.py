"""‖∇ log π(τ)‖² of every trajectory of a batch, from one batched backward pass."""

from vcpo.scores.oracle import squared_score_norms_oracle
from vcpo.scores.tape import ScoreTape

__all__ = ["ScoreTape", "squared_score_norms_oracle"]
