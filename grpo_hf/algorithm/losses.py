"""Per-token policy losses, before aggregation: one function each, and one dict of their names.

A loss is a function of one `TokenBatch` and of its own keyword options. It returns

    losses   [token], which carry the gradient
    metrics  {name: values [token]}, which are logged; NaN where a token is not counted in one

In the formulas r = exp(batch.log_ratio) is the ratio π_θ / π_old of the token or of its whole completion, as LEVELS has made
it, A = batch.advantages and log π_θ = batch.logprobs. An option gets the value of the GRPOConfig setting with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_hf.algorithm.correction import BOUNDS, corrected
from grpo_hf.algorithm.selection import covariance_band, highest_covariance, selecting
from grpo_hf.algorithm.sequences import once, sequence_mean, sequence_sum
from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    Tokens = Float[Tensor, " token"]
    Metrics = dict[str, Tokens]
    Loss = Callable[..., tuple[Tokens, Metrics]]

LOG_LEAST = math.log(1e-8)
"""The least log-weight of a completion in VESPO."""


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
    return losses, _of_ratios(_clip_ratios(below, above), batch)


def cispo(batch: TokenBatch, *, epsilon_high: float | None = None) -> tuple[Tokens, Metrics]:
    """L = -sg[min(r, ε_high)] A log π_θ: the weight is clipped, the gradient never is (CISPO; MiniMax-M1, arXiv 2506.13585).

    As in TRL ``epsilon_high`` is here the bound itself, not its distance from 1; None: 5, ScaleRL's (arXiv 2510.13786).
    Metric: 1 on the tokens whose weight is clipped and A > 0.
    """
    epsilon_high = 5.0 if epsilon_high is None else epsilon_high
    if epsilon_high < 1:
        raise ValueError(
            f"epsilon_high={epsilon_high}: for loss_type='cispo' it is the bound on the ratio itself, and a bound "
            "below 1 shrinks even on-policy gradients; give one of at least 1, say 5.0"
        )
    ratio = _ratio(batch).detach()
    losses = -ratio.clamp(max=epsilon_high) * batch.advantages * batch.logprobs
    return losses, _of_ratios({"cispo_clip_ratio": ((ratio > epsilon_high) & (batch.advantages > 0)).float()}, batch)


def sapo(
    batch: TokenBatch, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05
) -> tuple[Tokens, Metrics]:
    """L = -A σ(τ (r - 1)) 4 / τ, a soft gate in place of the clip; τ by the sign of A (SAPO, arXiv 2511.20347)."""
    temperature = torch.where(batch.advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -batch.advantages * torch.sigmoid(temperature * (_ratio(batch) - 1)) * 4 / temperature, {}


def gmpo(batch: TokenBatch, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> tuple[Tokens, Metrics]:
    """L = -A exp(mean_t c_t), c_t = log r_t clipped at -ε where A < 0 and at ε_high where A > 0: the geometric mean of a
    completion's ratios, each clipped in log space (GMPO; Zhao et al. 2025, arXiv 2507.20673; it takes ε = 0.4).

    Metrics: as in `clipped`, with e^-ε and e^ε_high as bounds.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    log_ratio, advantages = token_log_ratio(batch), batch.advantages
    below, above = (log_ratio < -epsilon) & (advantages < 0), (log_ratio > high) & (advantages > 0)
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-epsilon))
    return -advantages * sequence_mean(bounded, batch).exp()[batch.completion], _clip_ratios(below, above)


def vespo(
    batch: TokenBatch,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    vllm_importance_sampling_correction: bool = True,
    vllm_importance_sampling_mode: str = "token_truncate",
    vllm_importance_sampling_clip_max: float | None = 3.0,
    vllm_importance_sampling_clip_min: float | None = None,
) -> tuple[Tokens, Metrics]:
    """L = -sg[φ(w)] A log π_θ, φ(w) = w^k e^{λ (1 - w)}, w = Π_t (π_θ / π_old) (π_old / μ) over the completion; k and λ by
    the sign of A (VESPO; arXiv 2602.10693). The engine's part of w is bounded by token, and 1 without correction.

    Metric: "vespo/phi_seq", φ by completion.
    """
    log_ratio = token_log_ratio(batch).detach().clamp(-20.0, 20.0)
    if vllm_importance_sampling_correction:
        mode, low, high = (
            vllm_importance_sampling_mode,
            vllm_importance_sampling_clip_min,
            vllm_importance_sampling_clip_max,
        )
        if mode not in (allowed := [f"token_{bound}" for bound in BOUNDS]):
            raise ValueError(
                f"vllm_importance_sampling_mode={mode!r}, but loss_type='vespo' multiplies the weights of tokens: set "
                f"{' or '.join(map(repr, allowed))}"
            )
        log_ratio = log_ratio + corrected(batch, mode=mode, low=low, high=high)[0].log().clamp(LOG_LEAST, 20.0)
    log_w = sequence_sum(log_ratio, batch).clamp(LOG_LEAST, 20.0)[batch.completion]
    better = batch.advantages >= 0
    k = torch.where(better, vespo_k_pos, vespo_k_neg)
    rate = torch.where(better, vespo_lambda_pos, vespo_lambda_neg).clamp(min=1e-4)
    phi = (rate + k * log_w - rate * log_w.exp()).exp()
    return -phi * batch.advantages * batch.logprobs, {"vespo/phi_seq": once(phi, batch)}


def dppo_tv(
    batch: TokenBatch, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tokens, Metrics]:
    """L = -m sg[min(r, δ)] A log π_θ; m = 0 where π_θ - π_old has gone ε_high up with A > 0, or ε down with A <= 0: the
    total variation of "this token or another" bounds the step, not the ratio (DPPO; arXiv 2602.04879, which takes ε = 0.15).

    Metrics: as in `clipped`. ``delta`` None is no bound on r.
    """
    step = (batch.logprobs.exp() - batch.old_logprobs.exp()).detach()
    high = epsilon if epsilon_high is None else epsilon_high
    return _masked_policy_gradient(batch, below=step < -epsilon, above=step > high, delta=delta)


def dppo_kl(
    batch: TokenBatch, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None
) -> tuple[Tokens, Metrics]:
    """`dppo_tv` with the KL divergence of "this token or another" in place of the total variation, p = π_old, q = π_θ:
    p log(p / q) + (1 - p) log((1 - p) / (1 - q)) > ε (DPPO; arXiv 2602.04879, which takes ε = 0.05)."""
    logprobs, old_logprobs = batch.logprobs.detach(), batch.old_logprobs
    q, p = logprobs.exp(), old_logprobs.exp()
    kl = p * (old_logprobs - logprobs) + (1 - p) * ((1 - p + 1e-8) / (1 - q + 1e-8)).log()
    high = epsilon if epsilon_high is None else epsilon_high
    return _masked_policy_gradient(batch, below=(kl > epsilon) & (q < p), above=(kl > high) & (q > p), delta=delta)


@selecting(clip_cov=covariance_band)
def clip_cov(batch: TokenBatch, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> tuple[Tokens, Metrics]:
    """`clipped` without the tokens that `covariance_band` selects: those that would lower the entropy most (Clip-Cov; Cui et
    al. 2025, arXiv 2505.22617)."""
    losses, metrics = clipped(batch, epsilon=epsilon, epsilon_high=epsilon_high)
    return losses * (1 - batch.selected["clip_cov"]), metrics | {"clip_cov_ratio": batch.selected["clip_cov"]}


@selecting(kl_cov=highest_covariance)
def kl_cov(batch: TokenBatch, *, kl_cov_coef: float = 1.0) -> tuple[Tokens, Metrics]:
    """L = -A r + c |log r| on the tokens that `highest_covariance` selects, -A r on the others (KL-Cov; Cui et al. 2025,
    arXiv 2505.22617)."""
    losses, _ = unclipped(batch)
    return losses + kl_cov_coef * batch.selected["kl_cov"] * batch.log_ratio.abs(), {}  # type: ignore[union-attr]


LOSSES: dict[str, tuple[Loss, str]] = {
    "dapo": (clipped, "token_mean"),
    "grpo": (clipped, "sequence_mean"),
    "dr_grpo": (clipped, "constant_length"),
    "bnpo": (clipped, "local_token_mean"),
    "luspo": (clipped, "sequence_sum"),
    "cispo": (cispo, "token_mean"),
    "sapo": (sapo, "sequence_mean"),
    "vespo": (vespo, "token_mean"),
    "gmpo": (gmpo, "sequence_mean"),
    "dppo_tv": (dppo_tv, "token_mean"),
    "dppo_kl": (dppo_kl, "token_mean"),
    "clip_cov": (clip_cov, "token_mean"),
    "kl_cov": (kl_cov, "token_mean"),
    "reinforce": (reinforce, "token_mean"),
    "unclipped": (unclipped, "token_mean"),
}
"""loss_type -> the loss, and its own entry in AGGREGATIONS; TRL's names, then ours."""


def _ratio(batch: TokenBatch) -> Tokens:
    assert batch.log_ratio is not None, "the objective sets it, by LEVELS"
    return batch.log_ratio.exp()


def _clip_ratios(below: Tensor, above: Tensor) -> Metrics:
    return {
        "clip_ratio/low": below.float(),
        "clip_ratio/high": above.float(),
        "clip_ratio/region": (below | above).float(),
    }


def _of_ratios(metrics: Metrics, batch: TokenBatch) -> Metrics:
    """Counted once a ratio: by token, or once a completion."""
    return {name: once(values, batch) for name, values in metrics.items()} if batch.ratio_of_completions else metrics


def _masked_policy_gradient(
    batch: TokenBatch, *, below: Tensor, above: Tensor, delta: float | None
) -> tuple[Tokens, Metrics]:
    """-m sg[min(r, δ)] A log π_θ, m = 0 where a step has gone below against A <= 0, or above along A > 0."""
    better = batch.advantages > 0
    below, above = below & ~better, above & better
    ratio = _ratio(batch).detach().clamp(max=math.inf if delta is None else delta)
    kept = (~(below | above)).to(ratio.dtype)
    return -kept * ratio * batch.advantages * batch.logprobs, _clip_ratios(below, above)
