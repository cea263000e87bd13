"""Typed configuration: TOML into small range-checked classes, every field overridable by
``--section.field value``. Importable without torch.

:mod:`~vcpo.config.sections` has the fields, :mod:`~vcpo.config.load` reads them from a recipe and the
command line, :mod:`~vcpo.config.write` writes them back.
"""

from vcpo.config.load import apply_overrides, default_recipe, load_config
from vcpo.config.recipes import find_recipe, recipe_names
from vcpo.config.sections import (
    AlgorithmConfig,
    Config,
    EnvironmentConfig,
    EvaluationConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    PipelineConfig,
    RunConfig,
    RuntimeConfig,
    SamplerConfig,
    Section,
    WarmStartConfig,
)
from vcpo.config.write import dump_toml

__all__ = [
    "AlgorithmConfig",
    "Config",
    "EnvironmentConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "PipelineConfig",
    "RunConfig",
    "RuntimeConfig",
    "SamplerConfig",
    "Section",
    "WarmStartConfig",
    "apply_overrides",
    "default_recipe",
    "dump_toml",
    "find_recipe",
    "load_config",
    "recipe_names",
]
