"""Rewards [prompts group] -> advantages [prompts group]: how much better a completion did than its group.

A NaN reward means "no score": it is left out of every statistic and its advantage is 0. A group whose rewards are all
equal has advantage exactly 0 under every centered form, whatever the rounding of its mean. An infinite reward is never
hidden: its group's advantages come out infinite or NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

    Rewards = Float[Tensor, "prompts group"]


EPS = 1e-4
"""Added to standard deviations, as in TRL."""


def raw(rewards: Rewards) -> Rewards:
    """The reward itself, no baseline: A = r (REINFORCE; Williams 1992)."""
    return _zero_where_nan(rewards, rewards)


def centered(rewards: Rewards) -> Rewards:
    """Reward less its group's mean: A = r - mean(r) (Dr. GRPO; Liu et al. 2025, arXiv 2503.20783)."""
    return _zero_where_nan(rewards, _centered(rewards))


def group_normalized(rewards: Rewards) -> Rewards:
    """Centered over the group's Bessel std: A = (r - mean) / (std + 1e-4) (GRPO; Shao et al. 2024, arXiv 2402.03300)."""
    variance = _centered(rewards).square().nansum(-1, keepdim=True) / (_count(rewards) - 1).clamp(min=1)
    return _zero_where_nan(rewards, _centered(rewards) / (variance.sqrt() + EPS))


def batch_normalized(rewards: Rewards) -> Rewards:
    """Centered by group, scaled by the std of the whole batch: A = (r - mean) / (std_batch + 1e-4) (Lite PPO; Liu et al.
    2025, arXiv 2508.08221)."""
    scored = rewards[~rewards.isnan()]
    std = scored.std() if scored.numel() > 1 else rewards.new_zeros(())
    return _zero_where_nan(rewards, _centered(rewards) / (std + EPS))


def max_only(rewards: Rewards) -> Rewards:
    """The reward where it is the group's best, else 0: A = r * [r = max(r)] (CS336 lecture 17's fourth delta)."""
    scores = rewards.nan_to_num(nan=-torch.inf)
    best = scores.amax(dim=-1, keepdim=True)
    return _zero_where_nan(rewards, torch.where(scores == best, rewards, 0.0))


def leave_one_out(rewards: Rewards) -> Rewards:
    """Reward less the mean of the others: A_i = r_i - mean(r_j, j != i) (RLOO; Ahmadian et al. 2024, arXiv 2402.14740)."""
    count = _count(rewards)
    return _zero_where_nan(rewards, _centered(rewards) * count / (count - 1).clamp(min=1))


ADVANTAGES: dict[str, Callable[[Rewards], Rewards]] = {
    "raw": raw,
    "centered": centered,
    "group": group_normalized,
    "batch": batch_normalized,
    "max_only": max_only,
    "leave_one_out": leave_one_out,
}

NEEDS_A_GROUP = frozenset(ADVANTAGES) - {"raw", "max_only"}
"""Forms that are 0 everywhere when a group has one completion."""


def _zero_where_nan(rewards: Rewards, advantages: Rewards) -> Rewards:
    return torch.where(rewards.isnan(), 0.0, advantages)


def _count(rewards: Rewards) -> Tensor:
    return (~rewards.isnan()).sum(-1, keepdim=True)


def _centered(rewards: Rewards) -> Rewards:
    lowest = rewards.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    highest = rewards.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    # The mean of equal numbers can differ from them in the last bit; a group without signal must come out as exactly 0.
    return torch.where(lowest == highest, rewards * 0.0, rewards - rewards.nanmean(-1, keepdim=True))
