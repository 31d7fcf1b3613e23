"""How far the engine that sampled is from the trainer: per-token values that are logged beside the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from grpo_hf.algorithm.kl import k3

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Tokens = Float[Tensor, " token"]


def mismatch(
    old_logprobs: Tokens,
    rollout_logprobs: Tokens,
    sequence: Int[Tensor, " token"],
    num_sequences: int,
    correction: Callable[..., Tokens] | None,
) -> dict[str, Tokens]:
    """With μ the engine's and π the trainer's distribution under the weights that sampled, by metric name:

    |log π - log μ|; the k3 estimate of KL(μ || π); and with a ``correction`` its weights before they are bounded, and 1
    where the bound changed one.
    """
    log_weights = (old_logprobs - rollout_logprobs).detach()
    values = {"sampling/sampling_logp_difference": log_weights.abs(), "sampling/kl": k3(log_weights)}
    if correction is not None:
        raw = correction(old_logprobs, rollout_logprobs, sequence, num_sequences, low=None, high=None)
        bounded = correction(old_logprobs, rollout_logprobs, sequence, num_sequences)
        values["sampling/importance_sampling_ratio"] = raw
        values["sampling/frac_weights_bounded"] = (raw != bounded).float()
    return values
