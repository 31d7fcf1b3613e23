"""Credit: scores [prompts group objective] and weights [objective] -> advantages [prompts group].

How much better a completion did than its group. A NaN score means that this objective does not apply to that completion, and
is left out of every statistic; a completion without any score has advantage 0. A group whose scores are all equal has
advantage exactly 0 under every centered form, whatever the rounding of its mean. An infinite score is never hidden: its
group's advantages come out infinite or NaN.

In the formulas r = weighted_sum(scores, weights), one reward a completion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Scores = Float[Tensor, "prompts group objective"]
    Weights = Float[Tensor, " objective"]
    Rewards = Float[Tensor, "prompts group"]
    Credit = Callable[[Scores, Weights], Rewards]


EPS = 1e-4
"""Added to standard deviations, as in TRL."""


def weighted_sum(scores: Scores, weights: Weights) -> Rewards:
    """r = Σ_k w_k s_k over the objectives that apply (whose score is not NaN); NaN where none does."""
    applies = ~scores.isnan()
    return torch.where(applies.any(-1), _sum(scores, weights, applies), torch.nan)


def raw(scores: Scores, weights: Weights) -> Rewards:
    """The reward itself, no baseline: A = r (REINFORCE; Williams 1992)."""
    rewards = weighted_sum(scores, weights)
    return _zero_where_nan(rewards, rewards)


def centered(scores: Scores, weights: Weights) -> Rewards:
    """Reward less its group's mean: A = r - mean(r) (Dr. GRPO; Liu et al. 2025, arXiv 2503.20783)."""
    rewards = weighted_sum(scores, weights)
    return _zero_where_nan(rewards, _centered(rewards))


def group_normalized(scores: Scores, weights: Weights) -> Rewards:
    """Centered over the group's Bessel std: A = (r - mean) / (std + 1e-4) (GRPO; Shao et al. 2024, arXiv 2402.03300)."""
    rewards = weighted_sum(scores, weights)
    return _zero_where_nan(rewards, _normalized(rewards))


def batch_normalized(scores: Scores, weights: Weights) -> Rewards:
    """Centered by group, scaled by the std of the whole batch: A = (r - mean) / (std_batch + 1e-4) (Lite PPO; Liu et al.
    2025, arXiv 2508.08221)."""
    rewards = weighted_sum(scores, weights)
    return _zero_where_nan(rewards, _centered(rewards) / (_std(rewards[~rewards.isnan()]) + EPS))


def max_only(scores: Scores, weights: Weights) -> Rewards:
    """The reward where it is the group's best, else 0: A = r * [r = max(r)] (CS336 lecture 17's fourth delta)."""
    rewards = weighted_sum(scores, weights)
    scored = rewards.nan_to_num(nan=-torch.inf)
    best = scored.amax(dim=-1, keepdim=True)
    return _zero_where_nan(rewards, torch.where(scored == best, rewards, 0.0))


def leave_one_out(scores: Scores, weights: Weights) -> Rewards:
    """Reward less the mean of the others: A_i = r_i - mean(r_j, j != i) (RLOO; Ahmadian et al. 2024, arXiv 2402.14740)."""
    rewards = weighted_sum(scores, weights)
    count = _count(rewards)
    return _zero_where_nan(rewards, _centered(rewards) * count / (count - 1).clamp(min=1))


def gdpo(scores: Scores, weights: Weights) -> Rewards:
    """Each objective normalized within its group, then summed, then scaled over the batch (GDPO, arXiv 2601.05242; TRL's
    "normalize_then_sum"):

        z_k = (s_k - mean(s_k)) / (std(s_k) + 1e-4),   Z = Σ_k w_k z_k,   A = Z / (std_batch(Z) + 1e-4)

    An objective counts by its weight, however far its scores spread. The mean of Z over the batch is 0 already.
    """
    applies = ~scores.isnan()
    scored = applies.any(-1)
    normalized = torch.stack([_normalized(of_objective) for of_objective in scores.unbind(-1)], dim=-1)
    total = _sum(normalized, weights, applies)
    return torch.where(scored, total / (_std(total[scored]) + EPS), 0.0)


ADVANTAGES: dict[str, Credit] = {
    "raw": raw,
    "centered": centered,
    "group": group_normalized,
    "batch": batch_normalized,
    "max_only": max_only,
    "leave_one_out": leave_one_out,
    "gdpo": gdpo,
}

NEEDS_A_GROUP = frozenset(ADVANTAGES) - {"raw", "max_only"}
"""Forms that are 0 everywhere when a group has one completion."""


def _sum(values: Scores, weights: Weights, applies: Bool[Tensor, "prompts group objective"]) -> Rewards:
    """Σ_k w_k v_k where it applies; one objective after the other, so that equal values have equal sums to the last bit."""
    columns = torch.where(applies, values, 0.0).unbind(-1)
    return sum((weight * column for weight, column in zip(weights, columns, strict=True)), start=values.new_zeros(()))


def _zero_where_nan(rewards: Rewards, advantages: Rewards) -> Rewards:
    return torch.where(rewards.isnan(), 0.0, advantages)


def _count(rewards: Rewards) -> Tensor:
    return (~rewards.isnan()).sum(-1, keepdim=True)


def _std(values: Tensor) -> Float[Tensor, ""]:
    return values.std() if values.numel() > 1 else values.new_zeros(())


def _centered(rewards: Rewards) -> Rewards:
    lowest = rewards.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    highest = rewards.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    # The mean of equal numbers can differ from them in the last bit; a group without signal must come out as exactly 0.
    return torch.where(lowest == highest, rewards * 0.0, rewards - rewards.nanmean(-1, keepdim=True))


def _normalized(rewards: Rewards) -> Rewards:
    variance = _centered(rewards).square().nansum(-1, keepdim=True) / (_count(rewards) - 1).clamp(min=1)
    return _centered(rewards) / (variance.sqrt() + EPS)
