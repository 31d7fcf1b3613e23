"""Sums and means over the tokens of each completion, for tokens of many completions laid out in one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def sequence_sum(
    values: Float[Tensor, " token"], sequence: Int[Tensor, " token"], num_sequences: int
) -> Float[Tensor, " sequence"]:
    """Sum of each completion's token values; ``sequence`` is the completion that each token belongs to."""
    return values.new_zeros(num_sequences).index_add(0, sequence, values)


def sequence_lengths(sequence: Int[Tensor, " token"], num_sequences: int) -> Int[Tensor, " sequence"]:
    """Number of tokens of each completion."""
    return sequence.bincount(minlength=num_sequences)


def sequence_mean(
    values: Float[Tensor, " token"], sequence: Int[Tensor, " token"], num_sequences: int
) -> Float[Tensor, " sequence"]:
    """Mean of each completion's token values; 0 for a completion without tokens."""
    return sequence_sum(values, sequence, num_sequences) / sequence_lengths(sequence, num_sequences).clamp(min=1)
