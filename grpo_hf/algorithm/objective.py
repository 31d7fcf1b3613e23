"""The GRPO objective: the one place where loss, ratio level, aggregation, KL, entropy and correction come together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from grpo_hf.algorithm.aggregation import AGGREGATIONS, Denominators
from grpo_hf.algorithm.correction import correction_weights
from grpo_hf.algorithm.kl import KL_ESTIMATORS, bias_corrected
from grpo_hf.algorithm.losses import LEVELS, LOSSES, clip_masks
from grpo_hf.algorithm.mismatch import mismatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Tokens = Float[Tensor, " token"]

LOSS_TYPES: dict[str, tuple[str, str]] = {
    "dapo": ("clipped", "token_mean"),
    "grpo": ("clipped", "sequence_mean"),
    "dr_grpo": ("clipped", "constant_length"),
    "bnpo": ("clipped", "local_token_mean"),
    "luspo": ("clipped", "sequence_sum"),
    "cispo": ("cispo", "token_mean"),
    "sapo": ("sapo", "sequence_mean"),
    "reinforce": ("naive", "token_mean"),
    "unclipped": ("unclipped", "token_mean"),
}
"""loss_type -> (its entry in LOSSES, its entry in AGGREGATIONS); TRL's names, then ours."""

CLIPPED_LOSSES = frozenset(name for name, (loss, _) in LOSS_TYPES.items() if loss == "clipped")


@dataclass(frozen=True)
class Objective:
    """L = Σ_tokens w (c · policy_loss + β KL - γ H), w from the aggregation, c from the engine correction."""

    loss_type: str = "dapo"
    """A name of LOSS_TYPES."""
    level: str = "token"
    """A name of LEVELS."""
    loss_options: dict[str, Any] = field(default_factory=dict)
    """Keyword options of the loss function (epsilon, epsilon_high, delta, ...)."""
    beta: float = 0.0
    """β, the KL coefficient."""
    kl_estimator: str = "k3"
    """A name of KL_ESTIMATORS."""
    kl_bias_correction: bool = True
    """Multiply the KL estimate by the differentiable ratio."""
    entropy_coef: float = 0.0
    """γ, the entropy bonus; always a mean over the update's tokens, whatever the aggregation."""
    correction: Callable[..., Tokens] | None = None
    """`correction_weights` with its options bound; None: the engine's log-probs are only measured against."""

    def __call__(
        self,
        logprobs: Tokens,
        entropy: Tokens,
        advantages: Float[Tensor, " sequence"],
        sequence: Int[Tensor, " token"],
        denominators: Denominators,
        *,
        old_logprobs: Tokens,
        ref_logprobs: Tokens | None = None,
        rollout_logprobs: Tokens | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tokens]]:
        """The micro-batch's part of the loss, and the per-token values that are logged, by metric name."""
        loss_name, aggregation_name = LOSS_TYPES[self.loss_type]
        num_sequences = len(advantages)
        token_advantages = advantages[sequence]
        log_ratio = LEVELS[self.level](logprobs, old_logprobs, sequence, num_sequences)
        losses = LOSSES[loss_name](logprobs, log_ratio, token_advantages, **self.loss_options)
        values = {"entropy": entropy}
        if rollout_logprobs is not None:
            values |= mismatch(old_logprobs, rollout_logprobs, sequence, num_sequences, self.correction)
            if self.correction is not None:
                losses = losses * self.correction(old_logprobs, rollout_logprobs, sequence, num_sequences)
        if self.beta and ref_logprobs is not None:
            kl = KL_ESTIMATORS[self.kl_estimator](ref_logprobs - logprobs)
            kl = bias_corrected(kl, log_ratio) if self.kl_bias_correction else kl
            losses = losses + self.beta * kl
            values["kl"] = kl
        loss = (AGGREGATIONS[aggregation_name](sequence, num_sequences, denominators) * losses).sum()
        if self.entropy_coef:
            weights = AGGREGATIONS["token_mean"](sequence, num_sequences, denominators)
            loss = loss - self.entropy_coef * (weights * entropy).sum()
        return loss, values | self._clipped(log_ratio, token_advantages)

    @property
    def needs_every_token(self) -> bool:
        """Whether tokens with advantage 0 have a gradient too."""
        return bool(self.beta or self.entropy_coef)

    def _clipped(self, log_ratio: Tokens, advantages: Tokens) -> dict[str, Tokens]:
        if self.loss_type == "cispo":
            bound = self.loss_options.get("epsilon_high") or float("inf")
            return {"cispo_clip_ratio": ((log_ratio.detach().exp() > bound) & (advantages > 0)).float()}
        if self.loss_type not in CLIPPED_LOSSES:
            return {}
        options = {name: self.loss_options[name] for name in ("epsilon", "epsilon_high") if name in self.loss_options}
        low, high = clip_masks(log_ratio, advantages, **options)
        return {
            "clip_ratio/low": low.float(),
            "clip_ratio/high": high.float(),
            "clip_ratio/region": (low | high).float(),
        }


def engine_correction(mode: str, low: float | None, high: float | None) -> Callable[..., Tokens]:
    """`correction_weights` with its bounds."""
    return partial(correction_weights, mode=mode, low=low, high=high)
