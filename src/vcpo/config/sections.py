"""The sections of a config: small frozen classes, every field with its range.

The sentence under a field is its only documentation: ``vcpo config`` prints it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class Section(BaseModel):
    """Common behaviour of all sections: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class RunConfig(Section):
    name: str = ""
    """Name of the run's folder; empty: environment, algorithm and time."""
    folder: Path = Path("runs")
    """Where run folders are made."""
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    """Seed of model initialisation, problems and sampling."""


class ModelConfig(Section):
    name: str = ""
    """Folder or hub id of any causal LM that transformers loads; empty: a small Llama made for the task."""
    hidden_size: PositiveInt = 64
    """Width of the small model."""
    layers: PositiveInt = 2
    """Decoder layers of the small model."""
    heads: PositiveInt = 4
    """Attention heads of the small model."""
    intermediate_size: PositiveInt = 256
    """Width of the small model's MLP."""
    context_length: PositiveInt = 64
    """The most tokens of an episode; for a loaded model also bounded by what it supports."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the weights."""
    device: str = "cpu"
    """Torch device of learner and local sampler."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError("hidden_size / heads must be an even whole number")
        return self


class WarmStartConfig(Section):
    steps: NonNegativeInt = 350
    """Supervised steps on demonstrations before RL; 0: none. Never applied to a loaded model."""
    batch_size: PositiveInt = 128
    """Demonstrations a step."""
    learning_rate: PositiveFloat = 2e-3
    """AdamW learning rate of the warm start."""
    cache: bool = True
    """Keep the warm-started model for later runs with the same settings."""


class EnvironmentConfig(Section):
    kind: str = "maze"
    """maze, sort, countdown, jsonl, or module:Class of your own."""
    path: str = ""
    """The data file (jsonl only)."""
    max_tokens: PositiveInt = 32
    """The most tokens the model may sample in one turn."""
    timeout_seconds: PositiveFloat = 60.0
    """Time an episode may take, its wait for the sampler left out; then: retried once, then reward 0."""
    size: int = Field(default=4, ge=2, le=26)
    """sort: digits to sort; maze: side of the grid (at most 5); countdown: numbers given (at most 6)."""
    walls: NonNegativeInt = 3
    """maze: walls in the grid."""
    max_turns: PositiveInt = 8
    """maze: moves before the episode is lost."""
    match: Literal["exact", "contains", "number"] = "exact"
    """jsonl: the answer equals the response; is contained in it; or equals its last number."""


class AlgorithmConfig(Section):
    name: str = "vcpo"
    """vcpo, grpo, reinforce or tis; ``vcpo methods`` describes them."""
    on_policy_ratio: float = Field(default=1.0, gt=0, le=1)
    """ESS ratio of on-policy data (below 1 where sampler and learner numerics differ)."""
    truncation: PositiveFloat | None = None
    """Upper bound of the importance weights; unset: the algorithm's own."""
    baseline: Literal["zero", "group-mean", "leave-one-out", "optimal"] | None = None
    """Baseline; unset: the algorithm's own."""
    normalise: Literal["none", "std"] | None = None
    """Division of advantages by the group's reward deviation; unset: the algorithm's own."""
    aggregation: Literal["sequence-mean", "token-mean", "constant"] | None = None
    """How token terms are averaged; unset: the algorithm's own."""
    constant_length: PositiveInt = 16
    """Length that the ``constant`` aggregation divides by."""
    step_scale: Literal["off", "sqrt", "linear"] | None = None
    """How the ESS ratio scales the step; unset: the algorithm's own."""


class SamplerConfig(Section):
    kind: Literal["local"] = "local"
    """Engine that generates."""
    slots: PositiveInt = 256
    """Sequences decoded at once; more wait."""
    update: Literal["keep", "drain"] = "keep"
    """New weights: between two tokens of running episodes, or after they have finished."""
    prefill_tokens: PositiveInt = 8192
    """The most prompt tokens fed in one forward pass."""


class LearnerConfig(Section):
    learning_rate: PositiveFloat = 4e-4
    """AdamW learning rate before scaling."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; not scaled by ESS."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW first-moment decay."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW second-moment decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient-norm clip."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""
    token_budget: PositiveInt = 8192
    """The most tokens, padding included, in one micro-batch."""
    score_norms: Literal["sketched", "exact"] = "sketched"
    """Score norms of the optimal baseline: from random projections where that is cheaper, or exact."""
    checkpoint_every: NonNegativeInt = 100
    """Steps between checkpoints; 0: only at the end."""


class PipelineConfig(Section):
    mode: Literal["async", "exact"] = "async"
    """async: sampler and learner processes overlap; exact: one process, rollouts ``lag`` versions old."""
    lag: NonNegativeInt = 2
    """Target policy lag S in optimizer steps; 0 is the synchronous loop."""
    window: PositiveInt = 16
    """Younger groups that may pass the oldest one, plus 1: no lag exceeds lag + ceil((window-1)/prompts)."""
    prompts: PositiveInt = 16
    """Groups (prompts) in one optimizer step."""
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""
    steps: int = Field(default=600, ge=1, le=10**9)
    """Optimizer steps."""


class EvaluationConfig(Section):
    every: NonNegativeInt = 50
    """Steps between evaluations on held-out problems; 0: only before and after."""
    problems: PositiveInt = 256
    """Held-out problems of one evaluation during training."""
    final_problems: PositiveInt = 512
    """Held-out problems of the evaluations before and after."""


class RuntimeConfig(Section):
    samplers: PositiveInt = 1
    """Sampler processes (async mode)."""
    threads: PositiveInt = 1
    """Torch threads of each process; small models are fastest with 1."""
    timeout_seconds: PositiveFloat = 600.0
    """The longest wait for an answer of any process; the error names it."""


class Config(Section):
    """A recipe, resolved."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    sampler: SamplerConfig = SamplerConfig()
    learner: LearnerConfig = LearnerConfig()
    pipeline: PipelineConfig = PipelineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
