"""Per-token policy losses [token], before aggregation.

Every loss takes the same three tensors and the keyword options that it names:

    logprobs    log π_θ of each sampled token; carries the gradient
    log_ratio   log(π_θ / π_old) of each token, at the level that LEVELS made it (token or sequence); carries the gradient
    advantages  each token's completion's advantage; a constant

π_old is a constant: its log-probs are detached before the difference is taken. A ratio is exp of a difference of
log-probs, never a quotient of log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_hf.algorithm.sequences import sequence_mean

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Tokens = Float[Tensor, " token"]


def token_log_ratio(logprobs: Tokens, old_logprobs: Tokens, sequence: Int[Tensor, " token"], num_sequences: int) -> Tokens:
    """log r_t = log π_θ(o_t) - log π_old(o_t) (PPO; Schulman et al. 2017, arXiv 1707.06347)."""
    return logprobs - old_logprobs.detach()


def sequence_log_ratio(
    logprobs: Tokens, old_logprobs: Tokens, sequence: Int[Tensor, " token"], num_sequences: int
) -> Tokens:
    """One ratio a completion, length-normalized: log s = mean_t(log π_θ - log π_old) (GSPO; Zheng et al. 2025, arXiv
    2507.18071), repeated over the completion's tokens."""
    return sequence_mean(logprobs - old_logprobs.detach(), sequence, num_sequences)[sequence]


LEVELS: dict[str, Callable[[Tokens, Tokens, Tensor, int], Tokens]] = {
    "token": token_log_ratio,
    "sequence": sequence_log_ratio,
}


def naive(logprobs: Tokens, log_ratio: Tokens, advantages: Tokens) -> Tokens:
    """L = -A log π_θ (REINFORCE; Williams 1992)."""
    return -advantages * logprobs


def unclipped(logprobs: Tokens, log_ratio: Tokens, advantages: Tokens) -> Tokens:
    """L = -A r, the importance-weighted surrogate (CPI; Kakade & Langford 2002)."""
    return -advantages * log_ratio.exp()


def clipped(
    logprobs: Tokens,
    log_ratio: Tokens,
    advantages: Tokens,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tokens:
    """L = -min(min(r, δ) A, clip(r, 1 - ε, 1 + ε_high) A) (PPO, arXiv 1707.06347; ε_high from DAPO, arXiv 2503.14476; the
    two-sided bound δ > 1 + ε_high from INTELLECT-2, arXiv 2505.07291)."""
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def cispo(logprobs: Tokens, log_ratio: Tokens, advantages: Tokens, *, epsilon_high: float | None = None) -> Tokens:
    """L = -sg[min(r, ε_high)] A log π_θ: the weight is clipped, the gradient never is (CISPO; MiniMax-M1, arXiv
    2506.13585). As in TRL ``epsilon_high`` is here the bound itself (say 5.0), not its distance from 1; None: no bound."""
    weight = log_ratio.exp().detach()
    if epsilon_high is not None:
        weight = weight.clamp(max=epsilon_high)
    return -weight * advantages * logprobs


def sapo(
    logprobs: Tokens,
    log_ratio: Tokens,
    advantages: Tokens,
    *,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> Tokens:
    """L = -A σ(τ (r - 1)) 4 / τ, a soft gate in place of the clip; τ by the sign of A (SAPO, arXiv 2511.20347)."""
    temperature = torch.where(advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -advantages * torch.sigmoid(temperature * (log_ratio.exp() - 1)) * 4 / temperature


LOSSES: dict[str, Callable[..., Tokens]] = {
    "naive": naive,
    "unclipped": unclipped,
    "clipped": clipped,
    "cispo": cispo,
    "sapo": sapo,
}


def clip_masks(
    log_ratio: Tokens, advantages: Tokens, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[Bool[Tensor, " token"], Bool[Tensor, " token"]]:
    """Tokens whose gradient the clip removes: (r < 1 - ε and A < 0, r > 1 + ε_high and A > 0)."""
    ratio = log_ratio.detach().exp()
    high = epsilon if epsilon_high is None else epsilon_high
    return (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
