"""A teacher predicts how much the policy can learn from a prompt that it has not tried yet.

Groups of binary rewards say most at a success probability of one half: the standard deviation of a reward is
sqrt(p (1 − p)). The teacher learns this number from the policy's own hidden states (Goldilocks,
arXiv 2602.14868): h is the last hidden state of a prompt, its mean over the prompt's tokens, and

    prediction = ½ · sigmoid(w · z + b),   z = (h − mean) / (std · sqrt(D)),

fitted by squared error to sqrt(p̂ (1 − p̂)), p̂ the mean reward of a group, kept within [0, 1] (the share of
successes if rewards are 0 and 1). Mean and std are those of the replay, which holds the last N groups; std
has a floor, so that among prompts that are all alike the policy's own drift is not taken for a difference.
No gradient flows into the policy.

Departures: the paper does not publish its optimizer. Here AdamW goes over the whole replay ``PASSES`` times
after each step. A state in the replay is that of the policy that was trained on it, not of the newest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcpo.errors import CheckpointError
from vcpo.policy.loading import Policy

if TYPE_CHECKING:
    from jaxtyping import Float

PASSES = 16
LEARNING_RATE = 0.4
"""About how far one pass moves a logit: of the weights it is divided by sqrt(D), as ‖z‖₁ is about that."""
WEIGHT_DECAY = 0.01
FLOOR = 0.1
"""A deviation counts as at least this part of the states' root mean square."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Teacher:
    """A linear head on the policy's states, its optimizer and its replay; drawn from nothing random."""

    def __init__(self, policy: Policy, *, replay: int, token_budget: int) -> None:
        """``replay``: how many groups it learns from; ``token_budget``: the most prompt tokens at once."""
        self._policy, self._size, self._budget = policy, replay, token_budget
        width = policy.model.config.get_text_config().hidden_size
        self._head = [torch.zeros(width, requires_grad=True), torch.zeros(1, requires_grad=True)]
        weight, bias = self._head
        rates = [
            {"params": [weight], "lr": LEARNING_RATE / width**0.5},
            {"params": [bias], "lr": LEARNING_RATE / 4},
        ]
        self._optimizer = torch.optim.AdamW(rates, weight_decay=WEIGHT_DECAY)
        self._states, self._targets = torch.zeros(0, width), torch.zeros(0)

    @torch.no_grad()
    def states(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "B D"]:
        """Mean last hidden state of each prompt, cut to the policy's context; float32, on the CPU.

        A prompt must have a token. The states of prompts given together depend on these alone.
        """
        cut = [list(prompt[: self._policy.context_length]) for prompt in prompts]
        rows = max(1, self._budget // max(map(len, cut), default=1))
        parts = [self._states_of(cut[i : i + rows]) for i in range(0, len(cut), rows)]
        return torch.cat(parts) if parts else self._states[:0]

    def _states_of(self, prompts: Sequence[list[int]]) -> Tensor:
        model = self._policy.model
        width = max(map(len, prompts))
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=model.device)
        seen = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts], device=model.device)
        # The whole model is called: where it is sharded, that is what gathers the parameters.
        output = model(
            input_ids=ids, attention_mask=seen, use_cache=False, output_hidden_states=True, logits_to_keep=1
        )
        hidden = output.hidden_states[-1]
        weights = seen[..., None] / seen.sum(-1)[:, None, None]
        return (hidden.float() * weights).sum(1).cpu()

    @torch.no_grad()
    def predict(self, states: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """The predicted sqrt(p (1 − p)) of prompts with these states; ¼ before anything was learned."""
        return self._predicted(self._standardized(states))

    def learn(self, states: Float[Tensor, "B D"], mean_rewards: Sequence[float]) -> dict[str, float]:
        """Learn from groups just played; how well they had been predicted, as metrics of the step."""
        p = torch.tensor(mean_rewards, dtype=torch.float32).clamp(0, 1)
        targets = (p * (1 - p)).sqrt()
        predictions = self.predict(states)
        self._states = torch.cat([self._states, states])[-self._size :]
        self._targets = torch.cat([self._targets, targets])[-self._size :]
        seen = self._standardized(self._states)
        for _ in range(PASSES):
            self._optimizer.zero_grad()
            (self._predicted(seen) - self._targets).square().mean().backward()
            self._optimizer.step()
        return {
            "teacher_error": float((predictions - targets).square().mean().sqrt()),
            "teacher_prediction": float(predictions.mean()),
        }

    def _predicted(self, standardized: Tensor) -> Tensor:
        weight, bias = self._head
        return 0.5 * (standardized @ weight + bias).sigmoid()

    def _standardized(self, states: Tensor) -> Tensor:
        if len(self._states) < 2:
            return states / states.shape[1] ** 0.5
        floor = float(FLOOR * self._states.square().mean().sqrt())
        deviation = self._states.std(0).clamp(min=max(floor, 1e-6))
        return (states - self._states.mean(0)) / (deviation * states.shape[1] ** 0.5)

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold."""
        moments = {
            f"{key}.{i}": self._optimizer.state[parameter][key]
            for i, parameter in enumerate(self._head)
            for key in _MOMENTS
            if parameter in self._optimizer.state
        }
        weight, bias = (parameter.detach() for parameter in self._head)
        return {"weight": weight, "bias": bias, "states": self._states, "targets": self._targets} | moments

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Raises CheckpointError for the state of another teacher."""
        try:
            with torch.no_grad():
                for parameter, name in zip(self._head, ("weight", "bias"), strict=True):
                    parameter.copy_(state[name])
            self._states, self._targets = state["states"][-self._size :], state["targets"][-self._size :]
            if "step.0" in state:
                for i, parameter in enumerate(self._head):
                    self._optimizer.state[parameter] = {key: state[f"{key}.{i}"] for key in _MOMENTS}
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint's teacher is of another policy: {error}") from error
