"""Attention over a token tree in parts that are put together: what a token sees of its own run, and of each run before it
(Hydragen, one level: Juravsky et al. 2024, arXiv 2402.05099; here of any depth).

With a token's keys split into sets s, Z_s = Σ_{k in s} exp(q·k) and o_s the attention over s alone:

    log Z = logsumexp_s(log Z_s)        o = Σ_s exp(log Z_s - log Z) o_s

The gradient of each part is flash attention's own, given the whole's o and log Z in place of the part's (FlashAttention;
Dao et al. 2022, arXiv 2205.14135: dq, dk and dv need nothing else of the other keys).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

    from grpo_hf.types import Node

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_cascade(
    query: Float[Tensor, "1 head time dim"],
    key: Float[Tensor, "1 kv_head time dim"],
    value: Float[Tensor, "1 kv_head time dim"],
    nodes: Sequence[Node],
    scaling: float,
) -> Float[Tensor, "1 head time dim"]:
    """softmax(q k^T * scaling) v on the CPU, where a token sees its own run up to itself and all runs before that.

    Each run attends to itself causally; then everything below a run, which lies behind it in one piece, attends to it in one
    call. No key is copied, and no mask is made.
    """
    return _TreeCascade.apply(query, key, value, nodes, scaling)


class _TreeCascade(torch.autograd.Function):
    """States are [kv_head, head of it, time, dim]; keys and values are shared by the heads of a kv_head without a copy."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, nodes: Sequence[Node], scaling: float) -> Tensor:
        q, k, v = _by_kv_head(query, key, value)
        out = torch.empty_like(q.permute(2, 0, 1, 3), memory_format=torch.contiguous_format).permute(1, 2, 0, 3)
        log_z = q.new_empty(q.shape[:3], dtype=torch.float32)
        for own, _ in map(_spans, nodes):
            out[:, :, own], log_z[:, :, own] = _forward(q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scaling)
        for seen, below in map(_spans, nodes):
            if below is not None:
                o, log_z_seen = _forward(q[:, :, below], k[:, :, seen], v[:, :, seen], 0.0, False, scale=scaling)
                whole = torch.logaddexp(log_z[:, :, below], log_z_seen)
                out[:, :, below] *= (log_z[:, :, below] - whole).exp_().unsqueeze(-1)
                out[:, :, below] += o * (log_z_seen - whole).exp_().unsqueeze(-1)
                log_z[:, :, below] = whole
        ctx.save_for_backward(query, key, value, out, log_z)
        ctx.nodes, ctx.scaling = nodes, scaling
        return rearrange(out, "kv rep time dim -> 1 (kv rep) time dim")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_z = ctx.saved_tensors
        q, k, v = _by_kv_head(query, key, value)
        grad = rearrange(grad, "1 (kv rep) time dim -> kv rep time dim", kv=key.shape[1])
        grad_q, grad_k, grad_v = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        of_q = rearrange(grad_q, "1 (kv rep) time dim -> kv rep time dim", kv=key.shape[1])

        def part(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            to_q, to_k, to_v = _backward(
                grad[:, :, queries],
                q[:, :, queries],
                k[:, :, keys],
                v[:, :, keys],
                out[:, :, queries],
                log_z[:, :, queries],
                0.0,
                causal,
                scale=ctx.scaling,
            )
            return to_q, to_k.sum(1), to_v.sum(1)

        for own, _ in map(_spans, ctx.nodes):
            of_q[:, :, own], grad_k[0, :, own], grad_v[0, :, own] = part(own, own, True)
        for seen, below in map(_spans, ctx.nodes):
            if below is not None:
                to_q, to_k, to_v = part(below, seen, False)
                of_q[:, :, below] += to_q
                grad_k[0, :, seen] += to_k
                grad_v[0, :, seen] += to_v
        return grad_q, grad_k, grad_v, None, None


def _by_kv_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = rearrange(query, "1 (kv rep) time dim -> kv rep time dim", kv=key.shape[1])
    k, v = (rearrange(states, "1 kv time dim -> kv 1 time dim").expand(-1, q.shape[1], -1, -1) for states in (key, value))
    return q, k, v


def _spans(node: Node) -> tuple[slice, slice | None]:
    """A node's own tokens, and everything below it."""
    below = slice(node.span.stop, node.end) if node.end > node.span.stop else None
    return slice(node.span.start, node.span.stop), below
