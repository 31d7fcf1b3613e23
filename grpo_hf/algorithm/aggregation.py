"""Per-token weights [token] that turn per-token losses into one number: loss = sum(weights * losses).

Every denominator is a count over the whole update, taken by the caller before anything is dropped or cut into
micro-batches, so that weights summed over micro-batches and processes are those of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_hf.algorithm.sequences import sequence_lengths

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Weights = Float[Tensor, " token"]
    Sequence = Int[Tensor, " token"]


@dataclass(frozen=True)
class Denominators:
    """Counts over one update."""

    tokens: float
    """Completion tokens that count, over all processes."""
    sequences: float
    """Completions, over all processes."""
    local_tokens: float
    """Completion tokens that count, on this process."""
    num_processes: int
    """Processes whose gradients are summed."""
    max_completion_length: int
    """The length limit, for the constant-length form."""


def token_mean(sequence: Sequence, num_sequences: int, denominators: Denominators) -> Weights:
    """w = 1 / tokens: every token of the update counts the same (DAPO; Yu et al. 2025, arXiv 2503.14476)."""
    return _constant(sequence, 1 / max(denominators.tokens, 1))


def sequence_mean(sequence: Sequence, num_sequences: int, denominators: Denominators) -> Weights:
    """w = 1 / (sequences * |o_i|): every completion counts the same (GRPO; Shao et al. 2024, arXiv 2402.03300)."""
    return 1 / (denominators.sequences * sequence_lengths(sequence, num_sequences)[sequence].float())


def constant_length(sequence: Sequence, num_sequences: int, denominators: Denominators) -> Weights:
    """w = 1 / (sequences * L_max): no length bias (Dr. GRPO; Liu et al. 2025, arXiv 2503.20783)."""
    return _constant(sequence, 1 / (denominators.sequences * denominators.max_completion_length))


def local_token_mean(sequence: Sequence, num_sequences: int, denominators: Denominators) -> Weights:
    """w = 1 / (local tokens * processes): the mean over processes of each one's token mean (BNPO, arXiv 2506.02864)."""
    return _constant(sequence, 1 / (max(denominators.local_tokens, 1) * denominators.num_processes))


def sequence_sum(sequence: Sequence, num_sequences: int, denominators: Denominators) -> Weights:
    """w = 1 / sequences: a completion counts as its length (LUSPO, arXiv 2602.05261)."""
    return _constant(sequence, 1 / denominators.sequences)


AGGREGATIONS: dict[str, Callable[[Sequence, int, Denominators], Weights]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant_length": constant_length,
    "local_token_mean": local_token_mean,
    "sequence_sum": sequence_sum,
}


def _constant(sequence: Sequence, value: float) -> Weights:
    return torch.full(sequence.shape, value, device=sequence.device)
