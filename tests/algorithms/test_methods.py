"""Every named method against coefficients worked out by hand, on one group of three trajectories.

Rewards 1, 0, 0; two sampled tokens, two, one. Token ratios 1.25 and 2.4; 0.5 and 1; 4: so the sequence
weights are 3, 0.5 and 4. The group's mean is 1/3, its sample deviation 1/√3, so the normalised advantages are
P = 2/√3 and N = −1/√3 twice.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vcpo.algorithms import ALGORITHMS, Evidence, get_algorithm
from vcpo.algorithms.parts import SPLIT_HALF_OPTIMAL, Within, bounded_optimal

torch.set_num_threads(1)

P, N = 2 / math.sqrt(3), -1 / math.sqrt(3)
RATIOS = [[1.25, 2.4], [0.5, 1.0], [4.0, math.nan]]
PROBABILITIES = [[0.5, 0.001], [0.5, 0.5], [0.5, math.nan]]
ESS = 9.15**2 / (5 * 24.5725)
"""Of the five token ratios, divided by their number."""


def table(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def evidence() -> Evidence:
    log_probs = table(PROBABILITIES).log()
    return Evidence(
        log_probs=log_probs,
        behaviour_log_probs=log_probs - table(RATIOS).log(),
        mask=torch.tensor([[True, True], [True, True], [True, False]]),
        rewards=table([[1.0, 0.0, 0.0]])[0],
        groups=torch.zeros(3, dtype=torch.long),
        lags=torch.tensor([[1, 3], [0, 1], [1, 99]]),
        squared_score_norms=table([[1.0, 2.0, 0.5]])[0],
        entropies=table([[0.6, 0.1], [0.9, 0.5], [0.7, math.nan]]),
        energies=table([[1.0, 0.5], [0.5, 1.5], [0.25, math.nan]]),
        values=table([[0.5, 0.75], [0.25, 0.5], [0.5, math.nan]]),
    )


def kl(ratio: float) -> float:
    return -(1 - ESS) * (1 - 1 / ratio)


# The optimal baseline: Σ w²‖u‖²R / Σ w²‖u‖² = 9 / (9 + 0.5 + 8) = 18/35.
VCPO = [[3 * 17 / 35, 3 * 17 / 35], [-0.5 * 18 / 35, -0.5 * 18 / 35], [-4 * 18 / 35, 0.0]]
# OTB: the first place 1.25²·1 / (1.25²·1 + 0.5²·0.5 + 2²·0.25) = 25/43; at the second 2²·0.5 and 1²·1.5
# come to the first two.
FIRST, SECOND = 25 / 43, 57 / 83

EXPECTED: dict[str, list[list[float]]] = {
    "reinforce": [[1, 1], [0, 0], [0, 0]],
    "rloo": [[1, 1], [-0.5, -0.5], [-0.5, 0]],
    "opo": [[0.6, 0.6], [-0.4, -0.4], [-0.4, 0]],  # b = 2·1 / 5
    "otb": [[1.25 * (1 - FIRST), 2 * (1 - SECOND)], [-0.5 * FIRST, -SECOND], [-2 * FIRST, 0]],
    "asymre": [[2 / 3 + 0.1, 2 / 3 + 0.1], [-1 / 3 + 0.1, -1 / 3 + 0.1], [-1 / 3 + 0.1, 0]],
    "topr": [[P, P], [0.5 * N, 0.5 * N], [N, 0]],
    "grpo": [[0, 0], [0, N], [4 * N, 0]],
    "dr-grpo": [[0, 0], [0, -1 / 3], [-4 / 3, 0]],
    "dapo": [[1.25 * P, 0], [0, N], [4 * N, 0]],
    "gspo": [[0, 0], [0, 0], [4 * N, 0]],  # geometric means √3, √0.5, 4
    # The second token is spurious: unlikely, of a success, below the largest entropy. Four of five are left.
    "stapo": [[1.25 * 1.25 * P, 0], [0, 1.25 * N], [1.25 * 4 * N, 0]],
    # π/π_prox = √1.25 and 2.4^¼ = 1.245 > 1.2; 0.5 < 0.8 and 1; √4.
    "decoupled-ppo": [[1.25 * P, 0], [0, N], [4 * N, 0]],
    "ppo": [[0, 0], [0, -0.5], [0, 0]],  # the last by the dual clip: 4 > 3
    "vtrace": [[0.5, 0.25], [0.5 * -0.25, -0.5], [-0.5, 0]],
    "cispo": [[1.25 * P, 2.4 * P], [0.5 * N, N], [4 * N, 0]],
    "tis": [[3 * P, 3 * P], [0.5 * N, 0.5 * N], [4 * N, 0]],
    "tis-token": [[1.25 * P, 2 * P], [0.5 * N, N], [2 * N, 0]],
    "tis-geometric": [[math.sqrt(3) * P] * 2, [math.sqrt(0.5) * N] * 2, [2 * N, 0]],
    "mis": [[3 * P, 3 * P], [0.5 * N, 0.5 * N], [4 * N, 0]],
    "mis-token": [[1.25 * P, 0], [0.5 * N, N], [0, 0]],
    "mis-geometric": [[0, 0], [0, 0], [0, 0]],
    # Both tokens of the success and the first of the second could be clipped; with the other two alone the
    # mean of (log ρ)² is log(4)²/2 already.
    "m2po": [[0, 0], [0, N], [4 * N, 0]],
    "vespo": [
        [9 * math.exp(-6) * P] * 2,
        [0.125 * math.exp(1) * N] * 2,
        [64 * math.exp(-6) * N, 0],
    ],
    "p3o": [
        [ESS * P + kl(1.25), ESS * P + kl(2.4)],
        [0.5 * N + kl(0.5), ESS * N + kl(1.0)],
        [ESS * N + kl(4.0), 0],
    ],
    "vcpo": VCPO,
    "vcpo-ess": [[2, 2], [-0.5 / 3, -0.5 / 3], [-4 / 3, 0]],
    "vcpo-opob": VCPO,
    "vcpo-taper": [[P, P], [0.5 * N, 0.5 * N], [N, 0]],  # as topr
    "vcpo-clip-higher": [[VCPO[0][0], 0], [0, VCPO[1][1]], VCPO[2]],
    "vcpo-stapo": [[2 * VCPO[0][0], 0], VCPO[1], VCPO[2]],  # one of the two tokens is left
}


def test_every_method_is_here() -> None:
    assert EXPECTED.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_coefficients_by_hand(name: str) -> None:
    found = get_algorithm(name).update(evidence()).coefficients
    torch.testing.assert_close(found, table(EXPECTED[name]), rtol=3e-5, atol=1e-12)


def test_value_targets_by_hand() -> None:
    """PPO's are the rewards; V-trace's are traced back with min(1, ratio)."""
    targets = get_algorithm("ppo").update(evidence()).value_targets
    assert targets is not None and targets.tolist() == [[1, 1], [0, 0], [0, 0]]
    targets = get_algorithm("vtrace").update(evidence()).value_targets
    assert targets is not None
    torch.testing.assert_close(targets, table([[1, 1], [0.125, 0], [0, 0]]))


def test_masked_importance_sampling_leaves_out_what_is_outside() -> None:
    narrow = replace(get_algorithm("mis"), token_masks=(Within(0.6, 3.5),)).update(evidence())
    torch.testing.assert_close(
        narrow.coefficients, table([[3 * P, 3 * P], [0, 0], [0, 0]]), rtol=1e-5, atol=0
    )
    assert narrow.limited.tolist() == [[False, False], [True, True], [True, False]]
    wide = replace(get_algorithm("mis-geometric"), token_masks=(Within(0.5, 1.75),)).update(evidence())
    assert wide.coefficients[0, 0] == pytest.approx(math.sqrt(3) * P, rel=1e-5)
    assert not wide.coefficients[2].any()


def test_baselines_that_stay_below_the_mean_or_look_at_the_other_half() -> None:
    vcpo = get_algorithm("vcpo")
    # The optimum 18/35 is above the mean 1/3: the bound acts. With untruncated failures it would not.
    bounded = replace(vcpo, baseline=bounded_optimal(0.1)).update(evidence()).baselines
    assert bounded.tolist() == pytest.approx([1 / 3 - 0.1] * 3)
    # Halves are {0, 2} and {1}: the optimum of the first is 9/17, that of the second its reward, 0.
    halves = replace(vcpo, baseline=SPLIT_HALF_OPTIMAL).update(evidence()).baselines
    assert halves.tolist() == pytest.approx([0.0, 9 / 17, 0.0])


@pytest.mark.parametrize("name", EXPECTED)
def test_equal_rewards_move_nothing(name: str) -> None:
    """But for the methods whose baseline is not the group's own, and P3O's trust region."""
    given = replace(evidence(), rewards=torch.full((3,), 0.25, dtype=torch.float64))
    update = get_algorithm(name).update(given)
    if name in ("reinforce", "asymre", "ppo", "vtrace"):
        assert update.coefficients.any()
    elif name == "p3o":
        expected = [[kl(r) if r == r else 0.0 for r in row] for row in RATIOS]
        torch.testing.assert_close(update.coefficients, table(expected))
    else:
        assert not update.coefficients.any()


def test_overlong_answers_lose_up_to_one() -> None:
    """DAPO, a limit of 20 tokens and a buffer of 4: 0 to 16 tokens, then a quarter for each more."""
    shaped = get_algorithm("dapo").shaped_rewards(torch.ones(5), torch.tensor([0, 16, 17, 20, 25]), 20)
    assert shaped.tolist() == pytest.approx([1, 1, 0.75, 0, 0])
    assert get_algorithm("grpo").shaped_rewards(torch.ones(1), torch.tensor([25]), 20).tolist() == [1]


@pytest.mark.parametrize("name", ["mis", "mis-token", "mis-geometric", "grpo", "dapo", "gspo", "m2po"])
def test_a_weight_that_is_left_out_may_be_too_large_for_any_number(name: str) -> None:
    given = evidence()
    behaviour = given.behaviour_log_probs.clone()
    behaviour[0, 0] -= 1000.0  # a token of the success: PPO's clip stops it too
    coefficients = get_algorithm(name).update(replace(given, behaviour_log_probs=behaviour)).coefficients
    assert coefficients[0, 0] == 0 and coefficients.isfinite().all()
    assert coefficients[1, 1] == pytest.approx(EXPECTED[name][1][1], rel=3e-5)
