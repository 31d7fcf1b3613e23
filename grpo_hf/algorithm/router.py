"""The load-balancing loss of a mixture of experts.

L = E Σ_e f_e P_e, with f_e the share of tokens that are sent to expert e, and P_e the mean probability that the router gives
it, over all tokens and layers (Switch Transformers; Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6). f is constant:
once it is known of all tokens, the loss is a sum over parts of them, however they are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class RouterLoss:
    """What is added to an objective for a model with experts."""

    coefficient: float
    """Of the loss."""
    experts_per_token: int
    """To which each layer sends a token."""


def expert_load(
    router_logits: Sequence[Float[Tensor, "token expert"]], counts: Int[Tensor, " token"], experts_per_token: int
) -> Float[Tensor, "load expert"]:
    """Tokens that are sent to each expert, a constant, and the probability that it is given; sums over layers and tokens.

    ``router_logits`` has a layer each; a token counts ``counts`` times: as often as samples have it, and padding not at all.
    """
    load = counts.new_zeros(2, router_logits[0].shape[-1], dtype=torch.float32)
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        sent = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(experts_per_token).indices, 1.0)
        load = load + torch.stack([counts.float() @ sent, counts.float() @ probabilities])
    return load


def load_balancing(
    sent: Float[Tensor, " expert"], probability: Float[Tensor, " expert"], experts_per_token: int
) -> Float[Tensor, ""]:
    """L, or a part of it: ``sent`` is of all tokens, ``probability`` of all or of some; see `expert_load`."""
    tokens = (sent.sum() / experts_per_token).clamp(min=1)
    return len(sent) * (sent / tokens) @ (probability / tokens)
