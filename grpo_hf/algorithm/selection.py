"""Which tokens of an update a loss treats apart, where that depends on all of the update's tokens.

A selection takes a `TokenBatch` of the whole update, over all micro-batches and processes, and returns a weight [token], a
constant, which the loss finds in ``batch.selected``; so how an update is cut changes nothing. It costs a forward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    Tokens = Float[Tensor, " token"]
    Selection = Callable[..., Tokens]

Function = TypeVar("Function", bound=Callable[..., Any])


def top_entropy(batch: TokenBatch, *, top_entropy_quantile: float = 0.2) -> Tokens:
    """1 on the share ρ of tokens of highest entropy, else 0: H_t >= quantile(H, 1 - ρ) (Wang et al. 2025, "Beyond the 80/20
    rule", arXiv 2506.01939)."""
    entropy = batch.entropy.float()
    return (entropy >= _quantile(entropy, 1 - top_entropy_quantile)).to(batch.entropy.dtype)


def mean_of_top_entropy(batch: TokenBatch, *, top_entropy_quantile: float = 0.2) -> Tokens:
    """The same as weights whose mean is 1: a mean over all tokens becomes one over those."""
    chosen = top_entropy(batch, top_entropy_quantile=top_entropy_quantile)
    return chosen / chosen.mean()


def covariance_band(
    batch: TokenBatch,
    *,
    clip_cov_ratio: float = 0.0002,
    clip_cov_lb: float = 1.0,
    clip_cov_ub: float = 5.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tokens:
    """1 on a share of the tokens whose covariance of advantage and log-prob, (A - mean A)(log π - mean log π), is between
    the bounds, one at least where there are any, among those that PPO's clip leaves a gradient (Clip-Cov; Cui et al. 2025,
    arXiv 2505.22617).

    The paper draws them at random; here they are spread evenly over the band, which needs no random numbers.
    """
    covariance = _covariance(batch)
    ratio, better = (batch.logprobs - batch.old_logprobs).detach().exp(), batch.advantages > 0
    high = epsilon if epsilon_high is None else epsilon_high
    clipped = torch.where(better, ratio > 1 + high, ratio < 1 - epsilon)
    eligible = (covariance > clip_cov_lb) & (covariance < clip_cov_ub) & ~clipped
    order = covariance.argsort()
    band = order[eligible[order]]
    count = min(max(int(clip_cov_ratio * len(covariance)), 1), len(band))
    chosen = torch.zeros_like(covariance)
    chosen[band[(torch.arange(count) * len(band)).div(max(count, 1), rounding_mode="floor")]] = 1.0
    return chosen


def highest_covariance(batch: TokenBatch, *, kl_cov_ratio: float = 0.0002) -> Tokens:
    """1 on the share of tokens of highest covariance, see `covariance_band`; one at least (KL-Cov, arXiv 2505.22617)."""
    covariance = _covariance(batch)
    chosen = torch.zeros_like(covariance)
    chosen[covariance.topk(min(max(int(kl_cov_ratio * len(covariance)), 1), len(covariance))).indices] = 1.0
    return chosen


def selecting(**selections: Selection) -> Callable[[Function], Function]:
    """Let a loss find in ``batch.selected`` what these have selected, by name."""

    def mark(loss: Function) -> Function:
        loss.selections = selections  # type: ignore[attr-defined]
        return loss

    return mark


def selections_of(loss: Callable[..., Any]) -> dict[str, Selection]:
    """The selections of a loss, whose options may be bound."""
    return getattr(loss.func if isinstance(loss, partial) else loss, "selections", {})


def joined(parts: Sequence[TokenBatch]) -> TokenBatch:
    """The tokens of several batches as one constant batch on the CPU, completions counted on."""
    starts = torch.tensor([0, *(len(part.lengths) for part in parts)]).cumsum(0).tolist()
    names = [item.name for item in fields(TokenBatch) if isinstance(getattr(parts[0], item.name), Tensor)]
    columns: dict[str, Any] = {name: torch.cat([getattr(part, name).detach().cpu() for part in parts]) for name in names}
    completion = [part.completion.cpu() + start for part, start in zip(parts, starts, strict=False)]
    return replace(parts[0], **(columns | {"completion": torch.cat(completion), "selected": {}}))


def _covariance(batch: TokenBatch) -> Tokens:
    advantages, logprobs = batch.advantages.detach(), batch.logprobs.detach()
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def _quantile(values: Tokens, share: float) -> Tensor:
    """By linear interpolation, as torch.quantile, which takes 16 million values at most."""
    place = share * (len(values) - 1)
    ordered = values.detach().sort().values
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return ordered[below].lerp(ordered[above], place - below)
