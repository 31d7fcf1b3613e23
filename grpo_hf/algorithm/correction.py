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
from grpo_hf.algorithm.sequences import sequence_sum
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


BOUNDS: dict[str, Callable[[Tokens, float | None, float | None], Tokens]] = {"truncate": truncate, "mask": mask}
CORRECTION_MODES = tuple(f"{level}_{bound}" for level in ("token", "sequence") for bound in BOUNDS)


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
    """w = bound(π_old / μ), per token or (product over the completion) per sequence.

    ``mode`` is level_bound: token_truncate, token_mask, sequence_truncate or sequence_mask (TRL's names). Metrics: those of
    `measured`; the weights before they are bounded; and 1 where the bound changed one.
    """
    ones, metrics = measured(batch)
    if batch.rollout_logprobs is None:
        return ones, metrics
    level, bound = mode.split("_")
    missing = batch.rollout_logprobs.isnan()
    log_weights = torch.where(missing, 0.0, (batch.old_logprobs - batch.rollout_logprobs).detach())
    if level == "sequence":
        log_weights = sequence_sum(log_weights, batch)[batch.completion]
    raw = log_weights.exp()
    weights = BOUNDS[bound](raw, low, high)
    metrics["sampling/importance_sampling_ratio"] = torch.where(missing, torch.nan, raw)
    metrics["sampling/frac_weights_bounded"] = torch.where(missing, torch.nan, (raw != weights).float())
    return torch.where(missing, 1.0, weights), metrics
