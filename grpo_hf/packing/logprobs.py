"""Log-probs and entropy of targets without ever holding [tokens vocab] logits.

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
from grpo_hf.algorithm.router import expert_load
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

LOGITS_PER_BLOCK = 2**19
"""Logits that a CPU works on at a time once they are made: 2 MiB in float32, about a core's cache."""

LOGITS_KEPT = {"cpu": 2**24, "cuda": 2**28}
"""Log-probs that a forward pass leaves for the backward pass at most, which need not be made again then."""

LOGIT_TRANSFORMS: dict[str, Callable[[float, Tensor], Tensor]] = {
    "final_logit_softcapping": lambda cap, logits: cap * torch.tanh(logits / cap),
    "logit_scale": lambda scale, logits: logits * scale,
    "logits_scaling": lambda scale, logits: logits / scale,
}
"""What some models do to their head's output, by the name of the config field that holds the number."""


class Float32Head(nn.Linear):
    """A head in float32 whatever the rest computes in (ScaleRL; Khatri et al. 2025, arXiv 2510.13786)."""

    def forward(self, input: Tensor) -> Tensor:
        """The logits in float32, under autocast too."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def cast_head_to_fp32(model: PreTrainedModel) -> None:
    """Make the model's head a `Float32Head`; raises ValueError where it is no linear layer of its own."""
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight is model.get_input_embeddings().weight:  # type: ignore[union-attr]
        raise ValueError(
            f"cast_lm_head_to_fp32=True needs a head apart from the embeddings, and that of {type(model).__name__} is "
            f"{'tied to them' if type(head) is nn.Linear else type(head).__name__}; load the model in float32 instead: "
            "model_init_kwargs={'dtype': 'float32'}"
        )
    head.float().__class__ = Float32Head


def batch_logprobs(
    model: PreTrainedModel, batch: PackedBatch, *, temperature: float = 1.0, experts_per_token: int | None = None
) -> tuple[Tensor, ...]:
    """log π(o_t) and the entropy of π(. | o_<t) at every target of a micro-batch [token], in nats, float32.

    π is the model's softmax(logits / temperature), before any top-k, top-p or min-p. ``model`` is the causal LM itself
    (no DDP wrapper). With ``experts_per_token``, of a mixture of experts, their load too: see `expert_load`. All results
    carry gradients.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.tree is None:
        inputs["attention_mask"] = batch.attention_mask
    else:  # a four-dimensional mask is handed on by transformers as it is; the attention function looks at the tree
        inputs |= {"attention_mask": batch.input_ids.new_ones(1, 1, 1, 1), "tree": batch.tree}
    if experts_per_token:
        inputs["output_router_logits"] = True
    outputs = model.get_decoder()(**inputs)
    scores = head_logprobs(
        outputs[0].flatten(0, 1)[batch.scored_at],
        batch.targets,
        model.get_output_embeddings(),
        rows=batch.scored,
        temperature=temperature,
        transform=logit_transform(model),
    )
    return (*scores, expert_load(outputs.router_logits, batch.shared_by, experts_per_token)) if experts_per_token else scores


def head_logprobs(
    hidden: Hidden,
    targets: Int[Tensor, " token"],
    head: nn.Module,
    *,
    rows: Int[Tensor, " token"] | None = None,
    temperature: float = 1.0,
    transform: Callable[[Tensor], Tensor] | None = None,
    logits_per_chunk: int | None = None,
    logits_kept: int | None = None,
) -> tuple[Tokens, Tokens]:
    """log softmax(head(h) / T) at the targets, and that softmax's entropy.

    ``rows`` says which hidden state predicts each target (None: as many states as targets, in their order), so that a state
    with several targets goes through the head once. A plain linear head takes the fused path; any other (LoRA on the head,
    quantized, a bias, a softcap) is called chunk by chunk under checkpointing, which holds as little and costs a call more.
    """
    device = "cpu" if hidden.device.type == "cpu" else "cuda"
    vocab = getattr(head, "out_features", 0) or max(p.shape[0] for p in head.parameters())
    chunk = max(1, (logits_per_chunk or max(LOGITS_PER_CHUNK[device], TOKENS_PER_CHUNK * vocab)) // vocab)
    logits_kept = LOGITS_KEPT[device] if logits_kept is None else logits_kept
    rows = torch.arange(len(targets), device=targets.device) if rows is None else rows
    if type(head) in (nn.Linear, Float32Head) and head.bias is None and transform is None:
        kept = logits_kept if torch.is_grad_enabled() else 0
        autocast = torch.is_autocast_enabled(hidden.device.type) and type(head) is nn.Linear
        with torch.autocast(hidden.device.type, enabled=autocast):
            logprobs, entropy = _FusedLinearLogprobs.apply(hidden, head.weight, targets, rows, temperature, chunk, kept)
        return logprobs, entropy[rows]

    def score(chunk: Hidden, ids: Tensor, rows: Tensor) -> tuple[Tokens, Tokens]:
        logits = head(chunk).float()
        logits = logits if transform is None else transform(logits)
        return token_logprobs(logits[rows], ids, temperature), entropy_of(logits, temperature)

    parts = []
    order = rows.argsort(stable=True)
    for here, tokens in _chunks(rows, len(hidden), chunk):
        at = order[tokens]
        parts.append(checkpoint(score, hidden[here], targets[at], rows[at] - here.start, use_reentrant=False))
    logprobs = torch.cat([logprobs for logprobs, _ in parts])[order.argsort()]
    return logprobs, torch.cat([entropy for _, entropy in parts])[rows]


def logit_transform(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What the model does to its head's output, or None."""
    config = model.config.get_text_config()
    for name, transform in LOGIT_TRANSFORMS.items():
        value = getattr(config, name, None)
        if value is not None and not (name != "final_logit_softcapping" and value == 1):
            return partial(transform, value)
    return None


class _FusedLinearLogprobs(torch.autograd.Function):
    """(h [row], W) -> log p[target] [token], H [row] with p = softmax(h W^T / T); logits are made chunk by chunk.

    With z = h W^T / T:   d log p_t / dz = onehot_t - p   and   dH / dz = -p (log p + H).

    The first chunks, up to ``kept`` logits, are left for the backward pass, which makes the others again. With a frozen W
    the forward pass leaves p W instead, a vector a row (d log p_t / dh = (W_t - p W) / T), and nothing has to be made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "row dim"],
        weight: Float[Tensor, "vocab dim"],
        targets: Int[Tensor, " token"],
        rows: Int[Tensor, " token"],
        temperature: float,
        chunk: int,
        kept: int,
    ) -> tuple[Tokens, Float[Tensor, " row"]]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        compute_weight = weight.to(dtype)
        logprobs = torch.empty(len(targets), device=hidden.device)
        entropy = torch.empty(len(hidden), device=hidden.device)
        frozen = kept and ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        expected = torch.empty_like(hidden) if frozen else None
        kept_chunks: list[Tensor] = []
        order = rows.argsort(stable=True)
        for here, tokens in _chunks(rows, len(hidden), chunk):
            at = order[tokens]
            logp = _logits(hidden[here], compute_weight, temperature)
            for block, of_block in _blocks(logp, entropy[here]):
                block.copy_(block.log_softmax(-1))
                torch.sum(block.exp().mul_(block), -1, out=of_block).neg_()
            logprobs[at] = logp[rows[at] - here.start, targets[at]]
            if expected is not None:
                expected[here] = logp.exp_().to(dtype) @ compute_weight
            elif here.stop * len(weight) <= kept:
                kept_chunks.append(logp)
        ctx.save_for_backward(hidden, weight, targets, rows, order, entropy, expected, *kept_chunks)
        ctx.dtype, ctx.temperature, ctx.chunk = dtype, temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tokens | None, grad_entropy: Tokens | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, rows, order, entropy, expected, *kept_chunks = ctx.saved_tensors
        grad_of_token = hidden.new_zeros(len(targets), dtype=torch.float32) if grad_logprobs is None else grad_logprobs
        grad_of_row = torch.zeros_like(entropy).index_add_(0, rows, grad_of_token)
        compute_weight = weight.to(ctx.dtype)
        if expected is not None and grad_entropy is None:
            of_targets = compute_weight[targets] * (grad_of_token / ctx.temperature)[:, None].to(ctx.dtype)
            grad_hidden = expected * (-grad_of_row / ctx.temperature)[:, None].to(expected.dtype)
            return grad_hidden.index_add_(0, rows, of_targets.to(expected.dtype)), *[None] * 6
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_rows = [grad_of_row[:, None], entropy[:, None]]  # the coefficient of -p in dL/dz follows from these
        of_rows += [] if grad_entropy is None else [grad_entropy[:, None]]
        buffer = torch.empty(0, device=hidden.device)  # fresh memory for each chunk would take longer than its use
        for number, (here, tokens) in enumerate(_chunks(rows, len(hidden), ctx.chunk)):
            at, kept = order[tokens], number < len(kept_chunks)
            logp = kept_chunks[number] if kept else _logits(hidden[here], compute_weight, ctx.temperature)
            grad_logits = buffer = buffer if buffer.shape == logp.shape else torch.empty_like(logp)
            for block, grad, of_logprobs, h, *of_h in _blocks(logp, buffer, *(values[here] for values in of_rows)):
                logp_of_block = block if kept else block.log_softmax(-1)
                coefficient = of_logprobs + of_h[0] * (logp_of_block + h) if of_h else of_logprobs
                torch.exp(logp_of_block, out=grad).mul_(coefficient.neg())
            grad_logits.index_put_((rows[at] - here.start, targets[at]), grad_of_token[at], accumulate=True)
            if ctx.temperature != 1:
                grad_logits.div_(ctx.temperature)
            grad_logits = grad_logits.to(ctx.dtype)
            grad_hidden[here] = (grad_logits @ compute_weight).to(hidden.dtype)
            states = hidden[here].to(ctx.dtype)
            if grad_weight is not None and ctx.dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), states)
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ states
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 5


def _logits(hidden: Hidden, weight: Float[Tensor, "vocab dim"], temperature: float) -> Float[Tensor, "token vocab"]:
    logits = linear(hidden.to(weight.dtype), weight).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _blocks(logits: Float[Tensor, "row vocab"], *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of logits, and of what else has a row each, so few at a time on a CPU that one operation after another finds them
    in its cache."""
    rows = max(1, LOGITS_PER_BLOCK // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(logits.split(rows), *(values.split(rows) for values in others), strict=True)


def _chunks(rows: Int[Tensor, " token"], num_rows: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Hidden states, and their targets in the order of the rows."""
    ends = [0, *rows.bincount(minlength=num_rows).cumsum(0).tolist()]
    for start in range(0, num_rows, chunk):
        stop = min(start + chunk, num_rows)
        yield slice(start, stop), slice(ends[start], ends[stop])
