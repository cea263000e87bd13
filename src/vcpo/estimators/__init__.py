"""Pure functions of tensors: importance weights, effective sample size, baselines, surrogates.

They know no config, no model and no process, and can be used in any training loop. The normalisers of
:mod:`vcpo.estimators.aggregation` are reached through their module.
"""

from vcpo.estimators.baselines import group_mean, group_std, leave_one_out, optimal_baseline, zero_baseline
from vcpo.estimators.ess import (
    effective_sample_size,
    ess_from_partials,
    ess_partials,
    ess_ratio,
    ess_ratio_from_partials,
    step_scale,
)
from vcpo.estimators.importance import (
    keep_within,
    length_normalised_log_weights,
    log_importance_weights,
    log_ratios,
    truncate,
)
from vcpo.estimators.mismatch import expected_ess_ratio, measure_mismatch
from vcpo.estimators.surrogates import (
    policy_gradient_coefficients,
    ppo_clip_active,
    ppo_clip_coefficients,
)

__all__ = [
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
