"""Attention over a shared-prefix row in two parts that are put together: what a token sees of its own sequence's span, and
what a completion sees of its prompt (Hydragen; Juravsky et al. 2024, arXiv 2402.05099).

With a token's keys split into sets s, Z_s = Σ_{k in s} exp(q·k) and o_s the attention over s alone:

    log Z = logsumexp_s(log Z_s)        o = Σ_s exp(log Z_s - log Z) o_s

The gradient of each part is flash attention's own, given the whole's o and log Z in place of the part's (FlashAttention;
Dao et al. 2022, arXiv 2205.14135: dq, dk and dv need nothing else of the other keys).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Spans = list[tuple[range, list[range]]]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefix_and_own(
    query: Float[Tensor, "1 head time dim"],
    key: Float[Tensor, "1 kv_head time dim"],
    value: Float[Tensor, "1 kv_head time dim"],
    spans: Spans,
    scaling: float,
) -> Float[Tensor, "1 head time dim"]:
    """softmax(q k^T * scaling) v of a packed row on the CPU, where a prompt sees itself causally and a completion its
    prompt and itself; ``spans`` are PrefixLayout's. No key is copied, and no mask is made."""
    return _PrefixAndOwn.apply(query, key, value, spans, scaling)


class _PrefixAndOwn(torch.autograd.Function):
    """States are [kv_head, head of it, time, dim]; keys and values are shared by the heads of a kv_head without a copy."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float) -> Tensor:
        q, k, v = _by_kv_head(query, key, value)
        out = torch.empty_like(q.permute(2, 0, 1, 3), memory_format=torch.contiguous_format).permute(1, 2, 0, 3)
        log_z = q.new_empty(q.shape[:3], dtype=torch.float32)
        for prompt, completions in spans:
            for own in map(_slice, (prompt, *filter(len, completions))):
                out[:, :, own], log_z[:, :, own] = _forward(
                    q[:, :, own], k[:, :, own], v[:, :, own], 0.0, True, scale=scaling
                )
            if rest := _rest(prompt, completions):
                seen = _slice(prompt)
                o, log_z_seen = _forward(q[:, :, rest], k[:, :, seen], v[:, :, seen], 0.0, False, scale=scaling)
                whole = torch.logaddexp(log_z[:, :, rest], log_z_seen)
                out[:, :, rest] *= (log_z[:, :, rest] - whole).exp_().unsqueeze(-1)
                out[:, :, rest] += o * (log_z_seen - whole).exp_().unsqueeze(-1)
                log_z[:, :, rest] = whole
        ctx.save_for_backward(query, key, value, out, log_z)
        ctx.spans, ctx.scaling = spans, scaling
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

        for prompt, completions in ctx.spans:
            for own in map(_slice, (prompt, *filter(len, completions))):
                of_q[:, :, own], grad_k[0, :, own], grad_v[0, :, own] = part(own, own, True)
            if rest := _rest(prompt, completions):
                seen = _slice(prompt)
                to_q, to_k, to_v = part(rest, seen, False)
                of_q[:, :, rest] += to_q
                grad_k[0, :, seen] += to_k
                grad_v[0, :, seen] += to_v
        return grad_q, grad_k, grad_v, None, None


def _by_kv_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = rearrange(query, "1 (kv rep) time dim -> kv rep time dim", kv=key.shape[1])
    k, v = (rearrange(states, "1 kv time dim -> kv 1 time dim").expand(-1, q.shape[1], -1, -1) for states in (key, value))
    return q, k, v


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)


def _rest(prompt: range, completions: list[range]) -> slice | None:
    """The completions' tokens, which follow their prompt's."""
    return slice(prompt.stop, prompt.stop + total) if (total := sum(map(len, completions))) else None
