"""Every metric that a run logs, in one table: what it is, its unit, and what to suspect.

A row is written only if each of its keys is here, so the table is complete by construction. The report
prints it, and TensorBoard shows each meaning beside its curve.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from vcpo.errors import VcpoError


@dataclass(frozen=True)
class Metric:
    """One entry of the glossary."""

    name: str
    """Key in metrics.jsonl."""
    group: str
    """Heading under which the report and TensorBoard list it."""
    unit: str
    """Unit of the value; empty for a pure number."""
    meaning: str
    """One sentence: what is measured, over what."""
    suspect: str
    """The healthy range, and what to suspect outside it."""


HISTOGRAM = "lag_histogram"
"""{lag: groups}: it goes to metrics.jsonl only."""
SAMPLERS = "samplers"
"""{name: {figure: value}}; of the async mode."""

_METRICS = (
    # name, group, unit, meaning, suspect
    Metric("step", "progress", "", "Optimizer steps taken, this one included.", "Rises by one a row."),
    Metric(
        "version",
        "progress",
        "",
        "Policy version that the step produced; tokens are stamped with it.",
        "Equals the step; a gap means that weights were not published.",
    ),
    Metric(
        "elapsed",
        "progress",
        "s",
        "Wall time since this process began the run, evaluations included; starts over on resuming.",
        "A jump between two rows is an evaluation, a checkpoint or a stall.",
    ),
    Metric(
        "reward",
        "learning",
        "",
        "Mean reward of the minibatch's trajectories, as the behaviour policy earned them.",
        "Should rise; it trails the learner by the policy lag.",
    ),
    Metric(
        "reward_std",
        "learning",
        "",
        "Standard deviation of the rewards in the minibatch.",
        "Near 0 there is nothing to learn from: problems too easy or too hard.",
    ),
    Metric(
        "accuracy",
        "learning",
        "",
        "Fraction of held-out problems solved when sampling as in training (temperature, top_p, top_k and "
        "quantization of [sampler]); only on evaluated steps.",
        "Should follow the reward; a widening gap is overfitting to the training problems.",
    ),
    Metric(
        "greedy_accuracy",
        "learning",
        "",
        "Fraction of held-out problems solved by greedy decoding with the sampler's weights; only on "
        "evaluated steps.",
        "Flat while the sampled accuracy rises: the policy only sharpens.",
    ),
    Metric(
        "loss",
        "learning",
        "",
        "Value of the surrogate that was differentiated.",
        "Its level means little; only a sudden jump by orders of magnitude is a warning.",
    ),
    Metric(
        "ess",
        "variance",
        "trajectories",
        "Effective sample size (Σw)²/Σw² of the unclipped sequence importance weights.",
        "Between 1 and the minibatch size; near 1 a single trajectory decides the step.",
    ),
    Metric(
        "ess_ratio",
        "variance",
        "",
        "ESS divided by the number of trajectories in the minibatch.",
        "Above 0.3 is comfortable; below 0.1 the step is mostly noise. Falls before the reward does.",
    ),
    Metric(
        "ess_ratio_truncated",
        "variance",
        "",
        "ESS ratio of the weights that the update uses (truncated, tapered), of trajectories or tokens.",
        "Far above the ESS ratio: truncation hides the staleness, it does not remove it.",
    ),
    Metric(
        "on_policy_ratio",
        "variance",
        "",
        "ESS ratio that data without any lag would have; the step scale is relative to it. Set, or "
        "calibrated for the lengths of the step.",
        "Below 1 only where the sampler's numerics differ from the learner's, or top_p or top_k cut; "
        "calibrated, it falls as answers grow.",
    ),
    Metric(
        "value_loss",
        "learning",
        "",
        "Half the mean squared error of the critic.",
        "Falls while the critic learns, and rises when rewards change.",
    ),
    Metric(
        "value_explained",
        "learning",
        "",
        "Part of the variance of its targets that the critic explains.",
        "Near 0 or below: advantages are no better than the rewards themselves.",
    ),
    Metric(
        "log_weight_mean",
        "variance",
        "nats",
        "Mean log importance weight of the trajectories.",
        "Slightly below 0; strongly negative: the learner has left the behaviour policy.",
    ),
    Metric(
        "log_weight_max",
        "variance",
        "nats",
        "Largest log importance weight in the minibatch.",
        "Above about 5 one trajectory may outweigh all others.",
    ),
    Metric(
        "top_weight_share",
        "variance",
        "",
        "Share of the largest importance weight in the sum of all.",
        "Near 1/B when on-policy; above 0.5 the step follows one trajectory.",
    ),
    Metric(
        "truncated_fraction",
        "variance",
        "",
        "Fraction of importance weights beyond their bounds, or of tokens that a mask leaves out.",
        "Above 0.1 the update is noticeably biased.",
    ),
    Metric(
        "kl",
        "variance",
        "nats/token",
        "KL divergence per token from behaviour to current policy, k3 estimator E[ρ − 1 − log ρ].",
        "Below 0.1 is ordinary; above 0.5 runs have collapsed.",
    ),
    Metric(
        "ratio_variance",
        "variance",
        "nats²/token",
        "Mean square of the log-ratio over sampled tokens.",
        "About twice the KL while both are small; 0 without lag, or the numerics differ.",
    ),
    Metric(
        "step_scale",
        "update",
        "",
        "Factor on the learning rate from the ESS ratio; never above 1.",
        "Constantly small: the lag is too large for this learning rate.",
    ),
    Metric(
        "learning_rate",
        "update",
        "",
        "Learning rate that the optimizer used, after warm-up and step scale.",
        "Follows the step scale.",
    ),
    Metric(
        "grad_norm",
        "update",
        "",
        "Euclidean norm of the gradient before clipping.",
        "Lone spikes: a few weights or scores dominate. It gives no early warning of a collapse.",
    ),
    Metric(
        "score_norm_mean",
        "update",
        "",
        "Mean norm of the trajectories' scores, ‖∇ log π‖; only where the baseline needs it.",
        "Grows as sampled trajectories become unlikely.",
    ),
    Metric(
        "score_norm_max",
        "update",
        "",
        "Largest score norm in the minibatch.",
        "Many times the mean: one unlikely trajectory dominates the gradient.",
    ),
    Metric(
        "score_norm_error",
        "update",
        "",
        "Estimated relative error of the squared score norms, their mean; only where norms are measured.",
        "Below .2: most of it is common to a group, without effect on its baseline. 0: norms are exact.",
    ),
    Metric(
        "baseline_mean",
        "update",
        "",
        "Mean of the baselines over trajectories.",
        "Inside the range of the rewards.",
    ),
    Metric(
        "advantage_std",
        "update",
        "",
        "Standard deviation of the advantages over trajectories.",
        "Near 0 there is no learning signal.",
    ),
    Metric(
        "equal_groups",
        "data",
        "",
        "Fraction of groups whose rewards are all equal; they contribute nothing.",
        "Above 0.8 most rollouts are wasted: choose harder or easier problems.",
    ),
    Metric(
        "skipped_groups",
        "data",
        "groups",
        "Groups with equal rewards that were skipped since the step before; only with dynamic sampling.",
        "Above the groups of a step most rollouts are wasted: choose harder or easier problems.",
    ),
    Metric(
        "skipped_tokens",
        "data",
        "tokens",
        "Tokens of the skipped groups, counted as in tokens; only with dynamic sampling.",
        "What a step cost is this plus tokens: compare runs at equal sums.",
    ),
    Metric(
        "skipped_failed_episodes",
        "data",
        "episodes",
        "Episodes of the skipped groups whose environment failed twice; only with dynamic sampling.",
        "0; a group whose episodes all fail has equal rewards: it is skipped, and not in failed_episodes.",
    ),
    Metric(
        "teacher_error",
        "data",
        "",
        "Root mean square error of what the teacher predicted for the step's groups and those skipped before "
        "it, sqrt(p (1 − p)), before it learned from them; only with goldilocks selection.",
        "Below the deviation of sqrt(p (1 − p)) itself; groups of 16 alone give .1.",
    ),
    Metric(
        "teacher_prediction",
        "data",
        "",
        "Mean of what the teacher predicted for the same groups, between 0 and ½; only with goldilocks "
        "selection.",
        "Near ½: prompts of medium difficulty are found. Near 0: candidates are all too easy or too hard.",
    ),
    Metric(
        "tokens", "data", "tokens", "Tokens in the minibatch, prompts and observations included.", "Steady."
    ),
    Metric(
        "action_tokens",
        "data",
        "tokens",
        "Sampled tokens in the minibatch; only these enter the loss.",
        "Steady; it equals the response length times the number of trajectories.",
    ),
    Metric(
        "masked_tokens",
        "data",
        "tokens",
        "Sampled tokens that an older version than their trajectory's newest sampled, and that are therefore "
        "not trained on; only with learner.mask_off_policy_prefix.",
        "A small part of action_tokens (which count them); most of them: weights change too often.",
    ),
    Metric(
        "response_length",
        "data",
        "tokens",
        "Mean number of sampled tokens of a trajectory, over all its turns.",
        "A steady climb to the limit: answers ramble, or length is rewarded.",
    ),
    Metric(
        "failed_episodes",
        "data",
        "episodes",
        "Episodes of the minibatch whose environment failed twice; rewarded as failed.",
        "0; otherwise read the notes in the journal and the environment's log.",
    ),
    Metric(
        "truncated_episodes",
        "data",
        "episodes",
        "Episodes of the minibatch cut by the context or by the token limit.",
        "Above a quarter of the minibatch: raise environment.max_tokens or model.context_length.",
    ),
    Metric(
        "lag_mean",
        "lag",
        "steps",
        "Mean policy lag of the groups: the learner's version minus the oldest version in the group.",
        "At or below pipeline.lag.",
    ),
    Metric(
        "lag_max",
        "lag",
        "steps",
        "Largest policy lag of a group in the minibatch.",
        "Never above lag + 1 + floor((over_provision + window − 2) / prompts).",
    ),
    Metric(
        "token_lag_mean",
        "lag",
        "steps",
        "Mean policy lag of the sampled tokens, each by its own version.",
        "Below the groups' lag when weights change during generation.",
    ),
    Metric(HISTOGRAM, "lag", "groups", "Number of groups at each policy lag.", "Narrow, around the target."),
    Metric(
        SAMPLERS,
        "time",
        "",
        "Of each sampler: policy version and checksum that it serves, how many versions that is behind the "
        "learner, tokens a second of finished groups, groups and (expected) tokens that it has not finished.",
        "Alike; one with a lag or few tokens a second is slow, one that is missing has left.",
    ),
    Metric(
        "tokens_per_second",
        "time",
        "tokens/s",
        "Tokens of the minibatch divided by the time spent training, waiting and publishing.",
        "Steady; a drop means that rollouts or steps became slower.",
    ),
    Metric(
        "seconds_training",
        "time",
        "s",
        "Time of this step that the learner spent computing the update.",
        "Most of the step in an asynchronous run.",
    ),
    Metric(
        "seconds_waiting",
        "time",
        "s",
        "Time of this step that the learner waited for groups.",
        "Near 0; more than half of the step: the samplers are the bottleneck.",
    ),
    Metric(
        "seconds_publishing",
        "time",
        "s",
        "Time of this step that the learner spent handing weights to the samplers.",
        "A few per cent of the step.",
    ),
    Metric(
        "seconds_sampling",
        "time",
        "s",
        "Time of this step that samplers were generating, summed over them; overlaps training "
        "in an asynchronous run.",
        "Near the step's wall time; less than half of it: the window is full and samplers idle.",
    ),
)

GLOSSARY: dict[str, Metric] = {metric.name: metric for metric in _METRICS}


def require_known(keys: Iterable[str]) -> None:
    """Raise :class:`VcpoError` for the first key that the glossary lacks, naming the nearest one."""
    for key in keys:
        if key not in GLOSSARY:
            near = difflib.get_close_matches(key, GLOSSARY, n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise VcpoError(f"unknown metric '{key}'{hint}: describe it in vcpo.monitor.glossary first")
