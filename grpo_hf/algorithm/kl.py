"""Per-token estimates of KL(π_θ || π_ref) from samples of π_θ (Schulman 2020, "Approximating KL divergence").

An estimator takes d = log π_ref - log π_θ of the sampled tokens, [token], and returns its estimate there, [token].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    Tokens = Float[Tensor, " token"]


def k1(log_ratio: Tokens) -> Tokens:
    """k1 = -d: unbiased, high variance, can be negative."""
    return -log_ratio


def k2(log_ratio: Tokens) -> Tokens:
    """k2 = d² / 2: biased value, low variance, never negative; its gradient is the reverse KL's on-policy."""
    return log_ratio.square() / 2


def k3(log_ratio: Tokens) -> Tokens:
    """k3 = exp(d) - d - 1: unbiased value, low variance, never negative (GRPO's; arXiv 2402.03300)."""
    return log_ratio.exp() - log_ratio - 1


KL_ESTIMATORS: dict[str, Callable[[Tokens], Tokens]] = {"k1": k1, "k2": k2, "k3": k3}


def bias_corrected(kl: Tokens, policy_log_ratio: Tokens) -> Tokens:
    """r * kl with a differentiable r = π_θ / π_old: the gradient becomes that of the reverse KL (DeepSeek-V3.2, arXiv
    2512.02556); the value changes only off-policy."""
    return policy_log_ratio.exp() * kl


def kl_to_teacher(batch: TokenBatch) -> tuple[Tokens, dict[str, Tokens]]:
    """L = r sg[log π_θ - log π_teacher], with a differentiable r = π_θ / π_old: in expectation the gradient of the reverse
    KL(π_θ || π_teacher) at each token, given what comes before it (on-policy distillation; Agarwal et al. 2024, arXiv
    2306.13649; Gu et al. 2024, arXiv 2306.08543).

    Metric: "teacher_kl", the k1 estimate of that KL.
    """
    assert batch.teacher_logprobs is not None
    difference = (batch.logprobs - batch.teacher_logprobs).detach()
    return (batch.logprobs - batch.old_logprobs).exp() * difference, {"teacher_kl": difference}


def kl_to_reference(
    batch: TokenBatch, *, estimator: Callable[[Tokens], Tokens] = k3, bias_correction: bool = True
) -> tuple[Tokens, dict[str, Tokens]]:
    """The estimate of KL(π_θ || π_ref) at each token, [token], which carries the gradient; it is its own metric, "kl"."""
    assert batch.ref_logprobs is not None and batch.log_ratio is not None
    kl = estimator(batch.ref_logprobs - batch.logprobs)
    kl = bias_corrected(kl, batch.log_ratio) if bias_correction else kl
    return kl, {"kl": kl}
