"""``vcpo train --dry-run``: what a run would do, from its config alone. No weight is loaded or made."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from vcpo.config import Config
from vcpo.environments.protocol import DataEnvironment
from vcpo.environments.registry import environment_class
from vcpo.errors import ModelError, UnreachableDataError
from vcpo.pipeline.build import algorithm_of, build_environment, small_alphabet
from vcpo.pipeline.calibration import find_calibration
from vcpo.pipeline.engines import check_engine
from vcpo.pipeline.processes import check_processes, smallest, whole
from vcpo.pipeline.session import lag_bound_of
from vcpo.pipeline.step_scales import read_step_scales

_BYTES = {"float32": 4, "bfloat16": 2}
_HUB_SECONDS = 5.0
"""How long a plan waits for the hub to answer at all."""

_LOGITS = 14
"""Bytes for each token and entry of the vocabulary at the peak of a step, measured: 3.5 float32."""


@dataclass(frozen=True)
class ModelSize:
    """What memory estimates need to know of a model."""

    parameters: int
    adapters: int
    """Parameters of adapters, in float32, which alone are trained; 0: all are trained, without adapters."""
    layers: int
    key_value_width: int
    """Elements of keys plus values, of one token in one layer."""
    context_length: int
    vocabulary: int


def plan_text(config: Config, run_folder: Path | None = None) -> str:
    """The resolved plan for people: processes, memory, tokens, bounds. ``run_folder``: of a run to resume."""
    check_engine(config)
    check_processes(config)
    read_step_scales(config)
    _go_offline_if_the_hub_is_silent(config)
    size = _size_if_reachable(config)
    rows = [
        ("environment", config.environment.kind),
        *_data(config),
        ("model", _model(config, size)),
        ("algorithm", algorithm_of(config).describe().partition("\n")[0]),
        ("on-policy ratio", _on_policy_ratio(config, run_folder)),
        ("processes", _processes(config)),
        *(_memory(config, size) if size else ()),
        *_amounts(config, size.context_length if size else config.model.context_length),
        (
            "run folder",
            str(config.run.folder / (config.run.name or "(named by environment, algorithm and time)")),
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def check_environment(config: Config) -> None:
    """Make the environment as a run would, with its data, and the model's shape.

    Raises ConfigError for settings and data that cannot be used; what is out of reach now is not looked at.
    """
    _go_offline_if_the_hub_is_silent(config)
    _size_if_reachable(config)


def _on_policy_ratio(config: Config, run_folder: Path | None) -> str:
    """What the ESS ratio of a step is compared with."""
    if config.algorithm.on_policy_ratio != "calibrated":
        return f"{config.algorithm.on_policy_ratio:g}, whatever the lengths"
    calibration = find_calibration(config, run_folder)
    rows = calibration.record["lengths"][::-3][::-1]
    told = [f"{row['in_minibatch']['value']:.3f} at {row['length']}" for row in rows]
    return f"of each step's lengths, as calibrated {calibration.record['made']}: {', '.join(told)} tokens"


def _processes(config: Config) -> str:
    threads = f"{config.runtime.threads} torch thread{'s' if config.runtime.threads > 1 else ''} each"
    if config.pipeline.mode == "exact":
        return f"1 (learner and sampler in turn), {threads}"
    samplers, ranks = config.runtime.samplers, config.runtime.learner_ranks
    learner = f"{ranks} ranks of the learner" if ranks > 1 else "learner"
    told = f"controller, {learner}, {samplers} sampler{'s' if samplers > 1 else ''}, {threads}"
    if config.runtime.kind == "local":
        return told
    if not config.runtime.address:
        gpus = whole(config).gpus
        return f"{told}; on a Ray of the run's own" + (
            f", with {gpus:g} GPUs of this machine" if gpus else ""
        )
    return (
        f"{told}; on Ray ({config.runtime.address}), which must have at least {smallest(config)}, "
        f"and {whole(config)} for all"
    )


def _model(config: Config, size: ModelSize | None) -> str:
    if size is None:
        name = config.model.name
        return (
            f"{name}, not on this machine and out of its reach now: memory is not estimated "
            f"(hf download {name} where there is a network, or set model.name to a folder)"
        )
    text = f"{config.model.name or 'small Llama'}, {size.parameters:,} parameters, {config.model.dtype}"
    if size.adapters:
        text += f"; trained: {size.adapters:,} of adapters of rank {config.lora.rank}, float32"
    return text


def _data(config: Config) -> list[tuple[str, str]]:
    """Where problems come from that are not made up: read now, or what to do to have them."""
    kind = environment_class(config.environment.kind)
    if not isinstance(kind, DataEnvironment):
        return []
    try:
        return [("data", kind.data_text(config.environment))]
    except UnreachableDataError as error:
        return [("data", f"not looked at: {error}")]


def _memory(config: Config, size: ModelSize) -> list[tuple[str, str]]:
    """Estimates: weights, gradients and two moments for the learner; weights and cache for a sampler."""
    width = _BYTES[config.model.dtype]
    sampled = width if config.sampler.dtype == "same" else _BYTES[config.sampler.dtype]
    weights = size.parameters * width + size.adapters * 4
    served = size.parameters * sampled + size.adapters * 4
    published = size.adapters * 4 or weights
    # A gradient and two moments of what is trained, and a master copy where that is of few bits.
    optimizer = published + (size.adapters or size.parameters) * (8 if size.adapters or width == 4 else 12)
    logits = _LOGITS * config.learner.token_budget * size.vocabulary
    ranks = config.runtime.learner_ranks
    # Keys and values per token of a full cache: every slot as long as the context, one padding column.
    cache = config.sampler.slots * (size.context_length + 1) * size.layers * size.key_value_width * sampled
    return [
        (
            "learner memory" if ranks == 1 else "memory of a rank",
            f"{_bytes((weights + optimizer) / ranks)} for weights, gradients and optimizer, plus activations "
            f"of {config.learner.token_budget:,} tokens{_kept(config)} (logits alone about {_bytes(logits)})",
        ),
        (
            "sampler memory",
            f"{_bytes(served)} for weights, at most {_bytes(cache)} for {config.sampler.slots} slots",
        ),
        ("publication", f"{_bytes(published)} a step{', the adapters alone' if size.adapters else ''}"),
    ]


def _kept(config: Config) -> str:
    once = ", one layer's at a time (activation checkpointing)"
    return once if config.model.activation_checkpointing else ""


def _amounts(config: Config, context_length: int) -> list[tuple[str, str]]:
    pipeline = config.pipeline
    episodes = pipeline.prompts * pipeline.group_size
    return [
        ("a step", f"{pipeline.prompts} prompts × {pipeline.group_size} rollouts = {episodes} episodes, "
                   f"at most {episodes * context_length:,} tokens"),
        ("the run", f"{pipeline.steps} steps, {pipeline.steps * episodes:,} episodes, "
                    f"at most {pipeline.steps * episodes * context_length:,} tokens"),
        ("policy lag", f"target {pipeline.lag}, never above {lag_bound_of(config)}; at most "
                       f"{(pipeline.lag + 1) * pipeline.prompts + pipeline.over_provision} groups active"),
        ("evaluation", f"{config.evaluation.final_problems} held-out problems before and after, "
                       + (f"{config.evaluation.problems} every {config.evaluation.every} steps"
                          if config.evaluation.every else "none in between")),
    ]  # fmt: skip


def _go_offline_if_the_hub_is_silent(config: Config) -> None:
    """Go offline for the rest of this process if the hub does not answer: each of the libraries that read
    from it would try for half a minute."""
    from huggingface_hub import constants, get_session

    from vcpo.policy.loading import is_hub_id

    if constants.HF_HUB_OFFLINE or not (
        is_hub_id(config.model.name) or is_hub_id(config.environment.dataset)
    ):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # of whatever HTTP library the hub's package uses
        constants.HF_HUB_OFFLINE = True


def _size_if_reachable(config: Config) -> ModelSize | None:
    """None for a hub id whose config cannot be read here: a plan needs no network."""
    from vcpo.policy.loading import is_hub_id

    try:
        return _model_size(config)
    except ModelError as error:
        if is_hub_id(config.model.name) and isinstance(error.__cause__, OSError):
            return None
        raise


def _model_size(config: Config) -> ModelSize:
    from vcpo.policy.loading import load_architecture, shapes_alone, small_architecture, supported_context
    from vcpo.policy.lora import adapter_size, import_peft, target_modules
    from vcpo.policy.tokens import TokenizerCodec, character_tokenizer

    if config.model.name:
        architecture, tokenizer = load_architecture(config.model.name)
    else:
        tokenizer = character_tokenizer(small_alphabet(config))
        architecture = small_architecture(config.model, tokenizer)
    if config.lora.rank:
        import_peft(config.lora)
    model = shapes_alone(architecture, config.model)
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    targets = target_modules(model, config.lora, config.model.name or "the small model")
    size = ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        adapters=adapter_size(targets, config.lora),
        layers=text.num_hidden_layers,
        key_value_width=2 * heads * head_size,
        context_length=supported_context(text, config.model),
        vocabulary=text.vocab_size,
    )
    # The environment reads its data here, so a plan that is printed is one whose data can be used, unless it
    # is elsewhere, which the plan says.
    with contextlib.suppress(UnreachableDataError):
        build_environment(config, TokenizerCodec(tokenizer, config.model.name), size.context_length)
    return size


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
