"""The sections of a config: small frozen classes, every field with its range.

The sentence under a field is its only documentation: ``vcpo config`` prints it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    heads: PositiveInt = 2
    """Attention heads of the small model (vLLM wants hidden_size / heads of 32 or more)."""
    intermediate_size: PositiveInt = 256
    """Width of the small model's MLP."""
    context_length: PositiveInt = 64
    """The most tokens of an episode; for a loaded model also bounded by what it supports."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the weights."""
    device: str = "cpu"
    """Torch device of learner and local sampler."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of a loaded model in the learner; the local sampler uses sdpa where it can."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError("hidden_size / heads must be an even whole number")
        return self


class LoraConfig(Section):
    rank: NonNegativeInt = 0
    """Rank of the adapters; 0: all parameters are trained, without adapters."""
    alpha: PositiveFloat = 32.0
    """The adapters' product is multiplied by alpha / rank."""
    targets: list[str] = ["all-linear"]
    """Ends of the names of the modules that get adapters; all-linear: every linear one but the head."""


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
    """maze, collect, sort, countdown, jsonl, math, or module:Class of your own."""
    path: str = ""
    """jsonl, math: the data file, JSON lines or Parquet."""
    held_out_path: str = ""
    """jsonl, math: the file of held-out problems; empty: one prompt in eight of the data file is held out."""
    dataset: str = ""
    """jsonl, math: hub id of a data set, in place of path."""
    dataset_config: str = ""
    """The configuration of the data set, where it has several."""
    split: str = "train"
    """The split of the data set to train on."""
    held_out_split: str = ""
    """The split to hold out; empty: validation or test, where there is one, else one prompt in eight."""
    prompt_field: str = "prompt"
    """jsonl, math: the field with the problem."""
    answer_field: str = "answer"
    """jsonl, math: the field with the answer."""
    answer_form: Literal["plain", "hashes", "boxed"] = "plain"
    """Where the answer is in its field: all of it; after ####, as in GSM8K; in the last \\boxed{}, as in
    MATH."""
    template: str = ""
    """What the model is shown: {prompt} stands for the problem (countdown: {numbers} and {target}); empty:
    the problem alone, and for math also the request to reason and to put the answer in \\boxed{}."""
    max_tokens: PositiveInt = 32
    """The most tokens the model may sample in one turn."""
    timeout_seconds: PositiveFloat = 60.0
    """Time an episode may take, its wait for the sampler left out; then: retried once, then reward 0."""
    size: int = Field(default=4, ge=2, le=26)
    """sort: digits to sort; maze, collect: side of the grid (at most 5); countdown: numbers given (at most
    6)."""
    walls: NonNegativeInt = 3
    """maze, collect: walls in the grid."""
    max_turns: PositiveInt = 8
    """maze, collect: moves before the episode ends."""
    coins: PositiveInt = 3
    """collect: coins in the grid."""
    reward: Literal["graded", "all"] = "graded"
    """collect: the share of the coins taken, or 1 for all of them and else 0."""
    match: Literal["exact", "contains", "number"] = "exact"
    """jsonl: the answer equals the response; is contained in it; or equals its last number."""

    @model_validator(mode="after")
    def _data_comes_from_one_place(self) -> EnvironmentConfig:
        if self.path and self.dataset:
            raise ValueError("path is a file and dataset is on a hub: give one of them")
        if self.held_out_path and not self.path:
            raise ValueError("held_out_path goes with path; a data set has held_out_split")
        of_a_data_set = self.dataset_config or self.held_out_split or self.split != "train"
        if of_a_data_set and not self.dataset:
            raise ValueError("dataset_config, split and held_out_split are of a data set: set dataset")
        if self.held_out_split and self.split == self.held_out_split:
            raise ValueError(f"split and held_out_split are both {self.split}: hold out another one, or none")
        return self


class AlgorithmConfig(Section):
    name: str = "vcpo"
    """Name of the method; ``vcpo methods`` lists them."""
    on_policy_ratio: Annotated[float, Field(gt=0, le=1)] | Literal["calibrated"] = 1.0
    """ESS ratio of on-policy data, below 1 where sampler and learner numerics differ; calibrated: found by
    ``vcpo calibrate`` for the lengths of each step."""
    calibration: str = ""
    """File that ``vcpo calibrate --out`` wrote; empty: the one that it keeps for this model and sampler."""
    level: Literal["none", "token", "sequence", "geometric"] | None = None
    """Level of the importance weights; unset: the algorithm's own."""
    truncation: PositiveFloat | None = None
    """Upper bound of the importance weights; unset: the algorithm's own."""
    clip_low: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Lower bound of a clip is 1 minus this; unset: the algorithm's own."""
    clip_high: NonNegativeFloat | None = None
    """Upper bound of a clip is 1 plus this; unset: the algorithm's own."""
    baseline: (
        Literal[
            "zero",
            "group-mean",
            "leave-one-out",
            "below-mean",
            "length-weighted",
            "optimal",
            "bounded-optimal",
            "split-half-optimal",
            "optimal-token",
        ]
        | None
    ) = None
    """Baseline; unset: the algorithm's own."""
    margin: NonNegativeFloat | None = None
    """How far the baselines below-mean and bounded-optimal stay below the mean; unset: 0.1."""
    normalise: Literal["none", "std"] | None = None
    """Division of advantages by the group's reward deviation if it is not 0; unset: the algorithm's own."""
    aggregation: Literal["sequence-mean", "token-mean", "constant"] | None = None
    """How token terms are averaged; unset: the algorithm's own."""
    constant_length: PositiveInt | None = None
    """Length that the ``constant`` aggregation divides by; unset: 16."""
    step_scale: Literal["off", "sqrt", "linear"] | None = None
    """How the ESS ratio scales the step; unset: the algorithm's own."""
    ess_weights: Literal["sequence", "used"] | None = None
    """The ESS is of untruncated sequence weights, or of the weights used; unset: the algorithm's own."""
    step_scales: str = ""
    """File with one factor a step (JSON list), used in place of the step rule; empty: none."""


class SamplerConfig(Section):
    kind: Literal["local", "vllm"] = "local"
    """Engine that generates: transformers in the sampler's process, or vLLM servers."""
    slots: PositiveInt = 256
    """Sequences decoded at once, by each server; more wait."""
    update: Literal["keep", "drain"] = "keep"
    """New weights: between two tokens of running episodes, or after they have finished."""
    prefill_tokens: PositiveInt = 8192
    """The most prompt tokens fed in one forward pass."""
    temperature: PositiveFloat = 1.0
    """Logits are divided by it, in the learner too: the policy is what is sampled."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most probable tokens that together have this probability; 1: from all. The learner's
    policy is not cut: importance weights average below 1, and gradients are of what can be sampled."""
    top_k: NonNegativeInt = 0
    """Sample from this many most probable tokens, before top_p; 0: from all. Weights as with top_p."""
    dtype: Literal["same", "float32", "bfloat16"] = "same"
    """Number type of the sampler's weights; same: as in [model]."""
    quantization: Literal["none", "fp8", "int8", "int4"] = "none"
    """Rounding of the sampler's linear layers but the head, anew at each update; the learner's stay as they
    are. local: the numerics only, not the speed; vllm: fp8 only."""
    urls: list[str] = []
    """vLLM servers that run already (``vcpo serve`` starts one); empty: start them."""
    servers: PositiveInt = 1
    """vLLM servers that each sampler process starts."""
    python: str = ""
    """Python of the environment that has vLLM; empty: this one."""
    devices: list[str] = []
    """CUDA_VISIBLE_DEVICES of each vLLM server that is started, such as 1 or 2+3; empty: what is visible."""
    options: list[str] = []
    """More options for the vLLM servers that are started, such as --gpu-memory-utilization=0.8."""
    transfer: Literal["files", "collective"] = "files"
    """How weights reach the samplers: safetensors files (in shared memory where they fit; under ray, Ray's
    object store), or a broadcast (NCCL between GPUs, each of its own; gloo between CPUs)."""
    probe_tolerance: PositiveFloat | None = None
    """The largest mean difference, in nats, between log-probs of a server and of the learner after an update;
    unset: 0.01 in float32, 0.1 in bfloat16, 0.5 quantized."""

    @model_validator(mode="after")
    def _servers_are_found_or_started(self) -> SamplerConfig:
        if self.kind != "vllm" and (self.urls or self.python or self.devices or self.options):
            raise ValueError('urls, python, devices and options are of vLLM servers: set kind = "vllm"')
        if self.urls and (self.python or self.devices or self.options or self.servers != 1):
            raise ValueError(
                "urls are servers that run already: python, servers, devices, options start others"
            )
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(f"devices names {len(self.devices)} servers and servers is {self.servers}")
        return self


class LearnerConfig(Section):
    learning_rate: PositiveFloat = 4e-4
    """AdamW learning rate before scaling."""
    critic_learning_rate: PositiveFloat | None = None
    """Of the critic, for methods that have one; unset: as learning_rate."""
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
    logit_budget: PositiveInt = 2**27
    """The most logits (tokens times vocabulary) that exist at once; more are computed in pieces."""
    score_norms: Literal["sketched", "exact"] = "sketched"
    """Score norms of the optimal baseline: from random projections where that is cheaper, or exact."""
    mask_off_policy_prefix: bool = False
    """Train only on what the newest version in a trajectory sampled; older tokens of it stay as context."""
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
    over_provision: NonNegativeInt = 0
    """Groups begun beyond those needed: a step takes what is finished, within window; the others go on."""
    dynamic_sampling: bool | None = None
    """Skip groups whose rewards are all equal, and play others in their place; unset: as the method does."""
    selection: Literal["all", "goldilocks"] = "all"
    """Which problems are played: all in turn, or of some candidates the one a teacher expects most of."""
    candidates: PositiveInt = 4
    """Problems of which goldilocks selection chooses one."""
    exploration: float = Field(default=0.1, ge=0, le=1)
    """Share of groups for which goldilocks selection chooses at random."""
    replay: PositiveInt = 512
    """The last groups, skipped ones too, from which the teacher of goldilocks selection learns."""


class EvaluationConfig(Section):
    every: NonNegativeInt = 50
    """Steps between evaluations on held-out problems; 0: only before and after."""
    problems: PositiveInt = 256
    """Held-out problems of one evaluation during training."""
    final_problems: PositiveInt = 512
    """Held-out problems of the evaluations before and after."""


class RuntimeConfig(Section):
    kind: Literal["local", "ray"] = "local"
    """Where processes run: on this machine, or as actors of a Ray cluster (async mode)."""
    address: str = ""
    """ray: HOST:PORT of a cluster, or auto for the one of this machine; empty: a Ray of the run's own."""
    samplers: PositiveInt = 1
    """Sampler processes (async mode); with ray the number may change while the run goes on: vcpo scale."""
    learner_ranks: PositiveInt = 1
    """Processes that share the learner, its weights and its work (FSDP2; async mode); on cuda one a GPU."""
    sampler_cpus: NonNegativeFloat = 1.0
    """ray: CPUs that each sampler asks for, with its environments."""
    sampler_gpus: NonNegativeFloat | None = None
    """ray: GPUs that each sampler asks for; unset: those of a server on cuda, 0 with sampler.urls."""
    rank_cpus: NonNegativeFloat = 1.0
    """ray: CPUs that each rank of the learner asks for."""
    rank_gpus: NonNegativeFloat | None = None
    """ray: GPUs that each rank of the learner asks for; unset: 1 on cuda."""
    wait_seconds: PositiveFloat = 60.0
    """ray: how long to wait for the cluster to have room for the learner and a first sampler."""
    restarts: NonNegativeInt = 3
    """ray: how often in a row the learner, or a sampler, begins anew without having got any further."""
    threads: PositiveInt = 1
    """Torch threads of each process; small models are fastest with 1."""
    timeout_seconds: PositiveFloat = 600.0
    """The longest wait for an answer of any process; the error names it."""
    weights_folder: str = ""
    """Where published weights wait for samplers: a folder that all of them see; empty: shared memory."""


class Config(Section):
    """A recipe, resolved."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    sampler: SamplerConfig = SamplerConfig()
    learner: LearnerConfig = LearnerConfig()
    pipeline: PipelineConfig = PipelineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
