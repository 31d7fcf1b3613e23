"""The floating-point operations that an update needs: matrix products and attention, each product counted once.

What is computed again to save memory (gradient checkpointing, the head's logits in the backward pass) and padding are no
part of it, so that their share of a machine's peak is the model FLOPs utilization, MFU (Chowdhery et al. 2022, arXiv
2204.02311).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from grpo_hf.types import PackedBatch


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of forward and backward."""

    token: int
    """For each token, in the weights of the body."""
    scored: int
    """For each position that predicts targets, in the head."""
    pair: int
    """For each pair of a query and a key that it looks at, in one layer."""
    windows: Counter[int | None]
    """How many attention layers look so many keys back; None: all."""


def cost_of(model: PreTrainedModel) -> Cost:
    """What a causal LM costs. A weight is multiplied with a token's input (2 operations) and with its gradient (2), and one
    that is trained has a gradient of its own (2); scores and their use take 4 for each pair and head dimension, and twice
    that in the backward pass."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
    body, trained = _weights(model.get_decoder(), config)
    head, trained_head = _weights(model.get_output_embeddings(), config)
    return Cost(4 * body + 2 * trained, 4 * head + 2 * trained_head, 12 * width, _windows(config) if heads else Counter())


def update_flops(cost: Cost, microbatches: Iterable[PackedBatch]) -> int:
    """Of an update's micro-batches; those that only give a process something to run are none of it."""
    return sum(_batch_flops(cost, batch) for batch in microbatches if batch.weight)


def _batch_flops(cost: Cost, batch: PackedBatch) -> int:
    """A token at position p looks at p + 1 keys, or at its window."""
    mask = batch.attention_mask
    keys = (batch.position_ids if mask is None else batch.position_ids[mask.bool()]) + 1
    pairs = sum(
        layers * int(keys.sum() if window is None else keys.clamp(max=window).sum())
        for window, layers in cost.windows.items()
    )
    return cost.token * keys.numel() + cost.scored * len(batch.scored_at) + cost.pair * pairs


def _weights(module: nn.Module, config: PretrainedConfig) -> tuple[int, int]:
    """How many weights a token is multiplied with, and how many of them are trained; of experts those that it is sent to."""
    both = [0, 0]
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, nn.Linear):  # by its sizes, which quantized and sharded weights do not have
                size = part.in_features * part.out_features if name == "weight" else 0
            elif isinstance(part, nn.Embedding) or parameter.ndim < 2:
                size = 0
            else:
                experts = parameter.shape[0] if parameter.ndim == 3 else 1
                size = parameter.numel() * min(getattr(config, "num_experts_per_tok", None) or experts, experts) // experts
            both[0] += size
            both[1] += size * parameter.requires_grad
    return both[0], both[1]


def _windows(config: PretrainedConfig) -> Counter[int | None]:
    """As transformers' configs say it: one kind for each layer, or one window for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return Counter(window if kind == "sliding_attention" else None for kind in kinds if kind != "linear_attention")
