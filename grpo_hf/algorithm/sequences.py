"""Sums and means over the tokens of each completion, for tokens of many completions in one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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


def counted_mean(values: Float[Tensor, " token"], batch: TokenBatch | PackedBatch) -> Float[Tensor, " completion"]:
    """The same without the tokens whose value is NaN: they are not counted."""
    counted = batch.lengths - sequence_sum(values.isnan().to(values.dtype), batch)
    return sequence_sum(values.nan_to_num(), batch) / counted.clamp(min=1)


def once(values: Float[Tensor, " token"], batch: TokenBatch) -> Float[Tensor, " token"]:
    """A value of whole completions, repeated over their tokens, kept on the first token of each and NaN on the others, so
    that a mean over what counts is one over completions."""
    places = torch.arange(len(values), device=values.device)
    firsts = places.new_full((len(batch.lengths),), len(values)).scatter_reduce(0, batch.completion, places, "amin")
    return torch.where(places == firsts[batch.completion], values, torch.nan)
