"""Credit: scores [prompts group objective] and weights [objective] -> advantages [prompts group].

How much better a completion did than its group. A NaN score means that this objective does not apply to that completion, and
is left out of every statistic; a completion without any score has advantage 0. A group whose scores are all equal has
advantage exactly 0 under every centered form, whatever the rounding of its mean. An infinite score is never hidden: its
group's advantages come out infinite or NaN.

In the formulas r = weighted_sum(scores, weights), one reward a completion. Credit may name options after a *: ``lengths``
[prompts group], the tokens of each completion, or a GRPOConfig setting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

    Scores = Float[Tensor, "prompts group objective"]
    Weights = Float[Tensor, " objective"]
    Rewards = Float[Tensor, "prompts group"]
    Lengths = Float[Tensor, "prompts group"]
    Credit = Callable[..., Rewards]


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


def reinforce_plus_plus_baseline(scores: Scores, weights: Weights) -> Rewards:
    """Centered by group, then scaled by the std of that over the batch: c = r - mean(r), A = c / (std_batch(c) + 1e-4)
    (REINFORCE++-baseline; Hu et al. 2025, arXiv 2501.03262). The mean of c over the batch is 0 already."""
    rewards = weighted_sum(scores, weights)
    deviations = _centered(rewards)
    return _zero_where_nan(rewards, deviations / (_std(deviations[~rewards.isnan()]) + EPS))


def opo(scores: Scores, weights: Weights, *, lengths: Lengths) -> Rewards:
    """Reward less the mean over the group's tokens: A = r - Σ_j l_j r_j / Σ_j l_j, with l_j the tokens of a completion; of
    least variance where gradients grow with length (OPO; Hao et al. 2025, arXiv 2505.23585)."""
    rewards = weighted_sum(scores, weights)
    of_scored = torch.where(rewards.isnan(), 0.0, lengths.to(rewards.dtype))
    baseline = (of_scored * rewards).nansum(-1, keepdim=True) / of_scored.sum(-1, keepdim=True).clamp(min=1)
    return _zero_where_nan(rewards, torch.where(_all_equal(rewards), rewards * 0.0, rewards - baseline))


def maxrl(scores: Scores, weights: Weights) -> Rewards:
    """Centered over the group's mean: A = (r - mean) / mean, 0 where the mean is 0. Of rewards 0 and 1 the gradient nears
    that of log p(correct), which weighs hard prompts more (MaxRL; Tajwar et al. 2026, arXiv 2602.02710)."""
    rewards = weighted_sum(scores, weights)
    if (rewards < 0).any():
        lowest = rewards.nan_to_num().min()
        raise ValueError(f"advantage='maxrl' divides by the mean reward: rewards of 0 or more are needed, one is {lowest:g}")
    mean = rewards.nanmean(-1, keepdim=True)
    return _zero_where_nan(rewards, torch.where(mean > 0, _centered(rewards) / mean, 0.0))


def pass_at_k(scores: Scores, weights: Weights, *, advantage_k: int = 4) -> Rewards:
    """What a completion adds to the best of k: over the subsets I of k of the group's n that it is in,

        A_i = Σ_I (max_{j in I} r_j - max_{j in I, j != i} r_j) / C(n, k)

    The gradient is that of E[max of k rewards], without bias: of pass@k where rewards are 0 and 1 (PKPO's "leave one out
    minus one"; Walder & Karkhanis 2025, arXiv 2505.15201). A group of fewer than k is taken whole.
    """
    rewards = weighted_sum(scores, weights)
    ordered, order = torch.where(rewards.isnan(), -torch.inf, rewards).sort(dim=-1, stable=True)
    n = _count(rewards)
    rank = torch.arange(rewards.shape[-1], device=rewards.device) - (rewards.shape[-1] - n)  # 0: the lowest that has a score
    # C(rank, k - 1) choices of the others are all below. A step up from the neighbour counts for each of those: r_i - r_j is
    # a sum of steps, and equal rewards differ by exactly 0.
    steps = torch.where(rank > 0, ordered.diff(dim=-1, prepend=ordered[:, :1]), 0.0)
    k = n.clamp(max=advantage_k)
    advantages = (steps * _binomial(rank, k - 1) / _binomial(n, k)).cumsum(-1).to(rewards.dtype)
    return _zero_where_nan(rewards, torch.zeros_like(rewards).scatter(-1, order, advantages))


ADVANTAGES: dict[str, Credit] = {
    "raw": raw,
    "centered": centered,
    "group": group_normalized,
    "batch": batch_normalized,
    "max_only": max_only,
    "leave_one_out": leave_one_out,
    "gdpo": gdpo,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "opo": opo,
    "maxrl": maxrl,
    "pass_at_k": pass_at_k,
}


def credited(credit: Credit, scores: Scores, weights: Weights, lengths: Lengths) -> Rewards:
    """The advantages that credit gives, told the completions' lengths where it asks for them."""
    asked = {"lengths": lengths} if "lengths" in inspect.signature(credit).parameters else {}
    return credit(scores, weights, **asked)


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


def _all_equal(rewards: Rewards) -> Bool[Tensor, "prompts one"]:
    lowest = rewards.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    return lowest == rewards.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)


def _centered(rewards: Rewards) -> Rewards:
    # The mean of equal numbers can differ from them in the last bit; a group without signal must come out as exactly 0.
    return torch.where(_all_equal(rewards), rewards * 0.0, rewards - rewards.nanmean(-1, keepdim=True))


def _binomial(n: Tensor, k: Tensor) -> Tensor:
    """C(n, k); 0 where n < k."""
    n, k = torch.broadcast_tensors(n.double(), k.double())
    logs = [torch.lgamma(value.clamp(min=0) + 1) for value in (n, k, n - k)]
    return torch.where(n < k, 0.0, (logs[0] - logs[1] - logs[2]).exp())


def _normalized(rewards: Rewards) -> Rewards:
    variance = _centered(rewards).square().nansum(-1, keepdim=True) / (_count(rewards) - 1).clamp(min=1)
    return _centered(rewards) / (variance.sqrt() + EPS)
