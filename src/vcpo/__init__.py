"""Stable asynchronous reinforcement learning of language models.

The estimators can be imported from here. They are loaded on first use (PEP 562), so that ``import vcpo`` does
not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcpo.estimators import (
        effective_sample_size,
        ess_from_partials,
        ess_partials,
        ess_ratio,
        ess_ratio_from_partials,
        expected_ess_ratio,
        group_mean,
        group_std,
        keep_within,
        leave_one_out,
        length_normalised_log_weights,
        log_importance_weights,
        log_ratios,
        measure_mismatch,
        optimal_baseline,
        policy_gradient_coefficients,
        ppo_clip_active,
        ppo_clip_coefficients,
        step_scale,
        truncate,
        zero_baseline,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "effective_sample_size",
    "ess_from_partials",
    "ess_partials",
    "ess_ratio",
    "ess_ratio_from_partials",
    "expected_ess_ratio",
    "group_mean",
    "group_std",
    "keep_within",
    "leave_one_out",
    "length_normalised_log_weights",
    "log_importance_weights",
    "log_ratios",
    "measure_mismatch",
    "optimal_baseline",
    "policy_gradient_coefficients",
    "ppo_clip_active",
    "ppo_clip_coefficients",
    "step_scale",
    "truncate",
    "zero_baseline",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("vcpo.estimators"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
