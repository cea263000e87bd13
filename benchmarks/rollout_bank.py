"""Banks of frozen rollouts: every trajectory's gradient vector, and their inner products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.group_moments import Bank
from vcpo.algorithms import Evidence
from vcpo.policy.loading import Policy
from vcpo.policy.packing import pack
from vcpo.trajectory import Trajectory

AT_ONCE = 64
"""Trajectories whose gradients are found in one call: it holds their activations."""


@dataclass(frozen=True)
class Measured:
    """A bank and what it was made of; equal trajectories of a prompt are measured once."""

    bank: Bank
    vectors: Tensor
    """[U, P] u_i = ∇ (1/L_i) log π(y_i) of the U different trajectories."""
    different: Tensor
    """[M] which of them each rollout is."""

    def gradient(self, coefficients: Tensor) -> Tensor:
        """[P] Σ c_i u_i, of [M] coefficients."""
        sums = coefficients.new_zeros(len(self.vectors)).index_add_(0, self.different, coefficients)
        return sums.to(self.vectors) @ self.vectors

    def projected(self, direction: Tensor) -> Tensor:
        """[M] u_i · direction, float64."""
        return (self.vectors @ direction)[self.different].double()


def measure(policy: Policy, group: Sequence[Trajectory]) -> Measured:
    """The rollouts of one prompt under ``policy``."""
    places: dict[bytes, int] = {}
    different = torch.tensor([places.setdefault(t.tokens.tobytes(), len(places)) for t in group])
    firsts = [int((different == u).nonzero()[0]) for u in range(len(places))]
    distinct = [group[i] for i in firsts]
    vectors, log_probs, recorded, mask = _scores(policy, distinct)
    kernel = vectors @ vectors.T  # float32: its errors are far below those of sampling
    evidence = Evidence(
        log_probs=log_probs[different],
        behaviour_log_probs=recorded[different],
        mask=mask[different],
        rewards=torch.tensor([t.reward for t in group]),
        groups=torch.zeros(len(group), dtype=torch.long),
        squared_score_norms=kernel.diagonal()[different],
    )
    return Measured(Bank(evidence, kernel[different][:, different].double()), vectors, different)


def _scores(policy: Policy, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[U, P] vectors; [U, A] log-probs, those that the sampler recorded, and the mask."""
    rows = pack(trajectories, packed=False)  # padding lies to the right of a causal model's tokens
    shares = torch.zeros(rows.input_ids.shape)
    recorded = torch.zeros_like(shares)
    for row, t in enumerate(trajectories):
        mask = torch.from_numpy(t.action_mask)
        shares[row, : len(mask)] = mask / max(t.action_count, 1)
        recorded[row, : len(mask)] = torch.where(mask, torch.from_numpy(t.log_probs), 0.0)
    parameters = {name: p.detach() for name, p in policy.model.named_parameters()}
    one = vmap(grad(_objective_of(policy.model), has_aux=True), in_dims=(None, 0, 0))
    vectors, log_probs = [], []
    for begin in range(0, len(trajectories), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        gradients, found = one(parameters, rows.input_ids[part], shares[part])
        vectors.append(torch.cat([g.flatten(1) for g in gradients.values()], 1))
        log_probs.append(found)
    where = rows.action_rows, rows.action_columns
    mask = rows.spread(torch.ones(len(rows.action_rows))) > 0
    return torch.cat(vectors), rows.spread(torch.cat(log_probs)[where]), rows.spread(recorded[where]), mask


def _objective_of(model: torch.nn.Module) -> Any:
    def objective(parameters: dict[str, Tensor], tokens: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_t (mask_t / L) log π(y_t) of one trajectory [T], and log π of each token."""
        given = {"input_ids": tokens[None], "use_cache": False}
        logits = functional_call(model, parameters, (), given).logits[0, :-1]
        log_probs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        log_probs = torch.cat([log_probs.new_zeros(1), log_probs])
        return (log_probs * shares).sum(), log_probs.detach()

    return objective
