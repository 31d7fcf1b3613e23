"""Factors [token] for sampling with an engine whose log-probs differ from the trainer's.

The engine samples from μ, the trainer computes π_old of the same weights; each token's loss is multiplied by π_old / μ,
bounded (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; the sequence
level and masking: Liu et al. 2025, "When speed kills stability").

A factor takes a `TokenBatch` and returns weights [token], constants that multiply the losses, and metrics {name: values
[token]}. A token whose log μ is NaN (the engine gave none) has weight 1, is left out of its completion's product and is NaN
in the metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_hf.algorithm.kl import k3
from grpo_hf.algorithm.sequences import sequence_mean, sequence_sum
from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    Tokens = Float[Tensor, " token"]
    Metrics = dict[str, Tokens]
    Factor = Callable[[TokenBatch], tuple[Tokens, Metrics]]


def truncate(weights: Tokens, low: float | None, high: float | None) -> Tokens:
    """clamp(w, low, high); None leaves that side open."""
    return weights.clamp(-torch.inf if low is None else low, torch.inf if high is None else high)


def mask(weights: Tokens, low: float | None, high: float | None) -> Tokens:
    """w where low <= w <= high, else 0: the token leaves the loss."""
    inside = (weights >= (-torch.inf if low is None else low)) & (weights <= (torch.inf if high is None else high))
    return torch.where(inside, weights, 0.0)


def of_token(log_weights: Tokens, known: Tokens, batch: TokenBatch) -> Tokens:
    """Each token's own: with a mask and both bounds IcePop (Ling Team 2025, arXiv 2510.18855)."""
    return log_weights


def of_sequence(log_weights: Tokens, known: Tokens, batch: TokenBatch) -> Tokens:
    """The product over the completion: grows with its length."""
    return sequence_sum(log_weights, batch)[batch.completion]


def of_geometric_mean(log_weights: Tokens, known: Tokens, batch: TokenBatch) -> Tokens:
    """The geometric mean over the completion: bounds near 1 (say 0.99 and 1.01) hold for any length."""
    return (sequence_sum(log_weights, batch) / sequence_sum(known, batch).clamp(min=1))[batch.completion]


BOUNDS: dict[str, Callable[[Tokens, float | None, float | None], Tokens]] = {"truncate": truncate, "mask": mask}
MISMATCH_LEVELS: dict[str, Callable[[Tokens, Tokens, TokenBatch], Tokens]] = {
    "token": of_token,
    "sequence": of_sequence,
    "geometric": of_geometric_mean,
}
CORRECTION_MODES = tuple(f"{level}_{bound}" for level in MISMATCH_LEVELS for bound in BOUNDS)


def measured(batch: TokenBatch) -> tuple[Tokens, Metrics]:
    """w = 1: how far the engine is from the trainer is measured, and the loss stays as it is.

    Metrics, none without the engine's log-probs: |log π_old - log μ|; the k3 estimate of KL(μ || π_old); and 1 where a
    log-prob is missing.
    """
    ones = torch.ones_like(batch.old_logprobs)
    if batch.rollout_logprobs is None:
        return ones, {}
    log_weights = (batch.old_logprobs - batch.rollout_logprobs).detach()
    return ones, {
        "sampling/sampling_logp_difference": log_weights.abs(),
        "sampling/kl": k3(log_weights),
        "sampling/frac_without_logprobs": batch.rollout_logprobs.isnan().float(),
    }


def corrected(
    batch: TokenBatch, *, mode: str = "sequence_mask", low: float | None = None, high: float | None = 3.0
) -> tuple[Tokens, Metrics]:
    """w = bound(π_old / μ), per token, or the product or the geometric mean over the completion.

    ``mode`` is level_bound, of MISMATCH_LEVELS and BOUNDS (TRL has the first two levels, under these names). Metrics: those
    of `measured`; the weights before they are bounded; and 1 where the bound changed one.
    """
    ones, metrics = measured(batch)
    if batch.rollout_logprobs is None:
        return ones, metrics
    level, bound = mode.split("_")
    missing = batch.rollout_logprobs.isnan()
    log_weights = torch.where(missing, 0.0, (batch.old_logprobs - batch.rollout_logprobs).detach())
    raw = MISMATCH_LEVELS[level](log_weights, (~missing).to(log_weights.dtype), batch).exp()
    weights = BOUNDS[bound](raw, low, high)
    metrics["sampling/importance_sampling_ratio"] = torch.where(missing, torch.nan, raw)
    metrics["sampling/frac_weights_bounded"] = torch.where(missing, torch.nan, (raw != weights).float())
    return torch.where(missing, 1.0, weights), metrics


def off_policy_masked(batch: TokenBatch, *, threshold: float) -> tuple[Tokens, Metrics]:
    """w = 0 on completions with A < 0 and mean_t(log μ - log π_θ) > δ, else 1 (off-policy sequence masking; DeepSeek-V3.2,
    arXiv 2512.02556, equation 9). μ is the engine's where it gives log-probs, else π_old; a token without one adds 0.

    Metric: 1 where the mask is 0.
    """
    sampled = batch.old_logprobs if batch.rollout_logprobs is None else batch.rollout_logprobs
    drift = sequence_mean((sampled - batch.logprobs).detach().nan_to_num(), batch)[batch.completion]
    masked = (batch.advantages < 0) & (drift > threshold)
    return (~masked).to(batch.logprobs.dtype), {"off_policy_mask_ratio": masked.float()}


def chosen_by(name: str, batch: TokenBatch) -> tuple[Tokens, Metrics]:
    """w = what a selection of the objective has said of each token."""
    return batch.selected[name], {}
