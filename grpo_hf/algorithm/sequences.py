"""Sums and means over the tokens of each completion, for tokens of many completions in one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from grpo_hf.types import PackedBatch, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float


def sequence_sum(values: Float[Tensor, " token"], batch: TokenBatch | PackedBatch) -> Float[Tensor, " completion"]:
    """Σ_t v_t over each completion's tokens in the batch; 0 for a completion without any."""
    return values.new_zeros(len(batch.lengths)).index_add(0, batch.completion, values)


def sequence_mean(values: Float[Tensor, " token"], batch: TokenBatch | PackedBatch) -> Float[Tensor, " completion"]:
    """Σ_t v_t / |o_i|, with |o_i| the targets of the whole completion; 0 for a completion without any."""
    return sequence_sum(values, batch) / batch.lengths.clamp(min=1)
