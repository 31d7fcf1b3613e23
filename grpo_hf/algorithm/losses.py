"""Per-token policy losses, before aggregation: one function each, and one dict of their names.

A loss is a function of one `TokenBatch` and of its own keyword options. It returns

    losses   [token], which carry the gradient
    metrics  {name: values [token]}, which are logged; NaN where a token is not counted in one

In the formulas r = exp(batch.log_ratio) is the ratio π_θ / π_old of the token or of its whole completion, as LEVELS has made
it, A = batch.advantages and log π_θ = batch.logprobs. An option gets the value of the GRPOConfig setting with its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_hf.algorithm.sequences import sequence_mean
from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    Tokens = Float[Tensor, " token"]
    Metrics = dict[str, Tokens]
    Loss = Callable[..., tuple[Tokens, Metrics]]


def token_log_ratio(batch: TokenBatch) -> Tokens:
    """log r_t = log π_θ(o_t) - log π_old(o_t), with π_old held constant (PPO; Schulman et al. 2017, arXiv 1707.06347)."""
    return batch.logprobs - batch.old_logprobs.detach()


def sequence_log_ratio(batch: TokenBatch) -> Tokens:
    """One ratio a completion, length-normalized: log s = mean_t(log π_θ - log π_old) (GSPO; Zheng et al. 2025, arXiv
    2507.18071), repeated over the completion's tokens."""
    return sequence_mean(token_log_ratio(batch), batch)[batch.completion]


LEVELS: dict[str, Callable[[TokenBatch], Tokens]] = {"token": token_log_ratio, "sequence": sequence_log_ratio}


def reinforce(batch: TokenBatch) -> tuple[Tokens, Metrics]:
    """L = -A log π_θ (REINFORCE; Williams 1992)."""
    return -batch.advantages * batch.logprobs, {}


def unclipped(batch: TokenBatch) -> tuple[Tokens, Metrics]:
    """L = -A r, the importance-weighted surrogate (CPI; Kakade & Langford 2002)."""
    return -batch.advantages * _ratio(batch), {}


def clipped(
    batch: TokenBatch, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tokens, Metrics]:
    """L = -min(min(r, δ) A, clip(r, 1 - ε, 1 + ε_high) A) (PPO, arXiv 1707.06347; ε_high from DAPO, arXiv 2503.14476; the
    two-sided bound δ > 1 + ε_high from INTELLECT-2, arXiv 2505.07291).

    Metrics: 1 on the tokens whose gradient the clip removes: below (r < 1 - ε and A < 0), above (r > 1 + ε_high and A > 0),
    either. ``epsilon_high`` None is ``epsilon``, ``delta`` None no bound.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if delta is not None and delta <= 1 + high:
        raise ValueError(f"epsilon_high={high}, delta={delta}, but delta > 1 + epsilon_high is needed")
    ratio, advantages = _ratio(batch), batch.advantages
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    losses = -torch.minimum(bounded * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    below, above = (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    return losses, {
        "clip_ratio/low": below.float(),
        "clip_ratio/high": above.float(),
        "clip_ratio/region": (below | above).float(),
    }


def cispo(batch: TokenBatch, *, epsilon_high: float | None = None) -> tuple[Tokens, Metrics]:
    """L = -sg[min(r, ε_high)] A log π_θ: the weight is clipped, the gradient never is (CISPO; MiniMax-M1, arXiv 2506.13585).

    As in TRL ``epsilon_high`` is here the bound itself (say 5.0), not its distance from 1. Metric: 1 on the tokens whose
    weight is clipped and A > 0.
    """
    if epsilon_high is None or epsilon_high < 1:
        raise ValueError(
            f"epsilon_high={epsilon_high}: for loss_type='cispo' it is the bound on the ratio itself, and a bound "
            "below 1 shrinks even on-policy gradients; give one of at least 1, say 5.0"
        )
    ratio = _ratio(batch).detach()
    losses = -ratio.clamp(max=epsilon_high) * batch.advantages * batch.logprobs
    return losses, {"cispo_clip_ratio": ((ratio > epsilon_high) & (batch.advantages > 0)).float()}


def sapo(
    batch: TokenBatch, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05
) -> tuple[Tokens, Metrics]:
    """L = -A σ(τ (r - 1)) 4 / τ, a soft gate in place of the clip; τ by the sign of A (SAPO, arXiv 2511.20347)."""
    temperature = torch.where(batch.advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -batch.advantages * torch.sigmoid(temperature * (_ratio(batch) - 1)) * 4 / temperature, {}


LOSSES: dict[str, tuple[Loss, str]] = {
    "dapo": (clipped, "token_mean"),
    "grpo": (clipped, "sequence_mean"),
    "dr_grpo": (clipped, "constant_length"),
    "bnpo": (clipped, "local_token_mean"),
    "luspo": (clipped, "sequence_sum"),
    "cispo": (cispo, "token_mean"),
    "sapo": (sapo, "sequence_mean"),
    "reinforce": (reinforce, "token_mean"),
    "unclipped": (unclipped, "token_mean"),
}
"""loss_type -> the loss, and its own entry in AGGREGATIONS; TRL's names, then ours."""


def _ratio(batch: TokenBatch) -> Tokens:
    assert batch.log_ratio is not None, "the objective sets it, by LEVELS"
    return batch.log_ratio.exp()
