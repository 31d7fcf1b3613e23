"""Log-probs and entropy from logits that fit in memory; packing/logprobs.py is the form that never holds them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def token_logprobs(
    logits: Float[Tensor, "*batch vocab"], ids: Int[Tensor, "*batch"], temperature: float = 1.0
) -> Float[Tensor, "*batch"]:
    """log softmax(logits / T) at ids, in nats."""
    logits = logits / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Float[Tensor, "*batch vocab"], temperature: float = 1.0) -> Float[Tensor, "*batch"]:
    """H = -sum_v p_v log p_v with p = softmax(logits / T), in nats; a logit of -inf adds 0."""
    logprobs = (logits / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
