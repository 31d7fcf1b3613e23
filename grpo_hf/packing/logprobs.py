"""Log-probs and entropy of completion tokens without ever holding [tokens vocab] logits.

The head's product is made in chunks of tokens, in the forward and again in the backward pass, so that memory holds a bounded
number of logits whatever the number of tokens (as in Cut Your Losses, arXiv 2411.09009, and Liger Kernel, 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo_hf.algorithm.logits import entropy as entropy_of
from grpo_hf.algorithm.logits import token_logprobs
from grpo_hf.types import PackedBatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Hidden = Float[Tensor, "token dim"]
    Tokens = Float[Tensor, " token"]

LOGITS_PER_CHUNK = {"cpu": 2**23, "cuda": 2**27}
"""Logits made at a time, by device: 32 MiB in float32, about a CPU's cache (measured fastest of 2**20 to 2**24), and 512 MiB
on a GPU, so that there are many tokens to each pass over a head of 150,000 words."""

TOKENS_PER_CHUNK = 256
"""Tokens made at a time at least, however many words the head has: each chunk reads the head's weights and their gradient
again, which takes longer than the products of a few tokens."""

LOGITS_KEPT = {"cpu": 2**24, "cuda": 2**28}
"""Log-probs that a forward pass leaves for the backward pass at most, which need not be made again then."""

LOGIT_TRANSFORMS: dict[str, Callable[[float, Tensor], Tensor]] = {
    "final_logit_softcapping": lambda cap, logits: cap * torch.tanh(logits / cap),
    "logit_scale": lambda scale, logits: logits * scale,
    "logits_scaling": lambda scale, logits: logits / scale,
}
"""What some models do to their head's output, by the name of the config field that holds the number."""


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
    logits_per_chunk: int | None = None,
    logits_kept: int | None = None,
) -> tuple[Tokens, Tokens]:
    """log softmax(head(h) / T) at the targets, and that softmax's entropy.

    A plain linear head takes the fused path; any other (LoRA on the head, quantized, a bias, a softcap) is called chunk
    by chunk under checkpointing, which holds as little and costs one call more.
    """
    device = "cpu" if hidden.device.type == "cpu" else "cuda"
    vocab = _vocab_size(head)
    if logits_per_chunk is None:
        logits_per_chunk = max(LOGITS_PER_CHUNK[device], TOKENS_PER_CHUNK * vocab)
    chunk = max(1, logits_per_chunk // vocab)
    if logits_kept is None:
        logits_kept = LOGITS_KEPT[device]
    if type(head) is nn.Linear and head.bias is None and transform is None:
        kept = logits_kept if torch.is_grad_enabled() else 0
        return _FusedLinearLogprobs.apply(hidden, head.weight, targets, temperature, chunk, kept)

    def score(chunk: Hidden, ids: Tensor) -> tuple[Tokens, Tokens]:
        logits = head(chunk).float()
        logits = logits if transform is None else transform(logits)
        return token_logprobs(logits, ids, temperature), entropy_of(logits, temperature)

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
    """(h, W) -> log p[target], H with p = softmax(h W^T / T); logits are made chunk by chunk.

    With z = h W^T / T:   d log p_t / dz = onehot_t - p   and   dH / dz = -p (log p + H).

    The first chunks, up to ``kept`` logits, are left for the backward pass, which makes the others again. With a frozen W
    the forward pass leaves d log p_t / dh = (W_t - p W) / T instead, a vector a token, and nothing has to be made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Hidden,
        weight: Float[Tensor, "vocab dim"],
        targets: Tensor,
        temperature: float,
        chunk: int,
        kept: int,
    ) -> tuple[Tokens, Tokens]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        compute_weight = weight.to(dtype)
        logprobs = torch.empty(len(targets), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        frozen = kept and ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        slope = torch.empty_like(hidden) if frozen else None
        kept_chunks: list[Tensor] = []
        for rows in _chunks(len(targets), chunk):
            logp = _logits(hidden[rows], compute_weight, temperature).log_softmax(-1)
            logprobs[rows] = logp.gather(-1, targets[rows, None]).squeeze(-1)
            p = logp.exp()
            entropy[rows] = -torch.einsum("tv,tv->t", p, logp)
            if slope is not None:
                slope[rows] = (compute_weight[targets[rows]] - p.to(dtype) @ compute_weight) / temperature
            elif rows.stop * len(weight) <= kept:
                kept_chunks.append(logp)
        ctx.save_for_backward(hidden, weight, targets, entropy, slope, *kept_chunks)
        ctx.dtype, ctx.temperature, ctx.chunk = dtype, temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tokens | None, grad_entropy: Tokens | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, slope, *kept_chunks = ctx.saved_tensors
        if slope is not None and grad_entropy is None and grad_logprobs is not None:
            return slope * grad_logprobs[:, None].to(slope.dtype), None, None, None, None, None
        compute_weight = weight.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for number, rows in enumerate(_chunks(len(targets), ctx.chunk)):
            if number < len(kept_chunks):
                logp = kept_chunks[number]
            else:
                logp = _logits(hidden[rows], compute_weight, ctx.temperature).log_softmax(-1)
            grad = torch.zeros_like(entropy[rows]) if grad_logprobs is None else grad_logprobs[rows]
            coefficient = grad[:, None]  # of -p in dL/dz
            if grad_entropy is not None:
                coefficient = grad[:, None] + grad_entropy[rows, None] * (logp + entropy[rows, None])
            grad_logits = logp.exp().mul_(coefficient.neg())
            grad_logits.scatter_add_(-1, targets[rows, None], grad[:, None])
            if ctx.temperature != 1:
                grad_logits.div_(ctx.temperature)
            grad_logits = grad_logits.to(ctx.dtype)
            grad_hidden[rows] = (grad_logits @ compute_weight).to(hidden.dtype)
            states = hidden[rows].to(ctx.dtype)
            if grad_weight is not None and ctx.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), states)
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ states
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: Hidden, weight: Float[Tensor, "vocab dim"], temperature: float) -> Float[Tensor, "token vocab"]:
    logits = linear(hidden.to(weight.dtype), weight).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, length)) for start in range(0, length, chunk))
