"""Log-probs and entropy of completion tokens without ever holding [tokens vocab] logits.

The head's product is made in chunks of tokens, in the forward and again in the backward pass, so that memory holds one
chunk of logits whatever the number of tokens (as in Cut Your Losses, arXiv 2411.09009, and Liger Kernel, 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo_hf.algorithm.logits import entropy as entropy_of
from grpo_hf.algorithm.logits import token_logprobs
from grpo_hf.types import PackedBatch

LOGITS_PER_CHUNK = 2**23
"""Logits held at a time: 32 MiB in float32."""

LOGIT_TRANSFORMS: dict[str, Callable[[float, Tensor], Tensor]] = {
    "final_logit_softcapping": lambda cap, logits: cap * torch.tanh(logits / cap),
    "logit_scale": lambda scale, logits: logits * scale,
    "logits_scaling": lambda scale, logits: logits / scale,
}
"""What some models do to their head's output, by the name of the config field that holds the number."""

Hidden = Float[Tensor, "token dim"]
Tokens = Float[Tensor, " token"]


def batch_logprobs(model: PreTrainedModel, batch: PackedBatch, *, temperature: float = 1.0) -> tuple[Tokens, Tokens]:
    """log π(o_t) and the entropy of π(. | o_<t) at every completion token of a micro-batch, in nats, float32.

    π is the model's softmax(logits / temperature), before any top-k, top-p or min-p. ``model`` is the causal LM itself
    (no DDP wrapper); both results carry gradients.
    """
    if batch.prefix_layout is None:
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
    else:
        # A four-dimensional mask is handed on by transformers as it is; the attention function looks at the layout.
        inputs = {"attention_mask": batch.input_ids.new_ones(1, 1, 1, 1), "prefix_layout": batch.prefix_layout}
    decoder = model.get_decoder()
    hidden = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs)[0]
    return head_logprobs(
        hidden.flatten(0, 1)[batch.scored_at],
        batch.targets,
        model.get_output_embeddings(),
        temperature=temperature,
        transform=logit_transform(model),
    )


def head_logprobs(
    hidden: Hidden,
    targets: Int[Tensor, " token"],
    head: nn.Module,
    *,
    temperature: float = 1.0,
    transform: Callable[[Tensor], Tensor] | None = None,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> tuple[Tokens, Tokens]:
    """log softmax(head(h) / T) at the targets, and that softmax's entropy.

    A plain linear head takes the fused path; any other (LoRA on the head, quantized, a bias, a softcap) is called chunk
    by chunk under checkpointing, which holds as little and costs one call more.
    """
    if type(head) is nn.Linear and head.bias is None and transform is None:
        chunk = max(1, logits_per_chunk // head.weight.shape[0])
        return _FusedLinearLogprobs.apply(hidden, head.weight, targets, temperature, chunk)

    def score(chunk: Hidden, ids: Tensor) -> tuple[Tokens, Tokens]:
        logits = head(chunk).float()
        logits = logits if transform is None else transform(logits)
        return token_logprobs(logits, ids, temperature), entropy_of(logits, temperature)

    chunk = max(1, logits_per_chunk // _vocab_size(head))
    parts = [
        checkpoint(score, h, ids, use_reentrant=False)
        for h, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def logit_transform(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What the model does to its head's output, or None."""
    config = model.config.get_text_config()
    for name, transform in LOGIT_TRANSFORMS.items():
        value = getattr(config, name, None)
        if value is not None and not (name != "final_logit_softcapping" and value == 1):
            return partial(transform, value)
    return None


def _vocab_size(head: nn.Module) -> int:
    return getattr(head, "out_features", 0) or max(p.shape[0] for p in head.parameters())


class _FusedLinearLogprobs(torch.autograd.Function):
    """(h, W) -> log p[target], H with p = softmax(h W^T / T); logits are made chunk by chunk, twice.

    With z = h W^T / T:   d log p_t / dz = onehot_t - p   and   dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Hidden, weight: Float[Tensor, "vocab dim"], targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tokens, Tokens]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        compute_weight = weight.to(dtype)
        normalizer = torch.empty(len(targets), device=hidden.device)
        logprobs, entropy = torch.empty_like(normalizer), torch.empty_like(normalizer)
        for rows in _chunks(len(targets), chunk):
            logits = linear(hidden[rows].to(dtype), compute_weight).float().div_(temperature)
            normalizer[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - normalizer[rows]
            logits -= normalizer[rows, None]
            entropy[rows] = -torch.einsum("tv,tv->t", logits.exp(), logits)
        ctx.save_for_backward(hidden, weight, targets, normalizer, entropy)
        ctx.dtype, ctx.temperature, ctx.chunk = dtype, temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tokens | None, grad_entropy: Tokens | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizer, entropy = ctx.saved_tensors
        compute_weight = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(targets), ctx.chunk):
            states = hidden[rows].to(ctx.dtype)
            logp = linear(states, compute_weight).float().div_(ctx.temperature).sub_(normalizer[rows, None])
            grad = torch.zeros_like(normalizer[rows]) if grad_logprobs is None else grad_logprobs[rows]
            coefficient = grad[:, None]  # of -p in dL/dz
            if grad_entropy is not None:
                coefficient = grad[:, None] + grad_entropy[rows, None] * (logp + entropy[rows, None])
            grad_logits = logp.exp_().mul_(coefficient).neg_()
            grad_logits.scatter_add_(-1, targets[rows, None], grad[:, None])
            grad_logits = grad_logits.div_(ctx.temperature).to(ctx.dtype)
            grad_hidden[rows] = (grad_logits @ compute_weight).to(hidden.dtype)
            if grad_weight is not None and ctx.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), states)
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ states
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, length)) for start in range(0, length, chunk))
