"""The critic of algorithms that need one: V of what the policy saw before each sampled token.

A copy of the policy's body as it is when the run begins, with a linear head that begins at 0, so that the
first advantages are the rewards themselves. It shares nothing with the policy and has an optimizer of its
own; with LoRA its adapters are trained, as the policy's are. It costs as much memory and time as the policy
again, less the vocabulary.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vcpo.config import LearnerConfig
from vcpo.errors import CheckpointError
from vcpo.learner.optimizer import ScaledAdamW
from vcpo.learner.ranks import ALONE, Ranks
from vcpo.learner.sharding import part_of, shard
from vcpo.policy.loading import Policy
from vcpo.policy.log_probs import predicting
from vcpo.policy.packing import PackedRows

if TYPE_CHECKING:
    from jaxtyping import Float

_OPTIMIZER = "optimizer."


class Critic(nn.Module):
    """Values of the states before sampled tokens."""

    def __init__(self, policy: Policy, config: LearnerConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy.model.base_model)
        width = policy.model.config.get_text_config().hidden_size
        first = next(self.body.parameters())
        self.head = nn.Linear(width, 1, device=first.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if ranks.several:  # apart: a group of parameters has one number type
            shard(self.body, ranks)
            shard(self.head, ranks)
        rate = config.critic_learning_rate or config.learning_rate
        self.optimizer = ScaledAdamW(
            self.named_parameters(), config.model_copy(update={"learning_rate": rate})
        )

    def forward(self, rows: PackedRows) -> Float[Tensor, " N"]:
        """V before every sampled token, in the order of ``rows.action_owners``; float32, with gradient."""
        output = self.body(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, predicting(rows))
        return self.head(hidden.float()).squeeze(-1)

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by name, for a checkpoint."""
        moments = {_OPTIMIZER + name: tensor for name, tensor in self.optimizer.state().items()}
        return {name: p.detach() for name, p in self._trained()} | moments

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Inverse of :meth:`state`."""
        for name, parameter in self._trained():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise CheckpointError(f"the checkpoint's critic is of another model: {name} does not fit")
            parameter.data.copy_(part_of(tensors[name], parameter))
        moments = {
            name.removeprefix(_OPTIMIZER): tensor
            for name, tensor in tensors.items()
            if name.startswith(_OPTIMIZER)
        }
        self.optimizer.load_state(moments, steps)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]
