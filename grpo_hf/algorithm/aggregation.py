"""Per-token weights that turn per-token losses into one number: loss = Σ_t w_t L_t.

An aggregation takes the `TokenBatch` and the update's `Denominators`, and returns weights [token].

Every denominator is a count over the whole update, taken by the caller before anything is dropped or cut into
micro-batches, so that weights summed over micro-batches and processes are those of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_hf.types import TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float

    Weights = Float[Tensor, " token"]
    Aggregation = Callable[[TokenBatch, "Denominators"], Weights]


@dataclass(frozen=True)
class Denominators:
    """Counts for one update: a token unless its completion has no reward or is masked, a completion unless it has none."""

    tokens: float
    """Completion tokens of the rollout over its updates, over all processes: what TRL's dapo divides by."""
    sequences: float
    """Completions, over all processes."""
    local_tokens: float
    """Completion tokens of this update, on this process."""
    num_processes: int
    """Processes whose gradients are summed."""
    max_completion_length: int
    """The length limit, for the constant-length form."""
    update_tokens: float
    """Completion tokens of this update, over all processes."""


def token_mean(batch: TokenBatch, denominators: Denominators) -> Weights:
    """w = 1 / tokens: every token of the rollout counts the same (DAPO; Yu et al. 2025, arXiv 2503.14476)."""
    return _constant(batch, 1 / max(denominators.tokens, 1))


def update_mean(batch: TokenBatch, denominators: Denominators) -> Weights:
    """w = 1 / update tokens: the mean over the tokens of this very update, however long its completions are."""
    return _constant(batch, 1 / max(denominators.update_tokens, 1))


def sequence_mean(batch: TokenBatch, denominators: Denominators) -> Weights:
    """w = 1 / (sequences |o_i|): every completion counts the same (GRPO; Shao et al. 2024, arXiv 2402.03300)."""
    return 1 / (denominators.sequences * batch.lengths[batch.completion].float())


def constant_length(batch: TokenBatch, denominators: Denominators) -> Weights:
    """w = 1 / (sequences L_max): no length bias (Dr. GRPO; Liu et al. 2025, arXiv 2503.20783)."""
    return _constant(batch, 1 / (denominators.sequences * denominators.max_completion_length))


def local_token_mean(batch: TokenBatch, denominators: Denominators) -> Weights:
    """w = 1 / (local tokens * processes): the mean over processes of each one's token mean (BNPO, arXiv 2506.02864)."""
    return _constant(batch, 1 / (max(denominators.local_tokens, 1) * denominators.num_processes))


def sequence_sum(batch: TokenBatch, denominators: Denominators) -> Weights:
    """w = 1 / sequences: a completion counts as its length (LUSPO, arXiv 2602.05261)."""
    return _constant(batch, 1 / denominators.sequences)


AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": token_mean,
    "update_mean": update_mean,
    "sequence_mean": sequence_mean,
    "constant_length": constant_length,
    "local_token_mean": local_token_mean,
    "sequence_sum": sequence_sum,
}


def _constant(batch: TokenBatch, value: float) -> Weights:
    return torch.full_like(batch.completion, value, dtype=torch.float32)
