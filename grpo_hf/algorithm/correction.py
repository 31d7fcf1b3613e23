"""Importance weights [token] for sampling with an engine whose log-probs differ from the trainer's.

The engine samples from μ, the trainer computes π_old of the same weights; each token's loss is multiplied by π_old / μ,
bounded (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; the sequence
level and masking: Liu et al. 2025, "When speed kills stability").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_hf.algorithm.sequences import sequence_sum

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Tokens = Float[Tensor, " token"]


def truncate(weights: Tokens, low: float | None, high: float | None) -> Tokens:
    """clamp(w, low, high); None leaves that side open."""
    return weights.clamp(-torch.inf if low is None else low, torch.inf if high is None else high)


def mask(weights: Tokens, low: float | None, high: float | None) -> Tokens:
    """w where low <= w <= high, else 0: the token leaves the loss."""
    inside = (weights >= (-torch.inf if low is None else low)) & (weights <= (torch.inf if high is None else high))
    return torch.where(inside, weights, 0.0)


BOUNDS: dict[str, Callable[[Tokens, float | None, float | None], Tokens]] = {"truncate": truncate, "mask": mask}


def correction_weights(
    old_logprobs: Tokens,
    rollout_logprobs: Tokens,
    sequence: Int[Tensor, " token"],
    num_sequences: int,
    *,
    mode: str = "sequence_mask",
    low: float | None = None,
    high: float | None = 3.0,
) -> Tokens:
    """w = bound(π_old / μ), per token or (product over the completion) per sequence; a constant.

    ``mode`` is level_bound: token_truncate, token_mask, sequence_truncate or sequence_mask (TRL's names).
    """
    level, bound = mode.split("_")
    log_weights = (old_logprobs - rollout_logprobs).detach()
    if level == "sequence":
        log_weights = sequence_sum(log_weights, sequence, num_sequences)[sequence]
    return BOUNDS[bound](log_weights.exp(), low, high)


CORRECTION_MODES = tuple(f"{level}_{bound}" for level in ("token", "sequence") for bound in BOUNDS)
